"""The ground that the kernels' tests stand on: an interpreter that rounds as a GPU does, under a guard that can trip.

Small kernels with one fault each; each fault must turn red, and its clean twin must not.
"""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime import interpreter

from rigsa_kernels.offline import capturing
from rigsa_kernels.testing import GuardedBuilder, GuardError, interpreting
from rigsa_kernels.triton_common import popcount


@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr, size: tl.constexpr):
    rows, columns = tl.arange(0, size)[:, None], tl.arange(0, size)[None, :]
    at = rows * size + columns
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision="ieee"))


@triton.jit
def copy_kernel(x_ptr, out_ptr, n, block: tl.constexpr):
    offsets = tl.program_id(0) * block + tl.arange(0, block)
    ok = offsets < n
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=ok), mask=ok)


def copy(x, out, n=None, block=16):
    n = x.numel() if n is None else n
    copy_kernel[(triton.cdiv(n, block),)](x, out, n, block=block, enable_fp_fusion=True)


def product(dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 32, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty(32, 32)
    with interpreting():
        product_kernel[(1,)](a, b, out, size=32, num_warps=4, enable_fp_fusion=True)
    return out.double(), a.double() @ b.double()


# bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_are_right(dtype):
    got, want = product(dtype)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_canary_the_stock_product_is_still_wrong(monkeypatch):
    """When this fails, triton has learnt bfloat16 products, and `GuardedBuilder.create_dot` can go."""
    monkeypatch.delattr(GuardedBuilder, "create_dot")
    got, want = product(torch.bfloat16)
    assert (got - want).abs().max() > 1e3 * want.abs().max()


AWKWARD = [
    *(1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8),  # ties: to even, down and up
    *(1 + 2**-8 + 2**-20, 1 + 2**-8 - 2**-20),  # a little to either side of one
    *(3.4e38, -3.4e38, float("inf"), float("-inf"), float("nan")),  # the first two round to infinity
    *(0.0, -0.0, 1e-40, -(2.0**-133), 2.0**-134, 1.5 * 2.0**-133),  # and numbers below the normal ones
]


def rounded(values):
    out = torch.empty(values.numel(), dtype=torch.bfloat16)
    with interpreting():
        copy(values, out)
    return out


def test_casts_round_to_nearest_even():
    values = torch.cat([torch.tensor(AWKWARD), torch.randn(1000, generator=torch.Generator().manual_seed(0))])
    got, want = rounded(values), values.to(torch.bfloat16)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[~want.isnan()].view(torch.int16), want[~want.isnan()].view(torch.int16))


def test_casts_back_are_exact():
    values = torch.tensor(AWKWARD).to(torch.bfloat16)
    out = torch.empty(values.numel())
    with interpreting():
        copy(values, out)
    assert torch.equal(out.nan_to_num(), values.float().nan_to_num())


def test_canary_the_stock_cast_still_truncates(monkeypatch):
    """When this fails, triton rounds, and the casts of `GuardedBuilder` can go."""
    monkeypatch.delattr(GuardedBuilder, "cast_impl")
    monkeypatch.delattr(GuardedBuilder, "create_fp_to_fp")
    assert rounded(torch.tensor([1.0078])).item() == 1.0
    assert torch.tensor(1.0078).to(torch.bfloat16).item() == 1.0078125


@triton.jit
def unwidened_kernel(x_ptr, out_ptr, operation: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, 16))
    if operation == "add":
        x = x + x
    elif operation == "negate":
        x = -x
    elif operation == "compare":
        x = tl.where(x > x, x, x)
    elif operation == "fma":
        x = tl.fma(x, x, x)
    tl.store(out_ptr + tl.arange(0, 16), x)


@pytest.mark.parametrize("operation", ["add", "negate", "compare", "fma"])
def test_bfloat16_arithmetic_is_refused(operation):
    x = torch.ones(16, dtype=torch.bfloat16)
    with interpreting(), pytest.raises(GuardError, match="bfloat16 arithmetic"):
        unwidened_kernel[(1,)](x, torch.empty_like(x), operation=operation)


# One process


@triton.jit
def helper(x):
    return popcount(x) + tl.cdiv(x, 4)


@triton.jit
def nested_kernel(x_ptr, out_ptr, block: tl.constexpr):
    offsets = tl.arange(0, block)
    tl.store(out_ptr + offsets, helper(tl.load(x_ptr + offsets)))


def test_nested_helpers_run():
    x = torch.arange(64, dtype=torch.int32)
    out = torch.empty_like(x)
    with interpreting():
        nested_kernel[(1,)](x, out, block=64)
    assert out.tolist() == [int(i).bit_count() + -(-int(i) // 4) for i in x]


def compiled():
    """From the source: neither Triton's memory nor its disk is asked."""
    nested_kernel.device_caches.clear()
    x = torch.empty(64, dtype=torch.int32, device="meta")
    with triton.knobs.compilation.scope(), capturing(89) as launches:
        triton.knobs.compilation.always_compile = True
        nested_kernel[(1,)](x, x, block=64, enable_fp_fusion=True)
    return launches[0].compiled.asm["cubin"]


def interpreted():
    x = torch.randint(2**31 - 1, (64,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(x)
    with interpreting():
        nested_kernel[(1,)](x, out, block=64)
    return out


def test_interpreting_and_compiling_take_turns():
    first = interpreted(), compiled()
    second = interpreted(), compiled()
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]


def test_triton_is_left_as_it_was():
    namespaces = [tl, tl.core, tl.math, tl.tensor, tl.dtype, triton.runtime.jit.JITFunction]
    before = [dict(vars(namespace)) for namespace in namespaces]
    active, fills = triton.runtime.driver._active, torch.are_deterministic_algorithms_enabled()
    interpreted()
    with pytest.raises(GuardError), interpreting():
        copy(torch.zeros(16), torch.zeros(15), n=16)
    assert [dict(vars(namespace)) for namespace in namespaces] == before
    assert triton.runtime.driver._active is active
    assert not triton.knobs.runtime.interpret
    assert torch.are_deterministic_algorithms_enabled() == fills
    assert type(interpreter.interpreter_builder) is interpreter.InterpreterBuilder


# The guard


def test_a_clean_copy_is_clean():
    x = torch.randn(50)
    out = torch.empty(50)
    with interpreting():
        copy(x, out)
    assert torch.equal(out, x)


def test_load_out_of_bounds():
    with interpreting(), pytest.raises(GuardError, match="load: 1 of 16 addresses out of bounds"):
        copy(torch.zeros(31), torch.zeros(32), n=32)


def test_store_out_of_bounds():
    with interpreting(), pytest.raises(GuardError, match=r"store: 1 of 16 addresses out of bounds"):
        copy(torch.zeros(32), torch.zeros(31), n=32)


def test_a_view_ends_where_its_last_element_does():
    storage = torch.zeros(32)
    with interpreting(), pytest.raises(GuardError, match="out of bounds"):
        copy(storage[:31], torch.zeros(32), n=32)


@triton.jit
def table_kernel(table_ptr, out_ptr, n):
    address = tl.load(table_ptr).to(tl.pointer_type(tl.float32))
    offsets = tl.arange(0, 16)
    tl.store(out_ptr + offsets, tl.load(address + offsets, mask=offsets < n), mask=offsets < n)


def test_addresses_in_a_table_have_to_be_announced():
    x, out = torch.randn(16), torch.empty(16)
    table = torch.tensor([x.data_ptr()])
    with interpreting(also=[x]):
        table_kernel[(1,)](table, out, 16)
    assert torch.equal(out, x)
    with interpreting(), pytest.raises(GuardError, match="load: 16 of 16 addresses out of bounds"):
        table_kernel[(1,)](table, out, 16)


@triton.jit
def misaligned_kernel(x_ptr, out_ptr):
    tl.store(out_ptr, tl.load((x_ptr + 1).to(tl.pointer_type(tl.int32))))


def test_misaligned_address():
    with interpreting(), pytest.raises(GuardError, match="load: misaligned"):
        misaligned_kernel[(1,)](torch.zeros(4, dtype=torch.int16), torch.zeros(1, dtype=torch.int32))


@triton.jit
def scatter_kernel(x_ptr, out_ptr, stride, shift, block: tl.constexpr):
    """Lane i of program p writes at ``p * stride + i >> shift``."""
    offsets = tl.arange(0, block)
    tl.store(out_ptr + tl.program_id(0) * stride + (offsets >> shift), tl.load(x_ptr + offsets))


@pytest.mark.parametrize(
    ("stride", "shift", "error"),
    [(16, 0, None), (16, 1, "two lanes"), (15, 0, r"programs \d \(store\) and \d \(store\)")],
)
def test_who_writes_what(stride, shift, error):
    arguments = torch.zeros(16), torch.zeros(32), stride, shift
    with interpreting():
        if error is None:
            scatter_kernel[(2,)](*arguments, block=16)
        else:
            with pytest.raises(GuardError, match=error):
                scatter_kernel[(2,)](*arguments, block=16)


@triton.jit
def in_place_kernel(x_ptr, shift, n, block: tl.constexpr):
    """``x[i] = x[i + shift] + 1``."""
    offsets = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(x_ptr + offsets, tl.load(x_ptr + (offsets + shift) % n) + 1)


@pytest.mark.parametrize("order", range(3))
def test_reading_what_another_program_writes(order):
    x = torch.zeros(64)
    with interpreting(order=order):
        in_place_kernel[(4,)](x, 0, 64, block=16)
        assert x.tolist() == [1.0] * 64
        with pytest.raises(GuardError, match=r"programs \d \(load\) and \d \(store\) meet"):
            in_place_kernel[(4,)](x, 1, 64, block=16)


@triton.jit
def count_kernel(counter_ptr, out_ptr, read: tl.constexpr):
    ticket = tl.load(counter_ptr) if read else tl.atomic_add(counter_ptr, 1)
    if read:
        tl.atomic_add(counter_ptr, 1)
    tl.store(out_ptr + tl.program_id(0), ticket)


def tickets(order, out):
    with interpreting(order=order):
        count_kernel[(16,)](torch.zeros(1, dtype=torch.int32), out, read=False)
    return out.tolist()


def test_programs_run_in_shuffled_order():
    """An integer atomic hands out tickets, and so shows the order."""
    orders = [tickets(order, torch.zeros(16, dtype=torch.int32)) for order in (0, 1, 0)]
    assert sorted(orders[0]) == list(range(16))
    assert orders[0] != list(range(16))
    assert orders[0] != orders[1]
    assert orders[0] == orders[2]


def test_a_counter_read_beside_atomics():
    with interpreting(), pytest.raises(GuardError, match=r"programs \d+ \(load\) and \d+ \(atomic\) meet"):
        count_kernel[(4,)](torch.zeros(1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32), read=True)


@triton.jit
def float_atomic_kernel(x_ptr):
    tl.atomic_add(x_ptr, 1.0)


def test_float_atomics_are_refused():
    with interpreting(), pytest.raises(GuardError, match="atomic: floating-point"):
        float_atomic_kernel[(2,)](torch.zeros(1))


def test_an_unwritten_tail_is_nan():
    with interpreting():
        out = torch.empty(20)
        copy(torch.zeros(20), out, n=19)
    assert out[:19].tolist() == [0.0] * 19
    assert out[19].isnan()
