"""The checks themselves: they find what is there in one sample, and catch what is wrong in another."""

import pytest

from tests.sass import tools
from tests.sass.expected import BULK_LOAD, BULK_STORE, RULES, TO_E4M3, short_name
from tests.sass.listing import Kernel, complaints, kernels
from tests.sass.objects import HOPPER, build
from tests.sass.tools import ROOT

SAMPLES = ROOT / "tests" / "sass" / "samples"
needs_nvcc = pytest.mark.skipif(bool(tools.missing()), reason=tools.missing() or "nothing is missing")

SASS = """
		Function : _ZN7moebius4cuda20combine_recv_kernelEv
        /*0000*/                   LDC R1, c[0x0][0x28] ;                       /* 0x00000a00ff017b82 */
                                                                                /* 0x000fe20000000800 */
        /*0010*/                   LDG.E.64.STRONG.SYS R4, desc[UR8][R2.64] ;   /* 0x0000000402027981 */
        /*0020*/                   CCTL.IVALL ;                                 /* 0x00000000ff00798f */
        /*0030*/              @!P0 MEMBAR.ALL.SYS ;                             /* 0x0000000000007992 */
        /*0040*/             @!UP1 UBLKCP.G.S [UR6], [UR4], UR5 ;               /* 0x00000006040093ba */
        /*0050*/                   STG.E.64.STRONG.SYS desc[UR8][R2.64], R4 ;   /* 0x0000080402007986 */
		Function : _ZN7moebius4cuda20dispatch_recv_kernelEv
        /*0000*/                   EXIT ;                                       /* 0x000000000000794d */
"""
RESOURCES = """
 Function _ZN7moebius4cuda20combine_recv_kernelEv:
  REG:96 STACK:16 SHARED:0 LOCAL:8 CONSTANT[0]:672 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN7moebius4cuda20dispatch_recv_kernelEv:
  REG:10 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:672 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN7moebius4cuda20combine_recv_kernelEv' for 'sm_90a'
ptxas info    : Function properties for _ZN7moebius4cuda20combine_recv_kernelEv
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 96 registers
"""


def test_reads_what_the_tools_print() -> None:
    first, second = kernels(SASS, RESOURCES, LOG)
    assert (first.registers, first.stack, first.local, first.spilled) == (96, 16, 8, 12)
    assert len(first.code) == 6
    assert first.count(BULK_STORE) == 1
    assert first.count(BULK_LOAD) == 0
    assert first.has_acquire_sys()
    assert first.has_release_sys()
    assert short_name(first.name) == "combine_recv_kernelEv"
    assert (second.registers, second.spilled, second.code) == (10, -1, ["EXIT"])
    assert not second.has_acquire_sys()


def test_order_is_an_instruction_and_its_fence() -> None:
    load, store = "LDG.E.64.STRONG.SYS R4, [R2]", "STG.E.64.STRONG.SYS [R2], R4"
    assert not Kernel("k", [load, "EXIT"]).has_acquire_sys()
    assert not Kernel("k", ["CCTL.IVALL", load]).has_acquire_sys()
    assert not Kernel("k", [store, "MEMBAR.ALL.SYS"]).has_release_sys()
    assert not Kernel("k", ["MEMBAR.ALL.GPU", store]).has_release_sys()
    assert Kernel("k", ["MEMBAR.SC.SYS", "ERRBAR", store]).has_release_sys()


def test_a_policy_is_in_the_descriptor_of_its_load() -> None:
    load = "LDG.E.NA.128 R4, desc[UR4][R2.64]"
    assert Kernel("k", ["IMAD.MOV.U32 R5, RZ, RZ, 0x12f00000", "R2UR UR5, R5", load]).has_evict_first()
    assert Kernel("k", ["UMOV UR4, 0xf0", "UMOV UR5, 0x120", "USHF.L.U32 UR5, UR5, 0x14, URZ", load]).has_evict_first()
    assert not Kernel("k", ["UMOV UR4, 0xf0", "UMOV UR5, 0x140", load]).has_evict_first()
    assert not Kernel("k", ["ULDC.64 UR4, c[0x0][0x208]", load]).has_evict_first()
    assert not Kernel("k", ["UMOV UR5, 0x120", "LDG.E.128 R4, desc[UR4][R2.64]"]).has_evict_first()


def test_a_proxy_fence_is_wide_behind_one_of_the_device() -> None:
    assert Kernel("k", ["MEMBAR.ALL.CTA", "MEMBAR.ALL.GPU", "FENCE.VIEW.ASYNC.S"]).has_wide_proxy_fence()
    assert not Kernel("k", ["MEMBAR.ALL.CTA", "FENCE.VIEW.ASYNC.S"]).has_wide_proxy_fence()


def test_a_report_is_no_complaint_and_a_warning_is() -> None:
    assert complaints(LOG) == []
    warning = "ptxas warning : Local memory used for function 'k', size of stack frame: 16 bytes"
    assert complaints(LOG + warning) == [warning]


@needs_nvcc
def test_a_good_kernel_passes() -> None:
    for arch in HOPPER:
        made = build(SAMPLES / "good.cu", arch)
        assert not made.failed, made.log
        (kernel,) = made.kernels
        assert kernel.has_acquire_sys()
        assert kernel.has_release_sys()
        assert kernel.count(BULK_LOAD) == kernel.count(BULK_STORE) == 1
        assert kernel.count(TO_E4M3) == 0
        assert (kernel.stack, kernel.local, kernel.spilled) == (0, 0, 0)
        assert complaints(made.log) == []


@needs_nvcc
def test_a_bad_kernel_is_caught() -> None:
    made = build(SAMPLES / "bad.cu", "90a")
    assert not made.failed, made.log
    (kernel,) = made.kernels
    name = short_name(kernel.name)
    broken = {rule.what for rule in RULES if rule.applies(name, "90a") and not rule.holds(kernel)}
    assert broken >= {
        "no local memory is touched",
        "waits for the kernel before it",
        "lets the kernel after it start",
        "waits by an acquire at system scope",
        "sums without a fused multiply-add",
    }
    assert kernel.stack > 0
    assert any("ocal memory" in line for line in complaints(made.log))
