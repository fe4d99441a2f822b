"""The table of what the adapter leans on, held against sources that have it and sources that do not."""

from pathlib import Path

import pytest

from moebius import VersionError
from moebius.vllm import points
from moebius.vllm.points import Point

SOURCE = """
import typing
if typing.TYPE_CHECKING:
    from x import y
else:
    def hidden(a, *, b): ...
Names = typing.Literal["one"]
class Outer:
    field: int = 1
    CPU = "cpu"
    @property
    def held(self): ...
    class Inner:
        def deep(self, x): ...
try:
    class Maybe: ...
except ImportError:
    Fallback = None
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.py").write_text(SOURCE)
    return tmp_path


@pytest.mark.parametrize(
    "name",
    ["Names", "hidden", "Outer", "Outer.field", "Outer.CPU", "Outer.held", "Outer.Inner.deep", "Maybe", "Fallback"],
)
def test_finds_what_is_there(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points, "POINTS", (Point("a/b.py", name, "test"),))
    assert points.missing(root) == []


@pytest.mark.parametrize(
    ("path", "name", "parameters", "problem"),
    [
        ("a/c.py", "x", (), "the module is not there"),
        ("a/b.py", "gone", (), "it is not there"),
        ("a/b.py", "Outer.gone", (), "it is not there"),
        ("a/b.py", "Gone.field", (), "there is no class Gone"),
        ("a/b.py", "hidden", ("a", "c", "d"), "it has no parameter c, d"),
    ],
)
def test_says_what_moved(
    path: str, name: str, parameters: tuple[str, ...], problem: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = Point(path, name, "what for", parameters)
    monkeypatch.setattr(points, "POINTS", (point, Point("a/b.py", "Names", "another")))
    assert points.missing(root) == [(point, problem)]
    with pytest.raises(VersionError) as caught:
        points.check(root, "9.9.9")
    module = "vllm." + path[:3].replace("/", ".")
    message = str(caught.value)
    assert message.startswith("vLLM 9.9.9 is not one that this moebius can be an all-to-all backend of: ")
    assert f"{module}.{name} (what for): {problem}; 1 of 2 points moved. Use vLLM 0.30 to 0.33, or" in message


@pytest.mark.parametrize(
    ("version", "is_in"),
    [("0.30.0", True), ("0.33.1+cpu", True), ("0.29.9", False), ("0.34.0", False), ("1.0.0", False), ("dev", False)],
)
def test_the_range_of_versions(version: str, is_in: bool) -> None:
    assert points.is_supported(version) is is_in


def test_the_table_names_each_point_once() -> None:
    names = [(point.path, point.name) for point in points.POINTS]
    assert len(set(names)) == len(names)
    assert any(point.is_patched for point in points.POINTS)
