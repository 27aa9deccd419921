# SPDX-License-Identifier: Apache-2.0
"""The kernel report: parsing of nvcc's figures and of the disassembly, budgets and faults."""

from __future__ import annotations

from types import ModuleType

import pytest
from tool_loading import load

ENTRY = """ptxas info    : Compiling entry function '{kernel}' for '{architecture}'
ptxas info    : Function properties for {kernel}
    {spill} bytes stack frame, {spill} bytes spill stores, 0 bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers, 256 bytes smem
"""
#: A loop over frames with a load-only inner loop, a store-only loop, and padding after the end.
LOOPS = """Fatbin elf code:
================
arch = sm_90
code version = [1,7]
\tcode for sm_90
\t\tFunction : meter
        /*0000*/                   LDC R1, c[0x0][0x28] ;      /* 0x00 */
                                                               /* 0x01 */
        /*0010*/                   LDG.E R9, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/              @P1  LDG.E.64 R8, desc[UR4][R2.64] ;
        /*0040*/              @!P1 BRA 0x30 ;
        /*0050*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0060*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0070*/              @!P2 BRA 0x20 ;
        /*0080*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*0090*/              @P3  BRA 0x80 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   BRA 0xb0 ;
"""
STRAIGHT = """arch = sm_80
\t\tFunction : reuse
        /*0000*/              @!P0 EXIT ;
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/                   STG.E [R2.64], R4 ;
        /*0030*/                   STG.E [R2.64+0x4], R5 ;
        /*0040*/                   EXIT ;
        /*0050*/                   BRA 0x50;
        /*0060*/                   NOP;
\t\tFunction : decide
        /*0000*/                   EXIT ;
"""


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "tools/kernel_report.py")


@pytest.fixture
def sass(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "tools/sass.py")


def test_spills_exceeded_budgets_and_gaps_are_faults(report: ModuleType) -> None:
    text = ENTRY.format(kernel="meter", architecture="sm_80", spill=0, registers=40)
    text += ENTRY.format(kernel="meter", architecture="sm_90", spill=0, registers=41)
    budgets = {"registers": {"*": 64, "meter": 41}}
    assert report.find_faults(report.parse(text), ["sm_80", "sm_90"], budgets) == []
    granted = {"registers": {"*": 64, "meter": 40, "meter, sm_9?": 41}}
    assert report.find_faults(report.parse(text), ["sm_80", "sm_90"], granted) == []
    assert report.parse(text)[0].shared == 256

    text += ENTRY.format(kernel="reuse", architecture="sm_80", spill=8, registers=65)
    budgets["registers"]["decide"] = 64
    assert report.find_faults(report.parse(text), ["sm_80", "sm_90"], budgets) == [
        "reuse, sm_80: spills 8 + 0 bytes",
        "reuse, sm_80: 65 registers, budget 64",
        "reuse: not compiled for sm_90",
        "kernel_budgets.json, registers: decide matches no kernel",
    ]


def test_long_hot_code_and_narrow_accesses_are_faults(report: ModuleType) -> None:
    usage = report.Usage("reuse", "sm_90", registers=40, instructions=100, narrow_loads=1, narrow_stores=8)
    limits = {"instructions": {"*": 99}, "narrow_loads": {"*": 0, "reuse": 1}, "narrow_stores": {"*": 0}}
    assert report.find_faults([usage], ["sm_90"], limits) == [
        "reuse, sm_90: 100 instructions, budget 99",
        "reuse, sm_90: 8 narrow stores, budget 0",
    ]
    limits["narrow_stores"] = {"*": 0, "reuse": None}
    limits["instructions"] = {"*": 100}
    assert report.find_faults([usage], ["sm_90"], limits) == []


def test_hot_code_is_the_innermost_loop_that_loads_and_stores(sass: ModuleType) -> None:
    assert sass.parse(LOOPS) == [sass.HotCode("meter", "sm_90", 6, narrow_loads=1, narrow_stores=1)]


def test_hot_code_without_a_loop_is_the_kernel(sass: ModuleType) -> None:
    assert sass.parse(STRAIGHT + LOOPS) == [
        sass.HotCode("reuse", "sm_80", 5, narrow_loads=0, narrow_stores=2),
        sass.HotCode("decide", "sm_80", 1, 0, 0),
        sass.HotCode("meter", "sm_90", 6, 1, 1),
    ]


def test_a_missing_disassembler_is_an_error(
    report: ModuleType, sass: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda *arguments, **options: None)
    with pytest.raises(SystemExit, match=r"cuobjdump: not found in .*/cuda/bin"):
        report.add_hot_code([], [], "/cuda/bin/nvcc")


@pytest.mark.parametrize(
    ("architecture", "registers", "threads", "shared", "blocks"),
    [
        ("sm_90", 64, 256, 6848, 4),  # registers
        ("sm_90", 72, 160, 0, 5),  # registers: 28 warps, five per block
        ("sm_90", 32, 256, 0, 8),  # threads
        ("sm_86", 32, 256, 0, 6),  # threads
        ("sm_86", 40, 32, 0, 16),  # blocks
        ("sm_120", 64, 256, 40 * 1024, 2),  # shared memory
    ],
)
def test_blocks_of_a_multiprocessor(
    report: ModuleType, architecture: str, registers: int, threads: int, shared: int, blocks: int
) -> None:
    usage = report.Usage("kernel", architecture, registers=registers)
    assert report.blocks_per_multiprocessor(usage, report.Launch(threads, shared)) == blocks
