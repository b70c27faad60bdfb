"""SIGTERM and SIGINT: training finishes its step and saves, everything else ends at once, both with the signal's own code."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


SIGNALS = (signal.SIGTERM, signal.SIGINT)
ECHO = 1.0  # seconds: launchers pass on what the terminal has sent to all of its processes already


class Interrupted(SystemExit):
    """The end that a signal asked for. As it is a `SystemExit`, nothing takes it for an error, and the code is right even
    if nobody catches it.

    Args:
        number (`int`): Of the signal.
    """

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = number

    def __str__(self) -> str:
        return f"ended by {signal.Signals(self.number).name}."


class SignalHandler:
    """Handles both signals between `with` and its end, in the main thread; elsewhere it does nothing.

    The first signal raises `Interrupted`, or is only noted while it is `held`. The same signal again, a second or more
    later, ends the process at once, as if nothing handled it. A signal that was ignored before stays ignored.

    Attributes:
        received (`int`, *optional*): The first signal's number.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._first: dict[int, float] = {}
        self._held = self._raised = False
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> "SignalHandler":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in SIGNALS}
            for number, before in self._before.items():
                if before is not signal.SIG_IGN:
                    signal.signal(number, self)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, before in self._before.items():
            if signal.getsignal(number) is self:
                signal.signal(number, before)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a worker that was forked: it ends with its parent
        now = time.monotonic()
        if now - self._first.setdefault(number, now) >= ECHO:
            signal.signal(number, signal.SIG_DFL)
            os.kill(self._process, number)
        self.received = number if self.received is None else self.received
        if not self._held:
            self.raise_if_received()

    def raise_if_received(self) -> None:
        """Raises `Interrupted` if there was a signal, and if it was not raised before."""
        if self.received is not None and not self._raised:
            self._raised = True
            raise Interrupted(self.received)

    @property
    def is_installed(self) -> bool:
        """Whether signals come here."""
        return any(signal.getsignal(number) is self for number in SIGNALS)

    @contextmanager
    def held(self, hold: bool = True) -> Iterator[None]:
        """Signals are noted; whoever holds them may look at `received`. At the end what was noted is raised.

        Args:
            hold (`bool`): `False` lets go of them in between: what was noted is raised at once.
        """
        before, self._held = self._held, hold
        try:
            if not hold:
                self.raise_if_received()
            yield
        finally:
            self._held = before
        if not before:
            self.raise_if_received()


def signal_handler() -> SignalHandler:
    """The handler that is installed; in a program that has installed none, one that no signal comes to."""
    installed = (signal.getsignal(number) for number in SIGNALS)
    return next((handler for handler in installed if isinstance(handler, SignalHandler)), SignalHandler())


def leave_signals_to_the_parent(_: int = 0) -> None:
    """For worker processes: a terminal and some launchers signal them as well, but their parent still needs them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
