"""Names and values that mean something to matplotlib, to Markdown, to HTML or to a spreadsheet, in a report."""

import csv
import io
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rigsa.experiments.report.page import CSV_FILE, PAGE_FILE, TEXT_FILE, _code, _fenced, write_report
from rigsa.experiments.report.tables import Table, _csv_cell, escape_markdown
from rigsa.run import main
from tests.experiments.report.test_report import IMAGES, edit, make, write, write_run

SCRIPT = "<script>alert(1)</script>"
EVIL = ["$\\frac{$", "$x^2$ <b>", "a$b", SCRIPT, f"```\n\n{SCRIPT}", "|", "`", "[x](http://y)", "=1+1"]


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings that are told apart by a value that means something elsewhere, and a failed run that says such."""
    folder = tmp_path_factory.mktemp("evil")
    for number, text in enumerate(EVIL):
        write_run(folder / f"imp{number}", make("imp", attention=text, seed=0))
        write_run(folder / f"random{number}", make("random-mask", match=f"runs/{text}", seed=0))
    write(folder / "broken" / "failed.json", {"exit_code": 1, "message": SCRIPT})
    return folder


def outside_code(text: str) -> str:
    """Markdown without its fenced blocks and code in the line, as CommonMark has them."""
    kept, fence = [], ""
    for line in text.splitlines():
        ticks = line[: len(line) - len(line.lstrip("`"))]
        if fence:
            fence = "" if line == ticks and len(ticks) >= len(fence) else fence
        elif len(ticks) >= 3:
            fence = ticks
        elif not (line.startswith("`") and line.endswith("`")):
            kept.append(line)
    assert not fence
    return "\n".join(kept)


def test_names_stay_names_in_figures_markdown_html_and_spreadsheets(evil, tmp_path):
    shown, page = write_report([evil], tmp_path, IMAGES)
    text = (tmp_path / TEXT_FILE).read_text()
    assert SCRIPT not in outside_code(text)
    assert "\\<script>" in shown
    assert not re.search(r"(?<!\\)\[x\]\(", outside_code(text))
    assert SCRIPT not in page.read_text()
    rows = list(csv.reader(io.StringIO((tmp_path / CSV_FILE).read_text())))
    assert any("'=1+1" in row for row in rows)
    assert not any(cell.startswith(("=", "+", "@")) for row in rows for cell in row)
    assert (tmp_path / "figure_2.png").stat().st_size > 10_000


@given(st.text(alphabet="`~<>$|\\[]ab \n\r\u2028#*_&", max_size=20))
def test_no_text_leaves_its_cell_its_line_or_its_code(text):
    row = Table("t", "n", ["a", "b"], [[text, "1"]]).markdown().splitlines()
    assert len(row) == 3
    escaped = escape_markdown(text)
    for character in "<`[|":
        bare = escaped.replace("\\\\", "").replace(f"\\{character}", "")
        assert character not in bare
    assert SCRIPT not in outside_code("\n\n".join([_fenced([text, SCRIPT]), _code(f"{text}{SCRIPT}")]))


@given(st.one_of(st.text(max_size=5), st.floats(), st.integers()))
def test_no_cell_is_a_formula(value):
    cell = _csv_cell(value)
    assert not (isinstance(cell, str) and cell[:1] in tuple("=+-@\t\r"))
    assert cell == value or cell == f"'{value}" or value != value


def test_folders_whose_names_are_not_utf8_stand_in_a_report(tmp_path, capsys):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    write_run(folder, make("imp"))
    edit(folder / "config.json", data="/nowhere")
    assert main(["report", str(tmp_path)]) == 0
    assert "caf\\udce9" in (tmp_path / CSV_FILE).read_text()
    assert (tmp_path / PAGE_FILE).exists()
    assert "test accuracy" in capsys.readouterr().out
