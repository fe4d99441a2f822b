"""What the tree promises: sizes, names, and a README that knows every variable."""

import re

from moebius import env
from tests.packaging.tree import ROOT, checkout_files

MOST_LINES = {".py": 350, ".pyi": 350, ".h": 500, ".cpp": 500, ".cuh": 500, ".cu": 500}


def test_files_are_short() -> None:
    lengths = {
        path: len((ROOT / path).read_text().splitlines()) for path in checkout_files() if path.suffix in MOST_LINES
    }
    assert {path: length for path, length in lengths.items() if length > MOST_LINES[path.suffix]} == {}


def test_no_file_is_named_after_nothing() -> None:
    assert [path for path in checkout_files() if path.stem in ("utils", "common")] == []


def test_the_readme_lists_every_variable() -> None:
    listed = set(re.findall(r"^\| `(MOEBIUS_\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert listed == {variable.name for variable in env.VARIABLES}
