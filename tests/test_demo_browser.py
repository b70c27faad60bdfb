"""The demo in a real browser: run it with `-m slow` where a chromium is installed, too."""

import importlib.util
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from test_demo import write_report

from diffusers_disback.families import load_family
from diffusers_disback.hub.publish.student import save_student
from diffusers_disback.models.weights import fingerprint
from diffusers_disback.path.path import DegradationPath


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ["a chromium in PATH"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"a browser test needs {', '.join(MISSING)}, which is not installed"),
]
TEACHER = Path(__file__).parent.parent / "examples" / "text_to_image" / "shapes" / "teacher"
DIGITS = Path(__file__).parent.parent / "examples" / "unconditional_image_generation" / "digits" / "teacher"
KEYS = "ared-circle-on-white"  # each of which changes the prompt, and so the image
BAR = 0.5  # seconds from a keystroke to its image
# Resolves with the milliseconds from the next keystroke to the student's next image.
MILLISECONDS = """() => { window.told = new Promise(resolve => {
    let pressed;
    addEventListener('keydown', () => { pressed = performance.now(); }, {capture: true, once: true});
    const shown = () => document.querySelector('#student img').src;
    const before = shown();
    const observer = new MutationObserver(() => {
        if (document.querySelector('#student img') && shown() != before) {
            observer.disconnect();
            resolve(performance.now() - pressed);
        }
    });
    observer.observe(document.querySelector('#student'), {subtree: true, childList: true, attributes: true});
}); }"""


@pytest.fixture(scope="module")
def shapes_student(tmp_path_factory):
    """The shapes teacher's architecture as a student, untrained, and a path of two nodes: what takes time is the same.
    `DEMO_STUDENT` names a trained one instead."""
    if "DEMO_STUDENT" in os.environ:
        return Path(os.environ["DEMO_STUDENT"])
    folder = tmp_path_factory.mktemp("demo") / "student"
    teacher = load_family(str(TEACHER))
    save_student(teacher.one_step(teacher.score_model().copy().network, 399), teacher.local_model, folder)
    sha256 = fingerprint(teacher.network)
    path = DegradationPath.create(folder / "path", teacher.local_model, sha256, tiny.START, {})
    for step in (1, 2):
        teacher.network.conv_out.bias.data += 0.2
        path.append(teacher.network, step=step, loss=0.5)
    write_report(folder, path, TEACHER)
    return folder


@pytest.fixture
def serve():
    """Starts the command, and gives its address."""
    processes = []

    def start(folder):
        command = [sys.executable, "-m", "diffusers_disback.commands.cli", "demo", str(folder)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        line = processes[-1].stdout.readline()
        return re.match(r"http://\S+", line)[0]

    yield start
    for process in processes:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130, "Ctrl-C ends it"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser, address):
    page = browser.new_page(viewport={"width": 1000, "height": 720})
    page.set_default_timeout(60_000)
    page.others = []  # what the page asks of other machines
    page.on(
        "request",
        lambda asked: page.others.append(asked.url) if not asked.url.startswith((address, "data:", "blob:")) else None,
    )
    page.goto(address)
    page.wait_for_selector("#student img")
    return page


def source(page, place):
    return page.get_attribute(f"{place} img", "src")


def changes(page, place, before):
    page.wait_for_function(f"before => document.querySelector('{place} img')?.src != before", arg=before)


def test_the_image_follows_each_keystroke(shapes_student, serve, browser, capsys):
    page = opened(browser, serve(shapes_student))
    page.wait_for_selector("#teacher img")
    prompt = page.locator("#prompt textarea")
    before = source(page, "#student")
    prompt.fill("")
    changes(page, "#student", before)
    milliseconds = []
    for key in KEYS:
        page.wait_for_timeout(500)
        page.evaluate(MILLISECONDS)
        prompt.press_sequentially(key)
        milliseconds.append(page.evaluate("() => window.told"))
    seconds = [one / 1000 for one in milliseconds]
    with capsys.disabled():
        print(
            f"\nkeystroke to image: median {statistics.median(seconds):.3f} s of {len(seconds)}, most {max(seconds):.3f} s"
        )
    assert statistics.median(seconds) <= BAR
    assert not page.others, "nothing is asked of other machines"
    assert not page.locator("text=Error").count()


def test_the_teacher_follows_and_the_path_is_walked(shapes_student, serve, browser, tmp_path):
    page = opened(browser, serve(shapes_student))
    page.wait_for_selector("#teacher img")
    before = source(page, "#teacher")
    page.locator("#prompt textarea").fill("an orange star on a navy background")
    changes(page, "#teacher", before)
    page.locator("#number input[type=number]").fill("3")
    page.wait_for_function("() => document.querySelectorAll('#student img').length == 3")
    page.wait_for_function("() => document.querySelectorAll('#teacher img').length == 3")
    assert re.fullmatch(r"Student, 1 step: [\d.]+ s", page.inner_text("#student p"))
    assert re.fullmatch(r"Teacher, 25 steps, guidance 4: [\d.]+ s", page.inner_text("#teacher p"))
    screenshots = Path(os.environ.get("DEMO_SCREENSHOTS", tmp_path))
    page.mouse.click(5, 5)
    page.screenshot(path=screenshots / "demo.png")
    page.get_by_role("tab", name="Degradation path").click()
    page.wait_for_selector("#path img")
    assert page.inner_text("#path p").startswith("Teacher, 25 steps")
    before = source(page, "#path")
    page.locator("#node input[type=number]").fill("2")
    changes(page, "#path", before)
    assert page.inner_text("#path p").startswith("Node 2, step ")
    page.screenshot(path=screenshots / "demo_path.png")


def test_a_class_is_chosen(tmp_path, serve, browser):
    teacher = load_family(str(DIGITS))
    save_student(teacher.one_step(teacher.score_model().copy().network, 399), teacher.local_model, tmp_path / "digits")
    page = opened(browser, serve(tmp_path / "digits"))
    before = source(page, "#student")
    page.locator("#prompt input").click()
    page.get_by_role("option", name="7").click()
    changes(page, "#student", before)
    assert not page.locator("#teacher img").count()
