"""Which method to take: runs of several methods with one budget, in a table with a verdict in words."""

from __future__ import annotations

import math
from collections.abc import Callable

from rigsa.experiments.measures import Measure
from rigsa.experiments.report.runs import Report, Setting, trainable
from rigsa.experiments.report.statistics import compare, estimate
from rigsa.experiments.report.tables import Table

CERTAIN = 0.05
"""Two settings differ if the p of the paired t test over their seeds is below this."""
ERRORS = 2
"""With one seed they differ if their answers differ by more than so many standard errors."""


def deciding(report: Report) -> Measure:
    """What decides: the score of answers if there is one, else of texts the test loss and of images the accuracy."""
    config = report.config
    return report.loss if config.is_text and config.score == "none" else report.accuracies[0]


def decision_table(report: Report) -> tuple[Table, str]:
    """A row a setting, the best first, and a sentence that says which to take and why."""
    measure = deciding(report)
    order = sorted(report.settings, key=lambda setting: (_rank(setting, measure), _rank(setting, report.loss)))
    best = order[0]
    alike = {setting.label: _alike(setting, best, measure) for setting in order}
    rows = [[*_row(report, setting, measure), _judgement(setting, best, alike[setting.label])] for setting in order]
    columns = ["setting", "seeds", f"{measure.name} ({measure.unit})", *(one.name for one in _others(report, measure))]
    columns += ["trained numbers", "steps", "seconds", "peak GiB", "beside the best"]
    note = (
        "Final levels. Steps and seconds are those of all levels of a run. Alike: over seeds the paired t test gives "
        f"p of {CERTAIN} or more; with one seed the scores differ by {ERRORS} standard errors or less."
    )
    table = Table("Which to take", note, columns, rows).without_empty_columns()
    return table, _sentence(report, order, alike, measure)


def _others(report: Report, measure: Measure) -> list[Measure]:
    return [one for one in (*report.accuracies, *report.losses, *report.drifts) if one.keys != measure.keys]


def _rank(setting: Setting, measure: Measure) -> float:
    found = setting.estimate(measure, setting.final)
    if found is None or math.isnan(found.mean):
        return math.inf
    return found.mean if measure.less_is_better else -found.mean


def _row(report: Report, setting: Setting, measure: Measure) -> list[str]:
    finals = list(setting.at(setting.final).values())

    def mean(of: Callable[[list[dict[str, float]]], float]) -> float:
        return estimate([of(run.levels) for run in setting.runs]).mean

    measures = (measure, *_others(report, measure))
    return [
        setting.label,
        str(len(finals)),
        *(one.text(setting.estimate(one, setting.final)) for one in measures),
        f"{estimate([trainable(metrics) for metrics in finals]).mean:,.0f}",
        f"{mean(lambda levels: sum(level['steps'] for level in levels)):,.0f}",
        f"{mean(lambda levels: sum(level['train_seconds'] for level in levels)):,.0f}",
        f"{mean(lambda levels: max(level['peak_memory_bytes'] for level in levels)) / 2**30:.2f}",
    ]


def _alike(setting: Setting, best: Setting, measure: Measure) -> bool | None:
    """Whether a setting cannot be told from the best; None where nothing says how uncertain they are."""
    if setting is best:
        return True
    found = compare(setting.values(measure, setting.final), best.values(measure, best.final))
    if found is not None and found.p is not None:
        return found.p >= CERTAIN
    errors = [_stderr(one, measure) for one in (setting, best)]
    ours, theirs = (one.estimate(measure, one.final) for one in (setting, best))
    if ours is None or theirs is None or errors[0] is None or errors[1] is None:
        return None
    return abs(ours.mean - theirs.mean) <= ERRORS * math.hypot(errors[0], errors[1])


def _stderr(setting: Setting, measure: Measure) -> float | None:
    """The standard error over examples of the first run, where it is recorded."""
    metrics = next(iter(setting.at(setting.final).values()))
    return Measure("", (*measure.keys[:-1], "stderr"), "", 0).of(metrics)


def _judgement(setting: Setting, best: Setting, alike: bool | None) -> str:
    if setting is best:
        return "best"
    return {True: "alike", False: "worse", None: "not known"}[alike]


def _untrained(report: Report, measure: Measure) -> float | None:
    """The best value that an untrained model has; None where it was not measured."""
    values = [found.mean for name in report.bases() if (found := report.before(measure, name)) is not None]
    return (min if measure.less_is_better else max)(values, default=None)


def _sentence(report: Report, order: list[Setting], alike: dict[str, bool | None], measure: Measure) -> str:
    best = order[0]
    found = best.estimate(measure, best.final)
    if found is None:
        return "No run has measured what decides."
    value = f"{measure.name} {measure.text(found)}{' %' if measure.unit == '%' else f' {measure.unit}'}"
    base = _untrained(report, measure)
    if base is not None and (found.mean >= base if measure.less_is_better else found.mean <= base):
        return f"Take none yet: the best, {best.label} ({value}), is no better than the untrained model; train longer."
    unknown = [setting.label for setting in order if alike[setting.label] is None]
    even = [setting for setting in order if alike[setting.label]]
    fewest = min(even, key=lambda setting: trainable(next(iter(setting.at(setting.final).values()))))
    if fewest is best:
        text = f"Take {best.label}: {value}, the best."
        if others := [setting.label for setting in even if setting is not best]:
            text += f" {', '.join(others)} cannot be told from it, with no fewer trained numbers."
    else:
        text = (
            f"Take {fewest.label}: it cannot be told from {best.label}, the best ({value}), and has the fewest trained "
            "numbers of those."
        )
    if unknown:
        text += (
            f" Whether {', '.join(unknown)} is truly worse is not known: with one seed a loss has no standard error; "
            "give --seeds 0,1,2, or a --score."
        )
    return text
