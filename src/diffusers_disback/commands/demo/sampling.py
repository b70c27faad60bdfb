"""What the demo samples: a one-step student, its teacher in many steps, and the nodes of the path between them."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ...data.prompts import caption_of
from ...data.truncation import told_once
from ...evaluation.report import TEACHER_STEPS, move_to_node
from ...families import ModelFamily
from ...models.casting import inference_copy
from ...path.path import DegradationPath
from ...training.settings.fields import Range, check_number, check_text


MOST_CHARACTERS = 1000  # of a prompt; CLIP reads 77 tokens of it
PATIENCE = 0.1  # seconds of waiting for the teacher, after which a request asks whether it is still wanted
# Of what a visitor may ask for; the second says whether it is a whole number.
BOUNDS: dict[str, tuple[Range, bool]] = {
    "seed": (Range(minimum=0, maximum=9999), True),
    "number": (Range(minimum=1, maximum=8), True),
    "steps": (Range(minimum=1, maximum=100), True),
    "guidance": (Range(minimum=1, maximum=20), False),
}


class Superseded(Exception):
    """The same visitor has asked for something else since."""


class Latest:
    """Which request of each visitor is the newest. Only visitors with a running request are kept."""

    def __init__(self) -> None:
        self._newest: dict[Any, object] = {}

    @contextmanager
    def request(self, visitor: Any) -> Iterator[Callable[[], bool]]:
        """Makes a request the newest of a visitor, and gives a function that tells whether it still is."""
        own = object()
        self._newest[visitor] = own
        try:
            yield lambda: self._newest.get(visitor) is own
        finally:
            if self._newest.get(visitor) is own:
                del self._newest[visitor]


@dataclass(frozen=True)
class Wanted:
    """What a visitor asks for.

    Args:
        prompt (`str`): Or a class label; anything where there are neither.
        seed (`int`): Of the first image; the next image has the next seed.
        number (`int`): Of images.
        steps (`int`): Of the teacher, and of nodes.
        guidance (`float`): Of them.

    Raises:
        ValueError: If it is out of bounds.
    """

    prompt: str
    seed: int = 0
    number: int = 1
    steps: int = TEACHER_STEPS
    guidance: float = 1.0

    def __post_init__(self) -> None:
        check_text("The prompt", self.prompt, may_be_empty=True)
        if len(self.prompt) > MOST_CHARACTERS:
            raise ValueError(f"The prompt has {len(self.prompt)} characters; at most {MOST_CHARACTERS} are taken.")
        for name, (wanted, whole) in BOUNDS.items():
            check_number(name, getattr(self, name), wanted, whole)


@dataclass(frozen=True)
class Sample:
    """Images, and how long they took.

    Args:
        images (`Tensor`): RGB in 0..255, `[N, 3, H, W]` uint8 on the CPU.
        seconds (`float`): From the prompt to all images.
    """

    images: Tensor
    seconds: float


class Sampler:
    """Samples a student, and beside it the teacher and its path, which share one network in memory. Any thread may ask.

    The student is asked by one thread at a time, and so is the teacher. The teacher waits before each of its network's
    evaluations while the student samples, and gives up there when its request is superseded: a student's request never waits for
    a teacher's. Superseded requests that wait for the teacher give up, too.

    Args:
        student (`ModelFamily`): With the pipeline as its folder has it, its safety checker included.
        teacher (`ModelFamily`, *optional*): Of the same latents.
        path (`DegradationPath`, *optional*): From the teacher; with it there has to be one.
        device (`torch.device` or `str`): Where images are sampled.
        dtype (`torch.dtype`): Of denoisers.
    """

    def __init__(
        self,
        student: ModelFamily,
        teacher: ModelFamily | None = None,
        path: DegradationPath | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.student, self.teacher, self.path = student, teacher, path
        self.device = torch.device(device)
        self.latest = Latest()
        self._kept, self._dtype = ExitStack(), dtype
        self._student_lock, self._teacher_lock = threading.Lock(), threading.Lock()
        self._waited = 0.0
        self._node: int | None = 0
        self._is_wanted: Callable[[], bool] = lambda: True
        self._one_step = self._on_device(student, student.pipeline)
        if teacher is not None:
            teacher.at_resolution(student.resolution())
            many_steps = teacher.assemble(teacher.network, teacher.many_step_scheduler())
            checker = teacher.pipeline.components.get("safety_checker")
            if checker is not None:  # which the family leaves out where images are measured
                many_steps.register_modules(safety_checker=checker)
            self._many_steps = self._on_device(teacher, many_steps)
            self._network = getattr(self._many_steps, teacher.network_name)
            self._network.register_forward_pre_hook(lambda *_: self._before_evaluation())

    @property
    def choices(self) -> list[tuple[str, str]] | None:
        """Class labels as they are shown, and as prompts; `None` if there are prompts, and none if there is nothing to choose."""
        if self.student.takes_prompts:
            return None
        source = (self.teacher or self.student).conditions()  # a run knows the teacher's label for no class
        if not self.student.takes_condition(self.student.network.config):
            return []
        names = None if self.student.model is None else self.student.model.index.get("id2label")
        names = names if isinstance(names, dict) else {}
        return [(f"{label}: {names[label]}" if label in names else label, label) for label in source.captions]

    @property
    def is_guided(self) -> bool:
        """Whether guidance changes what the teacher samples."""
        teacher = self.teacher
        return teacher is not None and (teacher.takes_prompts or bool(teacher.conditions().empty))

    def warm_up(self) -> None:
        """Samples once what is slower at the first time than at others."""
        wanted = Wanted(self.choices[0][1] if self.choices else "", steps=1)
        self.one_step(wanted)
        if self.teacher is not None:
            self.many_steps(wanted)

    def one_step(self, wanted: Wanted) -> Sample:
        """The student's images."""
        with self._student_lock:
            return self._sample(self.student, self._one_step, wanted)

    def many_steps(self, wanted: Wanted, node: int = 0, is_wanted: Callable[[], bool] = lambda: True) -> Sample:
        """The images of the teacher, or of a node of its path.

        Args:
            wanted (`Wanted`): The prompt, the steps, ...
            node (`int`): 0 is the teacher.
            is_wanted (`Callable`): Asked while it waits for another's images, and before each evaluation of the network.

        Raises:
            Superseded: If it is not wanted any more.
            ValueError: If there is no such node, or it cannot be loaded.
        """
        assert self.teacher is not None
        nodes = 0 if self.path is None else len(self.path)
        check_number("node", node, Range(minimum=0, maximum=nodes), True)
        with self._alone(is_wanted):
            if self.path is not None:
                was, self._node = self._node, None
                move_to_node(self.path, self._network, was, node)
                self._node = node
            self._waited = 0.0
            arguments = {"num_inference_steps": wanted.steps, "guidance_scale": wanted.guidance}
            sample = self._sample(self.teacher, self._many_steps, wanted, **arguments)
            return Sample(sample.images, sample.seconds - self._waited)

    def _on_device(self, family: ModelFamily, pipeline: DiffusionPipeline) -> DiffusionPipeline:
        network = self._kept.enter_context(inference_copy(family.network, self.device, self._dtype))
        pipeline.register_modules(**{family.network_name: network})
        pipeline.set_progress_bar_config(disable=True)
        family.to(self.device)
        return pipeline

    @contextmanager
    def _alone(self, is_wanted: Callable[[], bool]) -> Iterator[None]:
        """Waits for the teacher as long as a request is wanted, and holds it."""
        while not self._teacher_lock.acquire(timeout=PATIENCE):
            if not is_wanted():
                raise Superseded
        try:
            self._is_wanted = is_wanted
            self._check_is_wanted()
            yield
        finally:
            self._teacher_lock.release()

    def _check_is_wanted(self) -> None:
        if not self._is_wanted():
            raise Superseded

    def _before_evaluation(self) -> None:
        """Lets the student go first, and gives up when the visitor wants something else."""
        started = time.monotonic()
        with self._student_lock:
            pass
        self._waited += time.monotonic() - started
        self._check_is_wanted()

    @told_once()
    @torch.no_grad()
    def _sample(self, family: ModelFamily, pipeline: DiffusionPipeline, wanted: Wanted, **arguments: Any) -> Sample:
        started = time.monotonic()
        seeds = range(wanted.seed, wanted.seed + wanted.number)
        shape = self.student.latent_shape()
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        encoded = family.arguments([caption_of(wanted.prompt, "The prompt") or ""])
        given = {
            name: tensor.expand(wanted.number, *tensor.shape[1:]).to(self.device) for name, tensor in encoded.items()
        }
        images = family.sample(pipeline, given, noise.to(self.device), **arguments)
        images = (images.float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)  # which waits for the device
        return Sample(images, time.monotonic() - started)
