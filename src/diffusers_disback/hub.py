"""What leaves the house: the student's folder in a form that others load, and its model card."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from .model_reference import ModelReference
from .path import write_json
from .pipeline import DisBackOneStepPipeline


_OWN = ("unet", "scheduler")
_KEPT = (".json", ".txt", ".safetensors", ".model")
_WEIGHTS = re.compile(
    r"[a-z_]+(?:\.(\w+))?(?:-\d+-of-\d+)?\.safetensors|[a-z_]+\.safetensors\.index(?:\.(\w+))?\.json"
)


def save_student(
    pipeline: DisBackOneStepPipeline, teacher: ModelReference, folder: str | Path, cache_dir: str | None = None
) -> None:
    """Writes the student's pipeline: its own UNet and scheduler, and the teacher's files as they are.

    The teacher's text encoder, tokenizer and autoencoder are copied, never saved anew: what transformers 5 writes,
    older versions take for random weights without an error. Pickled files are left out, and a variant's name is
    dropped, so that the folder loads without one.

    Args:
        pipeline (`DisBackOneStepPipeline`): The student's.
        teacher (`ModelReference`): Where the teacher's files lie.
        folder (`str` or `Path`): Other files in it stay.
        cache_dir (`str`, *optional*): Where downloads are kept.
    """
    folder = Path(folder)
    source = teacher.name_or_path
    if not os.path.isdir(source):
        source = DiffusionPipeline.download(
            source, revision=teacher.revision, variant=teacher.variant, cache_dir=cache_dir, use_safetensors=True
        )
    pipeline.unet.save_pretrained(folder / "unet")
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    for name, component in pipeline.components.items():
        if name not in _OWN and component is not None:
            _copy_component(Path(source, name), folder / name, teacher.variant)
            _declare_dtype(folder / name / "config.json", str(pipeline.unet.dtype).split(".")[-1])
    pipeline.save_config(folder)


def _copy_component(source: Path, target: Path, variant: str | None) -> None:
    target.mkdir(parents=True, exist_ok=True)
    files = {file: _WEIGHTS.fullmatch(file.name) for file in source.iterdir() if file.suffix in _KEPT}
    variants = {file: match.group(1) or match.group(2) for file, match in files.items() if match}
    wanted = variant if variant in variants.values() else None
    for file in files:
        if file not in variants:
            shutil.copyfile(file, target / file.name)
        elif variants[file] == wanted:
            name = file.name.replace(f".{wanted}", "")
            if file.suffix == ".json":  # the index of shards, which names them
                (target / name).write_text(file.read_text().replace(f".{wanted}", ""))
            else:
                shutil.copyfile(file, target / name)


def _declare_dtype(file: Path, dtype: str) -> None:
    """Makes a transformers model load in the UNet's precision, in whichever it is stored: by default transformers 5
    takes what the config declares, diffusers takes float32, and the two would not fit together."""
    config = json.loads(file.read_text()) if file.exists() else {}
    if "model_type" in config:
        config[next((key for key in ("dtype", "torch_dtype") if key in config), "torch_dtype")] = dtype
        write_json(file, config)


_CARD = """---
{{ card_data }}
---

# {{ title }}

A one-step text-to-image generator, distilled from `{{ teacher }}` with DisBack (Distribution Backtracking
Distillation, [arXiv 2408.15991](https://arxiv.org/abs/2408.15991)) by
diffusers-disback {{ versions.diffusers_disback }}. One evaluation of the UNet makes a picture.

![samples](samples.png)

## Use

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({{ repo }})
image = pipe({{ prompt }}, num_inference_steps=1, guidance_scale=0).images[0]
```

With diffusers-disback installed there are no such arguments to get wrong:

```python
from diffusers_disback import DisBackOneStepPipeline

pipe = DisBackOneStepPipeline.from_pretrained({{ repo }})
image = pipe({{ prompt }}).images[0]
```

## Figures

{{ figures }}

{{ stages }}

![convergence](convergence.png)
{% if path_picture %}
The degradation path: what each recorded node draws.

![path](path.png)
{% endif %}
## How it was made

```bash
{{ command }}
```

Settings:

{{ settings }}

Machine: {{ machine }}. Versions: {{ versions_line }}.

## Limits

The student inherits the teacher's limits and its conditions of use, makes pictures in one step only, takes no negative
prompt, and is made for {{ resolution }}x{{ resolution }} pixels.

## Citation

```bibtex
@inproceedings{zhang2025disback,
  title     = {Distribution Backtracking Builds A Faster Convergence Trajectory for Diffusion Distillation},
  author    = {Zhang, Shengyuan and Yang, Ling and Li, Zejian and Zhao, An and Meng, Chenye and Yang, Changyuan and Yang, Guang and Yang, Zhiyuan and Sun, Lingyun},
  booktitle = {International Conference on Learning Representations},
  year      = {2025}
}
```
"""


def write_model_card(
    folder: Path, report: dict[str, Any], prompt: str, resolution: int, licence: str | None = None
) -> None:
    """Writes `README.md` of a student's folder.

    Args:
        folder (`Path`): With the run's pictures.
        report (`dict`): The content of `report.json`.
        prompt (`str`): Of the snippets.
        resolution (`int`): In pixels.
        licence (`str`, *optional*): The teacher's, as a Hub identifier.
    """
    from huggingface_hub import ModelCard, ModelCardData

    teacher = report["settings"]["pretrained_model_name_or_path"]
    measured = {name: report[name] for name in ("floor", "teacher", "initial", "student") if name in report}
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "stable-diffusion", "one-step", "distillation", "disback"],
        license=licence,
    )
    card = ModelCard.from_template(
        data,
        template_str=_CARD,
        title=folder.resolve().name,
        teacher=teacher,
        repo=json.dumps(folder.as_posix()),
        prompt=json.dumps(prompt, ensure_ascii=False),
        figures=_table(measured),
        stages=_table(report["stages"]),
        path_picture=(folder / "path.png").exists(),
        command=report["command"],
        settings="\n".join(f"- `{name}`: {value!r}" for name, value in report["settings"].items()),
        machine=", ".join(f"{name} {value}" for name, value in report["machine"].items()),
        versions=report["versions"],
        versions_line=", ".join(f"{name} {value}" for name, value in report["versions"].items()),
        resolution=resolution,
    )
    card.save(folder / "README.md")


def licence_of(name_or_path: str) -> str | None:
    """The licence that a local model's card declares, as a Hub identifier."""
    from huggingface_hub import metadata_load

    card = Path(name_or_path, "README.md")
    return (metadata_load(card) or {}).get("license") if card.is_file() else None


def _table(rows: dict[str, dict[str, float]]) -> str:
    """A Markdown table, one row per name."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for name, row in rows.items():
        cells = [f"{row[column]:.4g}" if column in row else "" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
