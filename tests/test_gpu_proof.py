"""The command that proves things on a GPU: all of it at tiny sizes, that its checks can fail, and that sections fail
alone."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu_proof import bits, correct, peft_models, promises, training
from benchmarks.gpu_proof.__main__ import parse
from benchmarks.gpu_proof.behaviour import Loop, accumulation, checkpointing, compare
from benchmarks.gpu_proof.cases import KernelCase, LayerCase
from benchmarks.gpu_proof.gpu_tests import Rows
from benchmarks.gpu_proof.journal import CUT_OFF, DONE, FAILED, SKIPPED, Journal, read
from benchmarks.gpu_proof.runner import run_stages
from benchmarks.gpu_proof.schedule import PARTS, Section, all_names, stages
from benchmarks.gpu_proof.setting import Setting
from benchmarks.gpu_proof.workers import spread
from rigsa_kernels import gated_linear

ROOT = Path(__file__).resolve().parents[1]
MAY_BE_SKIPPED = {"sanitizer", "mnist", "liger"}
"""On a CPU, without data."""
IF_INSTALLED = {"unsloth": "unsloth"}


def in_an_hour(folder: Path, dry: bool = True) -> Setting:
    return Setting(folder, dry, time.monotonic() + 3600)


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a dry run of all sections, and what the command printed."""
    out = tmp_path_factory.mktemp("proof")
    command = [sys.executable, "-m", "benchmarks.gpu_proof", "--dry", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout


class TestAllOfIt:
    @pytest.mark.parametrize("name", all_names())
    def test_a_section_writes_its_file_and_finds_nothing_wrong(self, dry, name):
        record = read(dry[0], name)
        absent = name in IF_INSTALLED and importlib.util.find_spec(IF_INSTALLED[name]) is None
        skipped = absent or name in MAY_BE_SKIPPED or (name == "quickstart" and record["status"] == SKIPPED)
        assert record["status"] == (SKIPPED if skipped else DONE), record.get("reason")
        assert record["rows"] or name == "mnist"
        assert [row for row in record["rows"] if row.get("ok") is False or "error" in row] == []

    def test_it_ends_with_a_table(self, dry):
        folder, printed = dry
        text = (folder / "summary.md").read_text()
        assert printed.rstrip().splitlines()[-1].startswith("- mnist: skipped")
        assert printed[printed.index("**A dry run") :].strip() in text
        lines = json.loads((folder / "summary.json").read_text())["lines"]
        assert len(lines) == printed.count("| not measured |")
        assert any("full fine-tuning" in line["promised"] and line["measured"] for line in lines)
        assert "| size | provider | step_ms | host_ms |" in text

    def test_what_it_leaves_is_small_enough_to_send(self, dry):
        assert sum(path.stat().st_size for path in dry[0].rglob("*") if path.is_file()) < 2**20


def run(setting: Setting, journal: Journal, how: str) -> None:
    """A section: this module is one to the tests below."""
    journal.row(before=how)
    if how == "raises":
        raise ValueError("on purpose")
    if how == "dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "hangs":
        sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        journal.note(sleeper=sleeper.pid)
        time.sleep(600)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What the files say of five sections side by side, four of which do not end well, and of one after them."""
    out = tmp_path_factory.mktemp("sections")
    hows = ("raises", "dies", "hangs", "works")
    side_by_side = [Section(how, 8, "test_gpu_proof", {"how": how}) for how in hows]
    absent = Section("absent", 8, "no_such_module")
    after = Section("after", 60, "test_gpu_proof", {"how": "works"})
    run_stages([[*side_by_side, absent], [after]], in_an_hour(out, dry=False), lambda line: None)
    return {name: read(out, name) for name in (*hows, "absent", "after")}


def runs(process: int) -> bool:
    """A killed one may stay in the table until somebody asks for its exit code."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class TestSectionsFailAlone:
    @pytest.mark.parametrize(
        ("name", "status", "reason"),
        [
            ("raises", FAILED, "ValueError: on purpose"),
            ("dies", FAILED, "the process ended with code"),
            ("hangs", CUT_OFF, "killed after 8 s"),
            ("absent", FAILED, "No module named 'no_such_module'"),
        ],
    )
    def test_how_it_ended_is_said_and_its_rows_stay(self, records, name, status, reason):
        assert records[name]["status"] == status
        assert reason in records[name]["reason"]
        assert records[name]["rows"] == ([] if name == "absent" else [{"before": name}])

    def test_the_others_do_not_notice(self, records):
        assert [records[name]["status"] for name in ("works", "after")] == [DONE, DONE]

    def test_what_a_killed_section_had_started_ends_with_it(self, records):
        assert not runs(records["hangs"]["sleeper"])

    def test_without_time_left_a_section_says_so(self, tmp_path):
        setting = Setting(tmp_path, False, time.monotonic() - 1)
        run_stages([[Section("late", 9, "test_gpu_proof")]], setting, lambda line: None)
        assert read(tmp_path, "late")["status"] == SKIPPED
        assert "no time was left" in read(tmp_path, "late")["reason"]


@dataclass
class Asked:
    how: str


def answer(case: Asked) -> dict[str, object]:
    if case.how == "raises":
        raise ValueError("on purpose")
    if case.how == "dies":
        os._exit(3)
    if case.how == "loses its context":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return {"ok": True, "process": os.getpid()}


def test_a_case_that_breaks_its_process_takes_no_other_along(tmp_path):
    hows = ["works", "raises", "works", "dies", "works", "loses its context", "works", "works"]
    journal = Journal(tmp_path, "cases")
    spread(answer, map(Asked, hows), 1, journal)
    rows = read(tmp_path, "cases")["rows"]
    assert [row["how"] for row in rows] == hows
    assert [row["ok"] for row in rows] == [how == "works" for how in hows]
    assert "ended with code 3" in rows[3]["error"]
    processes = [row.get("process") for row in rows]
    assert processes[0] == processes[2] != processes[4] != processes[6] == processes[7]


CASE = KernelCase(17, 24, 64, "packed", torch.bfloat16, torch.float32)


class TestTheChecksCanFail:
    def test_kernels(self):
        assert correct.check(CASE, "cpu")["ok"]

    @pytest.mark.parametrize("name", ["y", "dx", "dvalues"])
    def test_a_result_that_is_off(self, monkeypatch, name):
        honest = correct.launch

        def off(*arguments):  # type: ignore[no-untyped-def]
            results = honest(*arguments)
            results[correct.RESULTS.index(name)].view(-1)[0] += 1
            return results

        monkeypatch.setattr(correct, "launch", off)
        found = correct.check(CASE, "cpu")
        assert not found["ok"]
        assert found[name] > 1

    def test_an_output_that_is_not_written(self, monkeypatch):
        def unwritten(x, base, bias, *others, exact):  # type: ignore[no-untyped-def]
            return gated_linear(x, base, bias, *others, exact=exact) + 0 * torch.empty(17, 24)

        monkeypatch.setattr(correct, "gated_linear", unwritten)
        assert not correct.check(CASE, "cpu")["ok"]

    def test_a_result_that_does_not_repeat(self, monkeypatch):
        honest, calls = correct.launch, []

        def wavering(*arguments):  # type: ignore[no-untyped-def]
            calls.append(1)
            results = honest(*arguments)
            results[0][0, 0] *= 1 + 2**-7 * (len(calls) % 2)
            return results

        monkeypatch.setattr(correct, "launch", wavering)
        assert not correct.check(CASE, "cpu")["repeats"]

    def test_a_layer_on_a_wrong_path(self, monkeypatch):
        case = LayerCase(17, 24, 64, 0.1, torch.bfloat16, "exact")
        assert correct.check(case, "cpu")["ok"]
        honest = correct.build_ours

        def off(problem, *others, **options):  # type: ignore[no-untyped-def]
            layer = honest(problem, *others, **options)
            layer.module.weight.data[0] += 1
            return layer

        monkeypatch.setattr(correct, "build_ours", off)
        with pytest.raises(AssertionError, match="off by"):
            correct.check(case, "cpu")

    def test_bits_that_differ(self, monkeypatch):
        arguments = (20, 40), 0.3, torch.float32, torch.device("cpu")
        assert bits._where_they_differ(*arguments) == []
        honest, calls = bits.same_sign, []

        def wavering(*others, **options):  # type: ignore[no-untyped-def]
            calls.append(1)
            return honest(*others, **options) ^ (len(calls) > 1)

        monkeypatch.setattr(bits, "same_sign", wavering)
        assert bits._where_they_differ(*arguments) == ["same sign"]

    def test_training_that_differs(self, tmp_path):
        plain, other = (Loop(in_an_hour(tmp_path), 0.1, "composed") for _ in range(2))
        for _ in range(2):
            plain.step()
            other.step()
        assert compare(plain, other)["ok"]
        other.step()
        assert not compare(plain, other)["ok"]

    def test_a_peft_model_that_is_not_left_as_it_was(self, tmp_path):
        setting = in_an_hour(tmp_path)
        ids, found = peft_models._ids(setting), []
        for change, check in product((0, 1), (peft_models.switched_off, peft_models.unloaded)):
            model = peft_models._adapted(setting, torch.float32, 0.25)
            model.base_model.model.lm_head.weight.data[0] += change
            found.append(check(model, ids)["ok"])
        assert found == [True, True, False, False]

    @pytest.mark.parametrize("check", [accumulation, checkpointing])
    def test_a_backward_that_differs(self, tmp_path, check):
        plain, other = (Loop(in_an_hour(tmp_path), 0.1, "composed") for _ in range(2))
        honest = other.backward
        other.backward = lambda *arguments: honest(slice(0, 8))  # type: ignore[method-assign]
        assert not check(plain, other)["ok"]


def report(when: str, outcome: str, **fields: object) -> SimpleNamespace:
    flags = {name: outcome == name for name in ("passed", "failed", "skipped")}
    return SimpleNamespace(when=when, outcome=outcome, nodeid=f"{when}-{outcome}", **flags, **fields)


def test_every_test_that_ran_has_a_row_with_its_message(tmp_path):
    rows = Rows(Journal(tmp_path, "tests"))
    rows.pytest_runtest_logreport(report("setup", "passed"))
    rows.pytest_runtest_logreport(report("call", "passed"))
    rows.pytest_runtest_logreport(report("call", "failed", longreprtext="E  assert 1 == 2"))
    rows.pytest_runtest_logreport(report("setup", "skipped", longrepr=("file", 3, "Skipped: no GPU")))
    rows.pytest_collectreport(report("collect", "failed", longreprtext="ImportError: x"))
    found = read(tmp_path, "tests")["rows"]
    assert [row.get("ok") for row in found] == [True, False, None, False]
    assert [row.get("error") for row in found] == [None, "E  assert 1 == 2", None, "ImportError: x"]
    assert found[2]["skipped"] == "Skipped: no GPU"


def recorded(folder: Path, name: str, rows: list[dict], status: str = DONE, **notes: object) -> None:
    journal = Journal(folder, name)
    journal.note(**notes)
    for row in rows:
        journal.row(**row)
    journal.close(status)


def verdict(folder: Path, start: str) -> tuple[str, str]:
    promises.write_summary(folder)
    lines = json.loads((folder / "summary.json").read_text())["lines"]
    (line,) = (line for line in lines if line["promised"].startswith(start))
    return line["measured"], line["verdict"]


class TestVerdicts:
    @pytest.mark.parametrize(
        ("oks", "status", "expected"),
        [
            ([True, True], DONE, "met"),
            ([True, False], DONE, "NOT MET"),
            ([True], DONE, "not finished"),
            ([True, True], CUT_OFF, "not finished"),
            ([True, False], CUT_OFF, "NOT MET"),
            ([], FAILED, "not measured"),
        ],
    )
    def test_of_checks(self, tmp_path, oks, status, expected):
        recorded(tmp_path, "correct", [{"ok": ok} for ok in oks], status, cases=2)
        assert verdict(tmp_path, "Every kernel")[1] == expected

    def test_a_row_that_does_not_say_that_it_is_right_is_wrong(self, tmp_path):
        recorded(tmp_path, "bits", [{"ok": True}, {}])
        assert verdict(tmp_path, "Initial values")[1] == "NOT MET"

    @pytest.mark.parametrize(("slow", "expected"), [(104, "met"), (106, "NOT MET")])
    def test_the_worst_place_decides(self, tmp_path, slow, expected):
        places = [{"m": 1, "n": 2, "k": 3}, {"m": 4, "n": 5, "k": 6}]
        library = [{"what": "y", "provider": "library", "us": 100, **place} for place in places]
        ours = [
            {"what": "y", "provider": "ours, composed", "density": 0.0346, "us": us, **place}
            for us, place in zip((90, slow), places, strict=True)
        ]
        other = {**ours[0], "density": 1.0, "us": 999}
        recorded(tmp_path, "kernels", [*library, *ours, other])
        measured, decided = verdict(tmp_path, "Forward, 3.46 %")
        assert decided == expected
        assert measured == f"median {(0.9 + slow / 100) / 2:.2f}, worst {slow / 100:.2f} at 4 x 5 x 6"

    def test_a_step_that_failed_is_not_measured(self, tmp_path):
        rows = [{"provider": "full fine-tuning", "step_ms": 10.0}, {"provider": "ours, 3.46 %", "error": "no"}]
        recorded(tmp_path, "steps_135M", rows)
        assert verdict(tmp_path, "Step of SmolLM2-135M") == ("", "not measured")

    @pytest.mark.parametrize(("own", "expected"), [(60, "met"), (70, "NOT MET")])
    def test_host_time(self, tmp_path, own, expected):
        what = "forward and backward of a layer"
        pairs = {"nn.Linear, trained": 50, "gated, level 0": own}
        recorded(tmp_path, "host", [{"what": what, "provider": name, "host_us": time} for name, time in pairs.items()])
        assert verdict(tmp_path, "Host time of a layer, gated, level 0")[1] == expected

    def test_memory_beside_the_plan(self, tmp_path):
        recorded(tmp_path, "planned", [{"size": "135M", "provider": "ours, 3.46 %", "peak_gib": 1.0}])
        recorded(tmp_path, "steps_135M", [{"provider": "ours, 3.46 %", "peak_gib": 1.2}])
        start = "Peak memory of a step of SmolLM2-135M: ours, 3.46 % / what rigsa plan says"
        assert verdict(tmp_path, start) == ("1.20 of 1.00 GiB (1.20)", "NOT MET")


class TestCommandLine:
    def test_without_a_gpu_it_says_what_would_run(self, capsys, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(SystemExit):
            parse(["--out", "x"])
        assert "PyTorch sees no GPU here; --dry" in capsys.readouterr().err

    def test_an_unknown_section_is_named(self, capsys):
        with pytest.raises(SystemExit):
            parse(["--dry", "--out", "x", "--sections", "correct,speed"])
        error = capsys.readouterr().err
        assert "--sections: expected some of environment, correct" in error
        assert "got speed" in error

    def test_a_part_and_sections_are_selected_in_their_order(self):
        names = [[section.name for section in stage] for stage in stages(1, ["kernels", "bits", "correct"])]
        assert names == [["correct", "bits"], ["kernels"]]
        assert stages(None, None) == [*PARTS[1], *PARTS[2]]

    @pytest.mark.parametrize("part", PARTS)
    def test_what_measures_time_runs_alone(self, part):
        checking = set(promises.CHECKED) | {"planned"}
        for stage in PARTS[part]:
            assert len(stage) == 1 or {section.name for section in stage} <= checking


class TestRunsOfTheCommandLine:
    @pytest.fixture
    def folders(self, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
        """Where the runs were that a section has started; they end at once."""
        found: list[Path] = []

        def start(command: list[str], **options: object) -> subprocess.Popen:
            found.append(Path(command[command.index("--out") + 1]))
            return honest([sys.executable, "-c", ""], **options)

        honest = subprocess.Popen
        monkeypatch.setattr(training.subprocess, "Popen", start)
        monkeypatch.setitem(training.KINDS, "mnist", lambda setting, scratch: [])
        monkeypatch.setitem(training.KINDS, "quickstart", lambda setting, scratch: [])
        return found

    def test_mnist_goes_on_where_it_is_kept_and_nothing_else_is(self, folders, tmp_path):
        kept = replace(in_an_hour(tmp_path), runs=str(tmp_path / "runs"))
        for setting, kind in product((in_an_hour(tmp_path), kept), ("quickstart", "mnist")):
            for _ in range(2):
                training.run(setting, Journal(tmp_path, kind), kind)
        assert folders[-1] == folders[-2] == tmp_path / "runs" / "mnist"
        assert len(set(folders)) == len(folders) - 1
        assert not any(folder.exists() for folder in folders[:6])
