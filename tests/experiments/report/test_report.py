"""Reports from run folders that no run made: configurations of the presets, and metrics in the documented form."""

import csv
import dataclasses
import itertools
import json
import math
import random
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rigsa.errors import RigsaError
from rigsa.experiments.config import Config
from rigsa.experiments.methods.registry import METHODS
from rigsa.experiments.presets import PRESETS, quickstart
from rigsa.experiments.report import figures, paper_numbers
from rigsa.experiments.report.page import CSV_FILE, PAGE_FILE, TEXT_FILE, write_report
from rigsa.experiments.report.runs import command_of, read_report
from rigsa.experiments.report.tables import (
    comparison_table,
    configuration_table,
    level_table,
    source_table,
    target_table,
)
from rigsa.experiments.tasks.textual_mnist import Images
from rigsa.run import build_parser, configure

WEIGHTS = 106_168_320
SOURCES = {"piqa": ("acc", 67.0, 0), "hellaswag": ("acc", 42.0, 0), "gsm8k": ("exact_match", 12.0, 5)}
IMAGES = Images(np.arange(64, dtype=np.uint8).reshape(1, 8, 8) % 10, np.array([7]))
RANKS = (1, 4, 16)

COUNTS = {"tokens": 300, "examples": 300, "perplexity": 1.5}


def write_run(folder: Path, config: Config, accuracy: float = 90.0, levels: tuple[int, ...] | None = None) -> Path:
    """A finished run whose accuracy lies within a point of `accuracy`, by seed and level, repeatably."""
    chance = random.Random(f"{config.method} {config.rank} {config.seed}")
    write(folder / "config.json", config.record())
    write(
        folder / "base/metrics.json", {"tokenizer": "0123abcd", **learned(config, 7.5, 3.0), **forgotten(config, 0.0)}
    )
    if levels is None:
        levels = config.method.levels(config) or (1,)
    for level in levels:
        write_level(folder / f"level_{level}", config, level, accuracy + chance.uniform(-1, 1), chance)
    return folder


def write_level(folder: Path, config: Config, level: int, accuracy: float, chance: random.Random) -> None:
    density = config.density if level and config.density else 0.43**level
    sizes: dict[str, Any] = {"density": density, "free": round(density * WEIGHTS), "weights": WEIGHTS}
    sizes["trainable"] = sizes["free"] + 210
    if not config.method.gated:
        sizes |= {"free": 0, "trainable": 305_000 * config.rank, "density": 305_000 * config.rank / WEIGHTS}
    pruned = config.method.name == "imp" and level > 0
    pruning = {"same_sign_share": 0.539, "free": 1000, "eligible": 539, "kept": 431} if pruned else {}
    metrics = {"level": level, **sizes, "pruning": pruning, "steps": 280, "train_loss": 0.2 + chance.uniform(0, 0.1)}
    metrics |= learned(config, accuracy, 0.3 + chance.uniform(0, 0.05)) | forgotten(config, chance.uniform(-4, 1))
    if config.drift:
        metrics["drift"] = {"kl": chance.uniform(0.02, 0.3), "stderr": 0.004, "tokens": 1000, "prompts": 32}
    write(folder / "metrics.json", metrics)
    write(folder / "resources.json", {"steps": 280, "train_seconds": 360.0, "peak_memory_bytes": 4 * 2**30})
    (folder / "done").touch()


def learned(config: Config, accuracy: float, loss: float) -> dict[str, Any]:
    results = {f"{shots}-shot": {"accuracy": accuracy, "loss": loss} | COUNTS for shots in config.shots}
    return {"test": results, "validation": {"accuracy": accuracy, "loss": loss} | COUNTS}


def forgotten(config: Config, change: float) -> dict[str, Any]:
    results = {
        task: {"metric": metric, "score": score + change, "stderr": 2.7, "documents": 300, "shots": shots, "others": {}}
        for task, (metric, score, shots) in SOURCES.items()
        if task in config.tasks
    }
    return {"source": results} if results else {}


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def make(method: str, **values: Any) -> Config:
    return dataclasses.replace(quickstart(method), **values)


def edit(path: Path, **values: Any) -> None:
    write(path, json.loads(path.read_text()) | values)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All methods, three seeds, some ranks, one run that failed and one that has only begun."""
    folder = tmp_path_factory.mktemp("sweep")
    measured = {"source_tasks": "piqa,hellaswag,gsm8k", "limit": 300, "eval_shots": "0,5"}
    for seed in range(3):
        for position, method in enumerate(METHODS):
            values: dict[str, Any] = {"seed": seed, **measured}
            if method == "imp":
                values |= {"prunings": 3, "density": 0.0, "keep_fraction": 0.8}
            if METHODS[method].matches:
                values["match"] = f"runs/imp-quickstart-seed{seed}"
            for rank in RANKS if method in ("lora", "qlora") else (8,):
                config = make(method, **values, rank=rank)
                levels = (3,) if METHODS[method].matches else None
                write_run(folder / method / f"rank{rank}-seed{seed}", config, 70 + position, levels)
    write(folder / "broken" / "failed.json", {"exit_code": 1, "message": "rigsa: training <diverged> at step 7"})
    write(folder / "begun" / "config.json", make("imp", seed=9, **measured).record())
    return folder


@pytest.fixture(scope="module")
def written(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "new"
    write_report([sweep], out, IMAGES)
    return out


class Page(HTMLParser):
    """Counts tags, checks that they close, and keeps every address and alternative text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.alts: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        values = dict(attributes)
        self.addresses += [values[name] or "" for name in ("src", "href") if name in values]
        if tag == "img":
            self.alts.append(values["alt"] or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_stands_alone(written):
    text = (written / PAGE_FILE).read_text()
    page = Page(text)
    assert page.tags.count("img") == 6
    assert page.tags.count("table") == 5
    assert all(address.startswith(("data:image/svg+xml;base64,", "#")) for address in page.addresses)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in text
    assert "url(" not in text
    assert "@media print" in text
    assert all("untrained 7.50 %" in alt for alt in page.alts[1:])
    assert all(f'id="{address[1:]}"' in text for address in page.addresses if address.startswith("#"))


def test_what_is_read_is_escaped(written):
    text = (written / PAGE_FILE).read_text()
    assert "training &lt;diverged&gt; at step 7" in text
    assert "<diverged>" not in text


def test_failed_and_unfinished_runs_are_named(sweep, written):
    text = (written / TEXT_FILE).read_text()
    assert f"{sweep}/broken failed: rigsa: training \\<diverged> at step 7" in text
    assert f"{sweep}/begun has no finished level yet; run its command again to go on" in text


def test_every_figure_lies_beside_the_page_and_has_its_command(sweep, written):
    text = (written / TEXT_FILE).read_text()
    linked = set(re.findall(r"\]\((figure\w*\.png)\)", text))
    assert linked == {path.name for path in written.glob("*.png")}
    assert linked == {"figure.png", *(f"figure_{number}.png" for number in (1, 2, 3, 4, 6))}
    assert text.count(f"`python -m rigsa.run report {sweep} --out {written}`") == 11


def test_csv_is_tidy(written):
    with (written / CSV_FILE).open() as file:
        rows = list(csv.DictReader(file))
    # imp has five rows, lt-sft and diff-pruning three, every other run two; lora and qlora have a run for each rank.
    others = len(METHODS) - 3 + 2 * (len(RANKS) - 1)
    assert len(rows) == len({(row["run"], row["level"]) for row in rows}) == 3 * (5 + 2 * 3 + 2 * others)
    last = next(row for row in rows if row["method"] == "imp" and row["level"] == "3" and row["seed"] == "2")
    assert float(last["density"]) == pytest.approx(0.43**3)
    assert float(last["source.piqa.stderr"]) == 2.7
    assert last["config.prunings"] == "3"
    assert {row["level"] for row in rows} == {"untrained", "0", "1", "2", "3"}


def test_equal_runs_give_equal_bytes(tmp_path):
    written = []
    for _ in range(2):
        run = write_run(tmp_path / "run", make("imp"))
        write_report([run], run, IMAGES)
        written.append({path.name: path.read_bytes() for path in run.iterdir() if path.is_file()})
        shutil.rmtree(run)
    assert written[0] == written[1]
    assert {"report.html", "report.md", "report.csv", "figure.png", "figure_1.png"} < written[0].keys()


def test_table_of_one_run_is_the_readmes(tmp_path):
    run = write_run(tmp_path / "run", make("imp"))
    table = level_table(read_report([run]))
    assert table.columns == [
        "run", "level", "density", "same sign", "eligible", "kept", "test accuracy", "test loss", "train loss",
        "seconds", "peak memory",
    ]  # fmt: skip
    assert table.rows[0][:3] == ["imp", "untrained", ""]
    assert table.rows[2][:6] == ["imp", "1", "3.46%", "53.9%", "539", "3,673,424"]
    assert table.rows[2][-2:] == ["360", "4.00 GiB"]
    assert table.markdown().count("| imp |") == 3


def column(table: Any, name: str) -> dict[tuple[str, str], str]:
    """(setting, level) to cell."""
    index, level = table.columns.index(name), table.columns.index("level")
    return {(row[0], row[level]): row[index] for row in table.rows}


def test_means_and_intervals_stand_in_the_tables(sweep):
    report = read_report([sweep])
    setting = next(setting for setting in report.settings if setting.label == "lora (rank 4)")
    values = [run.levels[0]["test"]["0-shot"]["accuracy"] for run in setting.runs]
    half = 4.302652729911275 * np.std(values, ddof=1) / 3**0.5  # Student's t, two degrees of freedom
    table = target_table(report)
    assert column(table, "0-shot (%)")["lora (rank 4)", "0"] == f"{np.mean(values):.2f} ± {half:.2f}"
    assert column(table, "seeds")["lora (rank 4)", "0"] == "3 seeds"
    assert column(table, "0-shot (%)")["untrained", ""] == "7.50"
    assert ("untrained, 4 bits", "") in column(table, "level")
    sources = source_table(report)
    assert column(sources, "PIQA (%)")["untrained", ""] == "67.00 (2.70)"
    assert column(sources, "PIQA, change")["imp", "3"].startswith("-")


def test_one_seed_says_so_and_has_no_interval(tmp_path):
    run = write_run(tmp_path / "run", make("lora", source_tasks="piqa"))
    report = read_report([run])
    target, source = target_table(report), source_table(report)
    assert column(target, "seeds")["lora", "0"] == "1 seed"
    assert "±" not in "".join(target.rows[1] + source.rows[1])
    assert column(source, "PIQA (%)")["lora", "0"].endswith("(2.70)")
    assert "HellaSwag (%)" not in source.columns
    assert comparison_table(report) is None


def test_nothing_is_said_about_what_was_not_measured(tmp_path):
    run = write_run(tmp_path / "run", make("imp", drift=False))
    report = read_report([run])
    assert source_table(report) is None
    assert [one.file for one in figures.drawings(report, None)] == ["figure_2.png", "figure_4.png", "figure.png"]


def test_differences_are_paired_by_seed(tmp_path):
    for seed, (imp, full) in enumerate([(80.0, 81.0), (60.0, 62.0), (90.0, 93.0)]):
        for method, accuracy in (("imp", imp), ("full", full)):
            run = write_run(tmp_path / f"{method}{seed}", make(method, seed=seed))
            last = run / ("level_1" if method == "imp" else "level_0") / "metrics.json"
            edit(last, test={"0-shot": {"accuracy": accuracy, "loss": 0.1} | COUNTS})
    table = comparison_table(read_report([tmp_path]))
    assert table.rows[0] == ["0-shot (%)", "full", "3", "+2.00", "-0.48 to +4.48", "0.074"]
    assert table.rows[1][2:] == ["3", "+0.000", "+0.000 to +0.000", "1.000"]


@pytest.mark.parametrize("moved", [False, True])
def test_controls_are_paired_by_what_their_configurations_say(tmp_path, moved):
    """Whatever the folders are called, also where they were moved together after they were made."""
    made = tmp_path / "made"
    for seed, name in enumerate(("first", "2nd", "tuesday")):
        write_run(made / name, make("imp", seed=seed))
        write_run(made / f"{name}-apart", make("imp", seed=seed, prunings=2))
        for method in ("random-mask", "reinit"):
            for matched in (name, f"{name}-apart"):
                control = make(method, seed=seed, match=str(made / matched))
                write_run(made / f"{method} of {matched}", control, levels=(1,))
    if moved:
        made = made.rename(tmp_path / "moved")
    report = read_report([made])
    assert [len(setting.runs) for setting in report.settings] == [3] * 6
    for setting in report.settings[2:]:
        assert {run.path.name.endswith("-apart") for run in setting.runs} == {setting.label.endswith("-apart)")}
    rows = [row for row in comparison_table(report).rows if "random-mask" in row[1] or "reinit" in row[1]]
    assert rows
    assert all(row[2] == "3" for row in rows)
    assert [len(one.points) for one in figures.all_series(report)] == [2, 3, 1, 1, 1, 1]


def test_a_difference_of_one_pair_is_honest(tmp_path):
    for method in ("imp", "full"):
        write_run(tmp_path / method, make(method))
    table = comparison_table(read_report([tmp_path]))
    assert all(row[2] == "1" and row[4:] == ["n < 2", "n < 2"] for row in table.rows)


def test_the_papers_numbers_stand_beside_its_model_only(tmp_path):
    for method, values in (("imp", {"prunings": 4}), ("qlora", {"rank": 16})):
        config = dataclasses.replace(PRESETS["paper"](method), **values)
        write_run(tmp_path / "paper" / method, config)
        write_run(tmp_path / "small" / method, dataclasses.replace(config, model="smollm2-135m"))
    report = read_report([tmp_path / "paper"])
    paper = column(target_table(report), "0-shot, paper (%)")
    assert paper["untrained", ""] == "9.16 (Table 1)"
    assert paper["untrained, 4 bits", ""] == "9.8 (Table 1)"
    assert paper["imp", "0"].startswith("99.05")
    assert paper["imp", "4"].startswith("98.37")
    assert paper["qlora", "0"].startswith("99.46")
    assert column(source_table(report), "GSM8k, paper (%)")["imp", "3"].startswith("45.1")
    assert [row[0] for row in configuration_table(report).rows] == ["imp", "qlora", "imp, paper", "qlora, paper"]
    small = read_report([tmp_path / "small"])
    for table in (target_table(small), source_table(small), configuration_table(small)):
        assert not any("paper" in text for text in (*table.columns, *(row[0] for row in table.rows)))


def test_the_papers_configuration_is_the_presets():
    for method, values in paper_numbers.CONFIGURATIONS.items():
        preset = PRESETS["paper"](method)
        for name, value in values.items():
            assert name == "rank" or getattr(preset, name) == value, name


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("method", METHODS)
def test_command_gives_the_configuration_back(method, preset):
    plain = PRESETS[preset](method)
    assert command_of(plain) == f"python -m rigsa.run {method} --preset {preset}"
    changed = dataclasses.replace(
        plain, seed=3, learning_rate=1.5e-4, system_prompt="it's 'so'", drift=False, checkpointing=True, data_dir="a b"
    )
    for config in (plain, changed):
        words = shlex.split(command_of(config))
        assert words[:3] == ["python", "-m", "rigsa.run"]
        assert configure(build_parser().parse_args(words[3:])) == config


def test_command_shows_differences_only():
    assert command_of(make("lora", seed=1)) == "python -m rigsa.run lora --preset quickstart --seed=1"
    config = make("imp", alpha_init=-1e-6, system_prompt="default")
    command = command_of(config)
    assert command == "python -m rigsa.run imp --preset quickstart --system-prompt=default --alpha-init=-1e-06"
    assert configure(build_parser().parse_args(shlex.split(command)[3:])) == config


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("model", "other", "--model is 'smollm2-135m' and 'other'"),
        ("data", "mnist", "--data is 'digits' and 'mnist'"),
        ("test_examples", 10, "--test-examples is 0 and 10"),
        ("eval_shots", "0,5", "--eval-shots is '0' and '0,5'"),
        ("system_prompt", "hello", "--system-prompt is '' and 'hello'"),
        ("limit", 10, "--limit is 0 and 10"),
        ("data_dir", "elsewhere", "--data-dir is '' and 'elsewhere'"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused_by_name(tmp_path, name, value, said):
    one = write_run(tmp_path / "one", make("imp", source_tasks="piqa"))
    other = write_run(tmp_path / "other", make("full", source_tasks="piqa", **{name: value}))
    with pytest.raises(RigsaError, match=re.escape(f"{one} and {other} cannot stand in one report: {said}")):
        read_report([one, other])


def test_mixed_tokenizers_are_refused_and_old_runs_are_not(tmp_path):
    one, other = (write_run(tmp_path / name, make("imp", seed=seed)) for seed, name in enumerate(("one", "two")))
    edit(other / "base/metrics.json", tokenizer="beef")
    with pytest.raises(RigsaError, match=r"mixed tokenizers between runs \(0123abcd and beef\)"):
        read_report([one, other])
    old = json.loads((other / "base/metrics.json").read_text())
    del old["tokenizer"]
    write(other / "base/metrics.json", old)
    assert len(read_report([one, other]).runs) == 2


def test_quantised_runs_stand_beside_the_others(tmp_path):
    for method in ("lora", "qlora"):
        write_run(tmp_path / method, make(method))
    assert list(read_report([tmp_path]).bases()) == ["untrained", "untrained, 4 bits"]


def test_one_run_twice_counts_once_and_its_copy_is_refused(tmp_path):
    run = write_run(tmp_path / "run", make("imp"))
    assert len(read_report([run, run]).runs) == 1
    copy = write_run(tmp_path / "copy", make("imp"))
    with pytest.raises(RigsaError, match=f"{run} and {copy} are the same run, imp with seed 0; give one of them"):
        read_report([run, copy])


def test_levels_still_to_come_do_not_enter_final_numbers(tmp_path):
    write_run(tmp_path / "whole", make("imp", prunings=2))
    part = write_run(tmp_path / "part", make("imp", prunings=2, seed=1), levels=(0, 1))
    report = read_report([tmp_path])
    (setting,) = report.settings
    assert setting.final == 2
    assert setting.values(report.accuracies[0], 2).keys() == {0}
    assert report.notes == [
        f"{part} has finished level 1 of 2; run its command again to go on",
        f"{part} does not count towards the final numbers of imp, level 2",
    ]


@pytest.mark.parametrize("content", ["[1, 2]", "3", '"text"', "{", "null"])
def test_configuration_that_is_no_object_is_one_error(tmp_path, content):
    run = write_run(tmp_path / "run", make("imp"))
    (run / "config.json").write_text(content)
    with pytest.raises(RigsaError, match=str(run / "config.json")):
        read_report([run])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"expected an object, got \[\]"),
        ("{}", "test is missing"),
        ('{"test": 3}', "test: expected an object, got 3|level is missing"),
        ('{"test": {"5-shot": {"accuracy": 3}}}', "test.0-shot is missing|level is missing"),
    ],
)
def test_damaged_metrics_are_one_error(tmp_path, content, message):
    run = write_run(tmp_path / "run", make("imp"))
    (run / "level_1/metrics.json").write_text(content)
    with pytest.raises(RigsaError, match=rf"level_1/metrics.json is damaged \(({message})\)"):
        read_report([run])


def test_folders_without_runs_are_named(tmp_path):
    with pytest.raises(RigsaError, match="nothing: no such run folder"):
        read_report([tmp_path / "nothing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(RigsaError, match=r"empty is no run folder \(it has no config.json\) and holds none"):
        read_report([tmp_path / "empty"])
    write(tmp_path / "bad" / "failed.json", {"exit_code": 1, "message": "no space left"})
    with pytest.raises(RigsaError, match="bad failed: no space left"):
        read_report([tmp_path / "bad"])


def test_report_on_several_runs_leaves_their_own_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [write_run(tmp_path / method, make(method)) for method in ("imp", "full")]
    _, page = write_report(runs[:1], None, IMAGES)
    assert page == runs[0] / PAGE_FILE
    before = page.read_bytes()
    _, page = write_report(runs, None, IMAGES)
    assert page == Path("report") / PAGE_FILE
    assert (runs[0] / PAGE_FILE).read_bytes() == before
    assert write_report(runs, None, IMAGES)[1] == page  # our own may be written again


@pytest.mark.parametrize("name", ["report.md", "report.html", "report.csv", "figure.png", "figure_3.png"])
def test_files_of_others_are_never_overwritten(tmp_path, name):
    run = write_run(tmp_path / "run", make("imp"))
    mine = tmp_path / "notes" / name
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(RigsaError, match=f"{name} was not written by rigsa report; choose another folder with --out"):
        write_report([run], mine.parent, IMAGES)
    assert [path.name for path in mine.parent.iterdir()] == [name]
    with pytest.raises(RigsaError, match="expected a folder, got a file"):
        write_report([run], mine, IMAGES)


def test_data_that_is_gone_costs_only_figure_1(tmp_path):
    run = write_run(tmp_path / "run", make("imp", data=str(tmp_path / "gone")))
    text, _ = write_report([run])
    assert "There is no Figure 1: --data" in text
    assert not (run / "figure_1.png").exists()
    assert (run / "figure_2.png").exists()


def test_every_method_has_a_look_of_its_own():
    looks = [figures.look(method) for method in METHODS]
    for name in ("marker", "linestyle"):
        assert len({look[name] for look in looks}) == len(METHODS)
    fills = {figures.look("imp", variant)["fillstyle"] for variant in range(6)}
    assert len(fills) == 6


def test_labels_of_figures_do_not_overlap(sweep):
    """Text boxes of each panel, drawn once, are disjoint."""
    report = read_report([sweep])
    for drawing in figures.drawings(report, IMAGES):
        drawing.figure.canvas.draw()
        for axes in drawing.figure.axes:
            texts = [text for text in (*axes.get_xticklabels(), axes.xaxis.label, axes.title) if text.get_text()]
            texts = [text for text in texts if text.get_visible() and axes.axison]
            boxes = [text.get_window_extent() for text in texts]
            for index, box in enumerate(boxes):
                for other in boxes[index + 1 :]:
                    assert not box.padded(-1).overlaps(other), drawing.file


FEW = ("imp", "random-mask", "lt-sft", "lora", "qlora")


@pytest.mark.parametrize(("names", "seeds"), [(FEW, 1), (FEW, 3), (tuple(METHODS), 1)])
def test_every_method_is_named_beside_its_marker(tmp_path, names, seeds):
    for seed, method in itertools.product(range(seeds), names):
        write_run(tmp_path / f"{method}{seed}", make(method, seed=seed))
    for drawing in figures.drawings(read_report([tmp_path]), None):
        drawing.figure.canvas.draw()
        legends = [*drawing.figure.legends, *(axes.get_legend() for axes in drawing.figure.axes if axes.get_legend())]
        named = {text.get_text().removesuffix(", final level") for legend in legends for text in legend.get_texts()}
        ranked = {name for name in names if METHODS[name].reads("rank") or METHODS[name].look.by_level}
        assert named - {"untrained", "untrained, 4 bits", "not beaten in both"} == (
            ranked if drawing.file == "figure_3.png" else set(names)
        )
        for axes in drawing.figure.axes:
            assert axes.get_window_extent().height / drawing.figure.dpi > 1.5, "the legend leaves no room"


def test_series_join_levels_and_ranks(sweep):
    series = {one.label: one for one in figures.all_series(read_report([sweep]))}
    assert series.keys() == set(METHODS)
    assert [level for _, level in series["imp"].points] == [0, 1, 2, 3]
    assert [setting.config.rank for setting, _ in series["qlora"].points] == list(RANKS)


def test_tickets_of_several_densities_and_their_controls_are_one_line_each_by_density(tmp_path):
    for density, criterion, seed in itertools.product((0.2, 0.01), ("rigsa", "large_final"), range(2)):
        name, seeds = f"imp-density{density}-{criterion}-seed{seed}", 1 if density == 0.2 else 2
        if seed < seeds:
            asked = {"density": density, "keep_fraction": 0.0, "prunings": 1, "criterion": criterion}
            write_run(tmp_path / name, make("imp", seed=seed, **asked))
            control = make("random-mask", seed=seed, match=str(tmp_path / name))
            write_run(tmp_path / f"random-{name}", control, levels=(1,))
            write_run(tmp_path / f"uniform-{density}-{seed}", make("random-mask", seed=seed, density=density))
    report = read_report([tmp_path])
    series = {one.label: one for one in figures.all_series(report, figures.SIZES)}
    assert series.keys() == {
        "imp (criterion rigsa)", "imp (criterion large_final)", "random-mask (match none, density on)",
        "random-mask (match a ticket, density off, matched criterion rigsa)",
        "random-mask (match a ticket, density off, matched criterion large_final)",
    }  # fmt: skip
    by_density = dict(figures._by(series["imp (criterion rigsa)"], report.accuracies[0], "density"))
    assert sorted(by_density) == pytest.approx([1, 20, 100])  # level 0 once, and that of two seeds
    assert by_density[100].n == 2
    assert all(len({id(setting) for setting, _ in one.points}) == 2 for one in series.values())


def labels_of(drawing: Any) -> list[str]:
    return [text.get_text() for legend in drawing.figure.legends for text in legend.get_texts()]


def test_a_trade_off_leaves_out_what_is_no_number_and_names_what_only_some_panels_have(tmp_path):
    measured = {"source_tasks": "piqa"}
    write_run(tmp_path / "imp", make("imp", **measured))
    write_run(tmp_path / "sift", make("sift", drift=False, **measured))
    for method, kl in (("erk", math.inf), ("snip", math.nan)):
        run = write_run(tmp_path / method, make(method, **measured), 99)
        edit(run / "level_1/metrics.json", drift={"kl": kl, "stderr": 0.1})
    drawing = figures.trade_off_figure(read_report([tmp_path]))
    assert sorted(labels_of(drawing)) == ["erk", "imp", "not beaten in both", "sift", "snip", "untrained"]
    drift, piqa = drawing.alt.split("by drift: ")[1].split("; by PIQA: ")
    assert "erk" not in drift
    assert "snip" not in drift
    assert "erk" in piqa or "snip" in piqa
    apart = tmp_path / "erk"
    edit(apart / "level_1/metrics.json", source={})
    assert figures.trade_off_figure(read_report([apart])) is None


def test_a_setting_that_trained_nothing_is_no_point_of_a_logarithmic_axis(tmp_path):
    write_run(tmp_path / "imp", make("imp"))
    run = write_run(tmp_path / "lora", make("lora"))
    edit(run / "level_0/metrics.json", trainable=0, density=0.0)
    assert len(figures.drawings(read_report([tmp_path]), None)) == 6 - 1


@pytest.mark.parametrize("methods", [("imp", "random-mask"), ("sift", "erk")])
def test_long_names_fit_into_figures(tmp_path, methods):
    """A setting is named by its options, of which some are long, and a legend that is too wide would be cut."""
    for method in methods:
        for include in ("*", ",".join(f"model.layers.{number}.mlp.*" for number in range(6))):
            config = make(method, include=include, density=0.1, **({"keep_fraction": 0.0} if method == "imp" else {}))
            write_run(tmp_path / f"{method}{len(include)}", config)
    for drawing in figures.drawings(read_report([tmp_path]), None):
        drawing.svg()  # lays the figure out
        figure = drawing.figure
        assert all(legend.get_window_extent().x0 >= 0 for legend in figure.legends)
        assert all(legend.get_window_extent().x1 <= figure.bbox.x1 for legend in figure.legends)
        assert all(axes.bbox.height > 0.3 * 72 for axes in figure.axes if axes.has_data()), drawing.file
        assert all(axes.bbox.width > 72 for axes in figure.axes if axes.has_data()), drawing.file


def test_the_front_of_a_trade_off_is_drawn_and_named(tmp_path):
    """The dense level learns most; of the others, what forgets less and learns more is not beaten."""
    learned = {"imp": (93.0, 0.2, 97.0, 0.1), "lora": (95.0, 0.3), "random-mask": (90.0, 0.05), "sift": (80.0, 0.07)}
    for method, numbers in learned.items():
        levels = (0, 1) if method == "imp" else (1,) if method == "random-mask" else None
        run = write_run(tmp_path / method, make(method, **({"density": 0.2} if method == "random-mask" else {})))
        folders = sorted(path for path in run.glob("level_*") if levels is None or int(path.name[-1]) in levels)
        for folder, accuracy, drift in zip(folders, numbers[::2], numbers[1::2], strict=True):
            metrics = json.loads((folder / "metrics.json").read_text())
            metrics["test"]["0-shot"]["accuracy"], metrics["drift"]["kl"] = accuracy, drift
            write(folder / "metrics.json", metrics)
    drawing = figures.trade_off_figure(read_report([tmp_path]))
    assert drawing.alt.endswith("by drift: random-mask at 20 %, imp at 3.46 %.")
    (axes,) = drawing.figure.axes
    (line,) = (line for line in axes.lines if line.get_label() == "not beaten in both")
    assert line.get_xydata().tolist() == [[0.05, 90.0], [0.1, 97.0]]


def test_what_an_early_end_saved_is_in_the_table(tmp_path):
    run = write_run(tmp_path / "run", make("imp"))
    path = run / "level_0" / "metrics.json"
    record = {"ended_at": 120, "steps_saved": 160, "distances": {}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"early_bird": record}))
    assert "step 120, 160 saved" in (write_report([run], None, IMAGES)[1].parent / TEXT_FILE).read_text()


def test_machine_says_what_was_recorded(tmp_path):
    run = write_run(tmp_path / "run", make("imp"))
    text = (write_report([run], None, IMAGES)[1].parent / TEXT_FILE).read_text()
    assert "Trained on a machine that was not recorded: 720 s in all, and at most 4.00 GiB." in text
    assert f"matplotlib {version('matplotlib')}" in text


def test_a_report_imports_no_transformers(tmp_path):
    """Its numbers come from run folders alone, so it does not wait for a library that trains."""
    run = write_run(tmp_path / "run", make("imp"))
    code = "import sys; from rigsa.run import main; main(sys.argv[1:]); sys.exit('transformers' in sys.modules)"
    command = [sys.executable, "-c", code, "report", str(run)]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run / PAGE_FILE).is_file()
