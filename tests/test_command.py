"""What a command line says of errors, and its exit codes, in processes that import nothing heavy."""

import errno
import traceback

import pytest
from test_signals import call

from diffusers_disback.commands.command_line import OURS, THEIRS, message


OWN = "from diffusers_disback.hub.files import read_json, inside; from pathlib import Path\n"


@pytest.mark.parametrize(
    "body, code, told",
    [
        ("raise ValueError('--x is 1; pass 2.\\nOr 3.')", 2, "--x is 1; pass 2.\nOr 3."),
        ("raise FloatingPointError('a loss was not finite')", 2, "a loss was not finite"),
        (OWN + "read_json(Path('missing'))", 2, "missing cannot be read: No such file or directory."),
        (OWN + "inside('x', 'a\\x1b[31m', 'b')", 2, r"b names 'a\x1b[31m', which is no place"),
        ("raise ValueError('a\\x1b]0;b\\r\\u2028c')", 2, r"a\x1b]0;b\r\u2028c"),
        ("open('/proc/nothing/here', 'w')", 2, "/proc/nothing/here: No such file or directory."),
        ("raise OSError('first\\nsecond')", 2, "first"),
        ("open('/dev/full', 'w').write('x' * 100000)", 2, "No space left on device."),
        ("import nowhere", 2, "No module named 'nowhere'. `pip install 'diffusers-disback[train,eval]'` brings"),
        ("[0] * 10**15", 2, "out of memory."),
        ("import json; json.loads('{')", 1, "JSONDecodeError: Expecting property name"),
        ("raise RuntimeError('one\\ntwo')", 1, "RuntimeError: one\nThis is a fault of diffusers-disback"),
        ("raise KeyError", 1, "KeyError: \nThis is a fault"),
        ("raise KeyboardInterrupt", 130, "ended by SIGINT."),
        ("return 5", 5, None),
        ("print(arguments)", 0, None),
    ],
)
def test_an_error_is_two_lines_at_most_and_a_code(body, code, told):
    done = call(body, "--a", "b")
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if told is None:
        assert done.stderr == "" and done.stdout in ("", "['--a', 'b']\n")
    else:
        assert done.stderr.startswith(f"tool: {told}") and len(done.stderr.splitlines()) <= 2


def test_debug_shows_the_traceback_and_is_no_argument():
    done = call("print(arguments)\nraise ValueError('said')", "--a", "--debug", "b")
    assert (done.returncode, done.stdout) == (2, "['--a', 'b']\n")
    assert "Traceback" in done.stderr and done.stderr.splitlines()[-1] == "tool: said"


def test_output_that_nobody_reads_is_no_error():
    import os
    import subprocess
    import sys
    from pathlib import Path

    from test_signals import PROGRAM

    program = PROGRAM.format(body="while True: print('line')")
    own = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent / "src")}
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"line\n"
    process.stdout.close()
    assert process.wait(30) == 141 and process.stderr.read() == b""
    process.stderr.close()


def test_other_processes_speak_after_the_main_one_and_say_which_they_are():
    assert call("raise ValueError('said')", RANK="1").stderr == "tool, process 1: said\n"
    done = call("os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)", RANK="1")
    assert (done.returncode, done.stderr) == (143, ""), "of a signal the main process tells"


def test_what_is_noted_on_an_error_stands_behind_it():
    error = OSError(errno.ENOSPC, "No space left on device", "/run/report.json")
    error.add_note("The last checkpoint is whole.")
    assert message(error, THEIRS) == "/run/report.json: No space left on device. The last checkpoint is whole."


def test_a_process_that_lost_another_one_points_to_it():
    """Its own error is a broken connection, in torch's code."""
    program = compile(
        "raise RuntimeError('Connection closed by peer')", "/x/torch/distributed/distributed_c10d.py", "exec"
    )
    try:
        exec(program)
    except RuntimeError as error:
        assert traceback.extract_tb(error.__traceback__) and "another process of this launch" in message(error, OURS)
