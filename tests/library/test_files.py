"""Files that are whole or absent, whatever is at the place and whatever goes wrong."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from rigsa import files
from rigsa.errors import RigsaError
from rigsa.files import (
    first_damage,
    mark_done,
    marked_hashes,
    read_json,
    remove_temporaries,
    require_regular,
    write_atomically,
    write_json,
    write_text,
)


def no_part_left(folder: Path) -> bool:
    return not list(folder.rglob("*.part"))


def test_what_is_no_regular_file_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path, kind in ((tmp_path / "pipe", "a pipe"), (tmp_path / "folder", "a folder"), (Path("/dev/null"), "a dev")):
        before = path.stat()
        with pytest.raises(RigsaError, match=f"cannot write {path}: expected a regular file or none there, got {kind}"):
            write_json(path, {})
        assert stat.S_IFMT(path.stat().st_mode) == stat.S_IFMT(before.st_mode)
    assert no_part_left(tmp_path)


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    write_text(tmp_path / "real" / "file", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "new"


def test_places_that_cannot_be_written_are_one_error(tmp_path):
    """Root may write anywhere, so permissions are tested by what not even root can do."""
    write_text(tmp_path / "file", "")
    for path, reason in (
        (tmp_path / "file" / "below", "Not a directory|File exists"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / ("x" * 300) / "below", "File name too long"),
        (Path("/proc/nothing/here"), "No such file|Permission denied"),
    ):
        with pytest.raises(RigsaError, match=f"cannot write .*({reason}).*What was saved before is untouched"):
            write_text(path, "text")
    write_text(tmp_path / ("y" * 255), "the longest name there is")
    assert no_part_left(tmp_path)


def test_the_error_of_a_full_disk_is_not_hidden_by_that_of_the_clean_up(tmp_path, monkeypatch):
    def full(path: Path, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "unlink", full)
    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(RigsaError, match=r"cannot write .*new/file: No space left on device"):
        write_text(tmp_path / "new" / "file", "")


def test_two_processes_that_write_one_file_do_not_share_a_temporary_one(tmp_path):
    code = "import sys; from rigsa.files import write_text; from pathlib import Path\n" \
           "for _ in range(200): write_text(Path(sys.argv[1]), sys.argv[2] * 100_000)"  # fmt: skip
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "file"), letter]) for letter in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert (tmp_path / "file").read_text() in ("a" * 100_000, "b" * 100_000)
    assert no_part_left(tmp_path)


def test_what_a_killed_process_left_is_removed(tmp_path):
    def die(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    monkey = files._remove_quietly
    try:
        files._remove_quietly = lambda path: None  # as it is after SIGKILL
        with pytest.raises(KeyboardInterrupt):
            write_atomically(tmp_path / "below" / "file", die)
    finally:
        files._remove_quietly = monkey
    assert not no_part_left(tmp_path)
    remove_temporaries(tmp_path)
    assert no_part_left(tmp_path)


def test_half_a_character_in_a_name_is_written_as_an_escape(tmp_path):
    write_text(tmp_path / "file", os.fsdecode(b"caf\xe9"))
    assert (tmp_path / "file").read_text() == "caf\\udce9"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[" * 100_000, b'{"a": ' * 50_000, b"9" * 5_000], ids=lambda content: content[:4]
)
def test_what_is_not_json_is_one_error(content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(RigsaError, match=r"file (is damaged|cannot be read)"):
        read_json(tmp_path / "file")


def test_what_is_no_file_is_never_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a pipe"), (tmp_path, "a folder"), (Path("/dev/zero"), "a device")):
        with pytest.raises(RigsaError, match=f"expected a regular file, got {kind}"):
            require_regular(path)
        with pytest.raises(RigsaError, match=f"expected a regular file, got {kind}"):
            read_json(path)
    monkeypatch.setattr(files, "LARGEST_JSON", 10)
    write_text(tmp_path / "large", json.dumps("x" * 2**20))
    with pytest.raises(RigsaError, match="expected at most 1000 bytes, got 1048578"):
        files.read_text(tmp_path / "large", 1000)


def test_a_marker_knows_what_it_marked(tmp_path):
    write_text(tmp_path / "one", "1")
    mark_done(tmp_path, ["one", "absent"])
    assert marked_hashes(tmp_path).keys() == {"one"}
    assert first_damage(tmp_path) is None
    write_text(tmp_path / "one", "2")
    assert first_damage(tmp_path) == "one has changed since it was written"
    (tmp_path / "one").unlink()
    assert first_damage(tmp_path) == "one is missing"
    for content in ("", "[]", '{"one": 1}'):
        (tmp_path / "done").write_text(content)
        assert "done" in str(first_damage(tmp_path))
