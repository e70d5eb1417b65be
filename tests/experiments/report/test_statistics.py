"""Intervals against tabulated values and scipy's own tests, and what counts as one setting."""

import dataclasses
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rigsa.experiments.presets import quickstart
from rigsa.experiments.report.statistics import Comparison, Estimate, compare, estimate, front, group

VALUES = st.lists(st.floats(-1000, 1000), min_size=2, max_size=8)


def make(method, **values):
    return dataclasses.replace(quickstart(method), **values)


def labels(*configs):
    return [one.label for one in group(configs)]


def test_interval_by_the_table():
    """t(0.975) is 12.706 with one degree of freedom and 4.303 with two."""
    assert estimate([1.0, 3.0]).half == pytest.approx(12.7062)
    assert estimate([1.0, 2.0, 3.0]) == Estimate(2.0, pytest.approx(4.30265 / 3**0.5), 3)


def test_one_value_has_no_interval():
    assert estimate([5.0]) == Estimate(5.0, None, 1)
    with pytest.raises(ValueError, match="expected at least one, got none"):
        estimate([])


def test_equal_values_have_an_interval_of_no_width():
    assert estimate([2.0, 2.0, 2.0]) == Estimate(2.0, 0.0, 3)


@given(VALUES)
def test_interval_is_scipys(values):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    if np.isfinite(low):
        found = estimate(values)
        assert found.mean - found.half == pytest.approx(low, abs=1e-6)
        assert found.mean + found.half == pytest.approx(high, abs=1e-6)


@given(VALUES, VALUES)
def test_comparison_is_the_paired_t_test(one, other):
    n = min(len(one), len(other))
    differences = np.array(one[:n]) - np.array(other[:n])
    if n < 2 or np.std(differences) < 1e-6:
        return
    found = compare(dict(enumerate(one)), dict(enumerate(other)))
    want = stats.ttest_rel(one[:n], other[:n])
    assert found.difference.n == n
    assert found.difference.mean == pytest.approx(differences.mean(), abs=1e-9)
    assert found.p == pytest.approx(want.pvalue, rel=1e-6)
    low, high = want.confidence_interval(0.95)
    assert found.difference.half == pytest.approx((high - low) / 2, rel=1e-6)


def test_only_common_seeds_are_compared():
    found = compare({0: 1.0, 1: 2.0, 7: 100.0}, {0: 0.0, 1: 3.0, 8: -100.0})
    assert (found.difference.mean, found.difference.n) == (0.0, 2)
    assert compare({0: 1.0}, {1: 1.0}) is None


def test_one_pair_has_neither_interval_nor_p():
    assert compare({3: 5.0, 4: 1.0}, {3: 2.0}) == Comparison(Estimate(3.0, None, 1), None)


def test_equal_differences():
    assert compare({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).p == 1
    assert compare({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}).p == 0


def test_seeds_share_a_setting_and_come_in_order():
    (one,) = group([make("lora", seed=seed) for seed in (2, 0, 1)])
    assert (one.label, one.members) == ("lora", (1, 2, 0))


def test_labels_show_what_differs_within_a_method():
    settings = ((16, 2e-3), (4, 2e-3), (16, 1e-3))
    configs = [make("imp"), *(make("lora", rank=rank, learning_rate=rate) for rank, rate in settings)]
    assert labels(*configs) == [
        "imp",
        "lora (rank 4, learning rate 0.002)",
        "lora (rank 16, learning rate 0.001)",
        "lora (rank 16, learning rate 0.002)",
    ]
    assert labels(make("imp"), make("lora", rank=4), make("lora", rank=16)) == [
        "imp",
        "lora (rank 4)",
        "lora (rank 16)",
    ]
    assert labels(make("imp", checkpointing=True), make("imp")) == ["imp (checkpointing off)", "imp (checkpointing on)"]


def test_matched_runs_that_differ_in_the_seed_are_one_setting():
    seeds = [make("random-mask", seed=seed, match=f"runs/imp-quickstart-seed{seed}") for seed in range(3)]
    other = make("random-mask", match="runs/imp-smoke-seed0")
    assert labels(*seeds) == ["random-mask"]
    assert labels(*seeds, other) == ["random-mask (match imp-quickstart)", "random-mask (match imp-smoke)"]


def test_what_is_measured_parts_no_settings_and_what_is_not_read_neither():
    assert labels(make("imp"), make("imp", seed=1, source_tasks="piqa", drift=False, limit=5)) == ["imp"]
    assert labels(make("imp"), make("imp", seed=1, rank=3)) == ["imp"]


def test_settings_that_differ_in_joined_fields_are_one():
    (one,) = group([make("lora", rank=rank) for rank in (16, 4)], joined=("rank",))
    assert one.label == "lora"
    controls = [make("random-mask", density=density) for density in (0.1, 0.2)] + [make("random-mask", match="runs/a")]
    uniform, shuffled = sorted(group(controls, joined=("density", "match")), key=lambda one: -len(one.members))
    assert (uniform.members, shuffled.members) == ((0, 1), (2,))


SMALL = st.integers(0, 3).map(float)


@given(st.lists(st.tuples(SMALL, SMALL), min_size=1))
def test_the_front_is_what_no_point_beats_and_beats_all_others(points):
    best = set(front(points))

    def is_beaten(index):
        x, y = points[index]
        return any(a >= x and b >= y and (a > x or b > y) for a, b in points)

    assert best == {index for index in range(len(points)) if not is_beaten(index)}
    assert best
