"""What the compiled kernels must look like, with no GPU: registers, asynchronous copies, tensor-core instructions.

Every bar is proven to be one: seeded faults below turn it red.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from rigsa_kernels import inspect, triton_linear
from rigsa_kernels.inspect import (
    CASES,
    ROWS,
    Inspection,
    Product,
    as_row,
    breaches,
    compile_case,
    empty,
    inspect_case,
    main,
    table,
)
from rigsa_kernels.offline import capturing
from rigsa_kernels.sass import Instruction, KernelCode, main_loop, parse, read, tensor_instructions, widths

# float16 differs from bfloat16 in conversions only, so one architecture answers for it.
EVERYWHERE = [(case, arch) for case in CASES for arch in (80, 89, 90) if arch == 89 or case.dtype != torch.float16]
OF_OTHER_KINDS = (
    ("gather_grad", "packed"), ("add_scaled", ""), ("free_entries", "compose"), ("adamw", "8-bit dense"),
    ("digit_counts", "packed score"), ("tile_grad", "32x32"),
)  # fmt: skip
# Of what is newer, the products of a training step in bfloat16, and one kernel of each other kind.
ON_BLACKWELL = [
    (case, arch)
    for case in CASES
    for arch in (100, 120)
    if case.dtype == torch.bfloat16
    and (
        (case.kernel.startswith("linear") and case.rows == ROWS and "D32" not in case.variant)
        or (case.kernel, case.variant) in OF_OTHER_KINDS
    )
]


def name(value):
    if isinstance(value, int):
        return str(value)
    return f"{value.kernel}-{value.variant}-{value.dtype}".replace(" ", "-").replace("torch.", "")


@functools.cache
def inspected(case, arch):
    return inspect_case(case, arch)


@pytest.mark.parametrize(("case", "arch"), EVERYWHERE + ON_BLACKWELL, ids=name)
def test_every_bar_is_met(case, arch):
    for inspection in inspected(case, arch):
        assert inspection.code.arch == arch
        assert breaches(inspection) == []


def work(case, arch):
    """Tensor-core instructions of a launch: its programs, times their loops, times their warps."""
    (launch,) = compile_case(case, arch)
    (inspection,) = inspected(case, arch)
    steps = -(-case.rows // launch.arguments["BLOCK_M"])
    return launch.grid[0] * steps * tensor_instructions(inspection.code.main_loop) * inspection.code.warps


@pytest.mark.parametrize("variant", ["16x16", "32x32", "64x64", "128x128"])
def test_the_gradient_of_tiles_does_their_share_of_the_whole_products_work(variant):
    """3.5 % of the tiles: at most 6 % of what the same kernels spend on every entry, the smallest tiles as well."""
    cases = {(case.kernel, case.variant): case for case in CASES if case.dtype == torch.bfloat16}
    whole, tiles = cases["linear_dvalues", "dense"], cases["tile_grad", variant]
    assert 0 < work(tiles, 89) <= 0.06 * work(whole, 89)


# Faults that the bars must see.

DENSE, GRADIENT = (next(case for case in CASES if case.kernel == kernel) for kernel in ("linear_fwd", "linear_dvalues"))


def breaches_in_tile(monkeypatch, *tile):
    monkeypatch.setattr(triton_linear, "choose_tile", lambda *args, **options: triton_linear.Tile(*tile))
    (inspection,) = inspect_case(DENSE, 89)
    return breaches(inspection)


def test_fault_rows_that_are_not_aligned():
    """A row of 2049 is no multiple of 16 bytes, and wide asynchronous copies are gone."""
    (launch,) = compile_case(DENSE, 89, (2048, 2049))
    found = breaches(Inspection(DENSE, "", read(launch.compiled), DENSE.product(launch)))
    assert [breach.split(":")[0] for breach in found] == ["asynchronous copies", "plain loads of matrices"]


def test_fault_a_tile_too_large_for_the_registers(monkeypatch):
    spills, crowded, *_ = breaches_in_tile(monkeypatch, 128, 256, 32, 4, 2)
    assert spills.startswith("spills")
    assert " 0 loads" not in spills
    assert " 0 stores" not in spills
    assert "expected two at least" in crowded


def test_fault_more_stages_than_shared_memory(monkeypatch):
    (breach,) = breaches_in_tile(monkeypatch, 128, 64, 32, 4, 8)
    assert breach.startswith("shared memory")
    assert breach.endswith("at most 101376 are there")


def test_fault_no_pipeline(monkeypatch):
    copies, loads = breaches_in_tile(monkeypatch, 128, 64, 32, 4, 1)
    assert copies == "asynchronous copies: -, expected 8x128"
    assert loads.startswith("plain loads of matrices")


@triton.jit
def transposed_in_registers(dy_ptr, x_ptr, out_ptr, m, n, k, block: tl.constexpr, block_m: tl.constexpr):
    """``dy.T @ x`` as one would write it first."""
    rows = tl.program_id(0) * block + tl.arange(0, block)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    tokens = tl.arange(0, block_m)[:, None]
    acc = tl.zeros((block, block), tl.float32)
    for start in range(0, m, block_m):
        dy = tl.load(dy_ptr + (start + tokens) * n + rows[None, :])
        x = tl.load(x_ptr + (start + tokens) * k + columns[None, :])
        acc = tl.dot(tl.trans(dy), x, acc)
    tl.store(out_ptr + rows[:, None] * k + columns[None, :], acc)


def test_fault_an_operand_transposed_after_the_load():
    dy, x = empty(2048, 2048, dtype=torch.bfloat16), empty(2048, 2048, dtype=torch.bfloat16)
    out = empty(2048, 2048, dtype=torch.float32)
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
    with capturing(89) as launches:
        transposed_in_registers[(32, 32)](dy, x, out, 2048, 2048, 2048, block=64, block_m=32, **options)
    product = Product(64, 64, 32, ((64, 2), (64, 2)))
    copies, loads = breaches(Inspection(GRADIENT, "", read(launches[0].compiled), product))
    assert copies.endswith("expected 4x128")
    assert loads.startswith("plain loads of matrices")


def test_fault_a_product_too_many():
    (inspection,) = inspected(DENSE, 89)
    half = dataclasses.replace(inspection.product, rows=inspection.product.rows // 2)
    (breach,) = breaches(dataclasses.replace(inspection, product=half))
    assert breach == "tensor-core instructions: {'HMMA.16816.F32.BF16': 32}, expected 16 of HMMA.16816.F32"


def test_fault_bits_that_are_counted_one_by_one():
    packed = next(case for case in CASES if case.variant == "packed")
    (inspection,) = inspected(packed, 89)
    rest = tuple(instruction for instruction in inspection.code.instructions if instruction.name != "POPC")
    code = dataclasses.replace(inspection.code, instructions=rest)
    assert breaches(dataclasses.replace(inspection, code=code)) == ["bits are counted without POPC"]


# Reading machine code.

TEXT = """
        /*0000*/                   S2R R7, SR_CTAID.X ;                /* 0x0000000000077919 */
        /*0010*/                   LDG.E.U16 R1, [R2.64] ;             /* 0x0 */
        /*0020*/              @!PT LDS RZ, [RZ] ;                      /* 0x0 */
        /*0030*/                   LDGSTS.E.BYPASS.LTC128B.128 [R1], [R2.64], P3 ;  /* 0x0 */
        /*0040*/                   LDGDEPBAR ;                         /* 0x0 */
        /*0050*/                   HMMA.16816.F32.BF16 R84, R112.reuse, R40, R84 ;  /* 0x0 */
        /*0060*/               @P2 BRA 0x30      &req={1}     ?trans5 ;    /* 0x0 */
        /*0070*/                   LDSM.16.MT88.4 R4, [R3] ;           /* 0x0 */
        /*0080*/              @!P2 BRA 0x10 ;                          /* 0x0 */
        /*0090*/                   EXIT ;                              /* 0x0 */
        /*00a0*/                   BRA 0xa0;                           /* 0x0 */
        /*00b0*/                   NOP;                                /* 0x0 */
"""


def test_reading_instructions():
    code = parse(TEXT)
    assert len(code) == 11
    assert code[1] == Instruction(0x10, "", "LDG.E.U16", "R1, [R2.64]")
    assert widths(code, "LDG") == {16: 1}
    assert widths(code, "LDGSTS") == {128: 1}
    assert widths(code, "LDSM") == {128: 1}
    assert widths(code, "LDS") == {}, "never executed"
    assert tensor_instructions(code) == 1
    assert code[6].operands == "0x30", "without how it is scheduled"


def test_main_loop_is_the_innermost():
    assert [instruction.name for instruction in main_loop(parse(TEXT))] == ["LDGSTS", "LDGDEPBAR", "HMMA", "BRA"]
    assert main_loop(parse(TEXT)[:3]) == ()


@pytest.mark.parametrize(
    ("registers", "warps", "shared_bytes", "programs"),
    [
        (168, 4, 20_480, 3),  # 12 warps have registers
        (255, 8, 0, 1),
        (32, 4, 0, 12),  # 48 warps an SM
        (32, 1, 0, 24),  # 24 programs an SM
        (32, 4, 49_152, 2),  # and 1 KiB of each is the system's
        (32, 4, 51_200, 1),
    ],
)
def test_programs_that_share_an_sm(registers, warps, shared_bytes, programs):
    code = KernelCode("kernel", 89, warps, registers, 0, shared_bytes, (), ())
    assert code.programs_per_sm == programs


# The command.


def test_the_whole_table_fits_a_screen():
    rows = [as_row(found) for case, arch in EVERYWHERE + ON_BLACKWELL for found in inspected(case, arch)]
    assert max(map(len, table(rows).splitlines())) <= 120


@pytest.fixture
def one_case(monkeypatch):
    monkeypatch.setattr(inspect, "CASES", (DENSE,))


@pytest.mark.usefixtures("one_case")
def test_table_and_json(tmp_path, capsys):
    file = tmp_path / "kernels.json"
    main(["--arch", "80", "89", "--json", str(file)])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    assert "nothing was run on a GPU" in lines[0]
    rows = json.loads(file.read_text())["rows"]
    assert [row["arch"] for row in rows] == [80, 89]
    assert rows[0]["main_loop"]["HMMA"] == rows[0]["tensor_instructions"] == 32
    assert rows[0]["breaches"] == []
    assert os.listdir(tmp_path) == ["kernels.json"]


@pytest.mark.usefixtures("one_case")
def test_check(monkeypatch, capsys):
    main(["--arch", "89", "--check"])
    assert capsys.readouterr().out == f"triton {triton.__version__}: 1 kernels compiled, 0 miss a bar\n"
    tile = triton_linear.Tile(128, 64, 32, 4, 1)
    monkeypatch.setattr(triton_linear, "choose_tile", lambda *args, **options: tile)
    with pytest.raises(SystemExit) as stop:
        main(["--arch", "89", "--check"])
    assert stop.value.code == 1
    *missed, last = capsys.readouterr().out.splitlines()
    assert missed[0] == "linear_fwd dense bfloat16 sm_89: asynchronous copies: -, expected 8x128"
    assert last.endswith("1 kernels compiled, 1 miss a bar")


@pytest.mark.parametrize(
    ("flag", "wrong", "valid"),
    [
        ("--arch", "75", "80, 89, 90, 100, 120"),
        ("--kernel", "conv", "linear_fwd"),
        ("--json", "no/where", "a folder that exists"),
    ],
)
def test_a_wrong_name_is_one_error_with_the_valid_ones(flag, wrong, valid, capsys):
    with pytest.raises(SystemExit):
        main([flag, wrong])
    error = capsys.readouterr().err.splitlines()[-1]
    assert wrong in error
    assert valid in error.replace("'", "")


def test_as_a_command_beside_the_standard_inspect():
    result = subprocess.run([sys.executable, "-m", "rigsa_kernels.inspect", "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--arch" in result.stdout


def test_without_triton():
    code = "import sys; sys.modules['triton'] = None; import rigsa_kernels.inspect"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "RuntimeError: triton" in result.stderr.splitlines()[-1]
    assert "pip install triton" in result.stderr.splitlines()[-1]
