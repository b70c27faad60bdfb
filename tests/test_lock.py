"""Who may write to an output folder. Processes are real ones; the other machine is a name in the file."""

import json
import os
import socket
import subprocess
import sys

import psutil
import pytest

from diffusers_disback.training.lock import LOCK, locked


@pytest.fixture
def other():
    """Another process that lives as long as the test."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def write(folder, **changes):
    content = {"host": socket.gethostname(), "pid": os.getpid(), "began": 0.0, "since": "2026-01-01", **changes}
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps(content))


def taken(folder):
    with locked(folder):
        return json.loads((folder / LOCK).read_text())["pid"] == os.getpid()


def test_a_folder_is_held_and_let_go_of_also_on_errors(tmp_path):
    folder = tmp_path / "a" / "run"
    with pytest.raises(ZeroDivisionError), locked(folder):
        with pytest.raises(ValueError, match=f"is in use by process {os.getpid()} on .* Wait for its end, or stop it"):
            taken(folder)
        assert (folder / LOCK).is_file(), "who is refused leaves the lock where it is"
        raise ZeroDivisionError
    assert not (tmp_path / "a").exists(), "nothing was put there"
    with locked(folder):
        (folder / "result").write_text("")
    assert [file.name for file in folder.iterdir()] == ["result"]


def test_another_living_process_holds_it(tmp_path, other):
    began = psutil.Process(other.pid).create_time()
    write(tmp_path, pid=other.pid, began=began)
    with pytest.raises(ValueError, match=f"in use by process {other.pid} on"):
        taken(tmp_path)
    other.kill()  # as the kernel would for lack of memory; it is not waited for yet, and has its number still
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    assert taken(tmp_path)


def test_what_is_stale_is_taken_over(tmp_path, other):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for stale in ({"pid": gone.pid}, {"pid": other.pid}, {"pid": 2**40}, {"pid": -5}):  # the second began later
        write(tmp_path, **stale)
        assert taken(tmp_path) and not list(tmp_path.iterdir()), stale


def test_another_machine_and_an_unreadable_file_are_refused_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_disback.training.lock._PATIENCE", 0.1)
    write(tmp_path, host="else\x1b[31mwhere")
    with pytest.raises(
        ValueError, match=r"else\\x1b\[31mwhere.* another machine .* remove .*run.lock, and start again"
    ):
        taken(tmp_path)
    for content in ("", "{", "[]", "{}", '{"pid": "1", "began": 0}'):
        (tmp_path / LOCK).write_text(content)
        with pytest.raises(ValueError, match="not by whom. If no run writes to .* remove .*run.lock"):
            taken(tmp_path)
        assert (tmp_path / LOCK).read_text() == content


def test_a_lock_that_somebody_else_has_put_there_is_not_removed(tmp_path):
    with locked(tmp_path):
        write(tmp_path, pid=1)
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == 1


def test_a_disk_that_takes_nothing_leaves_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr("json.dump", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        taken(tmp_path / "run")
    assert not (tmp_path / "run" / LOCK).exists()


def test_what_is_intact_is_noted_on_errors_of_this_folder(tmp_path):
    from diffusers_disback.training.run_folder import in_use

    for place, noted in ((tmp_path / "out" / "x", True), (tmp_path / "teacher", False), (None, False)):
        with pytest.raises(OSError, match="No space") as error, in_use(tmp_path / "out"):
            raise OSError(28, "No space", place and str(place))
        assert bool(getattr(error.value, "__notes__", [])) == noted, place
