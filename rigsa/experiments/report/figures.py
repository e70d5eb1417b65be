"""The figures of a report, in the paper's arrangement, each with its title, its caption and a text in its place."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator, NullLocator

from rigsa.experiments.config import Colour
from rigsa.experiments.measures import Measure, title
from rigsa.experiments.methods.registry import METHODS
from rigsa.experiments.report.runs import Report, Setting, trainable
from rigsa.experiments.report.statistics import Estimate, estimate, front, group
from rigsa.experiments.tasks.textual_mnist import Images, image_text

STYLE: Any = {
    "text.parse_math": False,  # a `$` in a label is a `$`
    "font.family": "sans-serif", "font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9, "legend.fontsize": 8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "lines.linewidth": 1.4,
    "lines.markersize": 6, "legend.frameon": False, "legend.handlelength": 3.2, "text.color": "#1a1a1a",
    "axes.labelcolor": "#1a1a1a", "axes.edgecolor": "#555555",
    "svg.fonttype": "none", "svg.hashsalt": "rigsa",  # text stays text; equal figures have equal identifiers
}  # fmt: skip
PALETTE: dict[Colour, str] = {
    "black": "#000000", "orange": "#E69F00", "sky": "#56B4E9", "green": "#009E73", "blue": "#0072B2", "red": "#D55E00",
    "purple": "#CC79A7",
}  # fmt: skip
"""Okabe & Ito, less yellow, which is lost on white: told apart by the colour-blind."""
_FILLS = ("full", "none", "left", "right", "top", "bottom")
"""How markers are filled, one fill for each of several settings of one method."""
BASE_LINES = ("--", ":")
POINTS_OF_AN_INCH = 72
ROOM_FOR_TICKS = 0.8
"""Inches that the height of a panel leaves for names that stand upright below it."""
GAP = 0.22
"""Inches between two columns of a legend."""
BESIDE_WORDS = 0.6 + GAP
"""Inches of a legend's column beside its words: the line, what stands around it, and the gap."""
HINTING = 1.03
"""Letters on a screen are up to so much wider than their outlines."""


@dataclass(frozen=True)
class Drawing:
    """A figure and what is said about it."""

    file: str
    title: str
    caption: str
    alt: str
    figure: Figure

    def svg(self) -> str:
        """The figure as SVG: the same text for the same data, whenever it is drawn."""
        buffer = io.StringIO()
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(buffer, format="svg", metadata={"Date": None})
        return buffer.getvalue()

    def save_png(self, path: Path) -> None:
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(path, format="png", dpi=150)


@dataclass(frozen=True)
class Panel:
    """The axes of one measure; the `lowest` of a column carry the labels of its horizontal axis."""

    axes: Axes
    measure: Measure
    lowest: bool


SIZES = ("rank", "density", "match")
"""Fields that say how much is trained: settings that differ in these alone are one line by trained numbers."""


@dataclass(frozen=True)
class Series:
    """Points that belong on one line: the levels of imp, the ranks of a low-rank method, or one setting alone."""

    label: str
    look: dict[str, Any]
    points: list[tuple[Setting, int]]

    def values(self, measure: Measure) -> list[tuple[Setting, int, Estimate]]:
        """The points at which `measure` was taken, each with its mean over seeds."""
        found = [(setting, level, setting.estimate(measure, level)) for setting, level in self.points]
        return [(setting, level, value) for setting, level, value in found if value is not None]


def look(method: str, variant: int = 0) -> dict[str, Any]:
    """Matplotlib's options for the line of a method; `variant` numbers several settings of it."""
    look = METHODS[method].look
    color, fill = PALETTE[look.colour], _FILLS[variant % len(_FILLS)]
    return {"color": color, "marker": look.marker, "linestyle": look.line, "fillstyle": fill}


def example_figure(images: Images) -> Drawing:
    """Figure 1: an image beside the text that the model reads."""
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(7, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        levels, label = images.levels[0], int(images.labels[0])
        height, width = levels.shape
        left.imshow(levels, cmap="gray", vmin=0, vmax=9)
        left.set(title=f"an image of the digit {label}")
        right.set(title="its text", xlim=(0, width), ylim=(height, 0), aspect="equal")
        for axes in (left, right):
            axes.axis("off")
        size = min(14.0, 7.5 * 28 / height)
        for row, line in enumerate(image_text(levels).split("\n")):
            right.text(width / 2, row + 0.5, line, family="monospace", size=size, ha="center", va="center")
    return Drawing(
        "figure_1.png",
        "Figure 1. Textual MNIST",
        "Each pixel becomes one digit from 0 to 9 and each row one line; the model answers with one token.",
        f"On the left a handwritten {label} of {height} by {width} grey pixels, on the right the same image as "
        f"{height} lines of {width} digits.",
        figure,
    )


def level_figure(report: Report) -> Drawing:
    """Figure 2: the target task, the source tasks and drift by level; methods without levels stand to the right."""
    series = [one for one in all_series(report) if one.points[0][0].config.method.look.by_level]
    others = [setting for setting in report.settings if not setting.config.method.look.by_level]
    last = max((level for one in series for _, level in one.points), default=-1)
    with matplotlib.rc_context(STYLE):
        figure, panels = _panels(report, width=max(3.6, 1.2 + 0.2 * (last + 1 + len(others))))
        for panel in panels:
            axes, measure = panel.axes, panel.measure
            for index, one in enumerate(series):
                shift = 0.1 * (index - (len(series) - 1) / 2) if len(one.points) == 1 else 0.0
                points = [(level + shift, value) for _, level, value in one.values(measure)]
                _plot(axes, points, one.look, one.label)
            places = [(last + 1 + index, setting) for index, setting in enumerate(others)]
            for place, setting in places:
                value = setting.estimate(measure, setting.final)
                _plot(axes, [] if value is None else [(place, value)], _look_of(report, setting), setting.label)
            if series and others:
                axes.axvline(last + 0.5, color="0.6", linewidth=0.8)
            name = "level {}" if others else "{}"
            ticks = [(level, name.format(level)) for level in range(last + 1)] + [(at, one.label) for at, one in places]
            axes.set_xticks([at for at, _ in ticks], [text for _, text in ticks] if panel.lowest else [])
            axes.tick_params(axis="x", rotation=90 if others else 0)
            axes.set(xlim=(-0.5, max(last + len(others) + 0.5, 0.5)))
            axes.set_xlabel("level (0 is dense)" if panel.lowest and not others else "")
        if others:
            _room_for_ticks(figure, [one.label for one in others])
        _legend(figure, panels)
    caption = "Level 0 is dense, each level after it a sparser ticket."
    if others:
        caption += " To the right of the line: methods that have no such levels, at the end of training."
    return Drawing(
        "figure_2.png",
        "Figure 2. What is learned and what is forgotten, by level",
        f"{caption} {_interval_note(report)}",
        _alt(report, f"{len(panels)} panel{'s' * (len(panels) > 1)} by level", series, others),
        figure,
    )


def rank_figure(report: Report) -> Drawing | None:
    """Figure 3: the same by rank, with the final level of imp and of the random mask as lines; None without ranks."""
    ranked = [one for one in all_series(report) if one.points[0][0].config.method.reads("rank")]
    if not ranked:
        return None
    fixed = [setting for setting in report.settings if setting.config.method.look.by_level]
    ranks = sorted({setting.config.rank for one in ranked for setting, _ in one.points})
    with matplotlib.rc_context(STYLE):
        figure, panels = _panels(report, width=4.0)
        for panel in panels:
            axes, measure = panel.axes, panel.measure
            for setting in fixed:
                value = setting.estimate(measure, setting.final)
                _line_across(axes, value, _look_of(report, setting), f"{setting.label}, final level")
            for index, one in enumerate(ranked):
                shift = 2 ** (0.12 * (index - (len(ranked) - 1) / 2))
                points = [(setting.config.rank * shift, value) for setting, _, value in one.values(measure)]
                _plot(axes, points, one.look, one.label, band=False)
            axes.set_xscale("log", base=2)
            axes.set_xticks(ranks, [str(rank) for rank in ranks])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set(xlabel="rank (log scale)" if panel.lowest else "", xlim=(ranks[0] / 1.5, ranks[-1] * 1.5))
        _legend(figure, panels)
    return Drawing(
        "figure_3.png",
        "Figure 3. The same by rank",
        f"Lines across are the final levels of methods without a rank. {_interval_note(report)}",
        _alt(report, f"{len(panels)} panel{'s' * (len(panels) > 1)} by rank", ranked, fixed),
        figure,
    )


def _headline(report: Report) -> str:
    """The label of the axis of the task's headline."""
    return f"{report.accuracies[0].name} (%)" if report.config.is_text else "test accuracy (%)"


def size_figure(report: Report) -> Drawing:
    """Figure 4: accuracy on the target task by trained numbers."""
    series = all_series(report, SIZES)
    measure = report.accuracies[0]
    with matplotlib.rc_context(STYLE):
        width = max(8, 5.2 + _legend_column(one.label for one in series))  # the legend stands beside the panel
        figure = Figure(figsize=(width, max(3.8, 0.19 * len(series) + 1)), layout="constrained")
        axes = figure.subplots()
        for one in series:
            _plot(axes, _by(one, measure, "trained numbers"), one.look, one.label)
        _baselines(axes, report, measure)
        axes.set(xscale="log", xlabel="trained numbers (log scale)", ylabel=_headline(report), ylim=(0, 102))
        _tick(axes, [at for one in series for at, _ in _by(one, measure, "trained numbers")])
        figure.legend(loc="outside right upper")
    return Drawing(
        "figure_4.png",
        "Figure 4. Accuracy by number of trained parameters",
        f"{measure.name} on the target task; lines join levels or ranks. {_interval_note(report)}",
        _alt(report, "Target accuracy by trained numbers on a logarithmic axis", series, []),
        figure,
    )


def density_figure(report: Report) -> Drawing:
    """Figure 5: accuracy on the target task by level and by density."""
    series = all_series(report, SIZES)
    measure = report.accuracies[0]
    levelled = [one for one in series if one.points[0][0].config.method.look.by_level]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        in_a_row = _legend_below(figure, [one.label for one in series], most=4)
        figure.set_figheight(figure.get_figheight() + 0.2 * -(-(len(series) + 2) // in_a_row))
        by_level, by_density = figure.subplots(1, 2, sharey=True)
        for one in levelled:
            for setting in {id(setting): setting for setting, _ in one.points}.values():
                points = [(level, value) for owner, level, value in one.values(measure) if owner is setting]
                _plot(by_level, points, one.look, None)
        for one in series:
            _plot(by_density, _by(one, measure, "density"), one.look, one.label)
        _baselines(by_level, report, measure, labelled=False)
        _baselines(by_density, report, measure)
        by_level.set(xlabel="level (0 is dense)", ylabel=_headline(report), ylim=(0, 102))
        by_level.xaxis.set_major_locator(MaxNLocator(integer=True))
        by_density.set(xlabel="density (% of adapted weights, log scale)", xscale="log")
        _tick(by_density, [at for one in series for at, _ in _by(one, measure, "density")])
        by_density.invert_xaxis()
        figure.legend(loc="outside lower center", ncols=in_a_row)
        config = report.config
        name = measure.name if config.is_text else f"{title(config)}, {measure.name}"
        figure.suptitle(f"{name}: {config.model} on {config.data}", fontsize=11)
    return Drawing(
        "figure.png",
        "Figure 5. Accuracy by level and by density",
        f"Density: trained entries, for low rank trained numbers, as a share of the adapted weights. "
        f"{_interval_note(report)}",
        _alt(report, "Target accuracy by level, and by density on a logarithmic axis", series, []),
        figure,
    )


def trade_off_figure(report: Report) -> Drawing | None:
    """Figure 6: the target task against each measure of what was forgotten; None where none was taken."""
    series = all_series(report, SIZES)
    learned = report.accuracies[0]
    points = {
        measure: found
        for measure in (*report.drifts, *report.sources)
        if (found := [(one, *point) for one in series for point in _trade_offs(one, measure, learned)])
    }
    if not points:
        return None
    columns = min(2, len(points))
    rows = -(-len(points) // columns)
    best, named = [], set[str]()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(6.5, 4.2 * columns), 3.2 * rows), layout="constrained")
        for index, (measure, found) in enumerate(points.items()):
            axes = figure.add_subplot(rows, columns, index + 1)
            best.append(f"{measure.name}: {', '.join(_draw_trade_offs(axes, found, measure, named))}")
            for base, line in zip(report.bases(), BASE_LINES, strict=False):
                before = report.before(measure, base)
                if before is not None:
                    label = _new(base, named)
                    axes.axvline(before.mean, color="0.35", linestyle=line, linewidth=1, label=label, zorder=1)
            axes.set(xlabel=f"{measure.name} ({measure.unit})", ylabel=_headline(report))
        in_a_row = _legend_below(figure, named, most=4)
        figure.set_figheight(figure.get_figheight() + 0.2 * (2 + len(series) // in_a_row))
        figure.legend(loc="outside lower center", ncols=in_a_row)
    return Drawing(
        "figure_6.png",
        "Figure 6. What is learned against what is forgotten",
        "Less drift is to the left, a better score of a source task to the right. Small numbers are densities in per "
        f"cent; the grey line joins the points that no other beats in both. {_interval_note(report)}",
        f"{_alt(report, 'Accuracy on the target task against what is forgotten', series, [])} "
        f"Not beaten in both, by {'; by '.join(best)}.",
        figure,
    )


Point: TypeAlias = tuple[Series, float, Estimate, Estimate]
"""A level in Figure 6: its density in per cent, what was forgotten, what was learned."""


def _trade_offs(series: Series, forgotten: Measure, learned: Measure) -> list[tuple[float, Estimate, Estimate]]:
    """Density, and both measures, of the levels where both were taken and are numbers that can be drawn."""
    x, y = (dict(_by(series, measure, "density")) for measure in (forgotten, learned))
    return [(density, value, y[density]) for density, value in x.items() if density in y and math.isfinite(value.mean)]


def _new(label: str, named: set[str]) -> str | None:
    """The label, the first time that it is asked for: one legend stands for all panels."""
    if label in named:
        return None
    named.add(label)
    return label


def _draw_trade_offs(axes: Axes, points: Sequence[Point], measure: Measure, named: set[str]) -> list[str]:
    """The points with their densities, and a line through those that are not beaten, which it returns by name."""
    for one, density, x, y in points:
        axes.plot(x.mean, y.mean, label=_new(one.label, named), **(one.look | {"linestyle": ""}))
        bars: dict[str, Any] = {"elinewidth": 0.6, "capsize": 2, "alpha": 0.6}
        axes.errorbar(x.mean, y.mean, y.half, x.half, fmt="none", ecolor=one.look["color"], **bars)
        place = (x.mean, y.mean)
        axes.annotate(_short(density), place, (4, 4), textcoords="offset points", fontsize=6.5, color="0.35")
    places = [(x.mean, y.mean) for _, _, x, y in points]
    sign = -1 if measure.less_is_better else 1
    best = sorted(front([(sign * x, y) for x, y in places]), key=lambda index: places[index])
    if len(best) > 1:
        line = zip(*(places[index] for index in best), strict=True)
        axes.plot(*line, color="0.6", linewidth=1, zorder=1, label=_new("not beaten in both", named))
    return [f"{points[index][0].label} at {_short(points[index][1])} %" for index in best]


def _room_for_ticks(figure: Figure, labels: Sequence[str]) -> None:
    """Make a figure higher for the upright names below its panels, which would else take their place."""
    longest = max((_inches(label, STYLE["font.size"]) for label in labels), default=0.0)
    figure.set_figheight(figure.get_figheight() + max(0.0, longest - ROOM_FOR_TICKS))


def _legend_column(labels: Iterable[str]) -> float:
    """The inches that a column of a legend with these labels takes: line, words and the gap to the next one."""
    return BESIDE_WORDS + max(_inches(label, STYLE["legend.fontsize"]) for label in labels)


def _legend_below(figure: Figure, labels: Iterable[str], most: int) -> int:
    """The columns of a legend below a figure, at most so many. The figure gets as wide as one column is."""
    column = _legend_column(labels)
    figure.set_figwidth(max(figure.get_figwidth(), column))
    return max(1, min(most, int((figure.get_figwidth() + GAP) / column)))


def _inches(text: str, size: float) -> float:
    width: float = TextPath((0, 0), text, prop=FontProperties(size=size)).get_extents().width
    return HINTING * width / POINTS_OF_AN_INCH


def drawings(report: Report, images: Images | None) -> list[Drawing]:
    """Every figure that the data allow; `images` are for Figure 1."""
    found = [
        None if images is None else example_figure(images), level_figure(report), rank_figure(report),
        size_figure(report), density_figure(report), trade_off_figure(report),
    ]  # fmt: skip
    return [drawing for drawing in found if drawing is not None]


def all_series(report: Report, joined: Collection[str] = ("rank",)) -> list[Series]:
    """Every setting once: levels of a setting on one line, and settings that differ in nothing but `joined` fields.

    The setting that others are compared with comes first, and so has the plain look of its method.
    """
    firsts = [setting.runs[0] for setting in report.settings]
    groups = group([run.config for run in firsts], joined, [run.ticket for run in firsts])
    groups.sort(key=lambda one: report.reference not in [report.settings[index] for index in one.members])
    seen: dict[str, int] = {}
    series = []
    for one in groups:
        settings = [report.settings[index] for index in one.members]
        settings.sort(key=lambda setting: (setting.config.rank, setting.config.density))
        method = settings[0].config.method
        variant = seen.get(method.name, 0)
        seen[method.name] = variant + 1
        points = [
            (setting, level)
            for setting in settings
            for level in (setting.levels if method.look.by_level else [setting.final])
        ]
        label = settings[0].label if len(settings) == 1 else one.label
        series.append(Series(label, look(method.name, variant), points))
    return series


def _look_of(report: Report, setting: Setting) -> dict[str, Any]:
    """The options of the line of its series."""
    return next(one.look for one in all_series(report) if any(member is setting for member, _ in one.points))


def _by(series: Series, measure: Measure, what: str) -> list[tuple[float, Estimate]]:
    """Points by density, in per cent, or by trained numbers, each a mean over seeds; one for a level 0 that settings
    share, that of the most seeds."""
    points: dict[float, Estimate] = {}
    for setting, level, value in series.values(measure):
        found = setting.at(level).values()
        sizes = [float(trainable(one)) if what == "trained numbers" else 100 * one["density"] for one in found]
        at = estimate(sizes).mean
        if at not in points or value.n > points[at].n:
            points[at] = value
    return list(points.items())


def _tick(axes: Axes, values: Sequence[float]) -> None:
    """Ticks of a logarithmic axis at the values themselves, less those too close to be written side by side, and 0."""
    drawn = sorted(value for value in values if value > 0)
    apart = (drawn[-1] / drawn[0]) ** 0.1 if drawn else 1.0
    kept: list[float] = []
    for value in drawn:
        if not kept or value > kept[-1] * max(apart, 1.0001):
            kept.append(value)
    axes.set_xticks(kept, [_short(value) for value in kept])
    axes.xaxis.set_minor_locator(NullLocator())


def _short(value: float) -> str:
    """The number in three digits: 63.9, 305k, 45.7M."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def _panels(report: Report, width: float) -> tuple[Figure, list[Panel]]:
    """One panel a measure, two in a row, each with its title, axis and untrained model."""
    measures = [report.accuracies[0], *report.sources, *report.drifts]
    columns = min(2, len(measures))
    rows = -(-len(measures) // columns)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=(max(5.0, columns * width), 3.0 * rows + 0.6), layout=layout)
    panels = []
    for index, measure in enumerate(measures):
        axes = figure.add_subplot(rows, columns, index + 1)
        name = f"{title(report.config)}, {measure.name}" if index == 0 else measure.name
        axes.set(title=name, ylabel="accuracy (%)" if measure.unit == "%" else measure.unit)
        if index == 0:
            axes.set_ylim(0, 102)
        _baselines(axes, report, measure)
        panels.append(Panel(axes, measure, lowest=index + columns >= len(measures)))
    return figure, panels


def _baselines(axes: Axes, report: Report, measure: Measure, labelled: bool = True) -> None:
    for base, line in zip(report.bases(), BASE_LINES, strict=False):
        before = report.before(measure, base)
        if before is not None:
            label = base if labelled else None
            axes.axhline(before.mean, color="0.35", linestyle=line, linewidth=1, label=label, zorder=1)


def _plot(
    axes: Axes, points: Sequence[tuple[float, Estimate]], look: dict[str, Any], label: str | None, band: bool = True
) -> None:
    """A line through the means; intervals as a band, or as bars where there is one point or `band` is off."""
    if not points:
        return
    points = sorted(points, key=lambda point: point[0])
    x, y = [at for at, _ in points], [value.mean for _, value in points]
    halves = [value.half or 0.0 for _, value in points]
    axes.plot(x, y, label=label, **look)
    if band and len(points) > 1 and any(halves):
        low, high = [a - b for a, b in zip(y, halves, strict=True)], [a + b for a, b in zip(y, halves, strict=True)]
        axes.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
    elif any(halves):
        axes.errorbar(x, y, yerr=halves, fmt="none", ecolor=look["color"], capsize=3, elinewidth=1)


def _line_across(axes: Axes, value: Estimate | None, look: dict[str, Any], label: str) -> None:
    """A line across the panel with its marker at both ends, and its interval as a band."""
    if value is None:
        return
    axes.axhline(value.mean, label=label, clip_on=False, **look)
    if value.half:
        axes.axhspan(value.mean - value.half, value.mean + value.half, color=look["color"], alpha=0.1, linewidth=0)


def _legend(figure: Figure, panels: Sequence[Panel]) -> None:
    """The legend stands in the place of a missing last panel, or below the figure if none is missing."""
    handles, labels = panels[0].axes.get_legend_handles_labels()
    fits = _legend_column(labels) * (1 + len(labels) // 12) <= figure.get_figwidth() / 2
    if len(panels) > 1 and len(panels) % 2 and fits:
        spare = figure.add_subplot((len(panels) + 1) // 2, 2, len(panels) + 1)
        spare.axis("off")
        spare.legend(handles, labels, loc="lower center" if len(labels) > 8 else "center", ncols=1 + len(labels) // 12)
    else:
        columns = _legend_below(figure, labels, most=min(3, len(labels)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
        figure.set_figheight(figure.get_figheight() + 0.2 * (-(-len(labels) // columns) - 1))  # panels keep their size


def _interval_note(report: Report) -> str:
    if any(len(setting.runs) > 1 for setting in report.settings):
        return "Means over seeds; bands and bars are 95 % t intervals, and a setting with one seed has none."
    return "One seed each, so there are no intervals."


def _alt(report: Report, what: str, series: Sequence[Series], others: Sequence[Setting]) -> str:
    """The headline numbers in words; the rest is in the tables."""
    measure = report.accuracies[0]
    base = report.before(measure, next(iter(report.bases())))
    parts = [f"untrained {measure.text(base)} %"]
    for one in series:
        values = [measure.text(value) for _, _, value in one.values(measure)]
        parts.append(f"{one.label} {' to '.join(dict.fromkeys((values[0], values[-1])))} %")
    parts += [f"{one.label} {measure.text(one.estimate(measure, one.final))} %" for one in others]
    return f"{what}. Target accuracy: {'; '.join(parts)}. The tables hold every number."
