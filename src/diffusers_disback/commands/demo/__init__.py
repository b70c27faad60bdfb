"""`diffusers-disback demo`: a page in the browser that samples a student at each keystroke."""

import argparse
from importlib.util import find_spec
from typing import Any

from ...hub.published import published
from ..command_line import number
from ..options import TEACHER, add_cache_dir, add_command, device


def add_commands(group: Any) -> None:
    """Adds `demo` to the commands."""
    parser = add_command(group, "demo", demo)
    parser.add_argument("student", metavar="STUDENT", help="a folder, or a model on the Hub (user/name)")
    parser.add_argument("--revision", help="branch, tag or commit of a student on the Hub (default: main)")
    parser.add_argument(
        TEACHER, metavar="TEACHER", help="where the teacher is (default: where the student's run says)"
    )
    parser.add_argument("--student_only", action="store_true", help="load neither the teacher nor the path")
    parser.add_argument(
        "--mixed_precision",
        choices=["no", "bf16", "fp16"],
        default="no",
        help="precision of the denoisers (default: no)",
    )
    parser.add_argument(
        "--host", metavar="ADDRESS", help="the address to listen at (default: one that only this machine reaches)"
    )
    parser.add_argument(
        "--port",
        type=number(True, minimum=1, maximum=65535),
        metavar="PORT",
        help="the port to listen at (default: the first free one from 7860)",
    )
    add_cache_dir(parser)


def demo(parsed: argparse.Namespace) -> None:
    """Shows a one-step student in the browser: images follow each keystroke, beside the teacher's and those of the degradation
    path, where the student's run has them."""
    if find_spec("gradio") is None:
        raise ValueError("The demo needs gradio: `pip install 'diffusers-disback[demo]'` brings it.")
    import torch
    from diffusers.utils.logging import disable_progress_bar

    from ...training.networks import PRECISIONS
    from .app import build, check_port, serve
    from .loading import load

    disable_progress_bar()
    if parsed.port is not None:
        check_port(parsed.port)
    dtype = PRECISIONS[parsed.mixed_precision]
    if dtype == torch.float16 and device() == "cpu":
        raise ValueError("--mixed_precision fp16 needs a GPU; leave it out, or take bf16.")
    sampler, settings = load(
        parsed.student,
        parsed.revision,
        parsed.pretrained_model_name_or_path,
        parsed.student_only,
        device(),
        dtype,
        parsed.cache_dir,
    )
    page = build(sampler, published(parsed.student), settings)
    sampler.warm_up()
    serve(page, parsed.host, parsed.port)
