"""Trains a network in shares, and a whole copy of it by the same gradients: `sharded_updates.py <folder> <teacher>`."""

import sys
from pathlib import Path


sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "examples" / "text_to_image")]

import copy  # noqa: E402

import tiny  # noqa: E402
import torch  # noqa: E402
from diffusers import DDPMPipeline  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from stages import training  # noqa: E402

from diffusers_disback.families import family_of  # noqa: E402
from diffusers_disback.models.weights import fill  # noqa: E402
from diffusers_disback.training.processes import process_state  # noqa: E402
from diffusers_disback.training.sharded_learner import ShardedLearner  # noqa: E402


def grey_pixels() -> DDPMPipeline:
    """With parameters of one row, of which the second process has nothing, and no block of its own."""
    return tiny.pixels(in_channels=1, out_channels=1)


folder, name = Path(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
state = process_state()
family = family_of({"latents": tiny.pipeline, "grey pixels": grey_pixels}[name]())
config = training(folder / "run", max_grad_norm=0.1)
start = copy.deepcopy(family.network)


def learner(network) -> ShardedLearner:
    return ShardedLearner("generator", copy.deepcopy(network), 1e-3, 10, config, ema_decay=0.5)


def loss_of(model, number: int, rank: int) -> torch.Tensor:
    """A slice's loss: each rank has its own samples."""
    draw = torch.Generator().manual_seed(10 * number + rank)
    shape = (1, *family.latent_shape(None))
    x0, noise = torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)
    condition = {}
    if name == "latents":
        condition["encoder_hidden_states"] = torch.randn(1, 4, start.config.cross_attention_dim, generator=draw)
    return model.denoising_loss(x0, noise, torch.tensor([300 + number]), condition)


whole = copy.deepcopy(start).requires_grad_(True).eval()
optimizer = torch.optim.AdamW(
    whole.parameters(), lr=1e-3, betas=config.adam_betas("generator"), eps=config.adam_epsilon, fused=True
)
for group in optimizer.param_groups:
    group["weight_decay"] = config.adam_weight_decay


def update(trained: ShardedLearner, number: int) -> None:
    with trained.accumulate():
        trained.backward_and_step(loss_of(trained.score_model(family), number, state.process_index))


sharded = learner(start)
for number in range(3):
    update(sharded, number)
    both = [loss_of(family.score_model(whole), number, rank) / 2 for rank in (0, 1)]
    sum(both).backward()
    torch.nn.utils.clip_grad_norm_(whole.parameters(), config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    if number == 1:
        (folder / "checkpoint").mkdir(exist_ok=True)
        state.wait_for_everyone()
        sharded.save(folder / "checkpoint")
        state.wait_for_everyone()

resumed = learner(start)
resumed.load(folder / "checkpoint")
update(resumed, 2)
average, sharded.ema = sharded.whole(), None
found = {"start": start, "whole": whole, "average": average, "sharded": sharded.whole(), "restored": resumed.whole()}
fill(sharded.network, start.state_dict(), "the start")
found["filled"] = sharded.whole()
tensors = {f"{name}/{key}": value for name, one in found.items() for key, value in one.state_dict().items()}
save_file(
    {name: value.detach().contiguous() for name, value in tensors.items()},
    folder / f"{state.process_index}.safetensors",
)
state.destroy_process_group()
