"""Files appear whole or not at all, whatever happens; folders are never shared."""

import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sparsereg import files
from sparsereg.errors import OutputError
from sparsereg.files import write_atomically, write_new


@pytest.fixture
def small_files_only():
    """No file may grow beyond 64 kB, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "before")

    def fail(beside: Path) -> None:
        beside.write_text("half of it")
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        write_atomically(path, fail)
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("silent", [False, True], ids=["the writer says why", "the writer does not say why"])
def test_a_full_disk_is_named_and_changes_nothing(tmp_path, small_files_only, silent):
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")

    def write(beside: Path) -> None:
        try:
            beside.write_bytes(bytes(1 << 20))
        except OSError:
            if silent:
                raise RuntimeError("file write failed") from None
            raise

    with pytest.raises(OutputError, match=r"a\.bin cannot be written: .*too small; nothing was changed"):
        write_atomically(path, write)
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file/a\.txt cannot be written: .*; make the folder writable"):
        files.write_text(tmp_path / "file" / "a.txt", "x")


def test_killed_writers_leave_the_file_before_and_their_leftovers_go(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "before")
    program = (
        "import sys, time; from pathlib import Path; from sparsereg.files import write_atomically\n"
        "def write(p):\n    p.write_text('half'); print('writing', flush=True); time.sleep(60)\n"
        "write_atomically(Path(sys.argv[1]), write)"
    )
    with subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        files.write_text(tmp_path / "b.txt", "beside a writer that lives")
        assert len([n for n in os.listdir(tmp_path) if n.startswith(files.LEFTOVER)]) == 1
        process.send_signal(signal.SIGKILL)
    assert path.read_text() == "before"
    assert len(os.listdir(tmp_path)) == 3
    files.write_text(tmp_path / "b.txt", "again")
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "b.txt"]


def test_leftovers_of_earlier_runs_go_with_the_next_run(tmp_path):
    folder = files.new_version(tmp_path) / "checkpoints"
    folder.mkdir()
    (folder / f"{files.LEFTOVER}1-last.ckpt").touch()
    (folder / "last.ckpt").touch()
    assert files.new_version(tmp_path).name == "version_1"
    assert os.listdir(folder) == ["last.ckpt"]


def test_write_new_never_writes_over_a_file(tmp_path, monkeypatch):
    names = [write_new(tmp_path / "a.txt", lambda p, i=i: p.write_text(str(i))).name for i in range(3)]
    assert names == ["a.txt", "a-1.txt", "a-2.txt"]

    def no_links(*args: object) -> None:
        raise OSError("this file system has no links")

    monkeypatch.setattr(os, "link", no_links)
    assert write_new(tmp_path / "a.txt", lambda p: p.write_text("3")).name == "a-3.txt"
    assert [(tmp_path / n).read_text() for n in [*names, "a-3.txt"]] == ["0", "1", "2", "3"]


def test_folders_made_at_the_same_moment_are_different(tmp_path):
    gate = threading.Barrier(8)
    made: list[Path] = []

    def make() -> None:
        gate.wait()
        made.append(files.new_folder(tmp_path / "2026-01-01_00-00-00"))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 8


def test_umask_decides_who_may_read(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
