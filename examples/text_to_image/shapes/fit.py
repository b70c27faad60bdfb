"""The training loop of all that the embedded teachers are made of; that of the digits, in its own folder, uses it, too."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from diffusers_disback.hub.files import write_json


def fit(
    name: str,
    model: nn.Module,
    loss_of_step: Callable[[nn.Module, int], Tensor],
    steps: int,
    learning_rate: float,
    work_dir: Path,
    ema_decay: float,
    save_every: int = 500,
) -> nn.Module:
    """Trains `model` and returns the moving average of its weights. Resumes from `work_dir`.

    Data and noise of a step are functions of the step, so a resumed run equals an unbroken one. The curve is kept in
    `work_dir/name.json`: a row `[step, mean loss, seconds]` every 50 steps. The state lies in `work_dir/name-STEP`, which the curve's
    file names once it is whole, so that an end at any moment leaves one that can be resumed.
    """
    accelerator = Accelerator()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-4)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=min(200, steps // 10), num_training_steps=steps)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    average.to(accelerator.device)
    curve_file = work_dir / f"{name}.json"
    first, curve, seconds, cpu_seconds = 0, [], 0.0, 0.0
    if curve_file.exists():
        saved = json.loads(curve_file.read_text())
        first, curve, seconds, cpu_seconds = (saved[key] for key in ("step", "curve", "seconds", "cpu_seconds"))
        accelerator.load_state(str(work_dir / f"{name}-{first}"))
        average.load_state_dict(load_file(work_dir / f"{name}-{first}" / "average.safetensors"), strict=True)
    started, started_cpu, running, last = time.monotonic(), time.process_time(), 0.0, first
    for step in tqdm(range(first, steps), initial=first, total=steps, desc=name, mininterval=10):
        loss = loss_of_step(model, step)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        # The average follows at once while it is young.
        if step < 10 / (1 - ema_decay):
            average.multi_avg_fn = get_ema_multi_avg_fn(min(ema_decay, (1 + step) / (10 + step)))
        average.update_parameters(accelerator.unwrap_model(model))
        running += loss.item() / 50
        done = step + 1
        if done % 50 == 0:
            curve.append([done, round(running, 6), round(seconds + time.monotonic() - started, 1)])
            running = 0.0
        if done % save_every == 0 or done == steps:
            folder = work_dir / f"{name}-{done}"
            accelerator.save_state(str(folder))
            save_file({k: v.contiguous() for k, v in average.state_dict().items()}, folder / "average.safetensors")
            spent = {
                "seconds": round(seconds + time.monotonic() - started, 1),
                "cpu_seconds": round(cpu_seconds + time.process_time() - started_cpu, 1),
            }
            write_json(curve_file, {"step": done, **spent, "curve": curve})
            shutil.rmtree(work_dir / f"{name}-{last}", ignore_errors=True)
            last = done
    accelerator.free_memory()
    return average.module.eval()
