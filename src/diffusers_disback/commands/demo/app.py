"""The demo's page: what is typed is sampled at each keystroke."""

import base64
import html
import io
import socket
from typing import Any

import gradio
from gradio.http_server import LOCALHOST_NAME
from PIL import Image

from ...evaluation.report import TEACHER_STEPS
from .sampling import BOUNDS, MOST_CHARACTERS, Sample, Sampler, Superseded, Wanted


SMALL = 256  # pixels of a side, up to which images are sent without loss
WAITING = 64  # requests in the queue, of all visitors; more are refused
WORKERS = 8  # requests of a kind that may run or wait for the model
CSS = """
.images { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 8px; }
.images img { width: 100%; max-width: 384px; image-rendering: pixelated; }
"""


def figure(sample: Sample, prompt: str, title: str) -> str:
    """Images and how they were sampled, as HTML that needs no other file."""
    images = []
    for image in sample.images.permute(0, 2, 3, 1).numpy():
        kind = "png" if max(image.shape) <= SMALL else "jpeg"
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, kind, quality=92)
        source = f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
        images.append(f'<img src="{source}" alt="{html.escape(prompt)}">')
    return f'<div class="images">{"".join(images)}</div><p>{html.escape(title)}: {sample.seconds:.3g} s</p>'


class App:
    """The page's functions. Errors of a visitor are shown to him; a request that was superseded changes nothing.

    Args:
        sampler (`Sampler`): Of a student, and what belongs to it.
    """

    def __init__(self, sampler: Sampler):
        self.sampler = sampler

    def student(self, prompt: str, seed: int, number: int) -> str:
        """What the student samples."""
        try:
            sample = self.sampler.one_step(Wanted(prompt, seed, number))
        except ValueError as error:
            raise gradio.Error(str(error), print_exception=False) from error
        return figure(sample, prompt, "Student, 1 step")

    def many_steps(
        self,
        shows_path: bool,
        prompt: str,
        seed: int,
        number: int,
        steps: int,
        guidance: float,
        node: int,
        request: gradio.Request,
    ) -> tuple[Any, Any]:
        """What the teacher samples, or a node of the path: the one whose tab is shown."""
        node = node if shows_path else 0
        with self.sampler.latest.request(request.session_hash) as is_newest:
            try:
                wanted = Wanted(prompt, seed, number, steps, guidance)
                sample = self.sampler.many_steps(wanted, node, is_newest)
            except Superseded:
                return gradio.skip(), gradio.skip()
            except ValueError as error:
                raise gradio.Error(str(error), print_exception=False) from error
        what = (
            f"Node {node}, step {self.sampler.path.nodes[node - 1]['step']}"
            if node and self.sampler.path
            else "Teacher"
        )
        guided = f", guidance {guidance:g}" if self.sampler.is_guided else ""
        shown = figure(sample, prompt, f"{what}, {steps} steps{guided}")
        return (gradio.skip(), shown) if shows_path else (shown, gradio.skip())


def build(sampler: Sampler, title: str, settings: dict[str, Any] = {}) -> gradio.Blocks:
    """The page.

    Args:
        sampler (`Sampler`): What it shows; without a teacher or a path, their parts of the page are left out.
        title (`str`): The student's name.
        settings (`dict`): What it begins with: `prompt`, and the teacher's `steps` and `guidance`.
    """
    app = App(sampler)

    def slider(name: str, value: float, step: float = 1) -> gradio.Slider:
        wanted, whole = BOUNDS[name]
        assert wanted.minimum is not None and wanted.maximum is not None
        labels = {
            "seed": "Seed",
            "number": "Images",
            "steps": "Teacher's steps",
            "guidance": "Teacher's guidance",
        }
        return gradio.Slider(
            wanted.minimum,
            wanted.maximum,
            value,
            step=step,
            precision=0 if whole else None,
            label=labels[name],
            elem_id=name,
        )

    with gradio.Blocks(title=title, analytics_enabled=False) as page:
        gradio.Markdown(f"# {html.escape(title)}")
        prompt = _condition(sampler, settings.get("prompt", ""))
        with gradio.Row():
            seed, number = slider("seed", 0), slider("number", 1)
            if sampler.teacher is not None:
                steps = slider("steps", settings.get("steps", TEACHER_STEPS))
                guidance = slider("guidance", settings.get("guidance", 1) if sampler.is_guided else 1, 0.25)
                guidance.visible = sampler.is_guided
        common = [prompt, seed, number]
        shows_path = gradio.State(False)
        node: gradio.State | gradio.Slider = gradio.State(0)
        of_node: gradio.State | gradio.HTML = gradio.State()
        with gradio.Tabs():
            with gradio.Tab("Student and teacher" if sampler.teacher else "Student") as first, gradio.Row():
                of_student = gradio.HTML(elem_id="student")
                of_teacher = gradio.HTML(elem_id="teacher", visible=sampler.teacher is not None)
            if sampler.path is not None:
                with gradio.Tab("Degradation path") as second:
                    last = len(sampler.path)
                    label = f"Node: 0 is the teacher, {last} is nearest to the student's start"
                    node = gradio.Slider(0, last, 0, step=1, precision=0, label=label, elem_id="node")
                    of_node = gradio.HTML(elem_id="path")
        follows = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": WORKERS}
        student = {"fn": app.student, "inputs": common, "outputs": of_student, **follows}
        page.load(**student)
        gradio.on([one.change for one in common], trigger_mode="always_last", **student)
        if sampler.teacher is not None:
            inputs = [shows_path, *common, steps, guidance, node]
            many = {"fn": app.many_steps, "inputs": inputs, "outputs": [of_teacher, of_node], **follows}
            page.load(**many)
            # Each request is sent, so that it ends the one before.
            changed = [one.change for one in (*common, steps, guidance)]
            if sampler.path is not None:
                changed.append(node.change)
                for tab, is_path in ((first, False), (second, True)):
                    tab.select(lambda chosen=is_path: chosen, outputs=shows_path, show_progress="hidden").then(**many)
            gradio.on(changed, trigger_mode="multiple", **many)
    return page.queue(max_size=WAITING, api_open=False)


def _condition(sampler: Sampler, prompt: str) -> Any:
    """Where a visitor says what is sampled: a text, a class label, or nothing."""
    choices = sampler.choices
    if choices is None:
        return gradio.Textbox(prompt, label="Prompt", max_length=MOST_CHARACTERS, autofocus=True, elem_id="prompt")
    if not choices:
        return gradio.State("")
    return gradio.Dropdown(choices, value=choices[0][1], label="Class", elem_id="prompt")


def check_port(port: int) -> None:
    """Raises a `ValueError` if a port is taken, as gradio will find it: before models are loaded, which may take long."""
    try:
        socket.create_server((LOCALHOST_NAME, port)).close()
    except OSError as error:
        raise ValueError(
            f"--port {port} of {LOCALHOST_NAME} cannot be had ({error.strerror}): choose another."
        ) from error


def serve(page: gradio.Blocks, host: str | None, port: int | None) -> None:
    """Serves the page until the process is ended.

    Args:
        page (`Blocks`): Of `build`.
        host (`str`, *optional*): The address to listen at; by default this machine's own, which no other reaches.
        port (`int`, *optional*): By default the first that is free from 7860 on.
    """
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        footer_links=[],
        css=CSS,
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    print(f"{page.local_url} (Ctrl-C ends it)", flush=True)
    try:
        page.block_thread()
    finally:
        page.close()  # or its threads would keep the process
