#!/usr/bin/env python
"""Where the time of our own stage-2 step goes: PyTorch's profiler, and Python's, over one step after a warm one.

python benchmarks/profile_step.py
python benchmarks/profile_step.py --lora_rank 16
"""

import argparse
import cProfile
import pstats
import tempfile
from collections import Counter

import torch
from bench_step import ours, step_of
from torch.profiler import ProfilerActivity, profile

from configurations import UNETS, random_pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=UNETS, default="sd15")
    parser.add_argument("--factor", type=float, default=0.2)
    parser.add_argument("--latents", type=int, default=16)
    parser.add_argument("--lora_rank", type=int)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    arguments.batch_size, arguments.fake_score_updates, arguments.precision, arguments.device = 1, 2, "no", "cpu"
    torch.set_num_threads(arguments.threads)
    pipeline = random_pipeline(arguments.model, arguments.factor, arguments.latents)
    with tempfile.TemporaryDirectory() as folder:
        stage = ours(pipeline, 2, folder, arguments, lora_rank=arguments.lora_rank)
        step = step_of(stage)
        calls: Counter[str] = Counter()
        for network in {id(each): each for each in (stage.student.unwrapped(), stage.fake_score.unwrapped())}.values():
            network.register_forward_pre_hook(lambda *_: calls.update(["forward"]))
        step()
        calls.clear()
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            step()
        print(f"forward passes of the trained networks: {calls['forward']}")
        print(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40))
        # What moves tensors or waits for a device, wherever it takes its time.
        for event in sorted(seen.key_averages(), key=lambda event: -event.count):
            if event.key in (
                "aten::_to_copy",
                "aten::item",
                "aten::_local_scalar_dense",
                "aten::copy_",
                "aten::is_nonzero",
            ):
                print(f"{event.key}: {event.count} calls, {event.self_cpu_time_total / 1e3:.1f} ms")
        timed = cProfile.Profile()
        timed.runcall(step)
        pstats.Stats(timed).sort_stats("tottime").print_stats(12)
        pstats.Stats(timed).sort_stats("cumtime").print_stats("diffusers_disback|adamw|clip_grad|_device")


if __name__ == "__main__":
    main()
