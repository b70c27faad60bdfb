"""Uploading while training goes on: no step waits for the Hub, and training never dies of it."""

import contextlib
import os
import queue
import shlex
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from tqdm.auto import tqdm

from ...models.reference import LocalModel
from ...path.path import DegradationPath
from ...training.config import TrainingConfig
from ..repository import Repository
from .run import push_run


class BackgroundUpload:
    """Does one push at a time in a thread of its own, which does not keep the process alive.

    A push brings all that is on disk to the Hub and can be repeated, so one that waits stands for all that were asked for
    before it. What fails is told once; all of it is on disk, and `command` pushes it later.

    Args:
        command (`str`): What pushes it later.
        say (`Callable`): Prints a line.
    """

    def __init__(self, command: str, say: Callable[[str], None]):
        self.command = command
        self.say = say
        self.problem: Exception | None = None
        self._told: set[str] = set()
        self._waiting: queue.Queue[Callable[[], object]] = queue.Queue(maxsize=1)
        threading.Thread(target=self._work, daemon=True).start()

    def submit(self, push: Callable[[], object]) -> None:
        """Has something pushed, soon. Returns at once."""
        # One that waits has not looked at the disk yet: it will see this, too.
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(push)

    def finish(self, push: Callable[[], object]) -> bool:
        """Waits for a last push. Returns whether all is on the Hub."""
        self._waiting.put(push)
        self._waiting.join()
        return self.problem is None

    def _work(self) -> None:
        while True:
            push = self._waiting.get()
            try:
                push()
                self.problem = None
            except Exception as error:  # whatever it is, training goes on
                self.problem = error
                self._tell(error)
            finally:
                self._waiting.task_done()

    def _tell(self, error: Exception) -> None:
        kind = getattr(error, "kind", str(error))
        if kind not in self._told:
            self._told.add(kind)
            problem = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            self.say(
                f"Nothing is lost, but the Hub does not have it: {problem} All is on disk; push it later, from this "
                f"folder, with\n  {self.command}"
            )


def push_command(training: TrainingConfig, repo_id: str) -> str:
    """The command line that pushes a run's folder. It holds no token."""
    command = ["diffusers-disback", "push", training.output_dir, repo_id]
    command += ["--private"] if training.hub_private_repo else []
    return shlex.join([*command, *(["--cache_dir", training.cache_dir] if training.cache_dir else [])])


def repository_of(training: TrainingConfig) -> Repository:
    """The repository that a run pushes to."""
    return Repository(training.hub_model_id or Path(training.output_dir).resolve().name, training.hub_token)


class RunUpload:
    """Pushes a run in the background: nodes as they are recorded, and at the end all of it. See `BackgroundUpload`.

    Args:
        training (`TrainingConfig`): With `push_to_hub`.
        teacher (`LocalModel`, *optional*): The run's teacher, if it was loaded.
    """

    def __init__(self, training: TrainingConfig, teacher: LocalModel | None = None):
        self.training = training
        self.teacher = teacher
        self.repository = repository_of(training)
        self.background = BackgroundUpload(
            push_command(training, self.repository.repo_id),
            lambda line: tqdm.write(line, file=sys.stderr),
        )
        self.background.submit(self._create)  # tells early that it cannot be written to

    def submit_path(self) -> None:
        """Has the path pushed as far as it is recorded. Returns at once."""
        self.background.submit(self._push_path)

    def finish(self) -> str:
        """Waits until all is pushed. Returns a line that says where it is, or how to push it later."""
        print(f"Pushing to {self.repository.repo_id}. All is on disk: it can be broken off and pushed later with")
        print(f"  {self.background.command}")
        if self.background.finish(self._push_all):
            return f"pushed to {self.repository.url}"
        return f"not pushed; push it later with {self.background.command}"

    def _create(self) -> None:
        self.repository.create(self.training.hub_private_repo or None)

    def _push_path(self) -> None:
        training = self.training
        self._create()
        path = DegradationPath.from_pretrained(
            training.path_folder, teacher=self.teacher or training.teacher, cache_dir=training.cache_dir
        )
        if path.complete:
            path.push_to_hub(self.repository.repo_id, token=training.hub_token)
        else:
            path.push_nodes(self.repository)

    def _push_all(self) -> None:
        training = self.training
        push_run(
            training.output_dir,
            self.repository.repo_id,
            training.hub_private_repo or None,
            token=training.hub_token,
            cache_dir=training.cache_dir,
            teacher=self.teacher
            or (training.teacher if os.path.exists(training.pretrained_model_name_or_path) else None),
        )
