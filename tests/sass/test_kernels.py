"""The kernels' machine code for every architecture: what is meant is there, nothing spills, nothing is warned about."""

import pytest

from tests.sass import tools
from tests.sass.expected import ALL, FILES, REGISTERS, RULES, short_name
from tests.sass.listing import complaints
from tests.sass.objects import ARCHS, FLAGS, Object, build_all
from tests.sass.tools import ROOT

pytestmark = pytest.mark.skipif(bool(tools.missing()), reason=tools.missing() or "nothing is missing")
SOURCES = tuple(sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
KERNEL_FILES = tuple(path for path in SOURCES if path.stem in FILES)


@pytest.fixture(params=ARCHS)
def arch(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture(params=[path.stem for path in SOURCES])
def made(request: pytest.FixtureRequest, arch: str) -> Object:
    return build_all(SOURCES)[request.param, arch]


def test_nvcc_has_nothing_to_say(made: Object) -> None:
    assert not made.failed, made.log
    assert complaints(made.log) == []


def test_the_machine_code_is_what_is_meant(made: Object) -> None:
    broken = [
        f"{short_name(kernel.name)[:60]}: {rule.what}"
        for kernel in made.kernels
        for rule in RULES
        if rule.applies(short_name(kernel.name), made.arch) and not rule.holds(kernel)
    ]
    assert broken == []


def test_registers_are_within_the_budget_and_nothing_spills(made: Object) -> None:
    over = []
    for kernel in made.kernels:
        name = short_name(kernel.name)
        most = next(budget for known, budget in REGISTERS.items() if name.startswith(known))
        if not 0 < kernel.registers <= most:
            over.append(f"{name[:60]}: {kernel.registers} registers, at most {most}")
        if (kernel.stack, kernel.local, kernel.spilled) != (0, 0, 0):
            over.append(f"{name[:60]}: stack {kernel.stack}, local {kernel.local}, spilled {kernel.spilled} bytes")
    assert over == []


def test_every_rule_and_every_budget_has_a_kernel() -> None:
    names = {
        arch: {
            short_name(kernel.name) for path in KERNEL_FILES for kernel in build_all(SOURCES)[path.stem, arch].kernels
        }
        for arch in ALL
    }
    idle = [
        f"{rule.kernel}: {rule.what}"
        for rule in RULES
        if not all(any(rule.applies(name, arch) for name in names[arch]) for arch in rule.archs)
    ]
    assert idle == []
    assert all(any(name.startswith(known) for name in names["90a"]) for known in REGISTERS)
    assert {path.stem for path in KERNEL_FILES} == set(FILES)


def test_the_flags_are_those_of_the_build() -> None:
    setup = (ROOT / "setup.py").read_text()
    assert all(f'"{flag}"' in setup for flag in FLAGS)
    assert f'"{" ".join(ARCHS)}"' in setup
