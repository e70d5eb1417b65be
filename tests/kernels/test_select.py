"""Selection, sign test and initial values: the Triton kernels in the interpreter against PyTorch and a full sort."""

# ruff: noqa: N803  (kernels name sizes as the field does)

import contextlib

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rigsa_kernels import SparsePattern, sass, triton_select
from rigsa_kernels import init as init_module
from rigsa_kernels import select as select_module
from rigsa_kernels.init import initial_values, uniform_init
from rigsa_kernels.offline import capturing
from rigsa_kernels.select import drawn, every_entry, ranked, same_sign, top_k
from rigsa_kernels.testing import GuardError, interpreting

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STREAM = {"bound": 0.1, "seed": 2**64 - 5, "key": 2**32 - 3}
OPERATORS = ("initial_values_", "same_sign", "digit_counts", "keep_largest")


@contextlib.contextmanager
def on_triton(order=0):
    """CPU tensors go to the launchers and their kernels to the interpreter, programs in the order of this seed."""
    with pytest.MonkeyPatch.context() as patch, interpreting(order=order):
        for name in OPERATORS:
            patch.setattr(torch.ops.rigsa, name, getattr(triton_select, name))
        yield


def generator(seed):
    return torch.Generator().manual_seed(seed)


def make_pattern(rows, columns, density, seed):
    """Dense where density is None; row 0 of a packed pattern is empty."""
    if density is None:
        return SparsePattern.dense(rows, columns)
    mask = torch.rand(rows, columns, generator=generator(seed)) < density
    if density < 1:
        mask[0] = False
    return SparsePattern.from_mask(mask)


def trained_values(pattern, dtype, seed, steps=None):
    """Initial values moved enough for some signs to change; rounded to multiples of 1 / steps where ties are wanted."""
    values = initial_values(pattern, dtype=dtype, **STREAM).float()
    values = values + 0.05 * torch.randn(values.shape, generator=generator(seed))
    return (values if steps is None else (values * steps).round() / steps).to(dtype)


@st.composite
def layers(draw):
    """A pattern, values on it and the order of the programs."""
    rows, columns = draw(st.integers(1, 70)), draw(st.sampled_from([1, 5, 16, 31, 32, 33, 48, 130, 200]))
    pattern = make_pattern(rows, columns, draw(st.sampled_from([None, 0.0, 0.1, 0.6, 1.0])), draw(st.integers(0, 99)))
    dtype, steps = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([None, 40]))
    return pattern, trained_values(pattern, dtype, draw(st.integers(0, 99)), steps), draw(st.integers(0, 99))


def ranked_by_sorting(scores, masks, k):
    """The k largest of several layers by a stable sort, as boolean masks."""
    order = torch.cat([score[mask] for score, mask in zip(scores, masks, strict=True)]).sort(
        descending=True, stable=True
    )
    kept = torch.zeros(order.indices.numel(), dtype=torch.bool)
    kept[order.indices[:k]] = True
    split = kept.split([int(mask.sum()) for mask in masks])
    return [mask.masked_scatter(mask, part) for mask, part in zip((mask.clone() for mask in masks), split, strict=True)]


few = settings(max_examples=12)


@few
@given(layers(), st.sampled_from([0, 3, 2**32 - 8, 2**34 - 16, 2**34 - 10]))
def test_initial_values_have_the_same_bits(layer, start):
    pattern, values, order = layer
    arguments = pattern.tensors, pattern.in_features, 0.1, -5, 2**32 - 3, start
    want, got = torch.empty_like(values), torch.empty_like(values)
    init_module._initial_values_(want, *arguments)
    with interpreting(order=order):
        triton_select.initial_values_(got.fill_(torch.nan), *arguments)
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_uniform_init_on_triton(dtype):
    want = uniform_init((3, 7, 43), dtype=dtype, **STREAM)
    with on_triton():
        assert torch.equal(uniform_init((3, 7, 43), dtype=dtype, **STREAM), want)
        assert uniform_init((0, 5), dtype=dtype, **STREAM).shape == (0, 5)


@few
@given(layers())
def test_same_sign(layer):
    pattern, values, order = layer
    want = same_sign(values, pattern, **STREAM)
    initial = pattern.scatter(initial_values(pattern, dtype=values.dtype, **STREAM))
    by_definition = pattern.scatter(values).sign() * initial.sign() > 0
    assert torch.equal(SparsePattern.from_words(want, pattern.in_features).to_mask(), by_definition)
    with on_triton(order):
        assert torch.equal(same_sign(values, pattern, **STREAM), want)


def test_an_initial_value_that_rounds_to_zero_has_no_sign():
    pattern = SparsePattern.dense(4, 32)
    options = {"bound": 1e-8, "seed": 0, "key": 0}
    assert not uniform_init((4, 32), dtype=torch.float16, **options).any()
    for sign in (1, -1):
        values = torch.full((4, 32), sign * 0.5, dtype=torch.float16)
        want = same_sign(values, pattern, **options)
        assert not want.any()
        with on_triton():
            assert torch.equal(same_sign(values, pattern, **options), want)


@few
@given(
    st.lists(layers(), min_size=1, max_size=2),
    st.sampled_from(["magnitude", "score"]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.booleans(),
)
def test_top_k_equals_a_full_sort(drawn_layers, by, share, alone):
    """Over all layers and in each; candidates are a part of the free entries where the values are magnitudes."""
    entries, scores, masks = {}, [], []
    for number, (pattern, values, _) in enumerate(drawn_layers):
        candidates = same_sign(values, pattern, **STREAM) if by == "magnitude" else None
        entries[str(number)] = ranked(values, pattern, by=by, candidates=candidates)
        matrix = pattern.scatter(values).float()
        scores.append(matrix.abs() if by == "magnitude" else matrix)
        words = entries[str(number)].candidates
        masks.append(SparsePattern.from_words(words, pattern.in_features).to_mask())
    numbers = [round(share * int(mask.sum())) for mask in masks]
    if alone:
        k = dict(zip(entries, numbers, strict=True))
        want = [
            ranked_by_sorting([score], [mask], number)[0]
            for score, mask, number in zip(scores, masks, numbers, strict=True)
        ]
    else:
        k = sum(numbers)
        want = ranked_by_sorting(scores, masks, k)
    kept = top_k(entries, k)
    assert all(torch.equal(pattern.to_mask(), mask) for pattern, mask in zip(kept.values(), want, strict=True))
    with on_triton(drawn_layers[0][2]):
        again = top_k(entries, k)
    for one, other in zip(kept.values(), again.values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.tensors, other.tensors, strict=True))


def keys_by_definition(values, by):
    """The unsigned keys of float32 values, in int64."""
    bits = values.view(torch.int32).to(torch.int64)
    if by == "magnitude":
        return bits & 0x7FFFFFFF
    return torch.where(bits < 0, ~bits, bits + 2**31)


@few
@given(st.integers(0, 99), st.sampled_from(["magnitude", "score", "random"]), st.sampled_from([0, 8, 16, 24]))
def test_digits_of_any_bits_are_counted_among_the_candidates(seed, by, shift):
    """The prefix of one key, and then the same prefix with its highest bit turned, which no key there shares."""
    shape, source = (40, 33), generator(seed)
    values = torch.randint(-(2**31), 2**31, shape, generator=source).to(torch.int32).view(torch.float32)
    pattern = SparsePattern.dense(*shape)
    mask = torch.rand(shape, generator=source) < 0.5
    chosen = SparsePattern.from_mask(mask).words
    keys = keys_by_definition(values, by) if by != "random" else init_module.random_words(
        3, 5, 1, 0, values.numel(), values.device).view(shape)  # fmt: skip
    entries = select_module.Entries(pattern, by, None if by == "random" else values, chosen, 3, 5)
    for prefix in (int(keys[3, 3]) >> shift + 8 << shift + 8, (int(keys[3, 3]) ^ 2**31) >> shift + 8 << shift + 8):
        shared = keys[mask & (keys >> shift + 8 == prefix >> shift + 8)]
        not_finite = 0 if by == "random" else (~values.isfinite()).sum()
        wanted = [*torch.bincount(shared >> shift & 255, minlength=256).tolist(), int(not_finite)]
        assert entries.digit_counts(prefix, shift).tolist() == wanted


def test_equal_numbers_tie_whatever_the_sign_of_zero():
    scores = torch.tensor([[-1.0, -0.0, 0.0, -0.0, 2.0, -3.0]])
    for run in (contextlib.nullcontext, on_triton):
        with run():
            kept = top_k({"a": ranked(scores, SparsePattern.dense(1, 6), by="score")}, 2)["a"]
        assert kept.to_mask().tolist() == [[False, True, False, False, True, False]]


@pytest.mark.parametrize(("k", "kept"), [(0, [0, 0]), (5, [5, 0]), (7, [6, 1]), (12, [6, 6])])
def test_ties_go_to_the_first_layer(k, kept):
    entries = {name: ranked(torch.ones(2, 3), SparsePattern.dense(2, 3), by="magnitude") for name in "ab"}
    for run in (contextlib.nullcontext, on_triton):
        with run():
            patterns = top_k(entries, k)
        for pattern, number in zip(patterns.values(), kept, strict=True):
            assert pattern.to_mask().flatten().tolist() == [True] * number + [False] * (6 - number)


@pytest.mark.parametrize("density", [None, 0.5])
def test_rows_beyond_signed_16_bits(density, monkeypatch):
    monkeypatch.setattr(triton_select, "ROWS", 4)  # few large tiles: the interpreter's time goes by their number
    monkeypatch.setattr(triton_select, "WORDS", 256)
    pattern = make_pattern(3, 40_001, density, seed=1)
    values = trained_values(pattern, torch.bfloat16, seed=2)
    k = values.numel() // 3
    kept = top_k({"a": ranked(values, pattern, by="magnitude")}, k)["a"]
    matrix = pattern.scatter(values).float().abs()
    mask = torch.ones(3, 40_001, dtype=torch.bool) if density is None else pattern.to_mask()
    assert torch.equal(kept.to_mask(), ranked_by_sorting([matrix], [mask], k)[0])
    with on_triton():
        again = top_k({"a": ranked(values, pattern, by="magnitude")}, k)["a"]
    assert torch.equal(again.words, kept.words)


def test_chunks_do_not_show():
    """Rows are walked in chunks on the PyTorch path; a chunk of one row gives the same."""
    pattern = make_pattern(40, 50, 0.5, seed=0)
    values = trained_values(pattern, torch.float32, seed=1, steps=40)

    def select():
        words = same_sign(values, pattern, **STREAM)
        kept = top_k({"a": ranked(values, pattern, by="magnitude", candidates=words)}, 300)["a"]
        return [
            words,
            kept.words,
            initial_values(pattern, **STREAM),
            top_k({"a": drawn((40, 50), seed=1, key=2)}, 99)["a"].words,
        ]

    whole = select()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(init_module, "CHUNK", 50)
        assert all(torch.equal(one, other) for one, other in zip(select(), whole, strict=True))


@few
@given(st.integers(1, 40), st.sampled_from([1, 31, 64, 70]), st.integers(0, 2**64 - 1), st.floats(0, 1))
def test_random_entries_are_drawn_exactly_and_the_same(rows, columns, seed, share):
    k = round(share * rows * columns)
    entries = {"a": drawn((rows, columns), seed=seed, key=3)}
    want = top_k(entries, k)["a"]
    assert want.nnz == k
    with on_triton():
        assert torch.equal(top_k(entries, k)["a"].words, want.words)


def test_random_entries_follow_the_philox_words():
    """A draw is the k largest words of stream 1, whose first word is Philox's at counter (0, key, 0, 1)."""
    words = init_module.random_words(7, 3, 1, 0, 600, torch.device("cpu"))
    first = init_module.philox(7, tuple(torch.tensor([value]) for value in (0, 3, 0, 1)))
    assert words[:4].tolist() == [int(word) for word in first]
    kept = top_k({"a": drawn((20, 30), seed=7, key=3)}, 100)["a"].to_mask().reshape(-1)
    assert words[kept].min() > words[~kept].max()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_cannot_be_ranked_are_named(value):
    pattern = make_pattern(40, 50, 0.5, seed=0)
    values = trained_values(pattern, torch.bfloat16, seed=1)
    values[77] = value
    good = ranked(torch.ones(2, 3), SparsePattern.dense(2, 3), by="magnitude")
    nothing = torch.zeros_like(pattern.words)
    for run in (contextlib.nullcontext, on_triton):
        bad = ranked(values, pattern, by="magnitude", candidates=nothing)  # found though it is no candidate
        with run(), pytest.raises(ValueError, match="expected finite numbers to rank, got 1 in bad that are not"):
            top_k({"good": good, "bad": bad}, 3)


def test_bad_arguments_are_named():
    pattern, values = SparsePattern.dense(2, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"values: expected \[2, 3\], got \[3, 2\]"):
        ranked(values.t(), pattern, by="score")
    with pytest.raises(ValueError, match=r"expected float32, bfloat16 or float16, got torch\.float64"):
        same_sign(values.double(), pattern, **STREAM)
    with pytest.raises(ValueError, match=r"candidates: expected int32 \[1, 2\], got torch.int32 \[2, 2\]"):
        ranked(values, pattern, by="score", candidates=torch.zeros(2, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="k: expected 0 to 6 entries in all layers, got 7"):
        top_k({"a": ranked(values, pattern, by="score")}, 7)
    with pytest.raises(ValueError, match="k: expected 0 to 6 entries in a, got -1"):
        top_k({"a": ranked(values, pattern, by="score")}, {"a": -1})
    with pytest.raises(ValueError, match="seed: expected 0 to"):
        drawn((2, 3), seed=-1, key=0)


def test_launchers_refuse_what_does_not_fit():
    words, offsets, base = make_pattern(5, 40, 0.5, seed=0).tensors
    values = torch.ones(5, 40)
    with pytest.raises(ValueError, match="values: expected 200 for a dense pattern, got 199"):
        triton_select.same_sign(values.view(-1)[1:], [], [5, 40], 0.1, 0, 0)
    with pytest.raises(ValueError, match="values: expected a contiguous tensor"):
        triton_select.same_sign(torch.ones(40, 5).t(), [], [5, 40], 0.1, 0, 0)
    with pytest.raises(ValueError, match=r"row_base: expected int32 \[5\]"):
        triton_select.same_sign(values, [words, offsets, base[:4]], [5, 40], 0.1, 0, 0)
    with pytest.raises(ValueError, match=r"word_offsets: expected contiguous int16 \[2, 5\]"):
        triton_select.same_sign(values, [words, offsets.int(), base], [5, 40], 0.1, 0, 0)
    with pytest.raises(ValueError, match=r"candidates: expected contiguous int32 \[2, 5\]"):
        triton_select.keep_largest(values, words[:1], [], 40, "score", 0, 0, 0, 1)
    with pytest.raises(ValueError, match="out: expected a contiguous tensor"):
        triton_select.initial_values_(torch.ones(40, 5).t(), [], 40, 0.1, 0, 0, 0)


@triton.jit
def tile_without_an_edge(tile, N, K, ROWS: tl.constexpr, WORDS: tl.constexpr):
    tiles_per_row = tl.cdiv(tl.cdiv(K, 32), WORDS)
    n = (tile // tiles_per_row).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None, None]
    q = (tile % tiles_per_row).to(tl.int64) * WORDS + tl.arange(0, WORDS)[None, :, None]
    return n, q, (n >= 0) & (q >= 0)


@triton.jit
def ties_that_start_anew(values_ptr, candidates_ptr, words_ptr, word_offsets_ptr, row_base_ptr, ties_ptr, N, K,
                         seed, key, threshold, BY: tl.constexpr, PACKED: tl.constexpr, ALIGNED: tl.constexpr,
                         ROWS: tl.constexpr, WORDS: tl.constexpr):  # fmt: skip
    tl.store(triton_select._tie_counts(ties_ptr, K, ROWS, WORDS), tl.zeros((ROWS,), tl.int32),
             mask=triton_select._rows(K, ROWS, WORDS) < N)  # fmt: skip


def test_faults_turn_the_checks_red(monkeypatch):
    pattern = make_pattern(33, 40, 0.5, seed=0)
    values = torch.ones(pattern.nnz)
    entries = {"a": ranked(values, pattern, by="magnitude")}
    k = pattern.nnz // 2
    with on_triton():
        assert top_k(entries, k)["a"].nnz == k

    with on_triton(), pytest.raises(GuardError, match="out of bounds"):  # a buffer one value short
        same_sign(values[:-1].clone(), _longer_by_one(pattern), **STREAM)

    with monkeypatch.context() as patch, on_triton():
        patch.setattr(triton_select, "ties_kernel", ties_that_start_anew)
        assert top_k(entries, k)["a"].nnz > k

    monkeypatch.setattr(triton_select, "_tile", tile_without_an_edge)
    with on_triton(), pytest.raises(Exception, match="out of bounds"):
        top_k(entries, k)


def _longer_by_one(pattern):
    return SparsePattern(*pattern.shape, pattern.nnz - 1, *pattern.tensors)


@pytest.mark.parametrize("packed", [False, True])
def test_operators_are_registered_right(packed):
    pattern = make_pattern(5, 40, 0.5 if packed else None, seed=0)
    values = trained_values(pattern, torch.float32, seed=1)
    candidates = every_entry((5, 40), values.device)
    entries = (values, candidates, pattern.tensors, 40, "magnitude", 0, 0)
    ops = torch.ops.rigsa
    torch.library.opcheck(ops.initial_values_.default, (values.clone(), pattern.tensors, 40, 0.1, 0, 1, 0))
    torch.library.opcheck(ops.same_sign.default, (values, pattern.tensors, [5, 40], 0.1, 0, 1))
    torch.library.opcheck(ops.digit_counts.default, (*entries, 0, 24))
    torch.library.opcheck(ops.keep_largest.default, (*entries, 0x3D000000, 3))
    torch.library.opcheck(ops.digit_counts.default, (None, candidates, [], 40, "random", 0, 1, 0, 24))


def on_meta(rows, columns, packed, dtype):
    """A layer without data."""
    words = torch.empty(-(-columns // 32), rows, dtype=torch.int32, device="meta")
    if not packed:
        return torch.empty(rows, columns, dtype=dtype, device="meta"), words, []
    row_base = torch.empty(rows, dtype=torch.int32, device="meta")
    return (
        torch.empty(rows * columns // 10, dtype=dtype, device="meta"),
        words,
        [words, words.to(torch.int16), row_base],
    )


@pytest.mark.parametrize("arch", [80, 89, 90])
@pytest.mark.parametrize(
    ("columns", "packed", "by", "dtype"),
    [
        (2048, False, "magnitude", torch.bfloat16),
        (2048, False, "magnitude", torch.float32),
        (50, True, "score", torch.bfloat16),
        (50, False, "random", torch.bfloat16),
    ],
)
def test_compiles_without_spills(arch, columns, packed, by, dtype):
    """Whole words and vectors where a row's length allows them, and rows where every entry has Philox for itself."""
    values, words, pattern = on_meta(8192, columns, packed, dtype)
    ranked_values = None if by == "random" else values
    with capturing(arch) as launches:
        triton_select.initial_values_(values, pattern, columns, 0.1, 0, 1, 0)
        triton_select.same_sign(values, pattern, [8192, columns], 0.1, 0, 1)
        triton_select.digit_counts(ranked_values, words, pattern, columns, by, 0, 1, 0, 24)
        triton_select.keep_largest(ranked_values, words, pattern, columns, by, 0, 1, 0, 10)
    assert len(launches) == 5
    for launch in launches:
        code = sass.read(launch.compiled)
        assert code.local_loads == code.local_stores == 0, launch
        assert code.stack_bytes <= 8 * (dtype == torch.float32), launch  # reserved by ptxas, and never touched
        assert code.registers <= 128, launch
        if columns == 2048:  # 16 values a lane
            data = sass.widths(code.instructions, "STG" if launch.name == "initial_values_kernel" else "LDG")
            assert data[128] == dtype.itemsize, (launch, data)


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Allocations(TorchDispatchMode):
    """The largest new tensor that any operation makes, in bytes."""

    largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((arguments, options))}
        for tensor in _tensors(result):
            if tensor.untyped_storage()._cdata not in given:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


def test_memory_is_bounded(monkeypatch):
    """In PyTorch by the chunk, whatever the layer; on a GPU by a fraction of a byte a weight."""
    values, words, _ = on_meta(8192, 8192, False, torch.bfloat16)
    size = values.numel()
    with capturing(89), Allocations() as on_gpu:
        triton_select.keep_largest(values, words, [], 8192, "magnitude", 0, 1, 0, 10)
    assert on_gpu.largest <= max(size // 8, 8 * size // 128)

    monkeypatch.setattr(init_module, "CHUNK", 1024)
    values, candidates = torch.rand(64, 512), every_entry((64, 512), torch.device("cpu"))
    with Allocations() as on_cpu:
        select_module._same_sign(values, [], (64, 512), 0.1, 0, 1)
        select_module._digit_counts(values, candidates, [], 512, "magnitude", 0, 1, 0, 24)
        select_module._keep_largest(values, candidates, [], 512, "magnitude", 0, 1, 0x3F000000, 10)
    assert on_cpu.largest <= 8 * 1024  # a chunk in int64; the layer takes 128 kB


@pytest.mark.gpu
@pytest.mark.parametrize("density", [None, 0.2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_on_a_gpu(density, dtype):
    pattern = make_pattern(300, 70, density, seed=0)
    values = trained_values(pattern, dtype, seed=1, steps=40)
    results = []
    for device in ("cpu", "cuda"):
        there, values_there = pattern.to(device), values.to(device)
        words = same_sign(values_there, there, **STREAM)
        kept = [
            top_k({"a": ranked(values_there, there, by="magnitude", candidates=words)}, 500)["a"],
            top_k({"a": ranked(values_there, there, by="score")}, 500)["a"],
            top_k({"a": drawn((300, 70), seed=1, key=2, device=device)}, 500)["a"],
        ]
        initial = initial_values(there, dtype=dtype, device=device, **STREAM)
        results.append([initial, words, *(tensor for pattern in kept for tensor in pattern.tensors)])
    assert all(torch.equal(one, other.cpu()) for one, other in zip(*results, strict=True))
