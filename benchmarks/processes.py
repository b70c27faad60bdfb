"""Starts Python command lines in processes of their own. Nothing large is imported here, since each new process imports it."""

import multiprocessing
import os
import runpy
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path


def start_python(arguments: list[str], forked: bool, log: Path | None = None, **environment: str) -> BaseProcess:
    """Starts `python ARGUMENTS` in a process of its own, whose `join` and `exitcode` tell how it ends.

    Args:
        arguments (`list[str]`): A script or `-m` and a module, and what it is given.
        forked (`bool`): Whether the process is a fork of this one, whose imports it has already, or is begun anew, as memory and
            a GPU want it.
        log (`Path`, *optional*): Gets what it prints.
        environment (`str`): Variables besides this process's own.
    """
    context = multiprocessing.get_context("fork" if forked else "spawn")
    process = context.Process(target=_become, args=(arguments, log, environment))
    process.start()
    return process


def _become(arguments: list[str], log: Path | None, environment: dict[str, str]) -> None:
    if log is not None:
        sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
    os.environ |= environment
    if "PYTHONPATH" in environment:
        sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
    run_python(arguments)


def run_python(arguments: list[str]) -> None:
    """Runs `python ARGUMENTS` in this process: a script or `-m` and a module, and what it is given."""
    is_module, sys.argv = arguments[0] == "-m", arguments[1:] if arguments[0] == "-m" else arguments
    if is_module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(sys.argv[0]).absolute().parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
