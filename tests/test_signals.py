"""Signals and a command line's end, in processes that import nothing heavy. How training ends is in test_stages."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from diffusers_disback.training.signals import Interrupted, SignalHandler, signal_handler


PROGRAM = """
import os, signal, sys, time
from diffusers_disback.commands.command_line import run
from diffusers_disback.training.signals import Interrupted, signal_handler

def me(number):
    os.kill(os.getpid(), number)
    time.sleep(0.01)

def main(arguments):
    {body}

sys.exit(run(main, sys.argv[1:], "tool"))
"""


def call(body, *arguments, **environment):
    program = PROGRAM.format(body=body.strip().replace("\n", "\n    "))
    own = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent / "src"), **environment}
    return subprocess.run([sys.executable, "-c", program, *arguments], env=own, capture_output=True, text=True)


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_a_command_at_once_with_a_line_and_its_code(name, code):
    done = call(f"me(signal.{name})\ntime.sleep(60)")
    assert (done.returncode, done.stderr) == (code, f"tool: ended by {name}.\n")


def test_a_held_signal_waits_and_its_echo_changes_nothing():
    body = """
handler = signal_handler()
with handler.held():
    for _ in range(3):
        me(signal.SIGINT)
        me(signal.SIGTERM)
    print("saved", handler.received == signal.SIGINT)
    try:
        handler.raise_if_received()
    except Interrupted as ended:
        ended.add_note("All is well.")
        me(signal.SIGTERM)
        raise
"""
    done = call(body)
    assert (done.returncode, done.stdout) == (130, "saved True\n")
    assert done.stderr == "tool: ended by SIGINT. All is well.\n"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_the_same_signal_a_second_later_does_not_wait(name):
    done = call(
        f"with signal_handler().held():\n  me(signal.{name})\n  time.sleep(1.1)\n  me(signal.{name})\n  time.sleep(60)"
    )
    assert done.returncode == -getattr(signal, name), "as if nothing had handled it"


def test_an_error_after_a_signal_is_the_signals_if_another_process_has_left():
    """Of another process's end by the same signal this one hears first. Any other error is told: a checkpoint that could not
    be saved must not look like one that was."""
    held = "with signal_handler().held():\n  me(signal.SIGTERM)\n  "
    lost = "exec(compile('raise RuntimeError(1)', '/x/torch/distributed/x.py', 'exec'))"
    done = call(held + lost)
    assert (done.returncode, done.stderr) == (143, "tool: ended by SIGTERM.\n")
    done = call(held + "raise OSError(28, 'No space left on device', '/x/checkpoint')")
    assert (done.returncode, done.stderr) == (2, "tool: /x/checkpoint: No space left on device.\n")


def test_handlers_are_only_there_in_between_and_in_the_main_thread():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with SignalHandler() as handler:
        assert signal_handler() is handler and handler.is_installed
        with pytest.raises(Interrupted) as ended:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        assert ended.value.code == 143
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert not signal_handler().is_installed, "a notebook keeps its KeyboardInterrupt"
    installed = []

    def elsewhere():
        with SignalHandler() as handler:
            installed.append(handler.is_installed)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert installed == [False]


def test_a_signal_that_is_ignored_stays_ignored():
    program = "import signal, os; signal.signal(signal.SIGINT, signal.SIG_IGN)" + PROGRAM.format(
        body="me(signal.SIGINT); print('on')"
    )
    own = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent / "src")}
    done = subprocess.run([sys.executable, "-c", program], env=own, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "on\n")


def test_a_forked_worker_leaves_signals_to_its_parent():
    body = """
child = os.fork()
if child == 0:
    me(signal.SIGINT)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert call(body).stdout == "7\n"
