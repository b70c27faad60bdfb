"""Uploading while training goes on: no step waits for the Hub, and training never dies of it."""

import os
import shlex
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from tqdm.auto import tqdm

from ...models.reference import LocalModel
from ...path.path import DegradationPath
from ...training.config import TrainingConfig
from ..repository import HubError, Repository
from .run import push_run


def push_command(training: TrainingConfig, repo_id: str) -> str:
    """The command line that pushes a run's folder. It holds no token."""
    command = ["diffusers-disback", "push", training.output_dir, repo_id]
    command += ["--private"] if training.hub_private_repo else []
    return shlex.join([*command, *(["--cache_dir", training.cache_dir] if training.cache_dir else [])])


def repository_of(training: TrainingConfig) -> Repository:
    """The repository that a run pushes to."""
    return Repository(training.hub_model_id or Path(training.output_dir).resolve().name, training.hub_token)


class RunUpload:
    """Pushes a run: nodes in the background, as they are recorded, and at the end all of it. What fails is told once; all of
    it is on disk, and `command` pushes it later.

    Args:
        training (`TrainingConfig`): With `push_to_hub`.
        teacher (`LocalModel`, *optional*): The run's teacher, if it was loaded.
    """

    def __init__(self, training: TrainingConfig, teacher: LocalModel | None = None):
        self.training = training
        self.teacher = teacher
        self.repository = repository_of(training)
        self.command = push_command(training, self.repository.repo_id)
        self._told: set[str] = set()
        self._pushing = threading.Lock()
        self._recorded = threading.Event()
        # Not the client's `run_as_future`, whose thread keeps a process that was interrupted alive until it has uploaded.
        threading.Thread(target=self._work, daemon=True).start()

    def submit_path(self) -> None:
        """Has the path pushed as far as it is recorded. Returns at once."""
        self._recorded.set()  # a push brings all that is on disk: one that is due stands for those before it

    def finish(self) -> str:
        """Waits until all is pushed. Returns a line that says where it is, or how to push it later."""
        print(f"Pushing to {self.repository.repo_id}. All is on disk: it can be broken off and pushed later with")
        print(f"  {self.command}")
        self._recorded.clear()
        if self._push(self._push_all):
            return f"pushed to {self.repository.url}"
        return f"not pushed; push it later with {self.command}"

    def _work(self) -> None:
        self._push(self._create)  # tells early that it cannot be written to
        while self._recorded.wait():
            self._recorded.clear()
            self._push(self._push_path)

    def _push(self, push: Callable[[], object]) -> bool:
        """Does one push at a time. Returns whether it is on the Hub."""
        with self._pushing:
            try:
                push()
            except Exception as error:  # whatever it is, training goes on
                kind = error.kind if isinstance(error, HubError) else str(error)
                if kind not in self._told:
                    problem = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
                    message = f"Nothing is lost, but the Hub does not have it: {problem} All is on disk; push it later"
                    tqdm.write(f"{message}, from this folder, with\n  {self.command}", file=sys.stderr)
                self._told.add(kind)
                return False
        return True

    def _create(self) -> None:
        self.repository.create(self.training.hub_private_repo or None)

    def _push_path(self) -> None:
        training = self.training
        self._create()
        path = DegradationPath.from_pretrained(
            training.path_folder, teacher=self.teacher or training.teacher, cache_dir=training.cache_dir
        )
        if not path.nodes:  # none yet, or it was left empty
            return
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
