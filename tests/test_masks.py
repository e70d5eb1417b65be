import functools
import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rigsa.config import paper
from rigsa.masks import magnitude_bits, prune, random_mask, same_sign, top_k


def draw_layers(seed: int, sizes: list[int], distinct: bool) -> tuple[dict, dict]:  # type: ignore[type-arg]
    """Final and initial values; few distinct magnitudes where ties are wanted."""
    generator = torch.Generator().manual_seed(seed)
    initial = {str(i): torch.rand(size, generator=generator) - 0.5 for i, size in enumerate(sizes)}
    final = {}
    for name, values in initial.items():
        noise = torch.randn(values.shape, generator=generator) * 0.4
        final[name] = values + noise if distinct else ((values + noise) * 4).round() / 4
    return final, initial


def kept_by_sorting(scores: list[tuple[float, int, str]], k: int) -> set[tuple[str, int]]:
    """Largest first, ties in storage order (`scores` is in storage order and the sort is stable)."""
    ranked = sorted(scores, key=lambda score: -score[0])
    return {(name, index) for _, index, name in ranked[:k]}


@given(
    st.integers(0, 10_000),
    st.lists(st.integers(20, 80), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from([0.3, 0.8, 1.0]),
    st.sampled_from(["layer", "global"]),
)
def test_prune_equals_a_full_sort(seed, sizes, distinct, keep_fraction, ranking):
    final, initial = draw_layers(seed, sizes, distinct)
    scores = {
        name: [
            (abs(w), i, name)
            for i, (w, w0) in enumerate(zip(final[name].tolist(), initial[name].tolist(), strict=True))
            if w * w0 > 0
        ]
        for name in final
    }
    groups = list(scores.values()) if ranking == "layer" else [functools.reduce(operator.iadd, scores.values(), [])]
    want = set().union(*(kept_by_sorting(group, round(keep_fraction * len(group))) for group in groups))
    if {name for name, _ in want} != set(final):
        with pytest.raises(ValueError, match="empty"):
            prune(final, initial, keep_fraction=keep_fraction, ranking=ranking)
        return
    masks, counts = prune(final, initial, keep_fraction=keep_fraction, ranking=ranking)
    assert {(name, i) for name, mask in masks.items() for i in mask.nonzero().flatten().tolist()} == want
    assert counts.kept == len(want)
    assert counts.eligible == sum(map(len, scores.values()))
    assert counts.free == sum(sizes)


@given(st.integers(0, 10_000), st.integers(1, 300), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_top_k_keeps_exactly_k_and_the_largest(seed, k, dtype):
    values = torch.randn(2, 150, generator=torch.Generator().manual_seed(seed)).to(dtype)
    masks = top_k([magnitude_bits(row) for row in values], k)
    assert sum(int(mask.sum()) for mask in masks) == k
    mask = torch.stack(masks)
    if k < 300:
        assert values[mask].abs().min() >= values[~mask].abs().max()


def test_shape_of_values_does_not_matter():
    keys = magnitude_bits(torch.randn(6, 7, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(top_k([keys], 11)[0], top_k([keys.flatten()], 11)[0].view(6, 7))


def test_zero_has_no_sign():
    final, initial = torch.tensor([0.0, -0.0, 1.0, -1.0, 1.0]), torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0])
    assert same_sign(final, initial).tolist() == [False, False, True, False, False]


def test_is_not_zhous_large_final_same_sign():
    """With 44 % sign flips, a fixed share of 20 % removed would keep flipped entries; this rule keeps 0.8 * 56 %."""
    initial = torch.ones(1000)
    final = torch.linspace(0.1, 1, 1000)
    final[:440] *= -1
    masks, _ = prune({"a": final}, {"a": initial}, keep_fraction=0.8, ranking="layer")
    assert int(masks["a"].sum()) == 448
    assert not masks["a"][:440].any()


def test_papers_density():
    """3.46 % is four prunings at 0.8 of 53.9 % same-sign entries, or five at 0.8 of 63.8 % (PAPER, 4.4 and 5.1)."""
    keep = paper().keep_fraction
    assert (keep * 0.539) ** paper().prunings == pytest.approx(0.0346, abs=0.0001)
    assert (keep * 0.638) ** 5 == pytest.approx(0.0346, abs=0.0001)


def test_papers_density_by_pruning_for_real():
    """Entries that keep their sign with probability 0.539, four times over, end at 3.46 % within sampling error."""
    generator = torch.Generator().manual_seed(0)
    initial = torch.rand(400_000, generator=generator) - 0.5
    for _ in range(4):
        flips = torch.rand(initial.shape, generator=generator) > 0.539
        final = (
            initial.abs() * torch.rand(initial.shape, generator=generator) * initial.sign() * (1 - 2 * flips.float())
        )
        masks, counts = prune({"a": final}, {"a": initial}, keep_fraction=0.8, ranking="layer")
        assert counts.kept == round(0.8 * counts.eligible)
        initial = initial[masks["a"]]
    deviation = 5 * (0.0346 * (1 - 0.0346) / 400_000) ** 0.5
    assert len(initial) / 400_000 == pytest.approx(0.8**4 * 0.539**4, abs=deviation)


@pytest.mark.parametrize("ranking", ["layer", "global"])
def test_a_layer_left_empty_is_named(ranking):
    final = {"good": torch.ones(10), "flipped": -torch.ones(10)}
    with pytest.raises(ValueError, match=r"leaves flipped empty \(0 eligible entries of 10\)"):
        prune(final, {name: torch.ones(10) for name in final}, keep_fraction=0.8, ranking=ranking)


def test_bad_values_are_named():
    ones = {"a": torch.ones(4)}
    with pytest.raises(ValueError, match="keep_fraction: expected more than 0 and at most 1, got 0"):
        prune(ones, ones, keep_fraction=0, ranking="layer")
    with pytest.raises(ValueError, match="the values of a are not all finite"):
        prune({"a": torch.tensor([1.0, float("nan"), 1.0, 1.0])}, ones, keep_fraction=0.5, ranking="layer")
    with pytest.raises(ValueError, match=r"expected float32, bfloat16 or float16, got torch\.float64"):
        magnitude_bits(torch.ones(2, dtype=torch.float64))


@given(st.integers(1, 600))
def test_random_masks_have_the_exact_count(kept):
    assert int(random_mask((20, 30), kept, seed=0, name="a").sum()) == kept


def test_random_masks_differ_between_layers_of_one_shape_and_between_seeds():
    masks = {(seed, name): random_mask((64, 64), 2048, seed=seed, name=name) for seed in (0, 1) for name in ("a", "b")}
    assert torch.equal(masks[0, "a"], random_mask((64, 64), 2048, seed=0, name="a"))
    for one, other in [((0, "a"), (0, "b")), ((0, "a"), (1, "a")), ((0, "b"), (1, "b"))]:
        overlap = int((masks[one] & masks[other]).sum())
        assert abs(overlap - 1024) < 5 * (4096 / 16 * 4096 / 4095) ** 0.5  # hypergeometric, five deviations


def test_random_mask_of_nothing_is_refused():
    with pytest.raises(ValueError, match="kept: expected 1 to 6 entries in a, got 0"):
        random_mask((2, 3), 0, seed=0, name="a")
