import functools
import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rigsa.experiments.presets import paper
from rigsa.masks import (
    TrainedLayer,
    drop_and_grow,
    erk_counts,
    hamming_distance,
    largest_patterns,
    prune,
    random_patterns,
)
from rigsa_kernels import SparsePattern, layer_key
from rigsa_kernels.init import initial_values

BOUND = 0.5


def initial_of(layer: TrainedLayer) -> torch.Tensor:
    return initial_values(layer.pattern, layer.bound, seed=layer.seed, key=layer.key, dtype=layer.values.dtype)


def make_layer(pattern, key, change) -> TrainedLayer:
    """Values that training made of the initial ones: `change` of them."""
    initial = initial_values(pattern, BOUND, seed=3, key=key)
    return TrainedLayer(change(initial), pattern, BOUND, 3, key)


def draw_layers(seed: int, sizes: list[int], distinct: bool) -> dict[str, TrainedLayer]:
    """Dense and packed layers by turns; few distinct magnitudes where ties are wanted."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for number, size in enumerate(sizes):
        pattern = SparsePattern.dense(size, 5)
        if number % 2:
            pattern = SparsePattern.from_mask(torch.rand(size, 5, generator=generator) < 0.7)
        noise = torch.randn(pattern.values_shape, generator=generator) * 0.4

        def change(initial, noise=noise):
            return initial + noise if distinct else ((initial + noise) * 4).round() / 4

        layers[str(number)] = make_layer(pattern, number, change)
    return layers


def kept_by_sorting(scores: list[tuple[float, int, str]], k: int) -> set[tuple[str, int]]:
    """Largest first, ties in storage order (`scores` is in storage order and the sort is stable)."""
    ranked = sorted(scores, key=lambda score: -score[0])
    return {(name, index) for _, index, name in ranked[:k]}


@given(
    st.integers(0, 10_000),
    st.lists(st.integers(4, 16), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from([0.3, 0.8, 1.0]),
    st.sampled_from(["layer", "global"]),
)
def test_prune_equals_a_full_sort(seed, sizes, distinct, keep_fraction, ranking):
    layers = draw_layers(seed, sizes, distinct)
    scores = {}
    for name, layer in layers.items():
        pairs = zip(layer.values.flatten().tolist(), initial_of(layer).flatten().tolist(), strict=True)
        scores[name] = [(abs(w), i, name) for i, (w, w0) in enumerate(pairs) if w * w0 > 0]
    groups = list(scores.values()) if ranking == "layer" else [functools.reduce(operator.iadd, scores.values(), [])]
    eligible = sum(map(len, groups))
    want = set().union(*(kept_by_sorting(group, round(keep_fraction * len(group))) for group in groups))
    if {name for name, _ in want} != set(layers):
        with pytest.raises(ValueError, match="empty"):
            prune(layers, keep_fraction=keep_fraction, ranking=ranking)
        return
    patterns, counts = prune(layers, keep_fraction=keep_fraction, ranking=ranking)
    got = {
        (name, index)
        for name, pattern in patterns.items()
        for index in layers[name].pattern.gather(pattern.to_mask()).flatten().nonzero().flatten().tolist()
    }
    assert got == want
    assert counts.kept == len(want) == sum(pattern.nnz for pattern in patterns.values())  # so none came back
    assert counts.eligible == eligible
    assert counts.free == sum(layer.values.numel() for layer in layers.values())


def test_zero_has_no_sign():
    layer = make_layer(SparsePattern.dense(1, 5), 0, lambda initial: initial * torch.tensor([0.0, -0.0, 1, -1, 2]))
    patterns, counts = prune({"a": layer}, keep_fraction=1.0, ranking="layer")
    assert patterns["a"].to_mask().tolist() == [[False, False, True, False, True]]
    assert counts.eligible == 2


def test_is_not_zhous_large_final_same_sign():
    """With 44 % sign flips, a fixed share of 20 % removed would keep flipped entries; this rule keeps 0.8 * 56 %."""
    size = torch.linspace(0.1, 1, 1000)
    size[:440] *= -1
    layer = make_layer(SparsePattern.dense(10, 100), 0, lambda initial: initial.sign() * size.view(10, 100))
    patterns, _ = prune({"a": layer}, keep_fraction=0.8, ranking="layer")
    assert patterns["a"].nnz == 448
    assert not patterns["a"].to_mask().flatten()[:440].any()


def test_papers_density():
    """3.46 % is four prunings at 0.8 of 53.9 % same-sign entries, or five at 0.8 of 63.8 % (PAPER, 4.4 and 5.1)."""
    keep = paper().keep_fraction
    assert (keep * 0.539) ** paper().prunings == pytest.approx(0.0346, abs=0.0001)
    assert (keep * 0.638) ** 5 == pytest.approx(0.0346, abs=0.0001)


def test_papers_density_by_pruning_for_real():
    """Entries that keep their sign with probability 0.539, four times over, end at 3.46 % within sampling error."""
    generator = torch.Generator().manual_seed(0)

    def train(initial):
        flips = (torch.rand(initial.shape, generator=generator) > 0.539).float()
        return initial * torch.rand(initial.shape, generator=generator) * (1 - 2 * flips)

    pattern = SparsePattern.dense(300, 100)
    for _ in range(4):
        before = pattern
        patterns, counts = prune({"a": make_layer(before, 0, train)}, keep_fraction=0.8, ranking="layer")
        pattern = patterns["a"]
        assert counts.kept == pattern.nnz == round(0.8 * counts.eligible)
        assert not (pattern.to_mask() & ~before.to_mask()).any()
    deviation = 5 * (0.0346 * (1 - 0.0346) / 30_000) ** 0.5
    assert pattern.density == pytest.approx(0.8**4 * 0.539**4, abs=deviation)


@pytest.mark.parametrize("ranking", ["layer", "global"])
def test_a_layer_left_empty_is_named(ranking):
    pattern = SparsePattern.dense(2, 5)
    layers = {"good": make_layer(pattern, 0, lambda initial: initial), "flipped": make_layer(pattern, 1, torch.neg)}
    with pytest.raises(ValueError, match=r"leaves flipped empty \(0 eligible entries of 10\)"):
        prune(layers, keep_fraction=0.8, ranking=ranking)


def test_bad_values_are_named():
    pattern = SparsePattern.dense(1, 4)
    layers = {"a": make_layer(pattern, 0, lambda initial: initial)}
    with pytest.raises(ValueError, match="keep_fraction: expected more than 0 and at most 1, got 0"):
        prune(layers, keep_fraction=0, ranking="layer")
    layers["b"] = make_layer(pattern, 1, lambda initial: initial * torch.tensor([1.0, float("nan"), 1.0, 1.0]))
    with pytest.raises(ValueError, match="expected finite numbers to rank, got 1 in b that are not"):
        prune(layers, keep_fraction=0.5, ranking="layer")
    with pytest.raises(ValueError, match=r"expected float32, bfloat16 or float16, got torch\.float64"):
        prune({"a": make_layer(pattern, 0, torch.Tensor.double)}, keep_fraction=0.5, ranking="layer")


def random_mask(shape: tuple[int, int], kept: int, *, seed: int, name: str) -> torch.Tensor:
    """`random_patterns` for one layer, as a boolean ``[N, K]`` mask."""
    return random_patterns({name: shape}, {name: kept}, seed=seed)[name].to_mask()


@given(st.integers(1, 600))
def test_random_masks_have_the_exact_count(kept):
    assert int(random_mask((20, 30), kept, seed=0, name="a").sum()) == kept


def test_every_layer_of_a_random_ticket_has_its_own_count():
    shapes, kept = {"a": (20, 30), "b": (7, 33)}, {"a": 17, "b": 231}
    patterns = random_patterns(shapes, kept, seed=4)
    assert {name: pattern.nnz for name, pattern in patterns.items()} == kept
    assert torch.equal(patterns["a"].to_mask(), random_mask((20, 30), 17, seed=4, name="a"))


def test_random_masks_differ_between_layers_of_one_shape_and_between_seeds():
    masks = {(seed, name): random_mask((64, 64), 2048, seed=seed, name=name) for seed in (0, 1) for name in ("a", "b")}
    assert torch.equal(masks[0, "a"], random_mask((64, 64), 2048, seed=0, name="a"))
    for one, other in [((0, "a"), (0, "b")), ((0, "a"), (1, "a")), ((0, "b"), (1, "b"))]:
        overlap = int((masks[one] & masks[other]).sum())
        assert abs(overlap - 1024) < 5 * (4096 / 16 * 4096 / 4095) ** 0.5  # hypergeometric, five deviations


def test_random_masks_are_uniform():
    """Over 400 seeds every one of 96 entries is drawn as often as any other, and apart from the initial values."""
    drawn = torch.stack([random_mask((3, 32), 24, seed=seed, name="a").flatten() for seed in range(400)]).float()
    assert (drawn.sum(0) - 100).abs().max() < 5 * (400 * 0.25 * 0.75) ** 0.5
    mask = random_mask((64, 64), 2048, seed=0, name="a")
    initial = initial_values(SparsePattern.dense(64, 64), BOUND, seed=0, key=layer_key("a"))
    assert abs(initial[mask].mean() - initial[~mask].mean()) < 5 * BOUND * (2 / 3 / 2048) ** 0.5


def test_random_mask_of_nothing_is_refused():
    with pytest.raises(ValueError, match="kept: expected 1 to 6 entries in a, got 0"):
        random_mask((2, 3), 0, seed=0, name="a")
    with pytest.raises(ValueError, match="kept: expected 1 to 6 entries in b, got 7"):
        random_patterns({"a": (2, 3), "b": (2, 3)}, {"a": 1, "b": 7}, seed=0)


def positions(pattern) -> set[int]:
    return set(pattern.to_mask().flatten().nonzero().flatten().tolist())


def matrices(seed, sizes, dtype, ties):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(size, 5, generator=generator) for size in sizes]
    return {str(n): ((x * 2).round() / 2 if ties else x).to(dtype) for n, x in enumerate(drawn)}


@given(
    st.integers(0, 10_000),
    st.lists(st.integers(2, 16), min_size=1, max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
    st.sampled_from([0.05, 0.3, 0.5, 1.0]),
    st.sampled_from(["layer", "global"]),
    st.sampled_from(["score", "magnitude"]),
    st.booleans(),
)
def test_largest_patterns_equal_a_full_sort(seed, sizes, dtype, ties, density, ranking, by, largest):
    scores = matrices(seed, sizes, dtype, ties)
    keys = {
        name: [
            ((1 if largest else -1) * (abs(x) if by == "magnitude" else x), i, name)
            for i, x in enumerate(matrix.flatten().tolist())
        ]
        for name, matrix in scores.items()
    }
    groups = list(keys.values()) if ranking == "layer" else [functools.reduce(operator.iadd, keys.values(), [])]
    want = set().union(*(kept_by_sorting(group, round(density * len(group))) for group in groups))
    options = {"density": density, "ranking": ranking, "by": by, "largest": largest}
    if {name for name, _ in want} != set(scores):
        with pytest.raises(ValueError, match="empty"):
            largest_patterns(scores, **options)
        return
    patterns = largest_patterns(scores, **options)
    assert {(name, i) for name, pattern in patterns.items() for i in positions(pattern)} == want
    if ranking == "layer":
        assert all(patterns[name].nnz == round(density * scores[name].numel()) for name in scores)
    else:
        assert sum(p.nnz for p in patterns.values()) == round(density * sum(x.numel() for x in scores.values()))


def test_largest_patterns_name_what_is_wrong():
    scores = {"big": torch.arange(10.0, 30.0).view(4, 5), "small": torch.zeros(1, 5)}
    with pytest.raises(ValueError, match=r"density: 0.5 leaves small empty \(5 weights\)"):
        largest_patterns(scores, density=0.5, ranking="global")
    with pytest.raises(ValueError, match=r"density: 0.05 leaves small empty \(5 weights\)"):
        largest_patterns(scores, density=0.05, ranking="layer")
    for density in (0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="density: expected more than 0 and at most 1, got"):
            largest_patterns(scores, density=density, ranking="layer")
    with pytest.raises(ValueError, match=r"scores: expected an \[N, K\] matrix for flat, got \[5\]"):
        largest_patterns({"flat": torch.zeros(5)}, density=0.5, ranking="layer")
    scores["small"][0, 2] = float("inf")
    with pytest.raises(ValueError, match="expected finite numbers to rank, got 1 in small that are not"):
        largest_patterns(scores, density=0.5, ranking="layer", largest=False)


def test_hamming_distance_counts_over_all_layers():
    a = {"a": SparsePattern.from_mask(torch.tensor([[True, True, False]])), "b": SparsePattern.dense(3, 33)}
    b = {"a": SparsePattern.from_mask(torch.tensor([[True, False, True]])), "b": SparsePattern.dense(3, 33)}
    assert hamming_distance(a, a) == 0
    assert hamming_distance(a, b) == hamming_distance(b, a) == 2 / (3 + 99)
    b["b"] = SparsePattern.from_mask(torch.zeros(3, 33, dtype=torch.bool))
    assert hamming_distance(a, b) == (2 + 99) / (3 + 99)
    assert hamming_distance({"b": a["b"]}, {"b": b["b"]}) == 1


def test_two_tickets_of_one_density_differ_in_twice_that_at_most():
    columns = torch.arange(100).repeat(10, 1)
    a, b = (SparsePattern.from_mask(columns % 50 == offset) for offset in (0, 1))
    assert hamming_distance({"": a}, {"": b}) == pytest.approx(2 * a.density)


def test_tickets_of_different_layers_have_no_distance():
    for other in ({}, {"b": SparsePattern.dense(2, 2)}, {"a": SparsePattern.dense(2, 3)}):
        with pytest.raises(ValueError, match="b: expected the layers of a"):
            hamming_distance({"a": SparsePattern.dense(2, 2)}, other)


@given(
    st.integers(0, 10_000),
    st.integers(1, 12),
    st.sampled_from([5, 32, 40]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
    st.sampled_from([0.0, 0.2, 1.0]),
)
def test_drop_and_grow_equals_a_full_sort(seed, rows, columns, dtype, ties, share):
    generator = torch.Generator().manual_seed(seed)
    matrix, gradient = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    if ties:
        matrix, gradient = matrix.round(), gradient.round()
    matrix, gradient = matrix.to(dtype), gradient.to(dtype)
    pattern = SparsePattern.from_mask(torch.rand(rows, columns, generator=generator) < 0.4)
    free, taken = positions(pattern), set(range(rows * columns)) - positions(pattern)
    number = int(share * min(len(free), len(taken)))
    size, slope = matrix.abs().flatten().tolist(), gradient.abs().flatten().tolist()
    stay = sorted(free, key=lambda i: (-size[i], i))[: len(free) - number]
    come = sorted(taken, key=lambda i: (-slope[i], i))[:number]
    got = drop_and_grow(pattern.gather(matrix), pattern, gradient, number=number)
    assert positions(got) == {*stay, *come}
    assert got.nnz == pattern.nnz
    assert len(positions(got) & taken) == number  # so none that was dropped came back


def test_a_dropped_entry_does_not_come_back_however_steep():
    pattern = SparsePattern.from_mask(torch.tensor([[True, True, False, False]]))
    gradient = torch.tensor([[100.0, 0.0, 0.0, 0.0]])
    got = drop_and_grow(torch.tensor([0.1, -5.0]), pattern, gradient, number=1)
    assert got.to_mask().tolist() == [[False, True, True, False]]  # equal gradients: the first


def test_drop_and_grow_names_what_is_wrong():
    pattern = SparsePattern.from_mask(torch.tensor([[True, True, True, False]]))
    values, gradient = torch.ones(3), torch.ones(1, 4)
    for number in (-1, 2):
        with pytest.raises(ValueError, match=rf"number: expected 0 to 1 entries to move \(3 are free\), got {number}"):
            drop_and_grow(values, pattern, gradient, number=number)
    with pytest.raises(ValueError, match=r"values: expected \[1, 4\], got \[4, 1\]"):
        drop_and_grow(values, pattern, gradient.T, number=1)
    gradient[0, 0] = float("nan")
    with pytest.raises(ValueError, match="got 1 in gradient that are not"):
        drop_and_grow(values, pattern, gradient, number=1)
    dense = SparsePattern.dense(2, 3)
    assert drop_and_grow(torch.ones(2, 3), dense, torch.ones(2, 3), number=0).nnz == 6


def test_erk_counts_of_layers_by_hand():
    """sides 20, 60 and 120 of 200 entries: epsilon is 1, but the first layer would exceed its size at density 0.5."""
    shapes = {"small": (10, 10), "middle": (20, 40), "large": (60, 60)}
    assert erk_counts(shapes, 200 / 4500) == {"small": 20, "middle": 60, "large": 120}
    assert erk_counts(shapes, 1.0) == {"small": 100, "middle": 800, "large": 3600}
    # At 1,000 entries the small layer would have 100 of its 100; without it 900 are shared 1 to 2.
    assert erk_counts(shapes, 1000 / 4500) == {"small": 100, "middle": 300, "large": 600}
    # Five entries on sides 20, 60 and 120: 0.5, 1.5 and 3, and the first of two equal rests is rounded up.
    assert erk_counts(shapes, 5 / 4500) == {"small": 1, "middle": 1, "large": 3}
    with pytest.raises(ValueError, match=r"density: 0.0004.* leaves small empty \(100 weights\); keep more"):
        erk_counts(shapes, 2 / 4500)
    for density in (0, 1.01, float("nan")):
        with pytest.raises(ValueError, match="density: expected more than 0 and at most 1"):
            erk_counts(shapes, density)


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=8),
    st.floats(0.001, 1, exclude_min=True),
)
def test_erk_counts_are_exact_and_as_the_rule_says(sides, density):
    shapes = {str(number): side for number, side in enumerate(sides)}
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    total, sums = sum(sizes.values()), sum(map(sum, sides))
    if any(round(density * total) * sum(side) < sums for side in sides):
        return  # a layer may be left empty, which the other test has
    counts = erk_counts(shapes, density)
    assert sum(counts.values()) == round(density * sum(sizes.values()))
    assert all(0 < counts[name] <= sizes[name] for name in shapes)
    sparse = [name for name in shapes if counts[name] < sizes[name]]
    dense = [name for name in shapes if counts[name] == sizes[name]]
    for one in sparse:
        for other in sparse:
            shared = counts[one] * sum(shapes[other]) / sum(shapes[one])
            assert abs(shared - counts[other]) < 1 + sum(shapes[other]) / sum(shapes[one])
        for other in dense:  # it would have as many, or more, by the same epsilon
            assert sizes[other] <= (counts[one] + 1) * sum(shapes[other]) / sum(shapes[one]) + 1
