"""Tables and figures from run folders alone: JSON in, Markdown and PNG out. No model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from rigsa.config import Config, flag, load
from rigsa.errors import RigsaError
from rigsa.experiment import BASE, METRICS_FILE
from rigsa.files import is_done, read_json, write_atomically, write_text
from rigsa.train import RESOURCES_FILE

TABLE_FILE = "report.md"
FIGURE_FILE = "figure.png"
_COLORS = {"imp": "#0072B2", "random-mask": "#D55E00"}  # Okabe & Ito: told apart by the colour-blind and in print
_MARKERS = {"imp": "o", "random-mask": "s"}


@dataclass(frozen=True)
class Run:
    """What a run folder holds: its configuration, the untrained model's metrics and those of the finished levels."""

    path: Path
    config: Config
    base: dict[str, Any]
    levels: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Run:
        """Raises RigsaError where `path` is no run folder, is damaged, or has no finished level."""
        if not path.is_dir():
            raise RigsaError(f"{path}: no such run folder")
        config = load(path)
        folders = sorted(folder for folder in path.glob("level_*") if is_done(folder))
        if not folders:
            raise RigsaError(f"{path} has no finished level yet; run its command again to go on")
        levels = [read_json(folder / METRICS_FILE) | read_json(folder / RESOURCES_FILE) for folder in folders]
        levels.sort(key=lambda metrics: metrics["level"])
        return cls(path, config, read_json(path / BASE / METRICS_FILE), levels)

    @property
    def headline(self) -> str:
        return f"{self.config.shots[0]}-shot"

    def accuracy(self, metrics: dict[str, Any]) -> float:
        return metrics["test"][self.headline]["accuracy"]


def write_report(paths: list[Path], out: Path) -> tuple[str, Path]:
    """Write `report.md` and `figure.png` into `out`. Returns the table and the figure's path."""
    runs = [Run.read(path) for path in paths]
    check_comparable(runs)
    table = markdown_table(runs)
    write_text(out / TABLE_FILE, f"{table}\n\n![accuracy by level and density]({FIGURE_FILE})\n")
    figure = draw(runs)
    write_atomically(out / FIGURE_FILE, lambda path: figure.savefig(path, format="png", dpi=150))
    plt.close(figure)
    return table, out / FIGURE_FILE


def check_comparable(runs: list[Run]) -> None:
    """Raises RigsaError where the runs differ in the model, the data or the headline test."""
    for name in ("model", "data", "test_images", "eval_shots"):
        for run in runs[1:]:
            here, there = getattr(runs[0].config, name), getattr(run.config, name)
            if here != there:
                paths = f"{runs[0].path} and {run.path}"
                raise RigsaError(f"{paths} cannot stand in one report: --{flag(name)} is {here!r} and {there!r}")


def markdown_table(runs: list[Run]) -> str:
    """One row per level, the untrained model first; columns are padded, so it reads well in a terminal too."""
    rows = [row for run in runs for row in _rows(run)]
    names = list(rows[0])
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in names]
    cells = [names, *([row[name] for name in names] for row in rows)]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _rows(run: Run) -> list[dict[str, str]]:
    untrained = {"level": "untrained", "test": run.base["test"], "pruning": {}}
    return [_row(run, metrics) for metrics in (untrained, *run.levels)]


def _row(run: Run, metrics: dict[str, Any]) -> dict[str, str]:
    """Column to cell, empty where the untrained model, or a ticket drawn at random, has no such number."""

    def cell(source: dict[str, Any], name: str, form: str) -> str:
        return form.format(source[name]) if name in source else ""

    headline, *more = metrics["test"]
    return {
        "run": run.config.method,
        "level": str(metrics["level"]),
        "density": cell(metrics, "density", "{:.2%}"),
        "same sign": cell(metrics["pruning"], "same_sign_share", "{:.1%}"),
        "eligible": cell(metrics["pruning"], "eligible", "{:,}"),
        "kept": cell(metrics, "free", "{:,}"),
        "test accuracy": f"{metrics['test'][headline]['accuracy']:.2f} %",
        **{f"test, {shots}": f"{metrics['test'][shots]['accuracy']:.2f} %" for shots in more},
        "test loss": f"{metrics['test'][headline]['loss']:.3f}",
        "train loss": cell(metrics, "train_loss", "{:.3f}"),
        "seconds": cell(metrics, "train_seconds", "{:.0f}"),
        "peak memory": f"{metrics['peak_memory_bytes'] / 2**30:.2f} GiB" if "peak_memory_bytes" in metrics else "",
    }


def draw(runs: list[Run]) -> plt.Figure:
    """Test accuracy against level, and against density on a logarithmic axis."""
    figure, (by_level, by_density) = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for run in runs:
        accuracy = [run.accuracy(metrics) for metrics in run.levels]
        style = {
            "color": _COLORS[run.config.method], "marker": _MARKERS[run.config.method], "label": _label(run, runs),
        }  # fmt: skip
        by_level.plot([metrics["level"] for metrics in run.levels], accuracy, **style)
        by_density.plot([100 * metrics["density"] for metrics in run.levels], accuracy, **style)
    base = runs[0].accuracy(runs[0].base)
    for axes in (by_level, by_density):
        axes.axhline(base, color="0.35", linestyle="--", linewidth=1, label=f"untrained ({base:.1f} %)")
        axes.grid(alpha=0.3)
    _label_axes(by_level, by_density, [metrics["density"] for run in runs for metrics in run.levels])
    by_density.legend(loc="center left", frameon=False)
    config = runs[0].config
    figure.suptitle(f"Textual MNIST, {runs[0].headline}: {config.model} on {config.data}", fontsize=11)
    return figure


def _label_axes(by_level: Axes, by_density: Axes, densities: list[float]) -> None:
    by_level.set(xlabel="level (0 is dense)", ylabel="test accuracy (%)", ylim=(0, 102))
    by_level.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_density.set(xlabel="density (% of adapted weights, log scale)", xscale="log")
    by_density.invert_xaxis()
    ticks = sorted({float(f"{100 * density:.2g}") for density in densities})
    by_density.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    by_density.minorticks_off()


def _label(run: Run, runs: list[Run]) -> str:
    alike = [other for other in runs if other.config.method == run.config.method]
    return run.config.method if len(alike) == 1 else f"{run.config.method} ({run.path.name})"
