"""What the benchmarks rest on: turns and ratios, checks that fail, memory that is counted, comparison, tables, fits."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

from benchmarks.arena import Arena, describe
from benchmarks.bench_products import OPERATIONS, PROVIDERS, product
from benchmarks.checks import assert_within, check_layer, make_problem
from benchmarks.compare import THRESHOLD, regressions
from benchmarks.memory import extra_bytes, held_bytes, saved_bytes
from benchmarks.providers import FULL, LAYERS, TICKET_NAME, ticket_mask
from benchmarks.race import Contestant, Replay, UnavailableError, ratios, run_rounds
from benchmarks.report import duration, exponent, exponent_table, size, table, tables
from benchmarks.targets import target_table
from rigsa_kernels import SparsePattern

CPU = torch.device("cpu")
SHAPE = (48, 64)


def bench(name="a", ratio=1.0, spread=0.01, group="g", median=1e-3, **info):  # type: ignore[no-untyped-def]
    """A stored benchmark, as far as anything here reads it."""
    quartiles = [ratio * (1 - spread), ratio * (1 + spread)]
    extra = {"provider": name, "floor": "floor", "ratio": ratio, "ratio_quartiles": quartiles}
    stats = {"median": median, "q1": median, "q3": median}
    return {"fullname": f"bench.py::{name}", "group": group, "stats": stats, "extra_info": extra | info}


class TestRace:
    def test_providers_take_turns_forwards_and_backwards(self):
        order: list[str] = []
        entries = {name: Contestant(lambda name=name: order.append(name), lambda: None) for name in "abc"}
        seconds = run_rounds(entries, stopwatch, budget=0, rounds=(2, 9))
        assert "".join(order) == "abc" + "abc" + "cba"
        assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abc", 2)

    @pytest.mark.parametrize(("budget", "rounds"), [(0, 2), (5, 3), (1000, 9)])
    def test_rounds_fill_the_budget(self, budget, rounds):
        entries = {name: Contestant(lambda: None, lambda: None) for name in "ab"}
        assert len(run_rounds(entries, lambda run: 1.0, budget, (2, 9))["a"]) == rounds

    def test_what_prepares_is_not_timed(self):
        order: list[str] = []
        entry = Contestant(lambda: order.append("run"), lambda: None, lambda: order.append("prepare"))
        run_rounds({"": entry}, lambda run: [order.append("start"), run(), 1.0][-1], 0, (1, 1))
        assert order == ["prepare", "start", "run"] * 2

    def test_the_ratio_is_taken_within_a_round(self):
        """A neighbour that makes one round ten times as slow does not move it."""
        floor, ours = [1.0, 1.0, 10.0, 1.0], [2.0, 2.0, 20.0, 2.0]
        assert ratios(ours, floor) == [2.0] * 4
        assert describe(Contestant(print, print), ours, floor)["ratio"] == 2

    def test_rates(self):
        entry = Contestant(print, print, least=0.5, bytes=int(6e9), tokens=100)
        fields = describe(entry, [2.0, 2.0], None)
        assert fields == {"tokens_per_second": 50, "gb_per_second": 3, "roofline_share": 0.25}

    def test_a_failure_is_its_own_provider_s(self):
        def unavailable() -> Contestant:
            raise UnavailableError("no such device")

        def wrong() -> None:
            raise AssertionError("y: off")

        good, bad = Contestant(lambda: None, lambda: None), Contestant(lambda: None, wrong)
        arena = Arena(CPU, "smoke", Replay(), [])
        outcome = arena.race("g", "good", {"good": lambda: good, "bad": lambda: bad, "absent": unavailable})
        assert set(outcome.seconds) == {"good"}
        assert {name: type(failure) for name, failure in outcome.failures.items()} == {
            "bad": AssertionError,
            "absent": UnavailableError,
        }
        with pytest.raises(pytest.skip.Exception, match="no such device"):
            arena.record(outcome, "absent", None)
        with pytest.raises(AssertionError, match="y: off"):
            arena.record(outcome, "bad", None)


def stopwatch(run) -> float:  # type: ignore[no-untyped-def]
    run()
    return 1.0


def test_pytest_benchmark_gets_the_times_that_were_measured():
    replay, seen = Replay(), []

    class Benchmark:
        def pedantic(self, target, rounds):  # type: ignore[no-untyped-def]
            for _ in range(rounds):
                start = replay.clock()
                target()
                seen.append(replay.clock() - start)

    replay.into(Benchmark(), [3.0, 1.0, 2.0])
    assert seen == [3.0, 1.0, 2.0]


class TestChecks:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("density", [1.0, 0.2])
    @pytest.mark.parametrize("provider", [name for name in LAYERS if "compile" not in name])
    def test_every_layer_passes(self, provider, density, dtype):
        if provider.startswith("PEFT"):
            pytest.importorskip("peft")
        problem = make_problem(5, SHAPE, dtype, CPU)
        try:
            layer = LAYERS[provider](problem, density)
        except UnavailableError as reason:
            pytest.skip(str(reason))
        check_layer(layer, problem)

    @pytest.mark.parametrize("name", ["rigsa_values", "rigsa_alpha", "weight"])
    def test_a_layer_that_is_off_is_caught(self, name):
        problem = make_problem(5, SHAPE, torch.bfloat16, CPU)
        layer = LAYERS["ours, exact"](problem, 0.2)
        wanted = layer.weight

        def other(own):  # type: ignore[no-untyped-def]
            return wanted({**own, name: own[name] * 1.1}) if name in own else wanted(own) * 1.1

        layer.weight = other
        with pytest.raises(AssertionError, match=r"off by .* is allowed"):
            check_layer(layer, problem)

    def test_the_bound_is_the_eager_error_and_a_rounding(self):
        want = torch.tensor([1.0], dtype=torch.float64)
        eps = torch.finfo(torch.bfloat16).eps
        assert_within("y", want + 1.9 * eps, want, want, want.max(), torch.bfloat16)
        with pytest.raises(AssertionError, match="y: off"):
            assert_within("y", want + 2.1 * eps, want, want, want.max(), torch.bfloat16)

    @pytest.mark.parametrize("provider", PROVIDERS)
    @pytest.mark.parametrize("operation", OPERATIONS)
    @pytest.mark.parametrize("density", [1.0, 0.3])
    def test_products_are_what_they_say(self, density, operation, provider):
        """On a CPU the operators run in PyTorch, so the calls that a GPU times can be checked here."""
        problem = make_problem(8, SHAPE, torch.bfloat16, CPU)
        pattern = SparsePattern.dense(*SHAPE)
        if density < 1:
            pattern = SparsePattern.from_mask(ticket_mask(SHAPE, density, CPU))
        run, want, eager = product(problem, pattern, operation, provider)
        assert run().shape == want.shape
        assert_within(provider, run(), want, eager, want.abs().max(), torch.bfloat16)


class TestMemory:
    def test_saved_bytes_leave_parameters_out_and_count_a_storage_once(self):
        linear = nn.Linear(8, 4)
        x = torch.randn(16, 8, requires_grad=True)
        assert saved_bytes(lambda: linear(x), linear) == 16 * 8 * 4
        assert saved_bytes(lambda: (linear(x), linear(x[:8])), linear) == 16 * 8 * 4

    def test_held_bytes_count_a_storage_once(self):
        x = torch.zeros(10)
        assert held_bytes([x, x[:3], torch.zeros(5)]) == 60

    def test_extra_bytes_are_those_of_the_worst_moment(self):
        mebi = 2**20

        def run() -> None:
            first = torch.zeros(mebi, dtype=torch.int8)
            second = torch.zeros(2 * mebi, dtype=torch.int8)
            del first, second
            torch.zeros(mebi, dtype=torch.int8)

        assert 3 * mebi <= extra_bytes(run, CPU) < 3.1 * mebi


class TestCompare:
    def test_equal_runs_pass(self):
        run = [bench("a", 0.9), bench("b", 3.0)]
        assert regressions(run, run) == []

    def test_seconds_alone_do_not_matter(self):
        assert regressions([bench(median=1.0)], [bench(median=9.0)]) == []

    def test_a_grown_ratio_is_named(self):
        (line,) = regressions([bench("a", 1.0), bench("b", 1.0)], [bench("a", 1.0), bench("b", 1.5)])
        assert re.search(r"::b: 1\.500 of the floor, was 1\.000", line)

    @pytest.mark.parametrize(("factor", "count"), [(THRESHOLD * 0.99, 0), (THRESHOLD * 1.01, 1), (0.5, 0)])
    def test_threshold(self, factor, count):
        assert len(regressions([bench(ratio=2.0)], [bench(ratio=2.0 * factor)])) == count

    def test_noise_that_overlaps_is_no_regression(self):
        assert regressions([bench(spread=0.3)], [bench(ratio=1.3, spread=0.3)]) == []

    def test_nothing_in_common_is_an_error(self):
        with pytest.raises(ValueError, match="none in common"):
            regressions([bench("a")], [bench("b")])


class TestReport:
    @pytest.mark.parametrize("power", [-1.0, 0.0, 1.0, 1.5])
    def test_exponent_of_a_power_law(self, power):
        xs = [2.0, 3.0, 10.0, 50.0]
        assert math.isclose(exponent(xs, [7 * x**power for x in xs]), power, abs_tol=1e-12)

    def test_exponent_needs_two_points(self):
        with pytest.raises(ValueError, match="two different points"):
            exponent([3.0, 3.0], [1.0, 2.0])

    def test_exponent_table(self):
        rows = [bench("ours", axis="tokens", x=x, median=x**2) for x in (1, 2, 4)]
        assert "| tokens | ours | 1 - 4 | 2.00 | 2.00 |" in exponent_table(rows)

    def test_table_has_the_columns_that_are_measured(self):
        rows = [bench("nn.Linear", saved_bytes=2**20), bench("ours", 1.234)]
        assert table(rows).splitlines() == [
            "| provider | median | quartiles | ratio | saved for backward |",
            "| --- | ---: | ---: | ---: | ---: |",
            "| nn.Linear | 1 ms | 1 ms - 1 ms | 1.00 | 1 MiB |",
            "| ours | 1 ms | 1 ms - 1 ms | 1.23 |  |",
        ]

    def test_tables_group_by_question(self):
        text = tables([bench("a", group="one"), bench("b", group="two"), bench("c", group="one")])
        assert text.index("### one") < text.index("| c |") < text.index("### two")

    def test_targets(self):
        group = "training step, small"
        text = target_table([bench(FULL, 1.0, group=group), bench(TICKET_NAME, 0.8, group=group)])
        assert f"| {group} | {TICKET_NAME} / {FULL} | 0.80 | ≤ 0.85 | met |" in text
        assert "missed" in target_table([bench(FULL, 1.0, group=group), bench(TICKET_NAME, 0.9, group=group)])

    @pytest.mark.parametrize(("seconds", "text"), [(2.0, "2 s"), (0.0345, "34.5 ms"), (1.5e-7, "0.15 µs")])
    def test_duration(self, seconds, text):
        assert duration(seconds) == text

    @pytest.mark.parametrize(("count", "text"), [(10, "10 B"), (1536, "1.5 KiB"), (3 * 2**30, "3 GiB")])
    def test_size(self, count, text):
        assert size(count) == text
