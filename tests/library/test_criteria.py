"""Criteria and treatments against their published definitions: by hand, and by a slow oracle that sorts."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rigsa import criteria
from rigsa.criteria import CRITERIA, TREATMENTS, Criterion, high_in_all, permutation, treated_values
from rigsa.masks import TrainedLayer, prune, random_patterns
from rigsa_kernels import SparsePattern, layer_key
from rigsa_kernels.init import initial_values, random_words

BOUND, SEED = 0.5, 3
ONE_SCORE = [name for name, criterion in CRITERIA.items() if len(criterion.scores) == 1]
TWO_SCORES = [name for name, criterion in CRITERIA.items() if len(criterion.scores) == 2]

FINAL = [4.0, -4.0, 1.0, -1.0, 0.0, -3.0]
INITIAL = [1.0, 2.0, 3.0, -2.0, 2.0, -2.0]
BY_HAND = {
    "large_final": [4, 4, 1, 1, 0, 3],
    "small_final": [-4, -4, -1, -1, 0, -3],
    "large_init": [1, 2, 3, 2, 2, 2],
    "small_init": [-1, -2, -3, -2, -2, -2],
    "magnitude_increase": [3, 2, -2, -1, -2, 1],
    "movement": [3, 6, 2, 1, 2, 1],
    "large_final_same_sign": [4, 0, 1, 1, 0, 3],
    "large_final_diff_sign": [0, 4, 0, 0, 0, 0],
    "magnitude_increase_same_sign": [3, 0, -2, -1, 0, 1],
    "magnitude_increase_diff_sign": [0, 2, 0, 0, -2, 0],
}


@pytest.mark.parametrize("name", ONE_SCORE)
def test_scores_by_hand(name):
    [score] = CRITERIA[name].scores
    assert score(torch.tensor(FINAL), torch.tensor(INITIAL)).tolist() == BY_HAND[name]


def test_every_criterion_of_the_paper_is_there():
    assert set(CRITERIA) == {"rigsa", *BY_HAND, "large_init_large_final", "small_init_small_final", "random"}
    assert all(criterion.help for criterion in CRITERIA.values())


def score_of_one(name, w, w0):
    """An entry's score by the table of Zhou et al., one number at a time, in float32 as ours."""
    w, w0 = np.float32(w), np.float32(w0)
    same = np.sign(w) == np.sign(w0)
    size = {
        "large_final": abs(w),
        "small_final": -abs(w),
        "large_init": abs(w0),
        "small_init": -abs(w0),
        "magnitude_increase": abs(w) - abs(w0),
        "movement": abs(w - w0),
    }
    for suffix, counts in (("_same_sign", same), ("_diff_sign", not same)):
        if name.endswith(suffix):
            return float(size[name.removesuffix(suffix)]) if counts else 0.0
    return float(size[name])


def draw_layers(seed, sizes, dtype, ties) -> dict[str, TrainedLayer]:
    """Dense and packed layers by turns, from Philox values and given ones; coarse numbers where ties are wanted."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for number, size in enumerate(sizes):
        pattern = SparsePattern.dense(size, 5)
        if number % 2:
            pattern = SparsePattern.from_mask(torch.rand(size, 5, generator=generator) < 0.7)
        initial = initial_values(pattern, BOUND, seed=SEED, key=number, dtype=dtype)
        values = initial + (torch.randn(pattern.values_shape, generator=generator) * 0.4).to(dtype)
        given = None
        if ties:
            values, given = (values * 4).round() / 4, (initial * 8).round() / 8
        layers[str(number)] = TrainedLayer(values, pattern, BOUND, SEED, number, given)
    return layers


def pairs(layer):
    return list(zip(layer.values.flatten().tolist(), layer.start().flatten().tolist(), strict=True))


def kept_entries(layers, patterns):
    """(layer, number among its free entries) of all that survive."""
    return {
        (name, index)
        for name, pattern in patterns.items()
        for index in layers[name].pattern.gather(pattern.to_mask()).flatten().nonzero().flatten().tolist()
    }


def compared(layers, ranking):
    return [{name: layer} for name, layer in layers.items()] if ranking == "layer" else [layers]


def in_order(scores):
    """Highest first; Python's sort is stable, so equals stay in storage order."""
    return [entry for _, entry in sorted(scores, key=lambda item: -item[0])]


def check_counts(layers, patterns, counts, want):
    assert kept_entries(layers, patterns) == want
    assert counts.kept == len(want) == sum(pattern.nnz for pattern in patterns.values())  # so none came back
    assert counts.free == counts.eligible == sum(layer.pattern.nnz for layer in layers.values())


draws = {
    "seed": st.integers(0, 10_000),
    "sizes": st.lists(st.integers(4, 16), min_size=1, max_size=4),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    "ties": st.booleans(),
    "keep_fraction": st.sampled_from([0.3, 0.8, 1.0]),
    "ranking": st.sampled_from(["layer", "global"]),
}


def pruned(layers, want, **options):
    """What `prune` gives, or None where it rightly refuses because a layer would be empty."""
    if {name for name, _ in want} != set(layers):
        with pytest.raises(ValueError, match="empty"):
            prune(layers, **options)
        return None
    return prune(layers, **options)


@pytest.mark.parametrize("name", ONE_SCORE)
@given(**draws)
def test_a_fixed_share_equals_a_full_sort(name, seed, sizes, dtype, ties, keep_fraction, ranking):
    layers, want = draw_layers(seed, sizes, dtype, ties), set()
    for group in compared(layers, ranking):
        scores = [
            (score_of_one(name, w, w0), (layer, index))
            for layer in group
            for index, (w, w0) in enumerate(pairs(group[layer]))
        ]
        want |= set(in_order(scores)[: round(keep_fraction * len(scores))])
    if result := pruned(layers, want, keep_fraction=keep_fraction, ranking=ranking, criterion=name):
        check_counts(layers, *result, want)


@pytest.mark.parametrize("name", TWO_SCORES)
@given(**draws)
def test_a_common_percentile_comes_as_close_as_any(name, seed, sizes, dtype, ties, keep_fraction, ranking):
    """Try every depth: what is among the first d by both scores, for the smallest d that leaves enough."""
    layers, want, sign = draw_layers(seed, sizes, dtype, ties), set(), 1 if name.startswith("large") else -1
    for group in compared(layers, ranking):
        both = [
            (sign * abs(w0), sign * abs(w), (layer, index))
            for layer in group
            for index, (w, w0) in enumerate(pairs(group[layer]))
        ]
        count = round(keep_fraction * len(both))
        first, last = in_order([(a, entry) for a, _, entry in both]), in_order([(b, entry) for _, b, entry in both])
        shared = [set(first[:depth]) & set(last[:depth]) for depth in range(len(both) + 1)]
        chosen = next(entries for entries in shared if len(entries) >= count)
        assert len(chosen) - count == min(abs(len(entries) - count) for entries in shared)
        want |= chosen
    if result := pruned(layers, want, keep_fraction=keep_fraction, ranking=ranking, criterion=name):
        check_counts(layers, *result, want)


def test_high_in_all_by_hand():
    scores = [torch.tensor([5.0, 4, 3, 2, 1]), torch.tensor([1.0, 5, 4, 3, 2])]  # places 0 1 2 3 4 and 4 0 1 2 3
    for count, want in [(0, ""), (1, "1"), (2, "12"), (3, "123"), (4, "01234"), (5, "01234")]:  # 3, then all: none at 4
        assert "".join(map(str, high_in_all(scores, count).nonzero().flatten().tolist())) == want


def test_excluded_entries_survive_in_zhous_rule_and_never_in_rigsas():
    """44 % of the signs changed, 20 % pruned: density 0.80 with 24 % flipped, against 0.8 * 56 % = 0.448."""
    size = torch.linspace(0.1, 1, 1000)
    size[torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:440]] *= -1
    pattern = SparsePattern.dense(10, 100)
    initial = initial_values(pattern, BOUND, seed=SEED, key=0)
    layers = {"a": TrainedLayer(initial.sign() * size.view(10, 100), pattern, BOUND, SEED, 0)}
    flipped = (size < 0).view(10, 100)

    zhou, counts = prune(layers, keep_fraction=0.8, ranking="layer", criterion="large_final_same_sign")
    kept = zhou["a"].to_mask()
    assert (counts.free, counts.eligible, counts.kept) == (1000, 1000, 800)
    assert int((kept & flipped).sum()) == 240
    assert int((kept & ~flipped).sum()) == 560
    assert kept[flipped].tolist() == [True] * 240 + [False] * 200  # equal scores: the first in storage order

    rigsa, counts = prune(layers, keep_fraction=0.8, ranking="layer")
    assert (counts.free, counts.eligible, counts.kept) == (1000, 560, 448)
    assert not (rigsa["a"].to_mask() & flipped).any()


def test_a_zero_beats_a_shrunken_magnitude():
    """Under magnitude_increase_same_sign an excluded entry scores 0, which is more than a negative increase."""
    pattern = SparsePattern.dense(1, 4)
    initial = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    layer = TrainedLayer(torch.tensor([[0.5, -9.0, 2.0, 0.75]]), pattern, BOUND, SEED, 0, initial)
    patterns, _ = prune({"a": layer}, keep_fraction=0.5, ranking="layer", criterion="magnitude_increase_same_sign")
    assert patterns["a"].to_mask().tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("ranking", ["layer", "global"])
def test_random_is_the_draw_of_random_patterns_level_after_level(ranking):
    shapes = {"a": (20, 30), "b": (7, 33)}
    patterns, values = {name: SparsePattern.dense(*shape) for name, shape in shapes.items()}, {}
    for _ in range(2):
        values = {name: torch.zeros(pattern.values_shape) for name, pattern in patterns.items()}
        layers = {
            name: TrainedLayer(values[name], pattern, BOUND, SEED, layer_key(name))
            for name, pattern in patterns.items()
        }
        before = patterns
        patterns, counts = prune(layers, keep_fraction=0.4, ranking=ranking, criterion="random")
        drawn = random_patterns(shapes, {name: pattern.nnz for name, pattern in patterns.items()}, seed=SEED)
        for name, pattern in patterns.items():
            assert torch.equal(pattern.to_mask(), drawn[name].to_mask())
            assert not (pattern.to_mask() & ~before[name].to_mask()).any()
        if ranking == "layer":
            assert all(patterns[name].nnz == round(0.4 * before[name].nnz) for name in shapes)
        assert counts.kept == sum(pattern.nnz for pattern in patterns.values())


@given(**draws)
def test_random_keeps_the_highest_philox_words_of_the_free(seed, sizes, dtype, ties, keep_fraction, ranking):
    layers, want = draw_layers(seed, sizes, dtype, ties), set()
    for group in compared(layers, ranking):
        words = []
        for name, layer in group.items():
            matrix = random_words(SEED, layer.key, 1, 0, layer.pattern.out_features * 5, torch.device("cpu")).view(
                -1, 5
            )
            words += [(word, (name, i)) for i, word in enumerate(layer.pattern.gather(matrix).flatten().tolist())]
        want |= set(in_order(words)[: round(keep_fraction * len(words))])
    if result := pruned(layers, want, keep_fraction=keep_fraction, ranking=ranking, criterion="random"):
        check_counts(layers, *result, want)


@pytest.mark.parametrize("ranking", ["layer", "global"])
@pytest.mark.parametrize("name", CRITERIA)
def test_given_initial_values_stand_for_the_regenerated_ones(name, ranking):
    layers = draw_layers(0, [12, 9], torch.bfloat16, ties=False)
    given = {
        layer: TrainedLayer(one.values, one.pattern, BOUND, 99, one.key, one.start()) for layer, one in layers.items()
    }
    given |= {} if name != "random" else layers  # its seed is no longer that of the initial values alone
    want, want_counts = prune(layers, keep_fraction=0.6, ranking=ranking, criterion=name)
    got, got_counts = prune(given, keep_fraction=0.6, ranking=ranking, criterion=name)
    assert got_counts == want_counts
    assert all(torch.equal(got[layer].to_mask(), want[layer].to_mask()) for layer in layers)


def test_the_sign_is_compared_with_the_treated_start():
    pattern = SparsePattern.from_mask(torch.tensor([[True, False, True, True, True]]))
    values, start = torch.tensor([1.0, -1.0, 0.0, 3.0]), torch.tensor([0.1, 0.1, 0.1, 0.2])
    layer = TrainedLayer(values, pattern, BOUND, SEED, 0, start)
    patterns, counts = prune({"a": layer}, keep_fraction=1.0, ranking="layer")
    assert patterns["a"].to_mask().tolist() == [[True, False, False, False, True]]
    assert (counts.free, counts.eligible, counts.kept) == (4, 2, 2)


@pytest.mark.parametrize(("ranking", "most"), [("layer", 1), ("global", 3)])
def test_scores_of_one_layer_at_a_time(monkeypatch, ranking, most):
    alive, counted = [0], []

    class Counted(torch.Tensor):
        def __del__(self):
            alive[0] -= self.__dict__.get("one", 0)

    def score(final, initial):
        alive[0] += 1
        counted.append(alive[0])
        out = (final - initial).abs().as_subclass(Counted)
        out.one = 1
        return out

    monkeypatch.setitem(criteria.CRITERIA, "movement", Criterion("counted", (score,)))
    layers = {str(n): draw_layers(n, [6], torch.float32, ties=False)["0"] for n in range(3)}
    prune(layers, keep_fraction=0.5, ranking=ranking, criterion="movement")
    assert max(counted) <= most
    assert len(counted) == 3


def test_bad_input_is_named():
    layers = draw_layers(0, [4, 4], torch.float32, ties=False)
    with pytest.raises(ValueError, match=r"criterion: expected one of rigsa, large_final, .* got 'largest'"):
        prune(layers, keep_fraction=0.5, ranking="layer", criterion="largest")
    layers["1"].values[0] = float("nan")
    for name in CRITERIA:  # even where the criterion does not look at it
        with pytest.raises(ValueError, match="expected finite numbers to rank, got 1 in 1 that are not"):
            prune(layers, keep_fraction=0.5, ranking="layer", criterion=name)
    layer = layers["0"]
    for name in ("rigsa", "movement"):
        wrong = TrainedLayer(layer.values, layer.pattern, BOUND, SEED, 0, torch.ones(3))
        with pytest.raises(ValueError, match=r"values: expected \[4, 5\], got \[3\]"):
            prune({"0": wrong}, keep_fraction=0.5, ranking="layer", criterion=name)


@pytest.mark.parametrize("name", [name for name in CRITERIA if name != "rigsa"])
def test_a_layer_left_empty_is_named(name):
    layers = {"thin": draw_layers(0, [1], torch.float32, ties=False)["0"]}
    with pytest.raises(ValueError, match=r"keep_fraction: 0.05 leaves thin empty \(5 eligible entries of 5\)"):
        prune(layers, keep_fraction=0.05, ranking="layer", criterion=name)


SHAPE = (24, 40)
TICKET = SparsePattern.from_mask(torch.rand(SHAPE, generator=torch.Generator().manual_seed(5)) < 0.3)
PATTERNS = {"dense": SparsePattern.dense(*SHAPE), "packed": TICKET}


def treat(treatment, pattern, *, key=7, draw_seed=11, dtype=torch.float32):
    return treated_values(treatment, pattern, bound=BOUND, seed=SEED, key=key, dtype=dtype, draw_seed=draw_seed)


def original(pattern, dtype=torch.float32):
    return initial_values(pattern, BOUND, seed=SEED, key=7, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_init_is_the_initial_values_bit_for_bit(pattern, dtype):
    got = treat("init", pattern, dtype=dtype)
    assert got.dtype == dtype
    assert torch.equal(got, original(pattern, dtype))


def whole_layer_shuffled():
    order = torch.tensor(shuffled_by_hand(SHAPE[0] * SHAPE[1], 11, 7))
    return original(PATTERNS["dense"]).flatten()[order].view(SHAPE)


def shuffled_by_hand(count, seed, key):
    words = random_words(seed, key, 2, 0, 2 * count, torch.device("cpu")).tolist()
    return sorted(range(count), key=lambda i: (words[2 * i] << 31) + words[2 * i + 1] // 2)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_treatments_by_definition(pattern):
    kept, layer = original(pattern), original(PATTERNS["dense"])
    sign = kept.sign()
    reinit = pattern.gather(whole_layer_shuffled())
    reshuffled = kept.flatten()[torch.tensor(shuffled_by_hand(kept.numel(), 11, 7))].view(kept.shape)
    deviation = torch.tensor(np.std(layer.numpy().astype(np.float64)), dtype=torch.float32)
    assert torch.equal(treat("random_reinit", pattern), reinit)
    assert torch.equal(treat("random_reshuffle", pattern), reshuffled)
    assert torch.equal(treat("signed_reinit", pattern), reinit.abs() * sign)
    assert torch.equal(treat("signed_reshuffle", pattern), reshuffled.abs() * sign)
    assert torch.equal(treat("signed_constant", pattern), deviation * sign)
    assert torch.equal(treat("rand_signed_constant", pattern), deviation * reinit.sign())


def test_what_a_shuffle_keeps():
    """Among the kept only, the numbers stay the ticket's; among all, they are a share of the layer's."""
    kept, layer = original(TICKET), original(PATTERNS["dense"]).flatten()
    assert torch.equal(treat("random_reshuffle", TICKET).sort().values, kept.sort().values)
    assert torch.equal(treat("random_reinit", PATTERNS["dense"]).flatten().sort().values, layer.sort().values)
    reinit = treat("random_reinit", TICKET)
    assert torch.isin(reinit, layer).all()
    assert not torch.equal(reinit.sort().values, kept.sort().values)
    assert torch.equal(
        treat("random_reinit", TICKET), TICKET.gather(treat("random_reinit", PATTERNS["dense"]))
    )  # so a survivor starts from the same value at every level


@pytest.mark.parametrize("treatment", [name for name in TREATMENTS if name not in ("init", "signed_constant")])
def test_draws_differ_between_layers_and_seeds_and_repeat(treatment):
    start = treat(treatment, TICKET)
    assert torch.equal(start, treat(treatment, TICKET))
    assert not torch.equal(start, treat(treatment, TICKET, draw_seed=12))
    assert permutation(200, seed=11, key=7).tolist() != permutation(200, seed=11, key=8).tolist()
    assert torch.equal(treat(treatment, TICKET, dtype=torch.bfloat16), start.bfloat16())


def test_permutation_is_uniform_and_does_not_depend_on_chunks(monkeypatch):
    counts = torch.zeros(6, 6)
    for seed in range(600):
        counts[torch.arange(6), permutation(6, seed=seed, key=1)] += 1
    assert (counts - 100).abs().max() < 5 * (600 / 6 * 5 / 6) ** 0.5  # five deviations of a binomial
    want = permutation(100, seed=2**64 - 1, key=2**32 - 1)
    assert want.sort().values.tolist() == list(range(100))
    monkeypatch.setattr(criteria, "CHUNK", 7)
    assert torch.equal(permutation(100, seed=2**64 - 1, key=2**32 - 1), want)


def test_permutation_never_changes():
    """A run that is continued with another version shuffles the same."""
    assert permutation(10, seed=0, key=0).tolist() == [9, 6, 8, 5, 4, 3, 2, 7, 0, 1]


def test_treatments_name_what_is_wrong():
    assert all(treatment.help for treatment in TREATMENTS.values())
    with pytest.raises(ValueError, match=r"treatment: expected one of init, random_reinit, .* got 'none'"):
        treat("none", TICKET)
    with pytest.raises(ValueError, match="seed: expected 0 to"):
        treat("random_reinit", TICKET, draw_seed=-1)
