"""A run from Python, or from the training script: teacher, data, both stages and results, in order."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import set_seed
from torch import nn

from .backtracking import BacktrackingTrainer
from .data.captions import given_prompts
from .data.prompts import PromptFile
from .degradation import DegradationRecorder
from .evaluation import Evaluation, check_evaluators
from .evaluation.report import Report, summary
from .evaluation.teacher_images import TeacherImages
from .families import ModelFamily, load_family
from .hub.files import write_text
from .hub.publish.background import RunUpload, repository_of
from .hub.publish.results import is_finished, write_results
from .hub.publish.student import check_teacher_files, save_student
from .hub.published import without_token
from .models.casting import inference_copy
from .models.generator import check_many_steps
from .models.reference import ModelReference
from .path.path import DegradationPath
from .training.checks import check_settings
from .training.config import DisBackConfig
from .training.defaults import as_begun, with_defaults
from .training.inputs import (
    check_inputs,
    condition_source,
    evaluation_prompts,
    load_image_files,
    load_prompts,
    real_images,
    validation_prompts,
)
from .training.networks import PRECISIONS, accelerator_of, check_tuning, compute_dtype
from .training.open_path import open_path
from .training.processes import process_state
from .training.results import BacktrackingResult
from .training.run_folder import in_use
from .training.settings_file import SETTINGS, write_settings
from .training.validation import Validation, check_metric


if TYPE_CHECKING:
    import datasets


SCRIPT = "examples/text_to_image/train_disback.py"
PIXEL_SCRIPT = "examples/unconditional_image_generation/train_disback.py"
PROMPTS = "prompts.txt"
# What the teacher's images depend on, of a run's inputs.
_OF_THE_TEACHER = ("teacher", "text_encoders", "scheduler", "autoencoder")


class DisBackTrainer:
    """Distils a diffusers teacher into a one-step generator with DisBack (arXiv 2408.15991).

    `train` records the degradation path and backtracks along it, `save_model` writes the student as a pipeline with its
    report and card, `push_to_hub` publishes it. All of it can be repeated: with `resume_from_checkpoint="latest"` a run that
    was cut off goes on, and one that is finished is left as it is.

    Args:
        model (`str` or `Path`, *optional*): The teacher: a folder, a model on the Hub, or a checkpoint in one file; by default
            `args.pretrained_model_name_or_path`.
        args (`DisBackConfig`, *optional*): All settings.
        train_dataset (`Sequence[str]` or `datasets.Dataset`, *optional*): Prompts, or rows whose column
            `args.caption_column` holds them; by default those that `args` names. A teacher without prompts needs none.
        evaluation (`Callable`, *optional*): Makes the evaluation; by default some images of each validation prompt are
            sampled, and measured by `args.evaluators`. It is called on the main process, which measures; the others share its
            sampling.
        command (`Sequence[str]`, *optional*): The script and its arguments that repeat the run, for report and card; by
            default the training script with the settings that are written beside the results.

    Attributes:
        args (`DisBackConfig`): The settings.
        path (`DegradationPath`, *optional*): After `train`, if there is one.
        result (`BacktrackingResult`, *optional*): Of stage 2, after `train`.

    Raises:
        ValueError: If settings contradict each other, or the results of another run.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        args: DisBackConfig | None = None,
        train_dataset: "Sequence[str] | datasets.Dataset | None" = None,
        evaluation: Callable[[], Evaluation] | None = None,
        command: Sequence[str] | None = None,
    ):
        config = DisBackConfig() if args is None else args
        if model is not None:
            config = replace(config, pretrained_model_name_or_path=str(model))
        if config.pretrained_model_name_or_path is None:
            raise ValueError("There is no teacher: pass model, or --pretrained_model_name_or_path.")
        sources = [name for name in ("prompts_file", "dataset_name", "train_data_dir") if getattr(config, name)]
        if train_dataset is not None and sources:
            raise ValueError(f"Prompts come from one place, but train_dataset and {sources[0]} are given.")
        own_prompts = [name for name in ("evaluation_prompts_file", "num_evaluation_prompts") if getattr(config, name)]
        if evaluation is not None and own_prompts:
            raise ValueError(
                f"--{own_prompts[0]} is of no use: this evaluation brings its own prompts, as that of an embedded teacher does."
            )
        names_timestep = config.conditioning_timestep is not None
        self.args = config = as_begun(config)
        self.folder = Path(config.output_dir)
        self._prompts = None if train_dataset is None else given_prompts(train_dataset, config.caption_column)
        self._make_evaluation = evaluation
        prompts_file = [] if self._prompts is None else ["--prompts_file", str(self.folder / PROMPTS)]
        own_command = [SCRIPT, "--config", str(self.folder / SETTINGS), *prompts_file]
        self._command = own_command if command is None else without_token(command)
        # A training script's command is completed by a default of the teacher's; an own script is its author's.
        self._completes_command = (
            not names_timestep and command is not None and self._command[:1] in ([SCRIPT], [PIXEL_SCRIPT])
        )
        check_settings(config)
        check_evaluators(config.evaluators, config.evaluator_args)
        if config.push_to_hub:
            repository_of(config)
        self.state = process_state()
        self.path: DegradationPath | None = None
        self.result: BacktrackingResult | None = None
        self._report: Report | None = None  # of all processes; the main one has images and measures
        self._upload: RunUpload | None = None
        self._student: nn.Module | None = None
        self._is_trained = False

    @property
    def is_finished(self) -> bool:
        """Whether the folder holds all that the run would leave, and it is to be resumed."""
        return self.args.resume_from_checkpoint == "latest" and is_finished(self.args)

    def train(self) -> BacktrackingResult | None:
        """Records the path and backtracks along it, as far as `args.stage` asks for; whole, or resumed.

        Returns:
            `BacktrackingResult`: What stage 2 found out; `None` if it is not run.

        Raises:
            ValueError: If teacher, prompts, start or path do not fit together, or were others when the run was begun.
            Interrupted: After a signal, with a checkpoint.
        """
        if self.is_finished:
            self.state.print(f"The run in {self.folder} is finished.\n{summary(self.folder)}")
            return None
        with in_use(self.folder):
            self._prepare()
            self._record()
            self._backtrack()
        self._is_trained = True
        return self.result

    def save_model(self) -> None:
        """Writes the student's pipeline, report, images and card into `args.output_dir`. Call it on every process."""
        if not self._is_trained:
            return
        with in_use(self.folder):  # which all processes agree on
            if self._report is None or not self.state.is_main_process:
                return
            if self._student is not None:
                self._save_student(self._student)
            with self.teacher.on_device(self.state.device):
                print(
                    write_results(
                        self._report,
                        self.teacher,
                        self.path,
                        self.result,
                        self.args,
                        self._command,
                        self._teacher_card,
                    )
                )

    def push_to_hub(self, repo_id: str | None = None) -> None:
        """Publishes the path, the student and its card: see `push_run`. A Hub that is away is told, with how to push later.

        Args:
            repo_id (`str`, *optional*): By default `args.hub_model_id`, or the output folder's name.
        """
        if self.state.is_main_process:
            config = self.args if repo_id is None else replace(self.args, hub_model_id=repo_id, push_to_hub=True)
            upload = self._upload if self._upload is not None and repo_id is None else RunUpload(config)
            print(upload.finish())

    # The run, in order -------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Loads the teacher, the prompts and the student's start, and measures teacher and start."""
        config, state = self.args, self.state
        set_seed(config.seed)
        self.dtype = compute_dtype(accelerator_of(config))
        torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
        prompts = load_prompts(config) if self._prompts is None else self._prompts
        files = load_image_files(config, prompts)
        evaluation = self._evaluation()
        encoders = PRECISIONS[config.text_encoder_precision]
        self.teacher: ModelFamily = load_family(config.teacher, config.cache_dir, encoders).to(state.device)
        check_many_steps(self.teacher.pipeline.scheduler, self.teacher.local_model.name_or_path)
        self.teacher.at_resolution(config.resolution)
        check_tuning(self.teacher.network, config)
        self.args = config = with_defaults(config, self.teacher)
        if self._completes_command:
            self._command = [*self._command, "--conditioning_timestep", str(config.conditioning_timestep)]
            self._completes_command = False
        self.teacher.check_timestep(config.conditioning_timestep, "conditioning_timestep")
        self.teacher.one_step_scheduler(config.conditioning_timestep)  # or it would be refused at the end
        if state.is_main_process:  # what the end of the run needs of the teacher's files is read before it begins
            if warning := self.teacher.check_schedule():
                print(warning, file=sys.stderr)
            check_teacher_files(self.teacher.local_model)
            self._teacher_card: dict[str, Any] = self.teacher.local_model.card()
        start = None
        if config.generator_model_name_or_path:
            start = ModelReference(
                config.generator_model_name_or_path, single_file_config=config.single_file_config
            ).resolve_denoiser(self.teacher.network_name, config.cache_dir)
        self.generator = self.teacher.initial_generator(start, config.resolution, config.all_adapters)
        self.inputs = check_inputs(config, self.teacher, self.generator, prompts, files)
        self.path = open_path(config, self.teacher, self.generator, state, self.inputs)
        self.conditions = condition_source(config, self.teacher, prompts, state, self.inputs)
        self.images = real_images(config, self.teacher, self.conditions, files, state)
        if config.push_to_hub and state.is_main_process:
            self._upload = RunUpload(config, self.teacher.model)
        self._measure_first(evaluation)
        if state.is_main_process:
            write_settings(self.folder / SETTINGS, config)
            if self._prompts is not None:  # so that the training script can repeat the run
                write_text(self.folder / PROMPTS, "".join(f"{prompt}\n" for prompt in self._prompts))

    def _evaluation(self) -> Evaluation | None:
        """The evaluation, on the main process, before anything takes long: a metric that is not measured is refused here. Its
        prompts are those of a file, or are not known yet."""
        if not self.state.is_main_process:
            return None
        config, file = self.args, self.args.evaluation_prompts_file
        if self._make_evaluation is None:
            evaluation = Evaluation([] if file is None else list(PromptFile(file)), batch_size=config.train_batch_size)
        else:
            evaluation = self._make_evaluation()
        evaluation.add(config.evaluators, config.evaluator_args, self.state.device, config.cache_dir)
        check_metric(config, evaluation.metrics)
        evaluation.show_progress = True
        return evaluation

    def _measure_first(self, evaluation: Evaluation | None) -> None:
        """Measures the teacher and the initial student. Encoders leave memory when all is encoded."""
        config = self.args
        wanted = validation_prompts(config, self.conditions.captions)
        if evaluation is not None and self._make_evaluation is None:
            given = (self.conditions.captions, wanted, evaluation.prompts or None)
            evaluation.prompts = evaluation_prompts(config, *given)
        self._report = Report(
            Evaluation.shared(evaluation, self.state),
            wanted,
            self.teacher,
            config.guidance_scale,
            dtype=self.dtype,
            size=self.teacher.resolution(config.resolution),
            teacher_images=TeacherImages(
                self.folder / "evaluation", {name: self.inputs.get(name) for name in _OF_THE_TEACHER}
            ),
            state=self.state,
        )
        if self.conditions.is_encoded:
            self.teacher.release_encoders()
        self._report.add_teacher()
        self._validation: Validation | None = None
        if evaluation is not None:
            self._validation = Validation(config, self.teacher, self._report.metrics, self._report.measures["teacher"])
        with inference_copy(self.generator, self.state.device, self.dtype) as network:
            self.initial_measures = self._measure(network, "initial")
        self.teacher.offload_to_cpu()
        self.state.wait_for_everyone()

    def _measure(self, network: nn.Module, name: str = "student", is_shared: bool = True) -> dict[str, float]:
        """Measures a student's network as it would be deployed; the measures are empty but on the main process. See
        `Report.add_student`."""
        assert self._report is not None  # of _measure_first
        with self.teacher.on_device(self.state.device):
            deployed = self.teacher.one_step(network, self.args.conditioning_timestep)
            return self._report.add_student(name, deployed, is_shared)

    def _record(self) -> None:
        """Runs stage 1, if there is a path to record."""
        if self.path is not None and not self.path.complete:
            recorded = None if self._upload is None else self._upload.submit_path
            common = (self.teacher, self.generator, self.conditions, self.path)
            self.path = DegradationRecorder(self.args, self.args, *common, recorded, self.inputs).record() or None

    def _backtrack(self) -> None:
        """Runs stage 2, if that is asked for."""
        if self.args.stage == "record":
            return
        common = (self.teacher, self.generator, self.conditions, self.path)
        measured = (self._measure, self.initial_measures)
        given = (*common, *measured, self.inputs, self.images, self._validation)
        trainer = BacktrackingTrainer(self.args, self.args, *given)
        self._student = trainer.train()
        self.result = trainer.result()
        trainer.release()

    def _save_student(self, student: nn.Module) -> None:
        """Writes the student's pipeline, on the main process. What is not what was measured last is measured again, by this process
        alone, which knows the best student: that one, and what was trained as an adapter, now that it is fused."""
        deployed = self.teacher.one_step(student, self.args.conditioning_timestep)
        lora = None if self.result is None else self.result.lora
        save_student(deployed, self.teacher.local_model, self.folder, lora)
        best = {} if self.result is None else self.result.outcome.get("best_model", {})
        if lora is not None or best.get("is_student"):
            with inference_copy(student, self.state.device, self.dtype) as network:
                self._measure(network, is_shared=False)
        self._student = None
