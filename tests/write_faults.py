"""Disks that fill up and processes that are killed, at each write in turn."""

import builtins
import errno
import os
import shutil
from contextlib import contextmanager

import safetensors.torch


class Fault:
    """Does something in place of the write number `at`, counted from 0: of opening a file to write, copying one, writing
    weights, forcing it to the disk, and giving it its name.

    Args:
        at (`int`): Which.
        action (`Callable`): Such as `full`.
        kind (`str`, *optional*): Count those of one kind alone, such as `"replace"`.
    """

    def __init__(self, at, action, kind=None):
        self.at, self.action, self.kind, self.writes = at, action, kind, 0

    def count(self, what):
        self.writes += self.kind in (None, what)
        if self.kind not in (None, what):
            return
        if self.writes == self.at + 1:
            self.action(what)

    @contextmanager
    def injected(self):
        places = [(os, "replace"), (os, "fsync"), (shutil, "copyfile"), (safetensors.torch, "save_file")]
        real = [(place, name, getattr(place, name)) for place, name in places]
        opened = builtins.open

        def before(name, function):
            def counted(*arguments, **named):
                self.count(name)
                return function(*arguments, **named)

            return counted

        def open_counted(file, mode="r", *arguments, **named):
            if set(mode) & set("wxa+"):
                self.count("open")
            return opened(file, mode, *arguments, **named)

        try:
            builtins.open = open_counted
            for place, name, function in real:
                setattr(place, name, before(name, function))
            yield self
        finally:
            builtins.open = opened
            for place, name, function in real:
                setattr(place, name, function)


def full(what):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), what)


def killed(function, at):
    """Calls a function in a process of its own that ends, as by SIGKILL, at a write. Returns whether it came to that."""
    child = os.fork()
    if child == 0:
        try:
            with Fault(at, lambda what: os._exit(9)).injected():
                function()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9
