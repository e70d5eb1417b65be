"""One process at a time on a folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from rigsa.errors import RigsaError
from rigsa.experiments.lock import InUseError, folder_lock
from rigsa.run import main

HOLD = (
    "import sys; from pathlib import Path; from rigsa.experiments.lock import folder_lock\n"
    "with folder_lock(Path(sys.argv[1])): print('held', flush=True); input()"
)


def hold(folder: Path) -> subprocess.Popen:  # type: ignore[type-arg]
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_before_it_checks_or_writes(tmp_path, capsys):
    folder = tmp_path / "run"
    first = hold(folder)
    message = f"rigsa: {folder} is in use by process {first.pid} on .*; wait until that has ended, or choose another"
    assert main(["imp", "--preset", "smoke", "--device", "cpu", "--out", str(folder)]) == 1
    with pytest.raises(InUseError, match=message.removeprefix("rigsa: ")), folder_lock(folder):
        pass
    assert "is in use by process" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == [".lock"]
    first.communicate("\n")
    assert not folder.exists()


def test_the_lock_dies_with_its_process(tmp_path):
    first = hold(tmp_path / "run")
    first.kill()
    first.communicate()
    assert (tmp_path / "run" / ".lock").exists()
    with folder_lock(tmp_path / "run"):
        pass
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_folder_that_was_made_for_the_lock_goes_with_it_unless_something_is_in_it(tmp_path):
    with folder_lock(tmp_path / "a" / "b"):
        pass
    assert list(tmp_path.iterdir()) == []
    with folder_lock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "kept").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["kept"]
    (tmp_path / "empty").mkdir()
    with folder_lock(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty").is_dir()


def test_places_for_no_folder_are_one_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RigsaError, match="file: expected a folder, got a file; choose another --out"), \
         folder_lock(tmp_path / "file"):  # fmt: skip
        pass
    for path in (tmp_path / "file" / "below", tmp_path / ("x" * 300), Path("/proc/nothing")):
        with pytest.raises(RigsaError, match="cannot write"), folder_lock(path):
            pass


def test_many_at_once_are_never_two(tmp_path):
    """Each process counts up a file twenty times, and lets go of the folder and its lock in between."""
    code = (
        "import sys, time; from pathlib import Path; from rigsa.experiments.lock import InUseError, folder_lock\n"
        "folder, count, done = Path(sys.argv[1]), Path(sys.argv[2]), 0\n"
        "while done < 20:\n"
        "    try:\n"
        "        with folder_lock(folder):\n"
        "            seen = int(count.read_text()); time.sleep(0.001); count.write_text(str(seen + 1)); done += 1\n"
        "    except InUseError: pass\n"
    )
    (tmp_path / "count").write_text("0")
    command = [sys.executable, "-c", code, str(tmp_path / "run"), str(tmp_path / "count")]
    processes = [subprocess.Popen(command) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert (tmp_path / "count").read_text() == "80"
