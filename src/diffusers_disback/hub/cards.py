"""Model cards of a student and of a path, as text. What they say comes from `report.json` and `path.json`.

Templates hold no value of others but in the form of the place where it stands: words and code by `markdown`, literals of
Python, quoted arguments; front matter is written by a YAML dumper.
"""

import shlex
from collections.abc import Callable
from typing import Any

from ..models.single_file import repo_of, single_file_of
from .markdown import address, fenced, inline_code, link, python, shell, table, text
from .published import published_manifest, published_report
from .repository import Repository


# What a path's teacher may be taken otherwise in than its files say, and the flags that say so.
_TEACHER_FLAGS = {
    "variant": "variant",
    "prediction_type": "prediction_type",
    "vae": "pretrained_vae_model_name_or_path",
    "lora": "teacher_lora",
    "single_file_config": "single_file_config",
    "rescale_betas_zero_snr": "rescale_betas_zero_snr",
}

_CITATION = """## Citation

```bibtex
@inproceedings{zhang2025disback,
  title     = {Distribution Backtracking Builds A Faster Convergence Trajectory for Diffusion Distillation},
  author    = {Zhang, Shengyuan and Yang, Ling and Li, Zejian and Zhao, An and Meng, Chenye and Yang, Changyuan and Yang, Guang and Yang, Zhiyuan and Sun, Lingyun},
  booktitle = {International Conference on Learning Representations},
  year      = {2025}
}
```
"""

_STUDENT = """---
{{ card_data }}
---

# {{ title }}

A one-step text-to-image generator, distilled from {{ teacher }}
with DisBack (Distribution Backtracking Distillation, [arXiv 2408.15991](https://arxiv.org/abs/2408.15991)) by
diffusers-disback {{ version }}. One evaluation of the UNet makes a picture.

![samples](samples.png)

## Use

With diffusers alone; both numbers matter:

{% call block("python") %}
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({{ repo }})
image = pipe({{ prompt }}, num_inference_steps=1, guidance_scale=0).images[0]
{% endcall %}

With diffusers-disback, where there is nothing to get wrong:

{% call block("python") %}
from diffusers_disback import DisBackOneStepPipeline

pipe = DisBackOneStepPipeline.from_pretrained({{ repo }})
image = pipe({{ prompt }}).images[0]
{% endcall %}

{% if lora_base %}It was trained as a LoRA, which is in `lora/`. On what it was trained on, and with the student's scheduler:

{% call block("python") %}
from diffusers import DDIMScheduler, DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({{ lora_base }}{% if teacher_revision %}, revision={{ teacher_revision }}{% endif %}{% if teacher_variant %}, variant={{ teacher_variant }}{% endif %})
pipe.load_lora_weights({{ repo }}, subfolder="lora", weight_name="pytorch_lora_weights.safetensors")
pipe.scheduler = DDIMScheduler.from_pretrained({{ repo }}, subfolder="scheduler")
image = pipe({{ prompt }}, num_inference_steps=1, guidance_scale=0).images[0]
{% endcall %}

{% endif %}The bare UNet, asked once, at timestep {{ timestep }}:

{% call block("python") %}
{{ bare }}
{% endcall %}

## Figures

Measured on {{ num_pictures }} pictures ({{ dataset }}), seed {{ evaluation_seed }}:

{{ figures }}

`distance` is a Frechet distance (0 is best), accuracies are shares of pictures (1 is best), `drift_*` are differences to
the teacher's many-step pictures of the same prompts (0 is best), `seconds_per_image` was taken on the machine below. These
are figures of one run with one seed.

![convergence](convergence.png)

## How it was made

{{ path }}
{% if path_picture %}
What each node of the path draws:

![path](path.png)
{% endif %}
{{ stages }}

Steps are updates of the fake score (degradation) and of the generator (backtracking); `peak_memory_mb` is of the GPU, on a
CPU of the process. Machine: {{ machine }}. Versions: {{ versions }}. Seed: {{ seed }}.

{% call block("bash") %}
{{ command }}
{% endcall %}

<details><summary>All settings</summary>

{{ settings }}

</details>

The energy that this took was not measured, so no carbon figure is given.

## Licence

{{ licence }}

## Limits

The student inherits the teacher's limits, makes pictures in one step only, takes no negative prompt, and is made for
{{ resolution }}x{{ resolution }} pixels.{% if behind %} By these measures it is behind its teacher in {{ behind }}.{% endif %}

"""

_BARE = """import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from transformers import CLIPTextModel, CLIPTokenizer

repo = {{ repo }}
tokenizer = CLIPTokenizer.from_pretrained(repo, subfolder="tokenizer")
text_encoder = CLIPTextModel.from_pretrained(repo, subfolder="text_encoder")
unet = UNet2DConditionModel.from_pretrained(repo, subfolder="unet")
scheduler = DDIMScheduler.from_pretrained(repo, subfolder="scheduler")
vae = AutoencoderKL.from_pretrained(repo, subfolder="vae")

with torch.no_grad():
    tokens = tokenizer({{ prompt }}, padding="max_length", truncation=True, return_tensors="pt")
    prompt_embeds = text_encoder(tokens.input_ids)[0]
    noise = torch.randn(1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    scheduler.set_timesteps(1)
    (t,) = scheduler.timesteps  # {{ timestep }}
    x0 = scheduler.step(unet(noise, t, prompt_embeds).sample, t, noise).prev_sample
    image = VaeImageProcessor().postprocess(vae.decode(x0 / vae.config.scaling_factor).sample)[0]"""

# Two text encoders: the stock pipeline's encode_prompt, without its UNet and autoencoder, is the shortest way.
_BARE_XL = """import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor

repo, side = {{ repo }}, {{ resolution }}
encoders = StableDiffusionXLPipeline.from_pretrained(repo, unet=None, vae=None)
unet = UNet2DConditionModel.from_pretrained(repo, subfolder="unet")
scheduler = DDIMScheduler.from_pretrained(repo, subfolder="scheduler")
vae = AutoencoderKL.from_pretrained(repo, subfolder="vae")

with torch.no_grad():
    prompt_embeds, _, pooled, _ = encoders.encode_prompt({{ prompt }}, do_classifier_free_guidance=False)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[side, side, 0, 0, side, side]])}
    noise = torch.randn(1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    scheduler.set_timesteps(1)
    (t,) = scheduler.timesteps  # {{ timestep }}
    output = unet(noise, t, prompt_embeds, added_cond_kwargs=added).sample
    x0 = scheduler.step(output, t, noise).prev_sample
    image = VaeImageProcessor().postprocess(vae.decode(x0 / vae.config.scaling_factor).sample)[0]"""

_PATH = """---
{{ card_data }}
---

# {{ title }}

A degradation path for DisBack (Distribution Backtracking Distillation,
[arXiv 2408.15991](https://arxiv.org/abs/2408.15991)), recorded by diffusers-disback: how a copy of the teacher
{{ teacher }} degraded while it was fitted to the samples of an untrained one-step student. It depends on the teacher and
on the student's start alone, so one path serves many students.

{{ nodes }}

Each node is a branch of this repository; `path.json` pins its commit and the SHA-256 of its weights.
{% if picture %}
What each node draws, from the teacher to the most degraded one:

![path](path.png)
{% endif %}
## Use

To distil a student along it, with the same teacher and the same start:

{% call block("bash") %}
accelerate launch train_disback.py --pretrained_model_name_or_path {{ teacher_argument }} \\
{% for flag in teacher_flags %}  {{ flag }} \\
{% endfor %}  --conditioning_timestep {{ timestep }} --degradation_path {{ repo_argument }} --stage backtrack --prompts_file prompts.txt
{% endcall %}

To look at a node:
{% if node %}
{% call block("python") %}
from diffusers import UNet2DConditionModel

{% if full %}unet = UNet2DConditionModel.from_pretrained({{ repo }}, subfolder="unet", revision={{ node }}){% else %}unet = UNet2DConditionModel.from_pretrained({{ teacher_literal }}, subfolder="unet")
unet.load_lora_adapter({{ repo }}, revision={{ node }}, subfolder="unet", prefix=None, use_safetensors=True){% endif %}
{% endcall %}
{% if full %}
{% call block("python") %}
from diffusers import DiffusionPipeline

degraded_teacher = DiffusionPipeline.from_pretrained({{ repo }}, revision={{ node }})
image = degraded_teacher("a photograph", num_inference_steps=25).images[0]
{% endcall %}
{% endif %}{% endif %}
{% call block("bash") %}
diffusers-disback path show {{ repo_argument }}
diffusers-disback path verify {{ repo_argument }}
diffusers-disback pull {{ repo_argument }} my-path
{% endcall %}

## How it was made

Teacher: {{ teacher }}{% if commit %}, commit {{ commit }}{% endif %}, SHA-256 of its denoiser {{ teacher_sha }}.
Start of the student: {{ start }}, asked at timestep {{ timestep }}.{% if cost %}
{{ cost }}{% endif %}

<details><summary>All settings</summary>

{{ settings }}

</details>

## Licence

{{ licence }}

"""


def student_card(report: dict[str, Any], title: str, repo: str, path_picture: bool) -> str:
    """`README.md` of a student.

    Args:
        report (`dict`): The content of `report.json`.
        title (`str`): Its name.
        repo (`str`): The folder or repository of the snippets.
        path_picture (`bool`): Whether there is a `path.png`.

    Raises:
        ValueError: If the report is not as this library writes it.
    """
    try:
        return _student_card(published_report(report), title, repo, path_picture)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"No card can be made of this report.json: {error!r} is missing or wrong.") from error


def _student_card(report: dict[str, Any], title: str, repo: str, path_picture: bool) -> str:
    from huggingface_hub import EvalResult
    from jinja2 import Template

    evaluation, settings = report["evaluation"], report["settings"]
    measured = {name: report[name] for name in ("floor", "teacher", "initial", "student") if name in report}
    results = [
        EvalResult(
            task_type="text-to-image",
            dataset_type=evaluation["type"],
            dataset_name=evaluation["name"],
            metric_type="accuracy" if name.endswith("_accuracy") else name,
            metric_name=name.replace("_", " "),
            metric_value=value,
        )
        for name, value in report["student"].items()
        if name != "seconds_per_image"
    ]
    texts = {
        "repo": python(repo),
        "prompt": python(report["example_prompt"]),
        "timestep": _whole(settings["conditioning_timestep"], "conditioning_timestep"),
        "resolution": _whole(report["resolution"], "resolution"),
    }
    # Where it was trained on the teacher as it lies there: else no snippet of a few lines loads what it is on.
    others = (
        "generator_model_name_or_path",
        "teacher_lora",
        "pretrained_vae_model_name_or_path",
        "single_file_config",
    )
    base = settings["pretrained_model_name_or_path"]
    plain = report.get("lora") and not any(settings[name] for name in others) and single_file_of(base) is None
    bare = _BARE_XL if report["pipeline_class"] == "StableDiffusionXLPipeline" else _BARE
    return _render(
        _STUDENT,
        base,
        report["teacher_card"],
        ["one-step", "distillation", "disback"],
        title,
        results,
        **texts,
        bare=Template(bare).render(texts),
        lora_base=python(base) if plain else None,
        teacher_revision=settings["revision"] and python(settings["revision"]),
        teacher_variant=settings["variant"] and python(settings["variant"]),
        figures=table(measured),
        num_pictures=text(evaluation["num_pictures"]),
        dataset=text(evaluation["name"]),
        evaluation_seed=text(evaluation["seed"]),
        path=_path_of(report),
        stages=table(report["stages"]),
        path_picture=path_picture,
        command=shell(shlex.split(report["command"])),
        settings=_list(settings),
        seed=text(report["seed"]),
        machine=_pairs(report["machine"]),
        version=text(report["versions"]["diffusers_disback"]),
        versions=_pairs(report["versions"]),
        behind=_behind(report),
    )


def path_card(manifest: dict[str, Any], repo_id: str, teacher_card: dict[str, Any], picture: bool) -> str:
    """`README.md` of a repository that holds a path alone.

    Args:
        manifest (`dict`): The content of `path.json`.
        repo_id (`str`): The repository.
        teacher_card (`dict`): What the teacher's card declares; see `ModelReference.card`.
        picture (`bool`): Whether there is a `path.png`.
    """
    manifest = published_manifest(manifest)
    teacher, generator, nodes = manifest["teacher"], manifest["generator"], manifest["nodes"]
    columns = ("step", "loss", "bytes")
    cost = manifest.get("cost")
    start = generator["name_or_path"]
    return _render(
        _PATH,
        teacher["name_or_path"],
        teacher_card,
        ["degradation-path", "distillation", "disback"],
        repo_id.split("/")[-1],
        nodes=table({node["name"]: {name: node[name] for name in columns} for node in nodes})
        if nodes
        else "No node is recorded yet.",
        picture=picture,
        repo=python(repo_id),
        repo_argument=shell([repo_id]),
        node=python(nodes[-1]["name"]) if nodes else None,
        full=bool(nodes) and nodes[-1]["kind"] == "full",
        teacher_literal=python(teacher["name_or_path"]),
        teacher_argument=shell([teacher["name_or_path"]]),
        teacher_flags=[
            shell([f"--{flag}", str(teacher[key])]) for key, flag in _TEACHER_FLAGS.items() if teacher.get(key)
        ],
        commit=teacher["commit"] and inline_code(teacher["commit"]),
        teacher_sha=inline_code(teacher["sha256"]),
        start=inline_code(start) if start else "a copy of the teacher",
        timestep=_whole(generator["conditioning_timestep"], "conditioning_timestep"),
        cost=cost
        and f"{cost['steps']} steps in {cost['seconds']:.0f} s, peak memory {cost['peak_memory_mb']:.0f} MB.",
        settings=_list(manifest["recording"]),
    )


def _render(
    template: str,
    teacher: str,
    teacher_card: dict[str, Any],
    tags: list[str],
    title: str,
    results: list[Any] | None = None,
    **texts: Any,
) -> str:
    """A card by the Hub's own tools: metadata that they know, and the template's text.

    Args:
        template (`str`): Of Jinja.
        teacher (`str`): Its name.
        teacher_card (`dict`): What its card declares.
        tags (`list[str]`): For the Hub.
        title (`str`): The name of what the card is of.
        results (`list[EvalResult]`, *optional*): Of a student.
        **texts: The template's other variables, each as it is to stand in Markdown.
    """
    from diffusers.utils.hub_utils import populate_model_card
    from huggingface_hub import ModelCard, ModelCardData

    base = repo_of(teacher) or teacher_card.get("base_model")
    licence = {key: teacher_card[key] for key in ("license", "license_name", "license_link") if key in teacher_card}
    if address(licence.get("license_link")) is None:
        licence.pop("license_link", None)
    data = ModelCardData(
        pipeline_tag="text-to-image",
        base_model=base,
        eval_results=results,
        model_name=title if results else None,
        **({"base_model_relation": "finetune"} if base else {}),
        **licence,
    )
    texts |= {"title": text(title), "teacher": inline_code(teacher), "licence": _licence(teacher, teacher_card)}
    card = ModelCard.from_template(data, template_str=template, block=_block, **texts)
    return str(populate_model_card(card, ["text-to-image", *tags])) + "\n" + _CITATION


def _block(language: str, caller: Callable[[], str]) -> str:
    """What a template's `{% call block(language) %}` becomes."""
    return fenced(language, caller())


def _licence(teacher: str, card: dict[str, Any]) -> str:
    if "license" not in card:
        return (
            f"The card of the teacher, {inline_code(teacher)}, declares no licence, so none is declared here. Weights "
            "derived from it are bound by its terms: find them before you use or share these."
        )
    name = card.get("license_name", card["license"])
    names = " and ".join(map(inline_code, name if isinstance(name, list) else [name]))
    where = f" ({link('text', card['license_link'])})" if "license_link" in card else ""
    return (
        f"These weights are derived from {inline_code(teacher)}, whose card declares the licence {names}{where}. It holds "
        "for them too, with all its conditions and restrictions of use."
    )


def _path_of(report: dict[str, Any]) -> str:
    path = report.get("path")
    if path is None:
        return "Without a degradation path: the teacher was the only target."
    nodes = _whole(path["num_nodes"], "num_nodes")
    if "repo_id" in path:
        return (
            f"Along the degradation path of {link(text(path['repo_id']), Repository(path['repo_id']).url)}, commit "
            f"{inline_code(path['commit'])}, with {nodes} nodes."
        )
    return f"Along a degradation path of {nodes} nodes: the branches `degradation-*` of this repository, or the folder `path`."


def _behind(report: dict[str, Any]) -> str:
    """The measures by which the student is worse than its teacher; drift, which is from the teacher, is none."""
    student, teacher = report["student"], report["teacher"]
    worse = []
    for name in student.keys() & teacher.keys():
        lost = student[name] - teacher[name] if name == "distance" else teacher[name] - student[name]
        if (name == "distance" or name.endswith("_accuracy")) and lost > 0:
            worse.append(f"{text(name.replace('_', ' '))} ({student[name]:.4g} against {teacher[name]:.4g})")
    return " and ".join(sorted(worse))


def _list(settings: dict[str, Any]) -> str:
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
