#!/usr/bin/env python
"""The one-step pipeline against the sum of its parts, text encoders + UNet + autoencoder, on the same inputs.

python benchmarks/bench_pipeline.py
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from configurations import UNETS, machine, parameters, random_pipeline
from diffusers_disback.families import to_pipeline


PROMPT = "a red house by the sea"
# A fifth of the width at the resolution of SD 1.5: seconds an image on a slow CPU.
SMALL = dict.fromkeys(UNETS, (0.2, 64))


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, on a CPU those of this process alone; and what came of it."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    started = clock()
    made = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - started, made


@torch.no_grad()
def compare(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both in turn. The parts are given what they get within the pipeline, and make the same image."""
    factor, latents = SMALL[name]
    teacher = random_pipeline(name, arguments.factor or factor, arguments.latents or latents)
    pipeline = to_pipeline(teacher.unet, 399, teacher).to(arguments.device)
    pipeline.set_progress_bar_config(disable=True)
    side = pipeline.unet.config.sample_size
    noise = torch.randn(arguments.batch_size, 4, side, side, device=arguments.device)
    prompts = [PROMPT] * arguments.batch_size
    tokens = pipeline.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    tokens = tokens.to(arguments.device)
    t = torch.tensor(399, device=arguments.device)
    sizes = torch.tensor(
        [[8.0 * side, 8.0 * side, 0, 0, 8.0 * side, 8.0 * side]] * len(prompts), device=arguments.device
    )
    alpha = pipeline.scheduler.alphas_cumprod[-1].item() ** 0.5
    sigma = (1 - alpha**2) ** 0.5
    epsilon = pipeline.scheduler.config.prediction_type == "epsilon"

    def text() -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
        if pipeline.text_encoder_2 is None:
            return pipeline.text_encoder(tokens)[0], None
        one, two = (
            encoder(tokens, output_hidden_states=True) for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)
        )
        embeds = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
        return embeds, {"text_embeds": two[0], "time_ids": sizes}

    def parts() -> tuple[dict[str, float], torch.Tensor]:
        took_text, (embeds, added) = timed(text)
        took_unet, output = timed(
            lambda: pipeline.unet(noise, t, encoder_hidden_states=embeds, added_cond_kwargs=added, return_dict=False)[
                0
            ]
        )
        x0 = (noise - sigma * output) / alpha if epsilon else alpha * noise - sigma * output
        took_vae, image = timed(lambda: pipeline.vae.decode(x0 / pipeline.vae.config.scaling_factor)[0])
        return {"text encoders": took_text, "unet": took_unet, "vae": took_vae}, image

    seconds: dict[str, list[float]] = {"pipeline": [], "text encoders": [], "unet": [], "vae": []}
    for number in range(arguments.rounds + 1):
        whole, image = timed(lambda: pipeline(prompts, latents=noise, output_type="pt").images)
        own, same = parts()
        if number == 0:
            difference = (image - (same / 2 + 0.5).clamp(0, 1)).abs().max().item()
            continue
        for part, took in {"pipeline": whole, **own}.items():
            seconds[part].append(took)
    sums = [sum(each) for each in zip(*(seconds[part] for part in ("text encoders", "unet", "vae")), strict=True)]
    ratios = [whole / each for whole, each in zip(seconds["pipeline"], sums, strict=True)]
    return {
        "model": name,
        "factor": arguments.factor or factor,
        "latents": side,
        "parameters": {part: parameters(getattr(pipeline, part)) for part in ("text_encoder", "unet", "vae")},
        "largest_difference": difference,
        "seconds": {part: round(statistics.median(values), 4) for part, values in seconds.items()},
        "ratio": round(statistics.median(ratios), 4),
        "all_ratios": [round(ratio, 4) for ratio in ratios],
    }


def main(line: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=UNETS, default=list(UNETS))
    parser.add_argument("--factor", type=float, help="of all widths")
    parser.add_argument("--latents", type=int, help="side of the latents")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "pipeline.json")
    arguments = parser.parse_args(line)
    torch.set_num_threads(arguments.threads)
    found = []
    for name in arguments.models:
        found.append(compare(name, arguments))
        print(name, found[-1]["seconds"], "ratio", found[-1]["ratio"], file=sys.stderr, flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"machine": machine(), "results": found}, indent=2) + "\n")
    print(f"see {arguments.output}")


if __name__ == "__main__":
    main(sys.argv[1:])
