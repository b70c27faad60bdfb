"""Model cards of a student and of a path, as text. What they say comes from `report.json` and `path.json`, and how they say
it from `templates/`.

A template holds no value of others but through a filter for the place where it stands: words and code by `markdown`, literals
of Python, quoted arguments; front matter is written by a YAML dumper.
"""

import shlex
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from ..models.batch import NO_LABEL
from ..models.reference import title_of
from ..models.single_file import repo_of, single_file_of
from ..training.settings.groups import TEACHER_FLAGS
from .markdown import address, fenced, inline_code, link, python, shell, table, text
from .published import component_of, published_manifest, published_report
from .repository import Repository


if TYPE_CHECKING:
    from jinja2 import Environment


@dataclass(frozen=True)
class Usage:
    """How a family's pipelines are used, as cards say it. The defaults are those of text-to-image.

    Args:
        task (`str`): The Hub's name of what they do.
        condition (`str`): What the stock pipeline's call is given, in Python; `{prompt}` is a prompt, `{label}` a class.
        example (`str`): A prompt or a class.
        takes_guidance (`bool`): Whether the call takes a `guidance_scale`.
        takes_size (`bool`): Whether the call has to be told the image's size, since its default is not the denoiser's.
        own_pipeline (`str`, *optional*): The class of this package that loads students, too.
        takes_lora (`bool`): Whether the stock pipeline loads a LoRA.
        calls_teacher (`bool`): Whether the teacher's own stock pipeline can be called in this way, too.
        network_class (`str`): Of diffusers, that loads the denoiser.
        scheduler_class (`str`): Of diffusers, of a student's scheduler.
        loading (`str`): What `from_pretrained` of a pipeline is given besides, in Python, after a comma.
        bare (`str`, *optional*): The template of a snippet that evaluates the bare network.
    """

    task: str = "text-to-image"
    condition: str = "{prompt}"
    example: str = "a photograph"
    takes_guidance: bool = True
    takes_size: bool = False
    own_pipeline: str | None = None
    takes_lora: bool = True
    calls_teacher: bool = True
    network_class: str = "AutoModel"
    scheduler_class: str = "DDIMScheduler"
    loading: str = ""
    bare: str | None = None

    def call(self, caption: str, steps: int, side: int | None = None) -> str:
        """The arguments of the stock pipeline's call, in Python, for a prompt, a class or `NO_LABEL`; a student's take no guidance.
        `side` is the image's, in pixels.

        Raises:
            ValueError: If a class is asked for, and the caption is no number.
        """
        guidance = "guidance_scale=0" if self.takes_guidance and steps == 1 else ""
        if "{label}" not in self.condition:
            condition = self.condition.replace("{prompt}", python(caption))
        else:
            condition = "" if caption == NO_LABEL else self.condition.replace("{label}", str(int(caption)))
        size = f"height={side}, width={side}" if self.takes_size and side is not None else ""
        return ", ".join(filter(None, (condition, size, f"num_inference_steps={steps}", guidance)))


STABLE_DIFFUSION = Usage(own_pipeline="DisBackOneStepPipeline", network_class="UNet2DConditionModel", bare="bare.md")
UNCONDITIONAL = Usage("unconditional-image-generation", condition="", takes_guidance=False, takes_lora=False)


# Settings by which a LoRA is of something else than the teacher as it lies there: no snippet of a few lines loads that.
_OTHER_BASES = (
    *("generator_model_name_or_path", "teacher_lora"),
    *("pretrained_vae_model_name_or_path", "single_file_config"),
)


def student_card(report: dict[str, Any], title: str, repo: str, path_image: bool, usage: Usage) -> str:
    """`README.md` of a student.

    Args:
        report (`dict`): The content of `report.json`.
        title (`str`): Its name.
        repo (`str`): The folder or repository of the snippets.
        path_image (`bool`): Whether there is a `path.png`.
        usage (`Usage`): What its family says of its use.

    Raises:
        ValueError: If the report is not as this library writes it.
    """
    from jinja2 import UndefinedError

    try:
        return _student_card(published_report(report), title, repo, path_image, usage)
    except (AttributeError, KeyError, TypeError, UndefinedError) as error:
        raise ValueError(f"No card can be made of this report.json: {error!r} is missing or wrong.") from error


def _student_card(report: dict[str, Any], title: str, repo: str, path_image: bool, usage: Usage) -> str:
    from huggingface_hub import EvalResult

    evaluation, settings = report["evaluation"], report["settings"]
    metrics = evaluation.get("metrics", {})  # those of earlier versions have none: a measure is its name
    known = {
        name: {"label": name.replace("_", " "), "panel": name} | metrics.get(name, {}) for name in report["student"]
    }
    results = [
        EvalResult(
            task_type=usage.task,
            dataset_type=evaluation["type"],
            dataset_name=evaluation["name"],
            metric_type=known[name]["panel"],
            metric_name=known[name]["label"],
            metric_value=value,
        )
        for name, value in report["student"].items()
        if name != "seconds_per_image"
    ]
    teacher = settings["pretrained_model_name_or_path"]
    is_plain = single_file_of(teacher) is None and not any(settings[name] for name in _OTHER_BASES)
    side = _whole(report["resolution"], "resolution")
    sized = replace(usage, takes_size="height=" not in usage.condition)  # that of the teacher may be another
    return _render(
        "student.md",
        usage,
        teacher,
        report["teacher_card"],
        ["one-step", "distillation", "disback"],
        title,
        results,
        report={"path": None, "best_model": None, "early_stopping": None, **report},
        repo=repo,
        path_image=path_image,
        lora_fits=usage.takes_lora and is_plain and bool(report.get("lora")),
        arguments=usage.call(report["example_prompt"], 1, side),
        teacher_arguments=sized.call(report["example_prompt"], 1, side),
        denoiser=title_of(component_of(report)),
        figures={name: report[name] for name in ("floor", "teacher", "initial", "student") if name in report},
        command=shlex.split(report["command"]),
        metrics=metrics,
        behind=sorted((known[name]["label"], name) for name in report.get("behind", {}).get("teacher", [])),
    )


def path_card(
    manifest: dict[str, Any],
    repo_id: str,
    teacher_card: dict[str, Any],
    image: bool,
    usage: Usage,
) -> str:
    """`README.md` of a repository that holds a path alone.

    Args:
        manifest (`dict`): The content of `path.json`.
        repo_id (`str`): The repository.
        teacher_card (`dict`): What the teacher's card declares; see `ModelReference.card`.
        image (`bool`): Whether there is a `path.png`.
        usage (`Usage`): What its teacher's family says of its use.
    """
    manifest = published_manifest(manifest)
    teacher = manifest["teacher"]
    return _render(
        "path.md",
        usage,
        teacher["name_or_path"],
        teacher_card,
        ["degradation-path", "distillation", "disback"],
        repo_id.split("/")[-1],
        manifest=manifest,
        figures={node["name"]: {key: node[key] for key in ("step", "loss", "bytes")} for node in manifest["nodes"]},
        image=image,
        denoiser=component_of(manifest),
        arguments=usage.call(usage.example, 25) if usage.calls_teacher else None,
        repo=repo_id,
        teacher_flags=[
            [f"--{flag}", teacher[key]] for key, flag in TEACHER_FLAGS.items() if teacher.get(key) not in (None, False)
        ],
    )


def _render(
    template: str,
    usage: Usage,
    teacher: str,
    teacher_card: dict[str, Any],
    tags: list[str],
    title: str,
    results: list[Any] | None = None,
    **values: Any,
) -> str:
    """A card by the Hub's own tools: metadata that they know, and the template's text.

    Args:
        template (`str`): A file of `templates`.
        usage (`Usage`): What the family says of its use.
        teacher (`str`): Its name.
        teacher_card (`dict`): What its card declares.
        tags (`list[str]`): For the Hub.
        title (`str`): The name of what the card is of.
        results (`list[EvalResult]`, *optional*): Of a student.
        **values: The template's other variables, as they are: its filters escape them.
    """
    from diffusers.utils.hub_utils import populate_model_card
    from huggingface_hub import ModelCard, ModelCardData

    base = repo_of(teacher) or teacher_card.get("base_model")
    licence: dict[str, Any] = {
        key: teacher_card[key] for key in ("license", "license_name", "license_link") if key in teacher_card
    }
    if address(licence.get("license_link")) is None:
        licence.pop("license_link", None)
    relation: dict[str, Any] = {"base_model_relation": "finetune"} if base else {}
    data = ModelCardData(
        pipeline_tag=usage.task,
        base_model=base,
        eval_results=results,
        model_name=title if results else None,
        **relation,
        **licence,
    )
    values |= {
        "usage": usage,
        "card_data": data.to_yaml(),
        "title": title,
        "teacher": teacher,
        "teacher_card": teacher_card,
    }
    card = ModelCard(_templates().get_template(template).render(values))
    return str(populate_model_card(card, [usage.task, *tags]))


@cache
def _templates() -> "Environment":
    """The files of `templates`, and the filters that escape values in them. A value that is missing is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(
        loader=PackageLoader(__package__),
        undefined=StrictUndefined,
        autoescape=False,  # of HTML; these are pages of Markdown, whose filters are below
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {
        "code": inline_code,
        "link": link,
        "python": python,
        "shell": shell,
        "table": table,
        "text": text,
    }
    templates.filters |= {"block": lambda code, language: fenced(language, code) + "\n", "listing": _listing}
    templates.filters |= {"pairs": _pairs, "whole": _whole, "hub_page": lambda repo_id: Repository(repo_id).url}
    return templates


def _listing(settings: dict[str, Any]) -> str:
    return "\n".join(f"- {inline_code(name)}: {inline_code(repr(value))}" for name, value in settings.items())


def _pairs(values: dict[str, Any]) -> str:
    return text(", ".join(f"{name} {value}" for name, value in values.items()))


def _whole(value: Any, name: str) -> int:
    """A whole number, for places where anything else would be read as code.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} has to be a whole number, but is {value!r}.")
    return value
