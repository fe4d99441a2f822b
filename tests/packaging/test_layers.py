"""Imports go one way, and what belongs to one module stays in it."""

import ast
from pathlib import Path

import pytest

from tests.packaging.tree import ROOT

# From the bottom up; a module that is not named here is above them all.
LAYERS = (
    {"_version", "config", "env", "errors"},
    {"native"},
    {"checks", "faults", "wire"},
    {"arguments", "cuda", "engines", "group", "heap", "hosts", "nvshmem", "plan", "results", "rounds", "slots"}
    | {"virtual_network"},
    {"all_to_all", "halves", "ops"},
)
TOP = len(LAYERS)
EXTENSIONS = {"_core", "_cuda", "_nvshmem"}
FOLDERS = {"backend": "moebius", "graphs": "moebius.graphs"}  # folder -> installed name


def modules() -> dict[str, Path]:
    """Every module by the name it installs under; a package by its own."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """Absolute names of all that a module imports to run, at its top or inside a function."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    tree = ast.parse(path.read_text())
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            found |= {f"{source}.{alias.name}" for alias in node.names}
    return found


def parts_used(name: str) -> set[str]:
    """The modules and folders right under `moebius` that a module imports; "" is the package itself."""
    used = set()
    for imported in imports(name):
        parts = imported.split(".")
        if parts[0] == "moebius":
            is_module = len(parts) > 1 and (parts[1] in EXTENSIONS or ".".join(parts[:2]) in MODULES)
            used.add(parts[1] if is_module else "")
    return used


def part(name: str) -> str:
    return ".".join(name.split(".")[1:2])


def layer(of: str) -> int:
    return next((height for height, names in enumerate(LAYERS) if of in names), TOP)


# `moebius` gathers the public names and so stands above its modules.
@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"moebius"}))
def test_a_module_imports_only_its_own_layer_and_those_below(name: str) -> None:
    for used in parts_used(name) - EXTENSIONS:
        assert layer(used) <= layer(part(name)), f"{name} imports moebius.{used}, which is above it"


def test_native_is_a_leaf_and_alone_imports_the_extensions() -> None:
    assert parts_used("moebius.native") <= {*EXTENSIONS, "env", "errors"}
    assert [name for name in MODULES if EXTENSIONS & parts_used(name)] == ["moebius.native"]


def test_only_the_cuda_engine_imports_cuda_bindings() -> None:
    users = {name for name in MODULES if any(used.split(".")[0] == "cuda" for used in imports(name))}
    assert users <= {"moebius.cuda.driver"}


def test_only_the_adapter_imports_vllm() -> None:
    users = {name for name in MODULES if any(used.split(".")[0] == "vllm" for used in imports(name))}
    assert {part(name) for name in users} <= {"vllm"}


def test_only_env_reads_the_environment() -> None:
    readers = set()
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            is_read = isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv")
            if is_read or (isinstance(node, ast.ImportFrom) and node.module == "os"):
                readers.add(name)
    assert readers == {"moebius.env"}


def test_relative_imports_inside_a_folder() -> None:
    for name, path in MODULES.items():
        if path.parent == ROOT / "backend":
            absolute = {
                node.module
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module
            }
            inside = {module for module in absolute if module.split(".")[0] == "moebius" and module != "moebius.graphs"}
            assert not inside, f"{name} imports {inside} by the absolute name: two classes for the type checker"
