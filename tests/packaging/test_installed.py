"""The installed package, from a folder where the repository is no help."""

import subprocess
import sys

import moebius

BLOCK_CORE = "import sys; sys.modules['moebius._core'] = None; "


def python(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd="/", capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_runs_from_anywhere() -> None:
    assert "demo" in python("-m", "moebius", "--help")


def test_import_does_not_load_the_extension() -> None:
    assert python("-c", "import sys, moebius; print('moebius._core' in sys.modules)").strip() == "False"


def test_import_works_without_the_extension() -> None:
    program = BLOCK_CORE + "import moebius; print(all(hasattr(moebius, name) for name in moebius.__all__))"
    assert python("-c", program).strip() == "True"


def test_the_command_runs_without_the_extension() -> None:
    arguments = "sys.argv[1:] = ['--help']; "
    program = BLOCK_CORE + arguments + "import runpy; runpy.run_module('moebius', run_name='__main__')"
    assert "demo" in python("-c", program)


def test_the_folders_are_no_packages() -> None:
    program = "from importlib.util import find_spec; print([find_spec(name) for name in ('backend', 'graphs')])"
    assert python("-I", "-c", program).strip() == "[None, None]"


def test_the_version_is_the_distributions() -> None:
    version = python("-c", "from importlib.metadata import version; print(version('moebius'))").strip()
    assert moebius.__version__ == version
