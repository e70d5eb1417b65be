"""What the compiled kernels must look like, with no GPU: registers, copies, tensor-core instructions, predicted speed.

Every bar is proven to be one: seeded faults below turn it red.
"""

import functools
import json
import math
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from rigsa_kernels.inspect import (
    CASES,
    ROWS,
    WEIGHTS,
    Product,
    Shape,
    as_row,
    compile_case,
    compile_plain,
    empty,
    inspect_case,
    launch_plain,
    main,
    table,
)
from rigsa_kernels.offline import capturing
from rigsa_kernels.sass import GPUS, Instruction, KernelCode, count, main_loop, opcodes, parse, predict, read, widths
from rigsa_kernels.testing import interpreting

PRODUCTS = [case for case in CASES if case.kernel.startswith("linear")]
ON_TENSOR_CORES = [case for case in PRODUCTS if case.dtype != torch.float32]

IN_TRAINING = [case for case in ON_TENSOR_CORES if "nf4" not in case.variant and case.rows == ROWS]
# A dense D in float32 is twice the bytes beside W0, and L2 shows it: the README says to hold it in bfloat16.
WIDE = [case for case in IN_TRAINING if case.variant == "dense D32"]

# float16 differs from bfloat16 in conversions only, so one architecture answers for it.
EVERYWHERE = [(case, arch) for case in CASES for arch in sorted(GPUS) if arch == 89 or case.dtype != torch.float16]


def name(case):
    return f"{case.kernel}-{case.variant}-{case.dtype}".replace(" ", "-").replace("torch.", "")


@functools.cache
def inspected(case, arch):
    return inspect_case(case, arch)


@functools.cache
def code_and_product(case):
    (launch,) = compile_case(case, 89)
    return read(launch.compiled), case.work(launch, Shape(case.rows, *WEIGHTS[0])).product


def tensor_instructions(product, warps):
    """What the arithmetic needs of m16n8k16 instructions, for one product of a tile, by each warp."""
    return product.block_rows * product.block_columns * product.block_size // (16 * 8 * 16) // warps


def copies(case, product, warps):
    """``{bits: how many}``: the copies a lane makes of the dense operands' tiles, as wide as they can be."""
    size = case.dtype.itemsize
    operands = [(product.block_rows, size)]
    if "nf4" not in case.variant:
        operands.append((product.block_columns, size))
    if "packed" not in case.variant and case.kernel != "linear_dvalues":
        operands.append((product.block_columns, 4 if "D32" in case.variant else size))
    made = Counter()
    for entries, size in operands:
        bits = entries * product.block_size * size * 8 // (32 * warps)
        made[min(bits, 128)] += max(bits // 128, 1)
    return made


@pytest.mark.parametrize(("case", "arch"), EVERYWHERE, ids=lambda value: str(value) if value in GPUS else name(value))
def test_nothing_spills(case, arch):
    for inspection in inspected(case, arch):
        code = inspection.code
        assert code.arch == arch
        assert (code.stack_bytes, code.local_loads, code.local_stores) == (0, 0, 0)
        assert code.shared_bytes <= GPUS[arch].shared_bytes_per_program
        assert code.registers <= 255


@pytest.mark.parametrize("case", CASES, ids=name)
def test_two_programs_share_an_sm(case):
    assert all(inspection.code.programs_per_sm >= 2 for inspection in inspected(case, 89))


@pytest.mark.parametrize("case", PRODUCTS, ids=name)
def test_dense_operands_are_copied_asynchronously_and_wide(case):
    code, product = code_and_product(case)
    want, got = copies(case, product, code.warps), widths(code.main_loop, "LDGSTS")
    assert got[128] == want[128]
    assert got >= want
    if case.variant.startswith("dense") or case.kernel == "linear_dvalues":
        assert count(code.main_loop, "LDG") == 0


@pytest.mark.parametrize("case", ON_TENSOR_CORES, ids=name)
def test_tensor_cores_do_what_the_product_needs_and_no_more(case):
    code, product = code_and_product(case)
    used = opcodes(code.main_loop, "HMMA")
    assert sum(used.values()) == tensor_instructions(product, code.warps)
    assert all(opcode.startswith("HMMA.16816.F32") for opcode in used)


@pytest.mark.parametrize("case", IN_TRAINING, ids=name)
def test_predicted_speed_beside_a_plain_product(case):
    (inspection,) = inspected(case, 89)
    assert min(prediction.ratio for prediction in inspection.predictions) >= (0.75 if case in WIDE else 0.95)


def test_sm_90_is_not_predicted():
    (inspection,) = inspected(CASES[0], 90)
    assert inspection.code.uses_warp_groups
    assert {prediction.ratio for prediction in inspection.predictions} == {None}


# The yardstick, and faults that the bars above must see.

GOOD = Product("x @ W.T", ROWS, 2048, 2048, 128, 64, 32)


def plain(product=GOOD, num_warps=4, num_stages=3):
    return read(compile_plain(product, torch.bfloat16, 89, num_warps, num_stages).compiled)


@pytest.mark.parametrize("form", ["x @ W.T", "dy @ W", "dy.T @ x"])
def test_the_yardstick_is_a_product(form):
    product = Product(form, 50, 37, 45, 32, 16, 16)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, 45, generator=generator), torch.randn(45, 37, generator=generator)
    stored = a.t().contiguous() if form == "dy.T @ x" else a, b.t().contiguous() if form == "x @ W.T" else b
    with interpreting():
        out = torch.empty(50, 37)
        launch_plain(product, *stored, out, num_warps=4, num_stages=2)
    torch.testing.assert_close(out, a @ b)


@pytest.mark.parametrize("form", ["x @ W.T", "dy @ W", "dy.T @ x"])
def test_the_yardstick_passes_the_bars(form):
    code = plain(Product(form, 2048, 2048, 2048, 128, 64, 32))
    assert not code.spills
    assert code.programs_per_sm >= 2
    assert widths(code.main_loop, "LDGSTS") == {128: 6}
    assert count(code.main_loop, "LDG") == 0
    assert opcodes(code.main_loop, "HMMA") == {"HMMA.16816.F32.BF16": 32}


def test_fault_rows_that_are_not_aligned():
    """A row of 2049 is no multiple of 16 bytes, and wide asynchronous copies are gone."""
    (launch,) = compile_case(CASES[0], 89, (2048, 2049))
    code = read(launch.compiled)
    assert widths(code.main_loop, "LDGSTS")[128] == 0
    assert count(code.main_loop, "LDG") > 0


def test_fault_a_tile_too_large_for_the_registers():
    code = plain(Product("x @ W.T", 2048, 2048, 2048, 128, 256, 32))
    assert code.spills
    assert code.stack_bytes > 0
    assert code.local_loads > 0
    assert code.local_stores > 0


def test_fault_no_pipeline():
    code = plain(num_stages=1)
    assert count(code.main_loop, "LDGSTS") == 0
    assert count(code.main_loop, "LDG") > 0


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
    code = read(launches[0].compiled)
    good = plain(Product("dy.T @ x", 2048, 2048, 2048, 64, 64, 32))
    assert widths(good.main_loop, "LDGSTS") == {128: 4}
    assert widths(code.main_loop, "LDGSTS")[128] < 4
    assert count(code.main_loop, "LDG") > 0


def test_a_slower_loop_is_predicted_slower():
    """The model's answer moves with the tile: in crumbs, the same product takes longer."""
    crumbs = Product("x @ W.T", ROWS, 2048, 2048, 32, 32, 32)
    good, slow = (
        predict(plain(tile), math.ceil(ROWS / tile.block_rows) * 2048 // tile.block_columns, tile.steps, 0).seconds
        for tile in (GOOD, crumbs)
    )
    assert GOOD.flop / good <= GPUS[89].tensor_flops
    assert slow > 1.5 * good


# Reading machine code.

TEXT = """
        /*0000*/                   S2R R7, SR_CTAID.X ;                /* 0x0000000000077919 */
        /*0010*/                   LDG.E.U16 R1, [R2.64] ;             /* 0x0 */
        /*0020*/              @!PT LDS RZ, [RZ] ;                      /* 0x0 */
        /*0030*/                   LDGSTS.E.BYPASS.LTC128B.128 [R1], [R2.64], P3 ;  /* 0x0 */
        /*0040*/                   LDGDEPBAR ;                         /* 0x0 */
        /*0050*/                   HMMA.16816.F32.BF16 R84, R112.reuse, R40, R84 ;  /* 0x0 */
        /*0060*/               @P2 BRA 0x30 ;                          /* 0x0 */
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
    assert code[5].tensor_flop == 4096


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
    rows = [as_row(found) for case, arch in EVERYWHERE for found in inspected(case, arch)]
    assert max(map(len, table(rows).splitlines())) <= 160


def test_table_and_json(tmp_path, capsys):
    file = tmp_path / "kernels.json"
    main(["--arch", "89", "--kernel", "linear_fwd", "--json", str(file)])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 160
    assert "nothing was run on a GPU" in lines[0]
    assert lines[0].startswith("Predicted")
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == sum(case.kernel == "linear_fwd" for case in CASES)
    assert rows[0]["main_loop"]["HMMA"] > 0
    assert os.listdir(tmp_path) == ["kernels.json"]


@pytest.mark.parametrize(
    ("flag", "wrong", "valid"),
    [
        ("--arch", "75", "80, 89, 90"),
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
