"""Measures what dropping one prompt in ten in stage 1 does to the nodes' unconditional branch.

    cd examples/text_to_image && python -m shapes.measure_dropped_prompts

Records the quickstart's path with and without dropped prompts, and prints the denoising loss of every node on the initial
student's samples, asked with the prompt and with the empty one; same samples, noise and timesteps throughout.
"""

import tempfile

import torch
import train_disback

from diffusers_disback import (
    Batches,
    DegradationRecorder,
    ModelReference,
    OneStepGenerator,
    PromptConditions,
    load_family,
)
from diffusers_disback.data.conditions import batch_of
from diffusers_disback.training.inputs import load_prompts
from diffusers_disback.training.open_path import open_path
from diffusers_disback.training.processes import process_state


SHARES = (0.0, 0.1)
BATCHES = 16


@torch.no_grad()
def losses(network, teacher, generator, data, batches, key: str) -> float:
    """The mean denoising loss on the generator's samples, all timesteps, with the `condition` or the `negative`."""
    model, total = teacher.score_model(network), 0.0
    for n in range(BATCHES):
        for draw in batches[n]:
            batch = batch_of(draw, data, torch.device("cpu"))
            x0 = generator(batch.noise, batch.condition)
            t = batch.draw_timesteps(0, teacher.schedule.num_timesteps - 1)
            total += model.denoising_loss(x0, batch.draw_noise(), t, getattr(batch, key)).item()
    return total / BATCHES


def main() -> None:
    table = {}
    for share in SHARES:
        with tempfile.TemporaryDirectory() as folder:
            arguments = ["--output_dir", folder, "--report_to", "none", "--proportion_empty_prompts", str(share)]
            training = train_disback.parse(arguments)
            teacher = load_family(ModelReference(training.pretrained_model_name_or_path))
            data = PromptConditions(load_prompts(training), teacher.encode)
            network = teacher.initial_generator()
            path = open_path(training, teacher, network, process_state())
            path = DegradationRecorder(training, training, teacher, network, data, path).record()
            generator = OneStepGenerator(teacher.score_model(network), training.conditioning_timestep)
            batches = Batches(len(data), teacher.latent_shape(), 1234, 1, training.train_batch_size)
            node = teacher.score_model().copy().network
            for index in range(len(path) + 1):
                path.load(index, into=node)
                for key in ("condition", "negative"):
                    table[index, key, share] = losses(node, teacher, generator, data, batches, key)
    print(
        "| node | "
        + " | ".join(f"{key}, {share:.0%} dropped" for key in ("prompt", "empty") for share in SHARES)
        + " |"
    )
    print("| --- |" + " --- |" * 4)
    for index in range(len(path) + 1):
        cells = [f"{table[index, key, share]:.4f}" for key in ("condition", "negative") for share in SHARES]
        print(f"| {index} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
