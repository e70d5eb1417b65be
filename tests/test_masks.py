import functools
import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rigsa.config import paper
from rigsa.masks import TrainedLayer, prune, random_mask, random_patterns
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
