"""AdamW: what it computes, in what bits, what it stores without drift, and what the compiled kernels move."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from rigsa_kernels import adamw, sass, triton_adamw
from rigsa_kernels.offline import capturing
from rigsa_kernels.testing import Guard, GuardError, interpreting

F64, F32, BF16, F16, INT8 = torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 1.0}
COMBINATIONS = [(F32, F32, F32), (F32, F32, BF16), (F32, BF16, INT8), (BF16, BF16, F32), (BF16, BF16, BF16),
                (BF16, F32, INT8)]  # fmt: skip
SIZES = [1, 300, 2048, 5000, 0, 255]
EPS = {F32: 2.0**-23, BF16: 2.0**-7}
CODE_STEP = 1 - (126 / 127) ** 2, 1 - (254 / 255) ** 4
"""Widest gap between neighbours among the codes of the two 8-bit moments, as a share of the scale."""


def named(*dtypes):
    return "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


combinations = pytest.mark.parametrize("dtypes", COMBINATIONS, ids=lambda dtypes: named(*dtypes))


class Tensors:
    """The arguments of one call of ``adamw_``, started at step 0."""

    def __init__(self, shapes, dtypes, seed=0):
        param, self.grad_dtype, moment = dtypes
        self.generator = torch.Generator().manual_seed(seed)
        second = torch.uint8 if moment == INT8 else moment
        self.params = [torch.randn(shape, generator=self.generator).to(param) for shape in shapes]
        self.exp_avgs = [torch.zeros_like(param, dtype=moment) for param in self.params]
        self.exp_avg_sqs = [torch.zeros_like(param, dtype=second) for param in self.params]
        blocks = [adamw.num_blocks(param.numel()) for param in self.params]
        self.scales = [torch.zeros(2, count) for count in blocks] if moment == INT8 else []
        self.next_grads()

    def next_grads(self):
        """Of many magnitudes, three decades within one tensor."""
        self.grads = [self.random_grad(param.shape).to(self.grad_dtype) for param in self.params]

    def random_grad(self, shape):
        decades = torch.empty(shape).uniform_(-3, 0, generator=self.generator)
        return torch.randn(shape, generator=self.generator) * 10.0**decades

    @property
    def state(self):
        return [self.params, self.exp_avgs, self.exp_avg_sqs, self.scales]

    @property
    def arguments(self):
        return [self.params, self.grads, *self.state[1:]]

    def run(self, function, step=1, seed=11, numbers=None, **hyper):
        numbers = list(range(len(self.params))) if numbers is None else numbers
        function(*self.arguments, numbers, *(HYPER | hyper).values(), step, seed)

    def interpret(self, step=1, order=0, **options):
        with interpreting(order=order, also=[tensor for list_ in self.arguments for tensor in list_]):
            self.run(triton_adamw.adamw_, step, **options)

    def decoded(self, index):
        """Parameter and moments as float64."""
        moments = [self.exp_avgs[index], self.exp_avg_sqs[index]]
        if self.scales:
            flat = [moment.view(-1) for moment in moments]
            decode = adamw.decode_exp_avg, adamw.decode_exp_avg_sq
            moments = [decode[i](flat[i], self.scales[index][i]).view_as(moments[i]) for i in range(2)]
        return [tensor.double() for tensor in (self.params[index], *moments)]


def same(one, other):
    return all(
        torch.equal(a, b)
        for list_, other_list in zip(one.state, other.state, strict=True)
        for a, b in zip(list_, other_list, strict=True)
    )


def step64(value, exp_avg, exp_avg_sq, grad, step, lr, beta1, beta2, eps, weight_decay):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) in float64."""
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad**2
    corrected = exp_avg / (1 - beta1**step), exp_avg_sq / (1 - beta2**step)
    return value - lr * weight_decay * value - lr * corrected[0] / (corrected[1].sqrt() + eps), exp_avg, exp_avg_sq


# What is stored, by definition: whole tensors in NumPy, whose uint32 wraps and whose float32 roots are rounded.


def mixed(words):
    words = (words ^ words >> 16) * np.uint32(0x7FEB352D)
    words = (words ^ words >> 15) * np.uint32(0x846CA68B)
    return words ^ words >> 16


def defined_words(count, number, step, seed):
    first, second = (np.uint32(word % 2**32) for word in adamw.random_key(seed, step))
    stream = mixed(np.array([number], dtype=np.uint32) ^ first)
    return mixed(mixed(np.arange(count, dtype=np.uint32) ^ stream) ^ second)


def defined_root(x):
    """Rounded; in float64, which no kernel computes in, PyTorch's own."""
    return np.sqrt(x) if x.dtype == np.float32 else torch.from_numpy(x).sqrt().numpy()


def defined_store(x, bits, target):
    if target.dtype == BF16:
        words = (x.astype(np.float32).view(np.uint32) + bits) >> 16
        target.view(torch.int16).copy_(torch.from_numpy(np.where(np.isnan(x), 0x7FC0, words).astype(np.int16)))
    else:
        target.copy_(torch.from_numpy(x))


def spread(per_block, count):
    return np.repeat(per_block, 256)[:count]


def defined_decode(codes, codes_sq, scales):
    root, root_sq = codes.float().numpy() * np.float32(1 / 127), codes_sq.float().numpy() * np.float32(1 / 255)
    scale, scale_sq = (spread(row, codes.numel()) for row in scales.numpy())
    return root * abs(root) * scale, root_sq * root_sq * (root_sq * root_sq) * scale_sq


def defined_encode(m, v, bits, bits_sq, codes, codes_sq, scales):
    scales.copy_(torch.from_numpy(np.stack([np.maximum.reduceat(x, np.arange(0, x.size, 256)) for x in (abs(m), v)])))
    inverse = np.float32(1) / np.maximum(scales.numpy(), np.float32(2.0**-126))
    ratio = abs(m) * spread(inverse[0], m.size)
    code = np.floor(np.minimum(defined_root(ratio) * 127, 126))
    code += bits.astype(m.dtype) / 2**16 * (code + code + 1) < ratio * 127.0**2 - code * code
    codes.copy_(torch.from_numpy(np.nan_to_num(np.where(m < 0, -code, code)).astype(np.int8)))
    root = defined_root(defined_root(v) * spread(np.sqrt(inverse[1]), m.size))
    code = np.floor(np.minimum(root * 255, 254))
    gap = (code + code + 1) * (code * code + code * code + code + code + 1)
    above = v * spread(inverse[1], m.size) * 255.0**4 - code * code * (code * code)
    code += bits_sq.astype(m.dtype) / 2**16 * gap < above
    codes_sq.copy_(torch.from_numpy(np.nan_to_num(np.where(v > 0, np.maximum(code, 1), code)).astype(np.uint8)))


def defined_adamw_(params, grads, exp_avgs, exp_avg_sqs, scales, numbers, *options):
    *hyper, step, seed = options
    decay, size, beta1, rest1, beta2, rest2, inverse_root, eps = adamw.hyper_parameters(*hyper, step)
    wide = torch.promote_types(params[0].dtype, F32)
    for index, tensors in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        value, _, exp_avg, exp_avg_sq = tensors
        words = defined_words(value.numel(), numbers[index], step, seed)
        p, g, *moments = (tensor.to(wide).numpy() for tensor in tensors)
        m, v = defined_decode(exp_avg, exp_avg_sq, scales[index]) if scales else moments
        m, v = beta1 * m + rest1 * g, beta2 * v + rest2 * (g * g)
        p = decay * p - size * (m / (defined_root(v) * inverse_root + eps))
        defined_store(p, words & 0xFFFF, value)
        second = mixed(words + np.uint32(adamw.SECOND_WORD)) & 0xFFFF
        if scales:
            defined_encode(m, v, second, words >> 16, exp_avg, exp_avg_sq, scales[index])
        else:
            defined_store(m, second, exp_avg)
            defined_store(v, words >> 16, exp_avg_sq)


def same_bits(a, b):
    """Any NaN is as good as another."""
    integer = getattr(torch, f"int{8 * a.element_size()}")
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(*(x.view(integer)[~x.isnan()] for x in (a, b)))


EDGES = [1, 2**16 - 1, 2**16, 2**16 + 1, 200_001]
EVERY_COMBINATION = [
    *itertools.product((F32, BF16), (F32, BF16), (F32, BF16, INT8)),
    *itertools.product((F64,), (F32, BF16, F64), (F32, BF16, INT8, F64)),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtypes", EVERY_COMBINATION, ids=lambda dtypes: named(*dtypes))
def test_what_is_stored_by_definition(dtypes):
    """Around the edges of chunks, as any parameter of any shard; what is not finite comes in the second step."""
    one, other = Tensors(EDGES, dtypes), Tensors(EDGES, dtypes)
    numbers = [0, 5, 167, (3 << 24) + 7, (200 << 24) + 9]
    for step, seed in ((1, 11), (2, -(2**63))):
        for tensors, function in ((one, adamw.adamw_), (other, defined_adamw_)):
            before = [grad.clone() for grad in tensors.grads]
            tensors.run(function, step, seed, numbers)
            assert all(map(same_bits, tensors.grads, before))
        for got, want in zip(one.state, other.state, strict=True):
            assert [same_bits(a, b) for a, b in zip(got, want, strict=True)] == [True] * len(got), step
        one.next_grads(), other.next_grads()
        for grad in (*one.grads[1:], *other.grads[1:]):
            grad[0], grad[1000], grad[2000], grad[-1] = 0.0, math.inf, -math.inf, math.nan


def test_codes_move_by_definition():
    """More of them than a chunk holds."""
    tensors = Tensors(EDGES[-1:], (F32, F32, INT8))
    tensors.run(adamw.adamw_)
    codes, codes_sq, scales = tensors.exp_avgs[0], tensors.exp_avg_sqs[0], tensors.scales[0]
    places = torch.randperm(codes.numel(), generator=tensors.generator)
    places[::3] = -1
    want = [torch.empty_like(tensor) for tensor in (codes, codes_sq, scales)]
    moved = [np.where(places >= 0, moment[places], 0) for moment in defined_decode(codes, codes_sq, scales)]
    words = defined_words(codes.numel(), 7, 1, 11)
    for _ in range(2):
        words = mixed(words + np.uint32(adamw.SECOND_WORD))
    defined_encode(*(moment.astype(np.float32) for moment in moved), words & 0xFFFF, words >> 16, *want)
    adamw.move_codes(codes, codes_sq, scales, places, 7, 1, 11)
    assert all(map(same_bits, (codes, codes_sq, scales), want))


# The same bits in PyTorch and in the kernel, and the right ones.


@combinations
def test_kernel_and_reference_store_the_same_bits(dtypes):
    """Six tensors in one launch, programs in shuffled order, memory poisoned, guard on."""
    one, other = Tensors(SIZES, dtypes), Tensors(SIZES, dtypes)
    for step in (1, 2, 7):
        one.run(adamw.adamw_, step)
        other.interpret(step, order=step)
        assert same(one, other)
        one.next_grads(), other.next_grads()


@settings(max_examples=15)
@given(
    st.lists(st.integers(0, 3000) | st.sampled_from([255, 256, 257, 2047, 2048, 2049]), min_size=1, max_size=4),
    st.sampled_from(COMBINATIONS),
    st.integers(0, 99),
)
def test_any_sizes(sizes, dtypes, order):
    one, other = Tensors(sizes, dtypes), Tensors(sizes, dtypes)
    one.run(adamw.adamw_)
    other.interpret(order=order)
    assert same(one, other)


@combinations
def test_every_step_is_right_to_the_rounding_of_what_it_stores(dtypes):
    """Twenty steps against float64, each from the state that stands stored before it."""
    tensors = Tensors([700], dtypes)
    for step in range(1, 21):
        before = tensors.decoded(0)
        tensors.interpret(step, order=step)
        want = step64(*before, tensors.grads[0].double(), step, **HYPER)
        for kind, (got, exact) in enumerate(zip(tensors.decoded(0), want, strict=True)):
            # A few float32 operations on terms no larger than these, then one rounding to what is stored: to nearest
            # in float32, up to a whole unit in the last place when stochastic, up to a code.
            terms = exact.abs() + before[kind].abs() + (HYPER["lr"] * 10 if kind == 0 else 0)
            bound = 8 * EPS[F32] * terms
            stored = dtypes[0] if kind == 0 else dtypes[2]
            if stored == BF16:
                bound = bound + EPS[BF16] * exact.abs()
            elif stored == INT8:
                scale = tensors.scales[0][kind - 1].double().repeat_interleave(256)[:700]
                bound = bound + CODE_STEP[kind - 1] * scale
            assert ((got - exact).abs() <= bound).all(), (step, kind)
        tensors.next_grads()


def eager_codes(x, power, top):
    """x through block-wise codes, to the nearest, in plain PyTorch."""
    blocks = torch.nn.functional.pad(x, (0, -x.numel() % 256)).view(-1, 256)
    scale = blocks.abs().amax(1, keepdim=True).clamp_min(1e-30)
    root = ((blocks.abs() / scale) ** (1 / power) * top).round() / top
    return (root**power * scale * blocks.sign()).view(-1)[: x.numel()]


def run_eager(param, grads, stored):
    moments = [torch.zeros_like(param), torch.zeros_like(param)]
    for step, grad in enumerate(grads, 1):
        param, *moments = step64(param, *moments, grad, step, **HYPER)
        param = param.to(stored[0]).to(param.dtype)
        if stored[1] == INT8:
            moments = [eager_codes(moments[0], 2, 127), eager_codes(moments[1], 4, 255).clamp_min(1e-30)]
        else:
            moments = [moment.to(stored[1]).to(param.dtype) for moment in moments]
    return param, *moments


@combinations
def test_twenty_steps_beside_eager(dtypes):
    """Not more than twice the error of rounding to nearest in eager, and one unit in the last place of the largest."""
    tensors = Tensors([1500], dtypes)
    start, grads = tensors.params[0].double(), []
    for step in range(1, 21):
        grads.append(tensors.grads[0].double())
        tensors.interpret(step)
        tensors.next_grads()
    parameter = torch.nn.Parameter(start.clone())
    oracle = torch.optim.AdamW([parameter], lr=HYPER["lr"], weight_decay=HYPER["weight_decay"])
    for parameter.grad in grads:
        oracle.step()
    want = [parameter.detach(), oracle.state[parameter]["exp_avg"], oracle.state[parameter]["exp_avg_sq"]]
    eager = run_eager(start.float(), [grad.float() for grad in grads], (dtypes[0], dtypes[2]))
    for kind, (got, beside, exact) in enumerate(zip(tensors.decoded(0), eager, want, strict=True)):
        stored = dtypes[0] if kind == 0 else dtypes[2]
        unit = EPS[stored] if stored in EPS else CODE_STEP[kind - 1]
        bound = 2 * ((beside.double() - exact).abs().max() + unit * exact.abs().max())
        assert (got - exact).abs().max() <= bound, kind


def test_float64_on_a_cpu_is_adamw():
    tensors = Tensors([37], (torch.float64,) * 3)
    want = step64(*tensors.decoded(0), tensors.grads[0], 3, **HYPER)
    tensors.run(adamw.adamw_, 3)
    for got, exact in zip(tensors.decoded(0), want, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-14, atol=1e-15)


def test_reference_in_chunks(monkeypatch):
    one, other = (Tensors([(40, 70), 1400], (BF16, BF16, INT8)) for _ in range(2))
    one.run(adamw.adamw_)
    monkeypatch.setattr(adamw, "_CHUNK", 512)
    other.run(adamw.adamw_)
    assert same(one, other)


def test_tensors_that_are_not_aligned_go_apart():
    tensors, other = Tensors([3000, 301], (BF16, BF16, BF16)), Tensors([3000, 301], (BF16, BF16, BF16))
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs"):
        getattr(tensors, name)[0] = torch.cat([torch.zeros(1), getattr(tensors, name)[0]]).to(BF16)[1:]
    tensors.interpret()
    other.run(adamw.adamw_)
    assert same(tensors, other)
    with capturing(89) as launches:
        tensors.run(triton_adamw.adamw_)
    assert [launch.arguments["ALIGNED"] for launch in launches] == [True, False]
    assert [128 in sass.widths(sass.read(launch.compiled).instructions, "LDG") for launch in launches] == [True, False]


@pytest.mark.filterwarnings("ignore:invalid value")
@combinations
def test_a_nan_or_an_infinity_stays_visible(dtypes):
    for bad in (math.nan, math.inf):
        tensors = Tensors([300], dtypes)
        tensors.grads[0][7] = bad
        tensors.interpret()
        assert tensors.params[0][7].isnan()
        assert tensors.params[0].isnan().sum() == 1


narrowed = triton_adamw._narrowed


@triton.jit
def narrow_kernel(x_ptr, bits_ptr, out_ptr):
    i = tl.arange(0, 8)
    tl.store(out_ptr + i, narrowed(tl.load(x_ptr + i), tl.load(bits_ptr + i).to(tl.uint32), tl.bfloat16))


def test_what_is_not_finite_is_not_rounded_away():
    """All ones is what a GPU makes of 0/0: a carry would turn it into -0.0."""
    x = torch.tensor([-1, 0x7FFFFFFF, 0x7F800001, 0x7F800000, -0x800000, 0, -(2**31), 0x3F800000], dtype=torch.int32)
    x, bits, out = x.view(F32), torch.full((8,), 0xFFFF, dtype=torch.int32), torch.empty(8, dtype=BF16)
    with interpreting():
        narrow_kernel[(1,)](x, bits, out)
    reference = adamw.stochastic_bfloat16(x, bits)
    assert torch.equal(out.view(torch.int16), reference.view(torch.int16))
    assert torch.equal(out.isnan(), x.isnan())
    assert torch.equal(out[3:].float(), x[3:])


# Stochastic rounding: repeatable, unbiased, and what it is for.


def decayed(step=1, number=0, size=8192, seed=11):
    """1.0, once decayed to 0.999, between the bfloat16 neighbours 0.99609375 and 1.0."""
    tensors = Tensors([size], (BF16, BF16, BF16))
    tensors.params[0].fill_(1.0)
    tensors.grads[0].zero_()
    tensors.interpret(step, numbers=[number], seed=seed, weight_decay=0.1)
    return tensors.params[0]


def standard_errors(values, mean=0.999, low=0.99609375, high=1.0):
    share = (mean - low) / (high - low)
    error = (high - low) * math.sqrt(share * (1 - share) / values.numel())
    return abs(values.double().mean().item() - mean) / error


def test_bfloat16_is_rounded_without_bias():
    values = decayed()
    assert set(values.tolist()) == {0.99609375, 1.0}
    assert standard_errors(values) < 4


@triton.jit
def truncated(x, bits, kind: tl.constexpr):
    return ((x.to(tl.uint32, bitcast=True) + bits * 0) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def to_nearest(x, bits, kind: tl.constexpr):
    return x.to(tl.bfloat16)


@pytest.mark.parametrize("fault", [truncated, to_nearest])
def test_fault_another_rounding_is_biased(fault, monkeypatch):
    monkeypatch.setattr(triton_adamw, "_narrowed", fault)
    assert standard_errors(decayed()) > 20


def test_random_bits_depend_on_seed_step_tensor_and_index_alone():
    up = {key: decayed(*key) == 1.0 for key in [(1, 0, 4096, 11), (2, 0, 4096, 11), (1, 1, 4096, 11), (1, 0, 4096, 12)]}
    assert torch.equal(decayed(1, 0, 5000, 11)[:4096] == 1.0, up[1, 0, 4096, 11])
    for one, other in itertools.combinations(up.values(), 2):
        # Independent: they agree in p**2 + q**2 of places, within 4 standard errors.
        share = (0.999 - 0.99609375) / (1 - 0.99609375)
        agree = share**2 + (1 - share) ** 2
        error = math.sqrt(agree * (1 - agree) / 4096)
        assert abs((one == other).double().mean().item() - agree) < 4 * error


def test_random_words_are_uniform_and_their_halves_independent():
    words = torch.cat([*adamw.random_words(adamw.random_key(0, 1), 5, torch.empty(1 << 18))])
    bits = (words.unsqueeze(1) >> torch.arange(32)) & 1
    second = adamw.mix(words + (adamw.SECOND_WORD - 2**32))
    bits = torch.cat([bits, (second.unsqueeze(1) >> torch.arange(16)) & 1], 1)
    signs = bits.double() * 2 - 1
    correlation = signs.T @ signs / math.sqrt(words.numel())  # off the diagonal: normal, variance 1
    correlation.fill_diagonal_(0.0)
    assert correlation.abs().max() < 5.5  # of 1128 pairs
    assert (signs.mean(0) * math.sqrt(words.numel())).abs().max() < 4.5  # of 48
    along = (signs[1:] * signs[:-1]).mean(0) * math.sqrt(words.numel())
    assert along.abs().max() < 4.5


def fall(dtypes, steps=1500):
    """Second moments, as shares of the truth, after the gradient fell to a thirtieth for all but one of a block."""
    tensors = Tensors([256], dtypes)
    truth = torch.zeros(256, dtype=torch.float64)
    for step in range(1, steps + 1):
        grad = torch.full((256,), 1.0 if step <= 100 else 1 / 30)
        grad[0] = 1.0
        tensors.grads[0].copy_(grad)
        truth = HYPER["beta2"] * truth + (1 - HYPER["beta2"]) * tensors.grads[0].double() ** 2
        tensors.run(adamw.adamw_, step)
    return (tensors.decoded(0)[2] / truth)[1:]


@pytest.mark.parametrize("moment", [BF16, INT8], ids=named)
def test_a_narrow_second_moment_falls_as_it_should(moment):
    share = fall((F32, F32, moment))
    # Per step, stochastic rounding adds a variance of at most gap**2 / 4, of which beta2**2 stays in the next: the
    # standard deviation of one value is at most gap / 2 / sqrt(1 - beta2**2), of the mean of 255 a sixteenth of that.
    relative_gap = EPS[BF16] if moment == BF16 else 4 / (255 * (1 / 30) ** 0.5)
    error = relative_gap / 2 / math.sqrt((1 - HYPER["beta2"] ** 2) * 255)
    assert abs(share.mean().item() - 1) < 4 * error


@pytest.mark.parametrize("moment", [BF16, INT8], ids=named)
def test_fault_to_nearest_it_would_stall(moment, monkeypatch):
    half = torch.tensor(0.5)

    def nearest_codes(exp_avg_sq, root, bits, codes, scale):
        scale.copy_(exp_avg_sq.view(-1, 256).amax(1))
        codes.copy_(((exp_avg_sq / scale) ** 0.25 * 255 + half).floor())

    monkeypatch.setattr(adamw, "encode_exp_avg_sq", nearest_codes)
    monkeypatch.setattr(adamw, "stochastic_bfloat16", lambda x, bits: x.bfloat16())
    share = fall((F32, F32, moment))
    assert share.mean() > 1.5


def rest(dtypes):
    """Values after 200 steps, and what they should be: of all but one of a block the gradient stops after five."""
    tensors, exact = Tensors([256], dtypes), Tensors([256], (F64,) * 3)
    for run in (tensors, exact):
        run.params[0].zero_()
        for step in range(1, 201):
            run.grads[0].fill_(0.01 if step <= 5 else 0.0)[0] = 1.0
            run.run(adamw.adamw_, step, lr=1e-3, beta2=0.95, weight_decay=0.0)
    return tensors.params[0][1:].double(), exact.params[0][1:]


@pytest.mark.parametrize("moment", [F32, BF16, INT8], ids=named)
def test_values_whose_gradient_stops_come_to_rest(moment):
    got, want = rest((F32, F32, moment))
    assert (got - want).mean().abs() < 0.25 * want.abs().mean()


def test_fault_to_nearest_they_would_run_away(monkeypatch):
    def nearest_codes(exp_avg, bits, codes, scale):
        scale.copy_(exp_avg.abs().view(-1, 256).amax(1))
        codes.copy_(((exp_avg.abs() / scale).sqrt() * 127 + 0.5).floor().copysign(exp_avg))

    monkeypatch.setattr(adamw, "encode_exp_avg", nearest_codes)
    got, want = rest((F32, F32, INT8))
    assert (got - want).mean().abs() > 10 * want.abs().mean()


def averaged(encode, decode, dtype, count=3000):
    """Mean of what 256 values come back as."""
    total, generator = torch.zeros(256, dtype=torch.float64), torch.Generator().manual_seed(1)
    codes, scale = torch.empty(256, dtype=dtype), torch.empty(1)
    for _ in range(count):
        encode(torch.randint(0, 1 << 16, (256,), generator=generator), codes, scale)
        total += decode(codes, scale)
    return total / count, codes


def assert_right_on_average(mean, values, top, power, count=3000):
    code = (values.abs().double() ** (1 / power) * top).floor()
    gap = ((code + 1) ** power - code**power) / top**power
    assert ((mean - values).abs() / (gap / 2 / math.sqrt(count))).max() < 5


def test_codes_of_first_moments_are_right_on_average():
    values = torch.randn(256, generator=torch.Generator().manual_seed(0)) ** 3
    values /= values.abs().max()
    mean, _ = averaged(lambda *rest: adamw.encode_exp_avg(values, *rest), adamw.decode_exp_avg, torch.int8)
    assert_right_on_average(mean, values, 127, 2)
    largest = values.abs().argmax()
    assert mean[largest] == values[largest]


def test_codes_of_second_moments_are_right_on_average_and_never_zero_by_rounding():
    values = torch.rand(256, generator=torch.Generator().manual_seed(0)) ** 6
    values[:3] = torch.tensor([1.0, 1e-20, 0.0])
    root = adamw.rounded_root(values)
    mean, codes = averaged(
        lambda *rest: adamw.encode_exp_avg_sq(values, root, *rest), adamw.decode_exp_avg_sq, torch.uint8
    )
    assert codes[1] == 1
    assert codes[2] == 0
    ordinary = values > (1 / 255) ** 4
    assert_right_on_average(mean[ordinary], values[ordinary], 255, 4)


# Memory: what is touched, how wide, how much.

MINIMUM = {
    (F32, F32, F32): (16, 12),
    (BF16, BF16, F32): (12, 10),
    (BF16, BF16, BF16): (8, 6),
    (BF16, BF16, INT8): (6, 4),
}
"""Bytes a value that these dtypes need at least: read, written."""


@pytest.mark.parametrize("dtypes", MINIMUM, ids=lambda dtypes: named(*dtypes))
def test_everything_is_read_once_and_written_once(dtypes, monkeypatch):
    """So the bytes moved are the least these dtypes need, and two scales a block."""
    guards = []
    monkeypatch.setattr(Guard, "check_races", lambda self: guards.append(self))
    tensors = Tensors([3 * triton_adamw.CHUNK + 257], dtypes)
    tensors.interpret()
    (guard,) = guards
    touched = {what: np.sort(np.concatenate([found for found, _ in guard.seen[what]])) for what in ("load", "store")}
    moved = Counter()
    for (what, addresses), list_ in itertools.product(touched.items(), tensors.arguments):
        for tensor in list_:
            start, size = tensor.data_ptr(), tensor.element_size()
            every = np.arange(start, start + tensor.nbytes, size, dtype=np.uint64)
            inside = addresses[(addresses >= start) & (addresses < start + tensor.nbytes)]
            assert np.array_equal(inside, every if what == "load" or tensor is not tensors.grads[0] else every[:0])
            moved[what] += size * inside.size if tensor.shape == tensors.params[0].shape else 0
    values = tensors.params[0].numel()
    assert (moved["load"] / values, moved["store"] / values) == MINIMUM[dtypes]


def compiled(dtypes, arch, **options):
    tensors = Tensors([4 * triton_adamw.CHUNK], dtypes)
    for list_ in tensors.arguments:
        list_[:] = [tensor.to("meta") for tensor in list_]
    with capturing(arch) as launches:
        tensors.run(triton_adamw.adamw_, **options)
    (launch,) = launches
    return launch.compiled


@pytest.mark.parametrize("arch", [80, 89, 90])
@pytest.mark.parametrize("dtypes", MINIMUM, ids=lambda dtypes: named(*dtypes))
def test_compiled_main_path_is_wide_and_nothing_spills(dtypes, arch):
    """128 bits a lane carry exactly the bytes of a chunk; narrower are the last chunk, the table and the scales."""
    code = sass.read(compiled(dtypes, arch))
    assert not code.spills
    assert code.programs_per_sm >= 3
    lanes = 32 * code.warps
    per_lane = triton_adamw.CHUNK // lanes
    for name, size in zip(("LDG", "STG"), MINIMUM[dtypes], strict=True):
        wide = sass.widths(code.instructions, name)
        assert wide.pop(128) * 16 == per_lane * size
        last_chunk = per_lane * (4 if name == "LDG" else 3)
        beside = 3 + 2 * 4 if dtypes[2] == INT8 else 3  # owner; on both paths the number, and scales
        assert wide.pop(64, 0) <= (14 if name == "LDG" else 0)  # the table
        assert wide.total() <= last_chunk + beside


def test_fault_without_the_promise_of_alignment_loads_are_narrow():
    unaligned = Tensors([4096], (F32, F32, F32))
    unaligned.params[0] = torch.zeros(4097)[1:]
    with capturing(89) as launches:
        unaligned.run(triton_adamw.adamw_)
    assert 128 not in sass.widths(sass.read(launches[0].compiled).instructions, "LDG")


def test_steps_seeds_and_rates_share_one_compiled_kernel():
    variants = [
        {"step": 1},
        {"step": 16, "seed": 0},
        {"step": 17, "seed": -5, "lr": 0.0},
        {"weight_decay": 0.0, "lr": 1.0},
    ]
    assert len({id(compiled((BF16, BF16, BF16), 89, **variant)) for variant in variants}) == 1


def test_tables_are_remembered_by_what_they_hold():
    tensors = Tensors([300], (F32, F32, F32))
    tensors.interpret()
    before = triton_adamw._on_device.cache_info()
    tensors.interpret(2)
    assert triton_adamw._on_device.cache_info().hits == before.hits + 1
    tensors.grads[0] = tensors.grads[0].clone()
    tensors.interpret(3)
    assert triton_adamw._on_device.cache_info().misses == before.misses + 1


# Faults that the guard must see.

REFUSED = GuardError, InterpreterError
"""The interpreter wraps what a kernel's inner function raises."""


@triton.jit
def store_everything(pointers, x, ok, full: tl.constexpr):
    tl.store(pointers, x)


def test_fault_no_boundary_mask(monkeypatch):
    monkeypatch.setattr(triton_adamw, "_store", store_everything)
    with pytest.raises(REFUSED, match=r"store: .* out of bounds"):
        Tensors([300], (F32, F32, F32)).interpret()


@pytest.mark.parametrize("name", ["grads", "exp_avgs", "exp_avg_sqs"])
def test_fault_a_buffer_one_value_short(name, monkeypatch):
    monkeypatch.setattr(adamw, "check", lambda *args: None)
    tensors = Tensors([2049], (F32, F32, F32))
    getattr(tensors, name)[0] = torch.zeros(2048)
    with pytest.raises(REFUSED, match=r"load: 1 of .* out of bounds"):
        tensors.interpret()


def test_fault_one_tensor_twice():
    tensors = Tensors([300, 300], (F32, F32, F32))
    tensors.params[1] = tensors.params[0]
    with pytest.raises(REFUSED, match="meet at one address"):
        tensors.interpret()


# Bad arguments.

BAD = {
    "lr": ({"lr": -1.0}, "lr: expected"),
    "betas": ({"beta2": 1.0}, "betas: expected at least 0 and below 1, got 1.0 at index 1"),
    "eps": ({"eps": -1e-8}, "eps: expected"),
    "weight_decay": ({"weight_decay": float("nan")}, "weight_decay: expected"),
    "step": ({"step": 0}, "step: expected at least 1, got 0"),
    "numbers": ({"numbers": [0]}, "numbers: expected 2 entries, as many as params, got 1"),
}


@pytest.mark.parametrize("function", [adamw.adamw_, triton_adamw.adamw_], ids=["reference", "launcher"])
@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_options_are_named(function, options, message):
    with pytest.raises(ValueError, match=message):
        Tensors([3, 4], (F32, F32, F32)).run(function, **options)


WRONG = {
    "params": (F16, None, "params: expected float32 or bfloat16"),
    "grads": (F16, None, "grads: expected float32 or bfloat16, got torch.float16"),
    "exp_avgs": (BF16, None, "exp_avgs, exp_avg_sqs: expected both"),
    "exp_avg_sqs": (None, (4,), r"exp_avg_sqs\[0\]: expected \[3\], got \[4\]"),
    "scales": (None, (2, 2), r"scales\[0\]: expected contiguous float32 \[2, 1\]"),
}


@pytest.mark.parametrize("function", [adamw.adamw_, triton_adamw.adamw_], ids=["reference", "launcher"])
@pytest.mark.parametrize("name", WRONG)
def test_bad_tensors_are_named_before_anything_is_changed(function, name):
    dtype, shape, message = WRONG[name]
    tensors = Tensors([3, 4], (F32, F32, INT8 if name == "scales" else F32))
    before = tensors.params[1].clone()
    list_ = getattr(tensors, name)
    list_[:] = [torch.zeros(shape or tensor.shape, dtype=dtype or tensor.dtype) for tensor in list_]
    with pytest.raises(ValueError, match=message):
        tensors.run(function)
    if name != "params":
        assert torch.equal(tensors.params[1], before)


# As operators.


@combinations
def test_operator(dtypes):
    tensors = Tensors([300, 7], dtypes)
    arguments = (*tensors.arguments, [0, 1], *HYPER.values(), 1, 11)
    torch.library.opcheck(torch.ops.rigsa.adamw_, arguments)
    one, other = Tensors([300, 7], dtypes), Tensors([300, 7], dtypes)
    one.run(torch.ops.rigsa.adamw_)
    other.run(adamw.adamw_)
    assert same(one, other)
