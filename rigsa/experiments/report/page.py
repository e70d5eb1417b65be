"""The report as one page without outside resources (`report.html`), as Markdown, as CSV, and its figures as files."""

from __future__ import annotations

import base64
import html
import platform
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from rigsa.errors import RigsaError
from rigsa.experiments.hardware import versions
from rigsa.experiments.measures import title
from rigsa.experiments.report.figures import Drawing, drawings
from rigsa.experiments.report.runs import Report, command_of, read_report
from rigsa.experiments.report.tables import Table, csv_text, escape_markdown, level_table, seeds_text, tables
from rigsa.experiments.run_folder import CONFIG_FILE
from rigsa.experiments.tasks.task import Task
from rigsa.experiments.tasks.textual_mnist import Images, TextualMnist, load_splits
from rigsa.files import write_atomically, write_text

PAGE_FILE = "report.html"
TEXT_FILE = "report.md"
CSV_FILE = "report.csv"
DEFAULT_OUT = Path("report")
"""A report on several folders goes here, in the working directory."""
_MARK = "<!-- written by rigsa report -->"
"""First line of report.md: what is ours may be written again."""


@dataclass(frozen=True)
class Commands:
    """Lines to type."""

    lines: list[str]


Block: TypeAlias = "str | Table | Drawing | Commands"


@dataclass(frozen=True)
class Section:
    """A heading and, below it, paragraphs, tables, figures and commands."""

    title: str
    blocks: list[Block]


def write_report(paths: Sequence[Path], out: Path | None = None, task: Task | None = None) -> tuple[str, Path]:
    """Write report.html, report.md, report.csv and the figures as PNG.

    Args:
        paths: run folders, or folders of them.
        out: where to; default: the one folder given, else ``./report``.
        task: of the runs, if it is at hand: Figure 1 shows its first test image. Else images are loaded here.

    Returns:
        What to print (the table of levels, and what was left out) and the path of the page.

    Raises:
        RigsaError: as `read_report`, or `out` holds a file of that name that is no report of ours.
    """
    report = read_report(paths)
    out = out or (paths[0] if len(paths) == 1 else DEFAULT_OUT)
    check_out(out)
    notes = [*report.notes, *(f"{folder} failed: {message}" for folder, message in report.failed)]
    try:
        images = _images(report, task)
    except RigsaError as error:
        images = None
        notes.append(f"There is no Figure 1: {error}")
    figures = drawings(report, images)
    command = shlex.join(["python", "-m", "rigsa.run", "report", *map(str, paths), "--out", str(out)])
    sections = make_sections(report, figures, notes)
    write_text(out / TEXT_FILE, markdown(report, sections, command))
    write_text(out / CSV_FILE, csv_text(report))
    for figure in figures:
        write_atomically(out / figure.file, figure.save_png)
    write_text(out / PAGE_FILE, page(report, sections, command))
    return "\n\n".join([level_table(report).markdown(), *notes]), out / PAGE_FILE


def _images(report: Report, task: Task | None) -> Images | None:
    """The test images of the runs' task; None for texts. Raises RigsaError where they are not to be had."""
    if isinstance(task, TextualMnist):
        return task.splits.test
    return None if report.config.is_text else load_splits(report.config.data).test


def check_out(out: Path) -> None:
    """Raises RigsaError where writing a report into `out` would overwrite a file that is not ours."""
    if out.exists() and not out.is_dir():
        raise RigsaError(f"--out {out}: expected a folder, got a file")
    if (out / CONFIG_FILE).exists():  # a run folder: the names of a report are ours there
        return
    text = out / TEXT_FILE
    if text.exists() and text.read_text(encoding="utf-8", errors="replace").startswith(_MARK):
        return
    for name in (TEXT_FILE, PAGE_FILE, CSV_FILE, "figure.png", *(f"figure_{n}.png" for n in (1, 2, 3, 4, 6))):
        if (out / name).exists():
            raise RigsaError(f"{out / name} was not written by rigsa report; choose another folder with --out")


def make_sections(report: Report, figures: Sequence[Drawing], notes: Sequence[str]) -> list[Section]:
    by_number: dict[str, Block] = {table.title.split(".")[0]: table for table in tables(report)}
    by_number |= {figure.title.split(".")[0]: figure for figure in figures}

    def some(*names: str) -> list[Block]:
        return [by_number[name] for name in names if name in by_number]

    reference = report.reference.config.method.name if report.reference else ""
    found = [
        Section("Left out and unfinished", list(notes)),
        Section("Task", some("Figure 1")),
        Section("What was learned and forgotten", some("Table 1", "Table 2", *(f"Figure {n}" for n in (2, 3, 4, 6)))),
        Section(f"Differences from {reference}", some("Table 5")),
        Section("Runs, level by level", some("Table 3", "Figure 5")),
        Section("Configuration", some("Table 4")),
        Section("How to run these again", [_AGAIN, Commands(_commands(report))]),
        Section("Machine and versions", [_machine(report)]),
    ]
    return [section for section in found if section.blocks]


_AGAIN = (
    "Each command is its run's configuration as differences from a preset. Given again it goes on where the run "
    "stopped; with another --out it starts afresh."
)


def _commands(report: Report) -> list[str]:
    return [
        f"{command_of(run.config)} --out {shlex.quote(str(run.path))}"
        for setting in report.settings
        for run in setting.runs
    ]


def _machine(report: Report) -> str:
    """What the run folders say about the machine, and what drew this."""
    levels = [metrics for run in report.runs for metrics in run.levels]
    seconds = sum(metrics.get("train_seconds", 0.0) for metrics in levels)
    peak = max(metrics.get("peak_memory_bytes", 0) for metrics in levels)
    made_on = sorted({f"{metrics['hardware']} ({metrics['versions']})" for metrics in levels if "hardware" in metrics})
    drawn_with = versions("matplotlib", "scipy")
    return (
        f"Trained on {'; '.join(made_on) or 'a machine that was not recorded'}: {seconds:,.0f} s in all, and at most "
        f"{peak / 2**30:.2f} GiB. Drawn with {drawn_with}, Python {platform.python_version()}."
    )


def heading(report: Report) -> tuple[str, str]:
    """Title, and a line that says what was compared."""
    config, methods = report.config, {run.config.method for run in report.runs}
    runs = f"{len(report.runs)} run{'s' * (len(report.runs) > 1)}"
    seeds = seeds_text(len({run.config.seed for run in report.runs}))
    many = f"{len(methods)} method{'s' * (len(methods) > 1)}"
    return f"Gated sparse adapters on {title(config)}", f"{config.model} on {config.data}: {runs}, {many}, {seeds}."


def markdown(report: Report, sections: Sequence[Section], command: str) -> str:
    """The report for a terminal or a repository; figures are the files beside it."""
    heads, line = map(escape_markdown, heading(report))
    parts = [_MARK, f"# {heads}", line]
    for section in sections:
        parts.append(f"## {escape_markdown(section.title)}")
        for block in section.blocks:
            if isinstance(block, str):
                parts.append("\n".join(map(escape_markdown, block.splitlines())))
            elif isinstance(block, Commands):
                parts.append(_fenced(block.lines))
            elif isinstance(block, Table):
                parts += [_titled(block.title, block.note), block.markdown(), _code(command)]
            else:
                parts += [f"![{escape_markdown(block.alt)}]({block.file})", _titled(block.title, block.caption)]
                parts.append(_code(command))
    return "\n\n".join(parts) + "\n"


def _titled(title: str, text: str) -> str:
    return f"**{escape_markdown(title)}.** {escape_markdown(text)}"


def _code(command: str) -> str:
    """In the line, unless something in it would end that."""
    return _fenced([command]) if "`" in command or len(command.splitlines()) > 1 else f"`{command}`"


def _fenced(lines: Sequence[str]) -> str:
    """A block of code, between fences that are longer than any in it."""
    text = "\n".join(lines)
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}\n{text}\n{fence}"


def page(report: Report, sections: Sequence[Section], command: str) -> str:
    """One HTML page that needs nothing else: no script, no font, no file."""
    heads, line = map(html.escape, heading(report))
    anchors = [section.title.lower().replace(" ", "-").replace(",", "") for section in sections]
    links = "".join(f'<li><a href="#{anchor}">{html.escape(section.title)}</a></li>'
                    for anchor, section in zip(anchors, sections, strict=True))  # fmt: skip
    bodies = [
        f'<section id="{anchor}">\n<h2>{html.escape(section.title)}</h2>\n'
        + "\n".join(_block(block, command) for block in section.blocks)
        + "\n</section>"
        for anchor, section in zip(anchors, sections, strict=True)
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{heads}</title>\n'
        f"<style>{_CSS}</style>\n</head>\n<body>\n<header>\n<h1>{heads}</h1>\n<p>{line}</p>\n</header>\n"
        f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n<main>\n'
        + "\n".join(bodies)
        + "\n</main>\n</body>\n</html>\n"
    )


def _block(block: Block, command: str) -> str:
    if isinstance(block, str):
        return f"<p>{html.escape(block)}</p>"
    if isinstance(block, Commands):
        return f"<pre>{html.escape(chr(10).join(block.lines))}</pre>"
    made_by = f'<p class="command"><code>{html.escape(command)}</code></p>'
    if isinstance(block, Table):
        return f'<div class="block">\n{_table(block)}\n{made_by}\n</div>'
    source = base64.b64encode(block.svg().encode()).decode()
    image = f'<img alt="{html.escape(block.alt)}" src="data:image/svg+xml;base64,{source}">'
    caption = f"<figcaption><b>{html.escape(block.title)}.</b> {html.escape(block.caption)}</figcaption>"
    return f'<figure class="block">\n{image}\n{caption}\n{made_by}\n</figure>'


def _table(table: Table) -> str:
    def cell(tag: str, index: int, text: str) -> str:
        name = ' class="name"' if index < table.num_names else ""
        return f"<{tag}{name}>{html.escape(text)}</{tag.split()[0]}>"

    def cells(row: Sequence[str]) -> str:
        return "".join(cell('th scope="row"' if index == 0 else "td", index, text) for index, text in enumerate(row))

    head = "".join(cell('th scope="col"', index, name) for index, name in enumerate(table.columns))
    rows = "\n".join(f"<tr>{cells(row)}</tr>" for row in table.rows)
    anchor = table.title.split(".")[0].lower().replace(" ", "-")
    named = f'aria-labelledby="{anchor}"'
    return (
        f'<p class="caption" id="{anchor}"><b>{html.escape(table.title)}.</b> {html.escape(table.note)}</p>\n'
        f'<div class="scroll" tabindex="0" role="region" {named}><table {named}>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>"
    )


_CSS = """
:root { color-scheme: light; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 70rem; background: #fff; color: #1a1a1a;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 1rem; padding-top: .5rem; border-top: 1px solid #ddd; }
header p { margin: .4rem 0 1rem; color: #444; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: 0; padding: 0; list-style: none; font-size: .9rem; }
a { color: #00578a; }
section > p { white-space: pre-line; }
.block { margin: 1.5rem 0 2rem; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto .5rem; }
figcaption, .caption { font-size: .9rem; color: #333; }
.caption { margin: 0 0 .5rem; break-after: avoid; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; font-weight: normal; white-space: nowrap; }
th.name, td.name { text-align: left; }
thead th { border-bottom: 2px solid #555; font-weight: 600; vertical-align: bottom; white-space: normal; }
tbody tr { border-bottom: 1px solid #e3e3e3; }
pre { overflow-x: auto; background: #f6f6f4; padding: .8rem 1rem; font-size: .82rem; line-height: 1.6; }
.command { margin: .4rem 0 0; font-size: .75rem; color: #666; overflow-wrap: anywhere; }
@media print {
  body { max-width: none; padding: 0; color: #000; font-size: 10pt; }
  nav { display: none; }
  .scroll { overflow: visible; }
  table { font-size: 7.5pt; }
  th, td { padding: .15rem .3rem; white-space: normal; }
  pre { white-space: pre-wrap; font-size: 7.5pt; }
  figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  figcaption, .caption, .command, header p { color: #000; }
}
"""
