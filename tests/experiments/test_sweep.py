"""The queue of a sweep with a runner that only writes results, and one real sweep on a model of 70 kB."""

import dataclasses
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rigsa.errors import RigsaError
from rigsa.experiments import lock, shared_results, sweep
from rigsa.experiments.config import Config
from rigsa.experiments.config_file import load
from rigsa.experiments.methods.registry import METHODS
from rigsa.experiments.presets import PRESETS, arguments_of
from rigsa.experiments.report.page import write_report
from rigsa.experiments.shared_results import share_results
from rigsa.experiments.sweep import command_of, print_commands, run_logged, run_sweep
from rigsa.experiments.sweep_plan import VARIABLE, Job, Plan, Shard, plan_sweep
from rigsa.files import mark_done, read_json, write_json
from rigsa.run import build_parser, main, resolve

COUNTS = {"tokens": 300, "examples": 300, "perplexity": 1.5}


def planned(out, methods="imp", seeds="0", vary=(), preset="smoke", **options):  # type: ignore[no-untyped-def]
    return plan_sweep(methods, seeds, vary, preset=preset, options=options, out=Path(out))


def names(plan) -> list[str]:  # type: ignore[no-untyped-def]
    return [job.name for job in plan.jobs]


def parsed(command: list[str]) -> Config:
    assert command[:3] == [sys.executable, "-m", "rigsa.run"]
    return resolve(build_parser().parse_args(command[3:]))


class FakeRuns:
    """A runner that writes what a finished run holds, or what a failed one says. `ran` are the names, in order."""

    def __init__(self, codes: dict[str, int] | None = None) -> None:
        self.ran: list[str] = []
        self.codes = codes or {}
        self.reports: list[list[str]] = []

    def __call__(self, command, log) -> int:  # type: ignore[no-untyped-def]
        config, folder = parsed(list(command)), Path(command[-1])
        assert load(folder) == config
        assert not (folder / "failed.json").exists()  # a run's own report would take it for failed
        self.ran.append(folder.name)
        code = self.codes.get(folder.name, 0)
        os.write(log.fileno(), b"level 0:  33%|###       | 2/6rigsa: one\ntwo\nlevel 0:  50%|####      | 3/6\n")
        if code == 0:
            test = {f"{shots}-shot": {"accuracy": 10 + config.seed, "loss": 1.0} | COUNTS for shots in config.shots}
            for level in ("base", "level_0", "level_1"):
                metrics = {"level": int(level[-1]) if level != "base" else -1, "density": 0.5, "free": 1, "test": test}
                write_json(folder / level / "metrics.json", metrics | {"pruning": {}})
                write_json(
                    folder / level / "resources.json", {"steps": 1, "train_seconds": 1.5, "peak_memory_bytes": 1}
                )
                mark_done(folder / level)
        return code

    def report(self, runs: list[Path], out: Path) -> None:
        self.reports.append([run.name for run in runs])


def run(plan, codes=None, shard="1/1") -> FakeRuns:  # type: ignore[no-untyped-def]
    runs = FakeRuns(codes)
    run_sweep(plan, runs.report, shard=Shard.parse(shard), run=runs)
    return runs


def test_the_plan_is_methods_by_seeds_by_values(tmp_path):
    plan = planned(tmp_path, "random-mask,imp,lora", "0,1", ["lora:rank=1,4", "imp:ranking=layer,global"])
    assert names(plan) == [
        "imp-ranking-layer-seed0", "imp-ranking-global-seed0", "lora-rank1-seed0", "lora-rank4-seed0",
        "random-mask-ranking-layer-seed0", "random-mask-ranking-global-seed0",
        "imp-ranking-layer-seed1", "imp-ranking-global-seed1", "lora-rank1-seed1", "lora-rank4-seed1",
        "random-mask-ranking-layer-seed1", "random-mask-ranking-global-seed1",
    ]  # fmt: skip
    configs = {job.name: job.config for job in plan.jobs}
    assert configs["lora-rank4-seed1"] == dataclasses.replace(PRESETS["smoke"]("lora"), rank=4, seed=1)
    control = configs["random-mask-ranking-global-seed1"]
    assert control.match == str(tmp_path / "imp-ranking-global-seed1")
    assert control == dataclasses.replace(PRESETS["smoke"]("random-mask"), seed=1, match=control.match)


def test_a_field_varies_over_the_methods_that_read_it(tmp_path):
    plan = planned(tmp_path, "full,lora,qlora", vary=["rank=4,8", "weight-decay=0.0,1e-3"], epochs=3, lora_alpha=8.0)
    assert Counter(job.config.method.name for job in plan.jobs) == {"full": 2, "lora": 4, "qlora": 4}
    assert "qlora-rank4-weight-decay0.001-seed0" in names(plan)
    assert {job.config.epochs for job in plan.jobs} == {3}
    full = PRESETS["smoke"]("full")
    assert (
        {job.config.lora_alpha for job in plan.jobs if job.config.method.name == "full"} == {full.lora_alpha} != {8.0}
    )
    assert names(planned(tmp_path, vary=["checkpointing=true,false"])) == ["imp-checkpointing-seed0",
                                                                           "imp-no-checkpointing-seed0"]  # fmt: skip


def test_a_random_mask_takes_the_settings_of_its_imp_run(tmp_path):
    plan = planned(tmp_path, "imp,random-mask", vary=["init_scale=1,2", "imp:prunings=0,2", "imp:eps=1e-6"])
    jobs = {job.name: job for job in plan.jobs}
    assert [job.name for job in plan.jobs if job.depends_on] == [
        "random-mask-init-scale1.0-prunings2-eps1e-06-seed0",  # none for 0 prunings, which leave no ticket
        "random-mask-init-scale2.0-prunings2-eps1e-06-seed0",
    ]
    control = jobs["random-mask-init-scale2.0-prunings2-eps1e-06-seed0"]
    assert control.depends_on == "imp-init-scale2.0-prunings2-eps1e-06-seed0"
    assert (control.config.init_scale, control.config.eps) == (2, 1e-6)
    assert control.config.prunings == PRESETS["smoke"]("random-mask").prunings  # which it does not read
    levels = planned(tmp_path, "imp,reinit", vary=["reinit:match_level=1,2"], prunings=2).jobs
    assert [(job.name, job.config.match_level, job.depends_on) for job in levels[1:]] == [
        ("reinit-match-level1-seed0", 1, "imp-seed0"), ("reinit-match-level2-seed0", 2, "imp-seed0")]  # fmt: skip
    dense = planned(tmp_path, "imp,random-mask", vary=["imp:density=0.1,0.2"]).jobs
    assert [(job.config.match, job.config.density) for job in dense[2:]] == [
        (str(tmp_path / "imp-density0.1-seed0"), 0), (str(tmp_path / "imp-density0.2-seed0"), 0)]  # fmt: skip
    alone = planned(tmp_path, "random-mask", density=0.25).jobs
    assert [(job.name, job.config.match, job.depends_on) for job in alone] == [("random-mask-seed0", "", None)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"methods": "imp,magic"}, "--methods: expected some of imp, .*, got 'magic'"),
        ({"methods": ""}, "--methods: expected values separated by commas, got ''"),
        ({"methods": "imp,imp"}, "--methods: expected every value once, got imp twice"),
        ({"seeds": "0,,1"}, "--seeds: expected values separated by commas, got '0,,1'"),
        ({"seeds": "0,-1"}, "--seeds: expected numbers from 0 .* got '-1'"),
        ({"seeds": str(2**63)}, "--seeds: expected numbers"),
        ({"seeds": "1,01"}, "--seeds: expected every value once, got 1 twice"),
        ({"vary": ["rank"]}, "--vary: expected FIELD=VALUE"),
        ({"vary": ["lora:rank=1"]}, "--vary lora:rank=1: expected one of the sweep's methods, imp, got 'lora'"),
        ({"vary": ["ranks=1"]}, "--vary ranks=1: expected a configuration option .* got 'ranks'"),
        ({"vary": ["seed=1"]}, "other than seed"),
        ({"vary": ["rank=1"]}, "--vary rank=1: imp has no option --rank; only rosa, lora, qlora, shira have it"),
        ({"vary": ["epochs="]}, "--vary epochs: expected values separated by commas, got ''"),
        ({"vary": ["epochs=1,x"]}, "--vary epochs: expected whole numbers, got 'x'"),
        ({"vary": ["drift=yes"]}, "--vary drift: expected true or false, got 'yes'"),
        ({"vary": ["eps=1e-8,0.00000001"]}, "--vary eps: expected every value once"),
        ({"vary": ["epochs=1", "imp:epochs=2"]}, "--vary imp:epochs: epochs of imp is varied twice"),
        ({"vary": ["epochs=0"]}, "--epochs: expected 1 to 1,000,000,000, got 0"),
        ({"vary": ["gate=round"]}, "--gate: expected one of layer, model"),
        ({"vary": ["data=a%b,a_b"]}, "2 runs would have the folder .*imp-data-a_b-seed0"),
        ({"rank": 4}, "--rank: no run of this sweep would use it"),
        ({"epochs": 4, "vary": ["epochs=1,2"]}, "--epochs: no run of this sweep would use it"),
        ({"methods": "random-mask,lora"}, "no imp run of seed 0 with a ticket"),
        ({"methods": "imp,random-mask", "prunings": 0}, "no imp run of seed 0 with a ticket"),
        (
            {"methods": "imp,random-mask", "vary": ["imp:eps=0.1", "random-mask:eps=0.2"]},
            "no imp run of seed 0, eps 0.2 with a ticket",
        ),
    ],
)
def test_what_does_not_fit_is_one_message(wrong, message, tmp_path):
    with pytest.raises(RigsaError, match=message):
        planned(tmp_path / "sweep", **wrong)


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2", "1/2/3", ""])
def test_shards_count_from_one(text):
    with pytest.raises(RigsaError, match="--shard: expected i/n with i from 1 to n"):
        Shard.parse(text)
    assert Shard.parse("2/8") == Shard(2, 8)


@given(
    methods=st.permutations(["imp", "random-mask", "lora", "full"]).flatmap(
        lambda order: st.integers(1, 4).map(lambda count: order[:count])
    ),
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=5, unique=True),
    prunings=st.lists(st.integers(1, 9), max_size=3, unique=True),
    count=st.integers(1, 9),
)
def test_every_job_is_in_one_shard_after_what_it_depends_on(methods, seeds, prunings, count):
    if "imp" not in methods:
        methods = [*methods, "imp"]
    vary = ["prunings=" + ",".join(map(str, prunings))] if prunings else []
    plan = planned("sweep", ",".join(methods), ",".join(map(str, seeds)), vary)
    shards = [Shard(index, count).of(plan.jobs) for index in range(1, count + 1)]
    assert Counter(job.name for shard in shards for job in shard) == Counter(names(plan))
    for shard in shards:
        before: set[str | None] = {None}
        for job in shard:
            assert job.depends_on in before
            before.add(job.name)
    groups = [sum(job.depends_on is None for job in shard) for shard in shards]
    assert max(groups) - min(groups) <= 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", PRESETS)
def test_arguments_give_the_configuration_back(method, preset):
    """For every field that the method reads, another value."""

    def other(value, choices):  # type: ignore[no-untyped-def]
        if choices:
            return next(choice for choice in choices if choice != value)
        return not value if isinstance(value, bool) else "- o=\n" if isinstance(value, str) else value / 2 or 5

    config, changed = PRESETS[preset](method), 0
    for name, field in VARIABLE.items():
        if METHODS[method].reads(name):
            value = type(field.default)(other(getattr(config, name), field.metadata["choices"]))
            try:
                varied = dataclasses.replace(config, seed=3, **{name: value})
            except RigsaError:  # one value alone does not fit, such as --quantize
                continue
            if METHODS[method].matches and not varied.density:
                varied = dataclasses.replace(varied, match="runs/imp")
            job = Job("name", varied, {})
            plan = Plan(Path("out"), preset, [], [], {}, {}, [job])
            assert parsed(command_of(job, plan)) == varied
            changed += varied != dataclasses.replace(config, seed=3)
    assert changed > 20


@given(st.floats(-1, 1), st.floats(1e-9, 1e3), st.text())
def test_numbers_and_text_survive_the_command_line(alpha_init, learning_rate, system_prompt):
    config = dataclasses.replace(
        PRESETS["smoke"]("imp"), alpha_init=alpha_init, learning_rate=learning_rate, system_prompt=system_prompt
    )
    arguments = ["imp", "--preset", "smoke", *arguments_of(config, "smoke")]
    assert resolve(build_parser().parse_args(arguments)) == config


def test_runs_come_in_order_and_are_reported_when_all_are_done(tmp_path, capsys):
    plan = planned(tmp_path / "sweep", "imp,random-mask", "0,1")
    runs = run(plan)
    assert runs.ran == names(plan)
    assert runs.reports == [names(plan)]
    out = capsys.readouterr().out
    assert "[4/4] random-mask-seed1: 11.00 % at level 1, 3 s\n" in out
    assert "run                level  test accuracy  seconds\n" in out
    assert out.endswith("random-mask-seed1      1        11.00 %        3\n")
    record = read_json(tmp_path / "sweep" / "sweep.json")
    assert record["methods"] == ["imp", "random-mask"]
    assert [entry["name"] for entry in record["runs"]] == names(plan)
    assert record["runs"][1]["depends_on"] == "imp-seed0"


def test_running_again_runs_nothing_and_more_seeds_only_the_new(tmp_path):
    run(planned(tmp_path, "imp", "0"))
    again = run(planned(tmp_path, "imp", "0"))
    assert again.ran == []
    assert again.reports == [["imp-seed0"]]
    assert run(planned(tmp_path, "imp,lora", "1,0")).ran == ["imp-seed1", "lora-seed1", "lora-seed0"]


@pytest.mark.parametrize(("code", "said"), [(3, "exit code 3"), (-9, r"killed by SIGKILL \(out of memory\?\)")])
def test_a_failed_run_is_reported_and_skipped(code, said, tmp_path, capsys):
    plan = planned(tmp_path, "imp,random-mask", "0,1")
    runs = FakeRuns({"imp-seed0": code})
    with pytest.raises(
        RigsaError, match=r"2 of 4 runs did not finish: imp-seed0, random-mask-seed0\. The same command"
    ):
        run_sweep(plan, runs.report, run=runs)
    assert runs.ran == ["imp-seed0", "imp-seed1", "random-mask-seed1"]
    assert runs.reports == []
    out = capsys.readouterr().out
    log = re.escape(str(tmp_path / "imp-seed0" / "run.log"))
    assert re.search(rf"imp-seed0: failed, {said}; see {log}\n    rigsa: one\n    two\n", out)
    assert "random-mask-seed0: skipped, as imp-seed0 did not finish\n" in out
    assert read_json(tmp_path / "imp-seed0" / "failed.json") == {"exit_code": code, "message": "rigsa: one\ntwo"}
    assert not (tmp_path / "random-mask-seed0" / "config.json").exists()

    assert run(plan).ran == ["imp-seed0", "random-mask-seed0"]
    assert not (tmp_path / "imp-seed0" / "failed.json").exists()
    assert (tmp_path / "imp-seed0" / "run.log").read_text().count("$ ") == 2


def test_the_last_shard_writes_the_report(tmp_path):
    plan = planned(tmp_path, "imp,random-mask,lora", "0,1,2")
    first, second = run(plan, shard="1/2"), run(plan, shard="2/2")
    assert first.ran == ["imp-seed0", "random-mask-seed0", "lora-seed1", "imp-seed2", "random-mask-seed2"]
    assert second.ran == ["lora-seed0", "imp-seed1", "random-mask-seed1", "lora-seed2"]
    assert (first.reports, second.reports) == ([], [names(plan)])
    assert run(planned(tmp_path, "imp", "0"), shard="9/9").ran == []


def test_another_configuration_over_a_run_is_refused_before_anything_starts(tmp_path):
    run(planned(tmp_path, "imp", "0"))
    before = (tmp_path / "sweep.json").read_bytes()
    changed = planned(tmp_path, "lora,imp", "0", epochs=7)
    with pytest.raises(RigsaError, match=r"imp-seed0 holds a run with another .*\n  --epochs: 2 there, 7"):
        run(changed)
    with pytest.raises(RigsaError, match="another configuration"):
        print_commands(changed, Shard())
    assert (tmp_path / "sweep.json").read_bytes() == before
    assert not (tmp_path / "lora-seed0").exists()


def test_a_run_that_failed_at_once_may_be_corrected(tmp_path):
    with pytest.raises(RigsaError, match="1 of 1 runs"):
        run(planned(tmp_path, model="typo"), {"imp-seed0": 1})
    assert run(planned(tmp_path, model="right")).ran == ["imp-seed0"]
    assert load(tmp_path / "imp-seed0").model == "right"


def test_a_folder_that_is_no_sweep_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RigsaError, match="is not a sweep folder and not empty"):
        run(planned(tmp_path))
    with pytest.raises(RigsaError, match="is a file"):
        run(planned(tmp_path / "thesis.tex"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_that_another_process_holds_is_not_started(tmp_path, capsys):
    plan = planned(tmp_path, "imp,random-mask", "0,1")
    runs = FakeRuns()
    write_json(tmp_path / "sweep.json", {})
    with lock.locked(tmp_path / "imp-seed0" / "run.log") as held:
        assert held is not None
        with pytest.raises(RigsaError, match="did not finish: imp-seed0, random-mask-seed0"):
            run_sweep(plan, runs.report, run=runs)
    assert runs.ran == ["imp-seed1", "random-mask-seed1"]
    assert "imp-seed0: skipped, as another process is running it" in capsys.readouterr().out


def test_a_run_that_outlives_its_sweep_keeps_its_log_locked(tmp_path):
    path = tmp_path / "run.log"
    with lock.locked(path) as log:
        child = sweep.subprocess.Popen([sys.executable, "-c", "input()"], stdin=sweep.subprocess.PIPE, stdout=log)
    with lock.locked(path) as log:
        assert log is None
    child.communicate(b"\n")
    with lock.locked(path) as log:
        assert log is not None


def test_dry_run_prints_commands_that_can_be_pasted_and_writes_nothing(tmp_path, capsys):
    plan = planned(tmp_path / "a sweep", "imp,random-mask", "0,1", ["alpha_init=-1e-6"], system_prompt="")
    print_commands(plan, Shard(2, 2), ["--gpu-memory=9.0"])
    lines = capsys.readouterr().out.splitlines()
    assert [parsed(shlex.split(line)) for line in lines] == [job.config for job in plan.jobs[2:]]
    assert all("--gpu-memory=9.0" in line for line in lines)
    assert not (tmp_path / "a sweep").exists()


def test_base_and_level_0_are_shared_where_they_are_the_same(tmp_path):
    def shared(folder="base", **options) -> list[str]:  # type: ignore[no-untyped-def]
        """The names of the runs that find that folder before they start."""
        found = []

        def runner(command, log) -> int:  # type: ignore[no-untyped-def]
            if (Path(command[-1]) / folder / "done").exists():
                found.append(Path(command[-1]).name)
            return runs(command, log)

        plan, runs = planned(tmp_path / str(len(list(tmp_path.iterdir()))), **options), FakeRuns()
        run_sweep(plan, runs.report, run=runner)
        return found

    assert shared(seeds="0,1") == ["imp-seed1"]
    assert shared(seeds="0,1", eval_shots="0,2") == []  # the seed draws the examples
    assert shared(methods="imp,random-mask", eval_shots="0,2") == ["random-mask-seed0"]
    assert shared(vary=["train_examples=9,10"]) == ["imp-train-examples10-seed0"]
    assert shared(vary=["train_examples=9,10"], eval_shots="2") == []
    assert shared(vary=["dtype=float32,bfloat16"]) == []
    assert shared(vary=["learning_rate=0.1,0.2"]) == ["imp-learning-rate0.2-seed0"]

    assert shared("level_0", vary=["density=0.1,0.2"]) == ["imp-density0.2-seed0"]
    assert shared("level_0", vary=["density=0.1,0.2"], early_bird_steps=1) == []  # the mask decides when it ends
    assert shared("level_0", vary=["tile=8,rows", "ticket_learning_rate=0.1"]) == [
        "imp-tile-rows-ticket-learning-rate0.1-seed0"
    ]
    assert shared("level_0", vary=["rewind_step=0,1"]) == []  # it writes down that step
    assert shared("level_0", vary=["learning_rate=0.1,0.2"]) == []
    assert shared("level_0", vary=["drift_prompts=4,5"]) == []  # which are measured at level 0, too
    assert shared("level_0", seeds="0,1", methods="lora") == []
    assert shared("level_0", methods="lt-sft,imp,random-mask", vary=["density=0.1,0.2"]) == [
        "lt-sft-density0.2-seed0",
        "imp-density0.2-seed0",
    ]


def test_an_unfinished_base_is_not_shared_and_is_replaced(tmp_path):
    plan = planned(tmp_path, seeds="0,1")
    run(planned(tmp_path, seeds="0"))
    (tmp_path / "imp-seed0" / "base" / "done").unlink()
    share_results(plan.jobs[1], plan)
    assert not (tmp_path / "imp-seed1" / "base").exists()
    mark_done(tmp_path / "imp-seed0" / "base")
    for left_over in ("base", ".base.part"):
        (tmp_path / "imp-seed1" / left_over).mkdir(parents=True)
        (tmp_path / "imp-seed1" / left_over / "old").touch()
    share_results(plan.jobs[1], plan)
    copied, measured = (tmp_path / f"imp-seed{seed}" / "base" for seed in (1, 0))
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == {
        path.name: path.read_bytes() for path in measured.iterdir()
    }
    assert not (tmp_path / "imp-seed1" / ".base.part").exists()


def test_a_damaged_level_0_is_not_shared(tmp_path):
    plan = planned(tmp_path, vary=["density=0.1,0.2"])
    run(planned(tmp_path, vary=["density=0.1"]))
    theirs, mine = (tmp_path / name / "level_0" for name in names(plan))
    mark_done(theirs, ["metrics.json"])
    whole = (theirs / "metrics.json").read_text()
    (theirs / "metrics.json").write_text(whole.replace("1", "2", 1))
    share_results(plan.jobs[1], plan)
    assert not mine.exists()
    (theirs / "metrics.json").write_text(whole)
    share_results(plan.jobs[1], plan)
    assert mine.exists()


@pytest.mark.parametrize("spoilt", ["level_0/resources.json", "config.json", "data.jsonl", "model/config.json"])
@pytest.mark.parametrize("folder", ["base", "level_0"])
def test_nothing_is_shared_that_a_run_of_its_own_would_not_make(folder, spoilt, tmp_path):
    """The marker names no resources, and no configuration tells what data and model hold."""
    (tmp_path / "model").mkdir()
    for name in ("data.jsonl", "model/config.json"):
        (tmp_path / name).write_text('{"text": "a"}')
        os.utime(tmp_path / name, (0, 0))
    options = {"data": str(tmp_path / "data.jsonl"), "model": str(tmp_path / "model")}
    plan = planned(tmp_path / "sweep", vary=["density=0.1,0.2"], **options)
    theirs, mine = (plan.folder(job) for job in plan.jobs)
    write_json(theirs / "config.json", plan.jobs[0].config.record())
    for name, resources in (("base", {}), ("level_0", {"steps": 1, "train_seconds": 1.5, "peak_memory_bytes": 1})):
        write_json(theirs / name / "metrics.json", {"level": 0})
        write_json(theirs / name / "resources.json", resources)
        write_json(theirs / name / "checkpoints" / "checkpoint-1" / "state.json", {})
        mark_done(theirs / name, ["metrics.json"])
    place = tmp_path if (tmp_path / spoilt).exists() else theirs
    whole = (place / spoilt).read_text()
    (place / spoilt).write_text(whole[:1])
    share_results(plan.jobs[1], plan)
    assert (mine / folder).exists() == (folder == "base" and spoilt == "level_0/resources.json")
    (place / spoilt).write_text(whole)
    os.utime(place / spoilt, (0, 0))
    share_results(plan.jobs[1], plan)
    assert {path.name for path in (mine / folder).iterdir()} == {"metrics.json", "resources.json", "done"}


def test_a_level_0_of_older_data_is_not_shared_by_a_run_that_was_measured_again(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "a"}')
    plan = planned(tmp_path / "sweep", vary=["density=0.1,0.2"], data=str(tmp_path / "data.jsonl"))
    theirs, mine = (plan.folder(job) for job in plan.jobs)
    write_json(theirs / "config.json", plan.jobs[0].config.record())
    for name in ("base", "level_0"):
        write_json(theirs / name / "metrics.json", {"level": 0})
        mark_done(theirs / name, ["metrics.json"])
    write_json(theirs / "level_0" / "resources.json", {"steps": 1, "train_seconds": 1.5, "peak_memory_bytes": 1})
    (theirs / "level_0" / "log.jsonl").touch()
    os.utime(theirs / "level_0" / "log.jsonl", (0, 0))
    share_results(plan.jobs[1], plan)
    assert {path.name for path in mine.iterdir()} == {"base"}


def test_only_what_fits_is_read_to_see_whether_it_is_whole(tmp_path, monkeypatch):
    """A dense level is gigabytes, and a sweep has many runs."""
    read = []
    monkeypatch.setattr(shared_results, "first_damage", lambda folder: read.append(folder.parent.name))
    run(planned(tmp_path, seeds="0,1", vary=["density=0.1,0.2"], eval_shots="0,1"))
    assert sorted(set(read)) == ["imp-density0.1-seed0", "imp-density0.1-seed1"]


RUN_THAT_SAYS_HOW_IT_ENDED = """
import time
print("started", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("ended")
    raise SystemExit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_run_and_then_the_sweep(number, tmp_path):
    plan = planned(tmp_path, "imp", "0,1")
    log = tmp_path / "imp-seed0" / "run.log"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

    def interrupt() -> None:
        while not log.exists() or "started" not in log.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=interrupt)
    sender.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_sweep(
                plan,
                lambda runs, out: pytest.fail("nothing to report"),
                run=lambda command, log: run_logged([sys.executable, "-c", RUN_THAT_SAYS_HOW_IT_ENDED], log),
            )
    finally:
        sender.join()
        signal.signal(signal.SIGINT, before)
    assert log.read_text().endswith("started\nended\n")
    assert not (tmp_path / "imp-seed0" / "failed.json").exists()
    assert not (tmp_path / "imp-seed1").exists()
    assert run(plan).ran == ["imp-seed0", "imp-seed1"]


KILLED_ONCE_THE_BASE_IS_MEASURED = """
import os, signal, sys
from rigsa.experiments.experiment import Experiment
from rigsa.run import main
Experiment.attach = lambda self: os.kill(os.getpid(), signal.SIGKILL)
main(sys.argv[1:])
"""


@pytest.mark.usefixtures("figures_are_drawn")
def test_a_real_sweep_survives_a_killed_run_and_ends_with_the_bits_of_single_runs(small_model_folder, tmp_path, capsys):
    """Two runs are processes of their own; the others run in this one, as importing takes the time."""
    options = {
        "model": str(small_model_folder), "dtype": "float32", "device": "cpu", "max_steps": 4, "test_examples": 20,
        "epochs": 1, "train_examples": 40, "alpha_learning_rate": 0.1, "drift": False,
    }  # fmt: skip
    plan = planned(tmp_path / "sweep", "imp,random-mask", "0,1", **options)
    in_process = []

    def runner(command, log) -> int:  # type: ignore[no-untyped-def]
        name = Path(command[-1]).name
        if name == "imp-seed0":
            return run_logged(command, log)
        if name == "imp-seed1" and not in_process.count(name):
            in_process.append(name)
            return run_logged([sys.executable, "-c", KILLED_ONCE_THE_BASE_IS_MEASURED, *command[3:]], log)
        in_process.append(name)
        return main(command[3:])

    reports: list[list[Path]] = []

    def report(runs: list[Path], out: Path) -> None:
        reports.append(runs)
        write_report(runs, out)

    with pytest.raises(RigsaError, match="did not finish: imp-seed1, random-mask-seed1"):
        run_sweep(plan, report, run=runner)
    assert read_json(tmp_path / "sweep" / "imp-seed1" / "failed.json")["exit_code"] == -signal.SIGKILL
    assert "killed by SIGKILL" in capsys.readouterr().out
    assert "method  imp" in (tmp_path / "sweep" / "imp-seed0" / "run.log").read_text()
    run_sweep(plan, report, run=runner)
    assert in_process == ["random-mask-seed0", "imp-seed1", "imp-seed1", "random-mask-seed1"]
    assert (tmp_path / "sweep" / "report.html").stat().st_size > 10_000
    assert reports == [[tmp_path / "sweep" / name for name in names(plan)]]

    alone = tmp_path / "alone"
    assert main(["imp", "--preset", "smoke", *arguments_of(plan.jobs[2].config, "smoke"), "--out", str(alone)]) == 0
    in_sweep = contents(tmp_path / "sweep" / "imp-seed1")
    assert in_sweep["base/metrics.json"] == contents(tmp_path / "sweep" / "imp-seed0")["base/metrics.json"]
    assert in_sweep == contents(alone)


def test_a_run_with_a_copied_level_0_ends_with_the_bits_of_one_alone(small_model_folder, tmp_path):
    options = {"model": str(small_model_folder), "dtype": "float32", "device": "cpu", "drift": False}
    plan = planned(tmp_path / "sweep", vary=["density=0.1,0.05"], rewind_step=1, **options)
    run_sweep(plan, lambda runs, out: None, run=lambda command, log: main(command[3:]))
    alone = tmp_path / "alone"
    assert main(["imp", "--preset", "smoke", *arguments_of(plan.jobs[1].config, "smoke"), "--out", str(alone)]) == 0
    first, second = (contents(tmp_path / "sweep" / name) for name in names(plan))
    assert second == contents(alone)
    assert first["level_0/adapter.safetensors"] == second["level_0/adapter.safetensors"]
    assert first["level_1/adapter.safetensors"] != second["level_1/adapter.safetensors"]


def contents(folder: Path) -> dict[str, bytes]:
    """What two equal runs share, whether a sweep started them or not."""
    paths = [folder / "config.json", *(folder / "base").glob("*"), *folder.glob("level_*/*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.name != "resources.json"}


def test_command_line_prints_the_commands_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "sweep"
    assert main(["sweep", "--methods", "imp,random-mask", "--seeds", "0,1", "--out", str(out), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    for line in lines:
        command = shlex.split(line)
        resolve(build_parser().parse_args(command[command.index("rigsa.run") + 1 :]))
    assert not out.exists()
    assert main(["sweep", "--methods", "imp,turbo", "--out", str(out)]) == 1
    assert "turbo" in capsys.readouterr().err
