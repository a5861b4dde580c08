"""Loops in machine code, and the model of their time."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from machine_code import LATENCY, Loop, ahead, buffers_of, innermost

CODE = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_2:
        /*0020*/              @!P0 LDGSTS.E.BYPASS.128 [R3], desc[UR4][R4.64] ;
        /*0030*/                   LDGDEPBAR ;
        /*0040*/                   LDGDEPBAR ;
        /*0050*/                   DEPBAR.LE SB0, 0x6 ;
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0070*/               @P1 BRA `(.L_x_2) ;
        /*0080*/               @P2 BRA `(.L_x_1) ;
        /*0090*/               @P3 BRA `(.L_x_3) ;
.L_x_3:
        /*00a0*/                   EXIT ;
"""


def test_innermost_loops_are_found() -> None:
    instructions, loops = innermost(CODE)
    assert len(instructions) == 11
    (loop,) = loops
    assert instructions[loop][0].startswith("@!P0 LDGSTS") and instructions[loop][-1] == "@P1 BRA `(.L_x_2)"


def test_a_wait_leaves_groups_of_copies_under_way() -> None:
    assert ahead(["LDGDEPBAR", "DEPBAR.LE SB0, 0x6", "LDGDEPBAR"]) == 3.0
    assert ahead(["LDGDEPBAR", "DEPBAR.LE SB0, 0xa", "DEPBAR.LE SB0, 0x0"]) == 0.0
    assert ahead(["LDG.E R0, [R2]", "BAR.SYNC 0x0"]) == 0.0


TTGIR = """
  %q = ttg.local_alloc %0 : (tensor<128x64xbf16>) -> !ttg.memdesc<128x64xbf16, #shared>
  %lists = scf.for %i = %a to %b step %c  : i32 {
    %x = arith.addi %i, %i : i32
  }
  %k = ttg.local_alloc : () -> !ttg.memdesc<5x64x64xbf16, #shared>
  %1 = scf.for %i = %a to %b step %c  : i32 {
    %2 = ttng.warp_group_dot %q, %k, %3
    %p = ttg.local_alloc %2 : (tensor<7x64x64xbf16>) -> !ttg.memdesc<7x64x64xbf16, #shared>
  }
  %4 = scf.for %i = %a to %b step %c  : i32 {
    %5 = tt.dot %q, %k, %3
  }
"""


def test_buffers_of_each_loop() -> None:
    assert buffers_of(TTGIR, 2) == [5, 1]
    with pytest.raises(RuntimeError, match=r"3 loops .* in machine code, 2 in TTGIR"):
        buffers_of(TTGIR, 3)


def test_a_step_issues_multiplies_and_waits_in_turn() -> None:
    flops = 4 * 128 * 128 * 128
    busy = 600 * 8 / 4 / 0.75 + 2048
    assert Loop(600, 3, 1.0).rate(8, flops) == pytest.approx(flops / busy)
    assert Loop(600, 1, 0.0).rate(8, flops) == pytest.approx(flops / (busy + LATENCY))
