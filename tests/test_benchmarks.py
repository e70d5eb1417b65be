"""What the benchmarks rest on: turns and ratios, checks that fail, memory that is counted, comparison, tables, fits."""

from __future__ import annotations

import gc
import importlib
import json
import math
import re
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import all_weights, bench_step, tile_figure
from benchmarks.arena import Arena, describe, heats
from benchmarks.bench_products import OPERATIONS, PROVIDERS, product
from benchmarks.checks import assert_within, check_layer, make_problem
from benchmarks.compare import RULE, SHORTEST, THRESHOLD, RecordError, check_common, compare, read_record
from benchmarks.loss_curves import draw, labels, main, styles
from benchmarks.memory import extra_bytes, held_bytes, saved_bytes, tensors_of
from benchmarks.models import make_model
from benchmarks.providers import (
    FROZEN,
    FULL,
    GRADIENTS,
    LAYERS,
    LORA_DEFAULT,
    SHIRA,
    TICKET_NAME,
    TRAINEES,
    model_linears,
    share,
    ticket_mask,
)
from benchmarks.race import Contestant, Replay, UnavailableError, ratios, run_rounds
from benchmarks.report import duration, exponent, exponent_table, size, table, tables
from benchmarks.shapes import Batch
from benchmarks.targets import BASE, TARGETS, target_table
from rigsa.errors import RigsaError
from rigsa_kernels import SparsePattern

CPU = torch.device("cpu")
SHAPE = (48, 64)


FOLDER = Path(__file__).parents[1] / "benchmarks"
COMMANDS = [path.stem for path in sorted(FOLDER.glob("*.py")) if path.stem not in ("conftest", "__init__")]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_module_finds_what_it_imports(name):
    """Some are commands that nothing else imports."""
    importlib.import_module(f"benchmarks.{name}")


def bench(name="a", ratio=1.0, spread=0.01, group="g", median=1e-2, **info):  # type: ignore[no-untyped-def]
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
        rates = {"tokens_per_second": 50, "gb_per_second": 3, "roofline_share": 0.25, "least_seconds": 0.5}
        assert fields == rates

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


class Built:
    """What a provider builds, as large as one likes."""


class TestHeats:
    @pytest.mark.parametrize(
        ("at_once", "parts"), [(None, ["abcde"]), (2, ["ab", "cd", "e"]), (5, ["abcde"]), (9, ["abcde"])]
    )
    def test_parts(self, at_once, parts):
        assert ["".join(part) for part in heats("abcde", at_once)] == parts

    def test_a_floor_alone_still_runs(self):
        assert Arena(CPU, "smoke", Replay(), []).race("g", "f", {"f": self.builder([], "f")}).seconds["f"]

    def test_who_is_not_asked_for_is_not_built(self):
        built: list[tuple[str, weakref.ref[Built]]] = []
        arena = Arena(CPU, "smoke", Replay(), [])
        arena.asked = {"b", "d"}
        arena.race("g", "f", {name: self.builder(built, name) for name in "fabcd"}, at_once=2)
        assert "".join(name for name, _ in built) == "fbd"

    def test_every_heat_has_the_floor_and_what_it_built_is_gone_before_the_next(self):
        built: list[tuple[str, weakref.ref[Built]]] = []
        alive: list[str] = []
        builders = {name: self.builder(built, name, alive) for name in "fabcd"}
        outcome = Arena(CPU, "smoke", Replay(), []).race("g", "f", builders, at_once=2)
        assert "".join(name for name, _ in built) == "fabfcd"
        assert alive == ["", "f", "fa", "", "f", "fc"]  # before each of them
        assert not any(made() for _, made in built)
        assert len(outcome.seconds["f"]) == len(outcome.seconds["a"]) + len(outcome.seconds["c"])
        assert outcome.info["f"]["ratio"] == 1

    def test_a_failure_keeps_nothing_alive(self):
        made: list[weakref.ref[Built]] = []

        def build() -> Contestant:
            model = Built()
            made.append(weakref.ref(model))
            try:
                raise KeyError("first")
            except KeyError as error:
                raise AssertionError("off") from error

        outcome = Arena(CPU, "smoke", Replay(), []).race("g", "f", {"f": build})
        assert made[0]() is None
        with pytest.raises(AssertionError, match="off"):
            raise outcome.failures["f"]

    @staticmethod
    def builder(built, name, alive=None):  # type: ignore[no-untyped-def]
        def build() -> Contestant:
            if alive is not None:
                alive.append("".join(name for name, made in built if made()))
            model = Built()
            model.itself = model  # as modules and their hooks do
            built.append((name, weakref.ref(model)))
            return Contestant(lambda: model, lambda: None)

        return build

    def test_whole_models_share_frozen_weights_and_are_freed(self, monkeypatch):
        """Two blocks of SmolLM2-135M: a heat of real providers, each of which checks itself and makes a step."""
        pytest.importorskip("peft")
        models: list[weakref.ref[nn.Module]] = []
        alive: list[int] = []

        def observed(name, model):  # type: ignore[no-untyped-def]
            gc.collect()
            alive.append(sum(made() is not None for made in models))
            trainee = TRAINEES[name](model)
            models.append(weakref.ref(trainee.model))
            embeddings.add(trainee.model.get_input_embeddings().weight.data_ptr())
            return trainee

        embeddings: set[int] = set()
        names = (FULL, TICKET_NAME, LORA_DEFAULT)
        monkeypatch.setattr("benchmarks.arena.ROUNDS", {"smoke": (2, 2)})
        monkeypatch.setattr(bench_step, "TRAINEES", {name: partial(observed, name) for name in names})
        monkeypatch.setattr(bench_step, "step_floor", lambda *args: 1.0)
        arena, batch = Arena(CPU, "smoke", Replay(), []), Batch("135M", 2, 1, 4, "bfloat16")
        builders = {name: partial(bench_step.contestant, arena, batch, name) for name in names}
        outcome = arena.race("g", FULL, builders, at_once=1)
        assert not outcome.failures
        assert alive == [0, 1, 0, 1]
        assert not any(made() for made in models)
        assert len(embeddings) == 1


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

    def test_saved_bytes_leave_no_graph_behind(self):
        """An operation that saves its own output, which the hooks are given, too."""
        nodes: list[weakref.ref[object]] = []

        class Marked(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):  # type: ignore[no-untyped-def]
                nodes.append(weakref.ref(ctx))
                return x.clone()

        x = torch.randn(4, requires_grad=True)
        saved_bytes(lambda: Marked.apply(x).exp().sum(), nn.Linear(1, 1))
        gc.collect()
        assert [node() for node in nodes] == [None]

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


def regressions(before, now, device="cpu"):  # type: ignore[no-untyped-def]
    return compare(before, now, device).worse


class TestCompare:
    def test_equal_runs_pass(self):
        run = [bench("a", 0.9), bench("b", 3.0)]
        found = compare(run, run, "cpu")
        assert (found.judged, found.worse, found.passed) == (2, [], True)

    def test_seconds_alone_do_not_matter(self):
        assert regressions([bench(median=1.0)], [bench(median=9.0)]) == []

    def test_a_grown_ratio_is_named(self):
        (line,) = regressions([bench("a", 1.0), bench("b", 1.0)], [bench("a", 1.0), bench("b", 1.5)])
        assert line == "bench.py::b: 1.500 (1.485 to 1.515) of the floor, was 1.000 (0.990 to 1.010)"

    @pytest.mark.parametrize(("factor", "count"), [(THRESHOLD * 0.99, 0), (THRESHOLD * 1.01, 1), (0.5, 0)])
    def test_threshold(self, factor, count):
        assert len(regressions([bench(ratio=2.0)], [bench(ratio=2.0 * factor)])) == count

    def test_noise_that_overlaps_is_no_regression(self):
        assert regressions([bench(spread=0.3)], [bench(ratio=1.3, spread=0.3)]) == []

    @pytest.mark.parametrize("ratio", [2.0, 0.5])
    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_on_a_cpu_the_shorter_of_provider_and_floor_must_last(self, device, ratio):
        for factor, judged in ((1.01, True), (0.99, device == "cuda")):
            median = factor * SHORTEST * max(ratio, 1)
            found = compare([bench(ratio=ratio, median=median)], [bench(ratio=2 * ratio, median=2 * median)], device)
            assert (found.judged, found.too_short, len(found.worse)) == (judged, not judged, judged)
            assert not found.passed  # a regression, or nothing judged

    def test_floors_are_not_compared_with_themselves(self):
        assert compare([bench("floor")], [bench("floor")], "cpu").judged == 0

    def test_the_rule_states_its_numbers(self):
        assert f"{THRESHOLD:g} times" in RULE
        assert "quartiles" in RULE

    def test_nothing_in_common_is_an_error(self):
        with pytest.raises(RecordError, match=r"--compare old\.json: none of its 1 benchmarks is among the 2 to run"):
            check_common([bench("a")], ["b", "c"], Path("old.json"))

    @pytest.mark.parametrize("text", [None, "", "{}", "[]", '{"benchmarks"'])
    def test_no_record(self, tmp_path, text):
        file = tmp_path / "results.json"
        if text is not None:
            file.write_text(text)
        with pytest.raises(RecordError, match=f"--compare {file}: .*expected"):
            read_record(file)

    def test_pytest_says_so_in_one_line_and_runs_nothing(self, tmp_path):
        file = tmp_path / "results.json"
        file.write_text(json.dumps({"benchmarks": [bench("a")]}))
        command = [sys.executable, "-m", "pytest", "benchmarks/bench_gradient.py", "--compare", str(file)]
        root = Path(__file__).resolve().parents[1]
        ran = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
        assert ran.returncode == pytest.ExitCode.USAGE_ERROR
        assert f"--compare {file}: none of its 1 benchmarks" in ran.stdout + ran.stderr
        assert "Traceback" not in ran.stdout + ran.stderr


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
            "| nn.Linear | 10 ms | 10 ms - 10 ms | 1.00 | 1 MiB |",
            "| ours | 10 ms | 10 ms - 10 ms | 1.23 |  |",
        ]

    def test_tables_group_by_question(self):
        text = tables([bench("a", group="one"), bench("b", group="two"), bench("c", group="one")])
        assert text.index("### one") < text.index("| c |") < text.index("### two")

    def test_targets(self):
        group = "training step, small"
        rows = [
            bench(FULL, 1.0, group=group, least_seconds=0.5, roofline_share=0.5),
            bench(TICKET_NAME, 0.8, group=group, least_seconds=0.36, roofline_share=0.45),
            bench(SHIRA, 1.2, group=group, least_seconds=0.36, roofline_share=0.3),
            bench(FROZEN, 0.6, group=group),
            bench(GRADIENTS, 0.75, group=group),
        ]
        text = target_table(rows)
        assert (
            f"| {group} | {TICKET_NAME} / {FULL} | ≤ 0.85 | 0.80 | met | 45% / 50% | 0.72 | 0.36 | 0.60 | 0.75 |"
            in text
        )
        assert (
            f"| {group} | {SHIRA} / {TICKET_NAME} | ≥ 1.6 | 1.50 | not met | 30% / 45% | 1.00 | 3.33 | 2.00 | 1.60 |"
            in text
        )
        assert f"| {group} | {TICKET_NAME} / {LORA_DEFAULT} | ≤ 0.6 |  | not measured |  |  |  |  |  |" in text

    def test_every_target_is_reported_where_its_question_is_asked(self):
        rows = [bench(FULL, group="training step, x"), bench(BASE, group="generation of 4"), bench("a", group="other")]
        lines = target_table(rows).splitlines()[2:]
        assert [line.split(" | ")[1] for line in lines] == [f"{own.numerator} / {own.denominator}" for own in TARGETS]
        assert target_table([bench("a", group="other")]) == ""

    @pytest.mark.parametrize(("seconds", "text"), [(2.0, "2 s"), (0.0345, "34.5 ms"), (1.5e-7, "0.15 µs")])
    def test_duration(self, seconds, text):
        assert duration(seconds) == text

    @pytest.mark.parametrize(("count", "text"), [(10, "10 B"), (1536, "1.5 KiB"), (3 * 2**30, "3 GiB")])
    def test_size(self, count, text):
        assert size(count) == text


class TestLossCurves:
    @staticmethod
    def run_folder(path, losses=(2.0, 1.0, 0.5), **config):  # type: ignore[no-untyped-def]
        (path / "level_0").mkdir(parents=True)
        (path / "config.json").write_text(json.dumps({"seed": 0, "values_dtype": "float32"} | config))
        lines = [{"step": 10 * (n + 1), "loss": loss} for n, loss in enumerate(losses)]
        (path / "level_0" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    def test_labels_are_what_differs(self):
        configs = [{"a": 1, "b_c": 2, "d": 0}, {"a": 1, "b_c": 3, "d": 0}, {"a": 1, "b_c": 2, "d": 4}]
        assert labels(configs) == ["b-c 2, d 0", "b-c 3", "d 4"]
        assert labels([{"a": 1, "prunings": 1}, {"a": 1, "prunings": 0}]) == ["run 1", "run 2"]

    def test_styles_differ_without_colour(self):
        seven = [style for style, _ in zip(styles(), range(7), strict=False)]
        for name in ("color", "linestyle", "marker"):
            assert len({str(style[name]) for style in seven}) == 7

    def test_curves_are_those_of_the_logs(self, tmp_path):
        runs = [self.run_folder(tmp_path / dtype, values_dtype=dtype) for dtype in ("float32", "bfloat16")]
        out = tmp_path / "docs" / "curves.svg"
        main([*map(str, runs), "--out", str(out)])
        text = out.read_text()
        assert [name for name in ("values-dtype float32", "values-dtype bfloat16") if f"<!-- {name} -->" in text] == [
            "values-dtype float32",
            "values-dtype bfloat16",
        ]
        draw(runs, tmp_path / "curves.png")
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")

    def test_what_is_no_run_is_named_and_no_file_written(self, tmp_path):
        good, empty = self.run_folder(tmp_path / "good"), self.run_folder(tmp_path / "empty", losses=())
        out = tmp_path / "x.png"
        for run, message in ((tmp_path, r"no config\.json"), (empty, "found no lines")):
            with pytest.raises(RigsaError, match=message):
                draw([good, run], out)
        with pytest.raises(SystemExit, match=r"error: --out .*\.gif: expected"):
            main([str(good), "--out", str(tmp_path / "x.gif")])
        assert not out.exists()


def test_the_host_does_little_more_for_a_gated_layer_than_its_gradient_takes():
    """Counted, as time is noise; the floor does nothing but the products and the launch of a kernel."""
    pytest.importorskip("triton")
    from unittest import mock

    from benchmarks import layer_host
    from benchmarks.optimizer_host import calls, without_device
    from rigsa_kernels import ops, triton_gather

    with without_device(), mock.patch.object(ops, "_dvalues", triton_gather.checked_dvalues):
        found = {}
        for name, provider in layer_host.providers().items():
            once = layer_host._pass(provider)
            once()
            found[name] = calls(once)
    floor = found[layer_host.GATHERING]
    assert found[layer_host.PLAIN] < found[layer_host.FUNCTION] < floor
    assert max(found[layer_host.TICKET], found[layer_host.LEVEL_0]) <= floor + 25, found
    timed = layer_host.measure(number=2, repeats=1)
    assert timed.keys() == found.keys()
    assert min(timed.values()) > 0


def test_the_figure_of_tiles_has_every_tile_and_density(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tile_figure, "SHAPES", ((48, 40),))
    monkeypatch.setattr(tile_figure, "TOKENS", 8)
    monkeypatch.setattr(tile_figure, "DENSITIES", (0.1, 0.5))
    tile_figure.main(["--out", str(tmp_path / "tiles.svg"), "--rounds", "1", "--dtypes", "float32"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ")] == [
        "| tile", *(f"| {tile}" for tile in tile_figure.TILES)
    ]  # fmt: skip
    assert (tmp_path / "tiles.svg").read_text().count("<svg") == 1
    with pytest.raises(SystemExit):
        tile_figure.main(["--out", str(tmp_path / "tiles.doc")])


@pytest.fixture(scope="module")
def tiny_base():  # type: ignore[no-untyped-def]
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    return make_model(Batch("135M", 1, 2, 8, "bfloat16"), CPU, head_dim=32, vocab_size=1000, **sizes)


OURS = [name for name in all_weights.CONTESTANTS if "level 0" in name or "torch AdamW" in name or "Masked" in name]


@pytest.mark.parametrize("name", OURS)
def test_all_weights_are_learned_and_their_bytes_counted(name, tiny_base):
    """A weight takes its copy of 2 bytes, a gradient of 2 or 4, and moments; a level 0 the frozen weight as well."""
    build, batches = all_weights.CONTESTANTS[name], all_weights.batches_of(Batch("135M", 1, 4, 8, "bfloat16"), 2)
    (first, *_), (last, *_) = (all_weights.train(build, tiny_base, batches, 3e-3, steps) for steps in (2, 24))
    assert last < first - 1
    weights = sum(linear.weight.numel() for linear in model_linears(tiny_base).values())
    bare = held_bytes(tensors_of(tiny_base)) - 2 * weights
    least = 2 + 2 + (2 if "8-bit" in name else 4)
    assert (all_weights.peak_bytes(build, tiny_base, batches[0]) - bare) / weights > least
    arrives = all_weights.arriving(build, tiny_base)
    assert arrives == pytest.approx(0.0 if "torch" in name else 1.0, abs=0.1)


def test_what_is_not_installed_is_named_and_left_out(tiny_base, monkeypatch):
    monkeypatch.setattr(all_weights.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    needed = {"torchao": "needs torchao", "bitsandbytes": "pip install bitsandbytes"}
    needed |= {"GaLore": "needs galore_torch", "APOLLO": "needs apollo_torch"}
    for name, build in all_weights.CONTESTANTS.items():
        if name not in OURS:
            with pytest.raises(UnavailableError, match=needed[re.split("[ ,]", name)[0]]):
                build(share(tiny_base), 1e-3)
