"""Tables of a report, for a terminal, a page and a spreadsheet: the paper's Tables 1 to 4, and paired comparisons."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rigsa.experiments.config import OPTIONS
from rigsa.experiments.measures import Measure, Metrics, unit
from rigsa.experiments.report import paper_numbers
from rigsa.experiments.report.runs import TASKS, Report, Run, Setting, trainable
from rigsa.experiments.report.statistics import Estimate, compare, estimate


@dataclass(frozen=True)
class Table:
    """Cells as text. The first `num_names` columns name the row; the others hold numbers."""

    title: str
    note: str
    columns: list[str]
    rows: list[list[str]]
    num_names: int = 1

    def markdown(self) -> str:
        """Columns are padded, so it reads well in a terminal too."""
        cells = [self.columns, *([escape_markdown(cell) for cell in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["| " + " | ".join(self._padded(row, widths)) + " |" for row in cells]
        rules = ["-" * (width + 2) if i < self.num_names else "-" * (width + 1) + ":" for i, width in enumerate(widths)]
        return "\n".join([lines[0], f"|{'|'.join(rules)}|", *lines[1:]])

    def _padded(self, row: list[str], widths: list[int]) -> list[str]:
        cells = enumerate(zip(row, widths, strict=True))
        return [cell.ljust(width) if i < self.num_names else cell.rjust(width) for i, (cell, width) in cells]

    def without_empty_columns(self) -> Table:
        kept = [i for i in range(len(self.columns)) if any(row[i] for row in self.rows)]
        rows = [[row[i] for i in kept] for row in self.rows]
        names = sum(i < self.num_names for i in kept)
        return dataclasses.replace(self, columns=[self.columns[i] for i in kept], rows=rows, num_names=names)


def escape_markdown(text: str) -> str:
    """`text` as words of Markdown on one line: no HTML, no code, no link and no cell begins in it."""
    return re.sub(r"([\\`<\[|])", r"\\\1", " ".join(text.splitlines()))


INTERVALS = "± is half of the 95 % t interval over seeds; one seed has none."


def seeds_text(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def target_table(report: Report) -> Table:
    """Table 1: the target task, untrained and after each level."""
    columns = ["setting", "level", "density", "trained numbers", "seeds"]
    for measure in report.accuracies:
        columns += [f"{measure.name} (%)", f"{measure.name}, paper (%)"]
    columns += [measure.name for measure in report.losses]
    rows = []
    for base, runs in report.bases().items():
        row = [base, "", "", "", seeds_text(len(runs))]
        for measure in report.accuracies:
            row += [measure.text(report.before(measure, base)), _paper(report, base, measure.name)]
        rows.append([*row, *(measure.text(report.before(measure, base)) for measure in report.losses)])
    for setting, level in _settings_and_levels(report):
        found = list(setting.at(level).values())
        row = [
            setting.label, str(level), f"{estimate([metrics['density'] for metrics in found]).mean:.2%}",
            f"{estimate([trainable(metrics) for metrics in found]).mean:,.0f}", seeds_text(len(found)),
        ]  # fmt: skip
        for measure in report.accuracies:
            value = measure.text(setting.estimate(measure, level))
            row += [value, _paper(report, _name_in_paper(report, setting, level), measure.name)]
        rows.append([*row, *(measure.text(setting.estimate(measure, level)) for measure in report.losses)])
    number = report.runs[0].levels[-1]["test"][report.accuracies[0].keys[1]]["examples"]
    note = f"Accuracy on {number:,} test {unit(report.config)}. {INTERVALS}"
    return Table("Table 1. Target task", note, columns, rows).without_empty_columns()


def source_table(report: Report) -> Table | None:
    """Table 2: the source tasks and drift, before and after; None where no run has measured them."""
    if not report.sources and not report.drifts:
        return None
    columns = ["setting", "level", "seeds"]
    for measure in report.sources:
        columns += [f"{measure.name} (%)", f"{measure.name}, change", f"{measure.name}, paper (%)"]
    columns += ["drift (nats per token)"] * len(report.drifts)
    rows = []
    for base, runs in report.bases().items():
        row = [base, "", seeds_text(len(runs))]
        for measure in report.sources:
            first = [run.base for run in runs.values() if measure.of(run.base) is not None]
            value = _with_stderr(measure, report.before(measure, base), first)
            row += [value, "", _paper(report, base, measure.keys[1])]
        rows.append(row + ["0"] * len(report.drifts))
    for setting, level in _settings_and_levels(report):
        found = list(setting.at(level).values())
        row = [setting.label, str(level), seeds_text(len(found))]
        for measure in report.sources:
            row += [
                _with_stderr(measure, setting.estimate(measure, level), found),
                _signed(measure, setting.change(measure, level)),
                _paper(report, _name_in_paper(report, setting, level), measure.keys[1]),
            ]
        row += [_with_stderr(measure, setting.estimate(measure, level), found) for measure in report.drifts]
        rows.append(row)
    note = (
        "Accuracy on the source tasks, its change from the untrained model, and drift: the Kullback-Leibler divergence "
        "from the untrained model on that model's own replies (0 for itself). "
        f"{INTERVALS} Of a single value the standard error over documents or prompts stands in brackets."
    )
    return Table("Table 2. Source tasks and drift", note, columns, rows).without_empty_columns()


def level_table(report: Report) -> Table:
    """Table 3: every run, level by level, the untrained model first."""
    rows = [
        _level_row(report, setting, run, metrics)
        for setting in report.settings
        for run in setting.runs
        for metrics in ({"level": "untrained", "test": run.base["test"], "pruning": {}}, *run.levels)
    ]
    if not any(row["ended early"] for row in rows):
        rows = [{name: cell for name, cell in row.items() if name != "ended early"} for row in rows]
    note = "Same sign: share of the free entries whose sign is still the initial one; they are eligible."
    return Table("Table 3. Runs, level by level", note, list(rows[0]), [list(row.values()) for row in rows])


def _early_end(record: Metrics) -> str:
    """The step at which an early bird ended the level and the steps saved; empty for a level that ran to its end."""
    return f"step {record['ended_at']}, {record['steps_saved']} saved" if record.get("ended_at") else ""


def _level_row(report: Report, setting: Setting, run: Run, metrics: Metrics) -> dict[str, str]:
    """Column to cell, empty where the untrained model, or a ticket drawn at random, has no such number."""

    def cell(source: Metrics, name: str, form: str) -> str:
        return form.format(source[name]) if name in source else ""

    headline, *more = report.accuracies
    several = len({one.config.seed for one in report.runs}) > 1
    return {
        "run": setting.label + (f", seed {run.config.seed}" if several else ""),
        "level": str(metrics["level"]),
        "density": cell(metrics, "density", "{:.2%}"),
        "same sign": cell(metrics["pruning"], "same_sign_share", "{:.1%}"),
        "eligible": cell(metrics["pruning"], "eligible", "{:,}"),
        "kept": cell(metrics, "free", "{:,}") if metrics.get("free") else "",
        _heading(report): f"{headline.of(metrics):.2f} %",
        **{f"test, {measure.name}": f"{measure.of(metrics):.2f} %" for measure in more},
        "test loss": f"{report.loss.of(metrics):.3f}",
        "train loss": cell(metrics, "train_loss", "{:.3f}"),
        "ended early": _early_end(metrics.get("early_bird", {})),
        "seconds": cell(metrics, "train_seconds", "{:.0f}"),
        "peak memory": f"{metrics['peak_memory_bytes'] / 2**30:.2f} GiB" if "peak_memory_bytes" in metrics else "",
    }


def _heading(report: Report) -> str:
    """What the headline is called in a table that has other columns about training."""
    return f"test, {report.accuracies[0].name}" if report.config.is_text else "test accuracy"


CONFIGURATION = (
    "learning_rate", "alpha_learning_rate", "batch_size", "epochs", "max_steps", "warmup_steps", "weight_decay",
    "prunings", "keep_fraction", "density", "rank", "lora_alpha", "lora_dropout", "gate", "alpha_init", "init_scale",
    "dtype", "quantize", "values_dtype", "state_dtype", "loss",
)  # fmt: skip
"""Fields that Table 4 always shows; it adds those in which settings of one method differ."""


def configuration_table(report: Report) -> Table:
    """Table 4: how each setting was trained; a field that its method does not read is empty."""
    differing = [name for name in OPTIONS if any(f"{name.replace('_', ' ')} " in one.label for one in report.settings)]
    fields = list(dict.fromkeys([*CONFIGURATION, *differing]))
    rows = []
    for setting in report.settings:
        config = setting.config
        values = {name: getattr(config, name) for name in fields if config.method.reads(name)}
        steps = str(setting.runs[0].levels[-1].get("steps", ""))
        rows.append([setting.label, _seeds_of(setting), steps, *_values(fields, values)])
    methods = {setting.config.method.name for setting in report.settings}
    for method, values in paper_numbers.CONFIGURATIONS.items():
        if report.has_paper and method in methods:
            rows.append([f"{method}, paper", "", "", *_values(fields, values)])
    columns = ["setting", "seeds", "steps a level", *(name.replace("_", " ") for name in fields)]
    note = (
        "Fields of the configuration, by the names of the options. Max steps 0: as many as the epochs have; density 0: "
        "that of the matched run; keep fraction 0: what leads to that density."
    )
    return Table("Table 4. Configuration", note, columns, rows).without_empty_columns()


def _values(fields: Sequence[str], values: dict[str, Any]) -> list[str]:
    shown = [values.get(name, "") for name in fields]
    return [f"{value:g}" if isinstance(value, float) else str(value) for value in shown]


def _seeds_of(setting: Setting) -> str:
    return ", ".join(str(run.config.seed) for run in setting.runs)


def comparison_table(report: Report) -> Table | None:
    """Table 5: each setting's final level against the reference's, paired by seed; None without a reference."""
    reference = report.reference
    if reference is None or len(report.settings) == 1:
        return None
    rows = []
    for measure in (report.accuracies[0], report.loss, *report.drifts, *report.sources):
        there = reference.values(measure, reference.final)
        for setting in report.settings:
            found = None if setting is reference else compare(setting.values(measure, setting.final), there)
            if found is None:
                continue
            difference, p = found.difference, found.p
            interval = "n < 2"
            if difference.half is not None:
                low, high = difference.mean - difference.half, difference.mean + difference.half
                interval = f"{low:+.{measure.decimals}f} to {high:+.{measure.decimals}f}"
            rows.append([
                f"{measure.name} ({measure.unit})", setting.label, str(difference.n),
                f"{difference.mean:+.{measure.decimals}f}", interval, "n < 2" if p is None else _p_text(p),
            ])  # fmt: skip
    note = (
        f"Mean difference from {reference.label}, final level against final level, over the seeds that both have; 95 % "
        "t interval and two-sided p of the paired t test, not corrected for the number of comparisons."
    )
    columns = ["measure", "setting", "n", "mean difference", "95 % interval", "p"]
    return Table(f"Table 5. Differences from {reference.label}", note, columns, rows, num_names=2)


def _p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _settings_and_levels(report: Report) -> Iterator[tuple[Setting, int]]:
    return ((setting, level) for setting in report.settings for level in setting.levels)


def _with_stderr(measure: Measure, value: Estimate | None, found: Sequence[Metrics]) -> str:
    """The value with its interval over seeds, or else with the standard error that was recorded."""
    text = measure.text(value)
    error = dataclasses.replace(measure, keys=(*measure.keys[:-1], "stderr")).of(found[0]) if found else None
    if value is None or value.half is not None or error is None or not math.isfinite(error):
        return text
    return f"{text} ({error:.{measure.decimals}f})"


def _signed(measure: Measure, value: Estimate | None) -> str:
    return "" if value is None else f"{'+' if value.mean >= 0 else ''}{measure.text(value)}"


def _name_in_paper(report: Report, setting: Setting, level: int) -> str:
    if setting is report.reference:
        return f"imp, level {level}"
    return f"{setting.config.method}, rank {setting.config.rank}"


def _paper(report: Report, what: str, measure: str) -> str:
    """The paper's number and its place there, where the runs are of its model; on the target task, of its data too."""
    number = paper_numbers.NUMBERS.get((what, measure))
    if (
        number is None
        or not report.has_paper
        or (measure not in TASKS and (report.config.data == "digits" or report.config.is_text))
    ):
        return ""
    return f"{number.value:g} ({number.source})"


def tables(report: Report) -> list[Table]:
    return [table for make in TABLES if (table := make(report)) is not None and table.rows]


TABLES: tuple[Callable[[Report], Table | None], ...] = (
    target_table, source_table, level_table, configuration_table, comparison_table,
)  # fmt: skip


def csv_text(report: Report) -> str:
    """One row per run and level, the untrained model first; at the end the configuration as ``config.NAME``."""
    rows = [
        {"run": str(run.path), "setting": setting.label, "method": run.config.method.name, "seed": run.config.seed}
        | {"level": metrics.get("level", "untrained")}
        | dict(_flat({key: value for key, value in metrics.items() if key not in ("level", "layer_density")}))
        | {f"config.{name}": value for name, value in run.config.record().items()}
        for setting in report.settings
        for run in setting.runs
        for metrics in (run.base, *run.levels)
    ]
    rows = [{str(_csv_cell(name)): _csv_cell(value) for name, value in row.items()} for row in rows]
    names = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    columns = sorted(names, key=lambda name: name.startswith("config."))
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _csv_cell(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula gets an apostrophe before it."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _flat(values: Metrics, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested names joined by points: ``test.0-shot.accuracy``."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
