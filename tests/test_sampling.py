import multiprocessing
import os
import socket

import pytest
import tiny
import torch
from diffusers import LCMScheduler

from diffusers_disback.evaluation import Evaluation
from diffusers_disback.evaluation.report import Report
from diffusers_disback.evaluation.sampling import Sampled, sample_batches
from diffusers_disback.evaluation.teacher_images import TeacherImages
from diffusers_disback.families import family_of
from diffusers_disback.training.processes import process_state


PROMPTS = [*tiny.PROMPTS, "a red square", "a white star"]


def sampled(state=None):
    """Five images in batches of two, by a sampler that draws noise of its own."""
    family = family_of(tiny.pipeline())
    pipeline = family.undecorated(family.assemble(family.network, LCMScheduler.from_config(tiny.scheduler().config)))
    return Evaluation(PROMPTS, batch_size=2).timed_sample(family, pipeline, state, num_inference_steps=2)


def measured(folder, state=None):
    """A run's report of teacher, initial student and student, whose teacher is read back the second time."""
    family = family_of(tiny.pipeline())
    evaluation = None
    if state is None or state.is_main_process:
        evaluation = Evaluation(PROMPTS, seed=5, batch_size=2)
        evaluation.add(["drift"])
    sampled = 0
    for _ in range(2):
        shared = evaluation if state is None else Evaluation.shared(evaluation, state)
        report = Report(
            shared, PROMPTS[:3], family, 2.0, teacher_steps=2, teacher_images=TeacherImages(folder, {}), state=state
        )
        report.add_teacher()
        report.add_student("student", family.one_step(tiny.pipeline(seed=1).unet, 399))
        sampled += report.shown["student"].shape[0]
    images = torch.cat([report.shown["teacher"], report.shown["student"]])
    drift = [{name: one[name] for name in report.metrics} for one in report.measures.values()]
    return images, drift, sampled, sorted(file.name for file in folder.iterdir())


def process(rank, processes, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    state = process_state()
    found = sampled(state)
    (folder / "evaluation").mkdir(exist_ok=True)
    report = measured(folder / "evaluation", state)
    torch.save((state.num_processes, found.images, found.sizes, found.seconds, report), folder / f"{rank}.pt")
    state.destroy_process_group()


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_sample_what_one_does(processes, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=process, args=(rank, processes, port, tmp_path)) for rank in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        worker.kill()
    assert [worker.exitcode for worker in workers] == [0] * processes
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(processes)]
    assert {rank[0] for rank in ranks} == {processes}
    alone = sampled()
    assert torch.equal(ranks[0][1], alone.images) and len(alone.images) == 5
    assert all(not len(images) for _, images, *_ in ranks[1:])
    assert all(sizes == alone.sizes == [2, 2, 1] and len(seconds) == 3 for _, _, sizes, seconds, _ in ranks)
    (tmp_path / "alone").mkdir()
    report, (images, drift, number, files) = ranks[0][-1], measured(tmp_path / "alone")
    assert torch.equal(report[0], images) and report[1:] == (drift, number, files) and len(files) == 2
    assert all((len(one), drift, number) == (0, [{}, {}], 0) for one, drift, number, _ in (r[-1] for r in ranks[1:]))


def test_batches_are_sampled_from_one_generator_and_seeded():
    noise, drawn, calls = [], [], []

    def sample(prompts, given):
        calls.append(prompts)
        noise.append(given)
        drawn.append(torch.rand(()).item())
        return torch.full((len(prompts), 3, 4, 4), len(prompts) / 2)

    before = torch.get_rng_state()
    cpu = torch.device("cpu")
    found = sample_batches(list("abc"), 2, 7, (4, 2, 2), sample, cpu, warm_up=True)
    assert torch.equal(torch.get_rng_state(), before), "other generators are left alone"
    assert calls == [["a", "b"], ["a", "b"], ["c"]] and torch.equal(noise[0], noise[1])
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(noise[1], torch.randn(2, 4, 2, 2, generator=generator))
    assert torch.equal(noise[2], torch.randn(1, 4, 2, 2, generator=generator))
    assert drawn[0] == drawn[1] != drawn[2]
    assert found.images.dtype == torch.uint8 and found.images[:, 0, 0, 0].tolist() == [255, 255, 128]
    assert found.sizes == [2, 1] and len(found.seconds) == 2, "the warm-up is not timed"


def test_seconds_per_image():
    found = Sampled(torch.empty(5, 3, 1, 1), [2.0, 6.0, 2.0], [2, 2, 1])
    assert found.mean_seconds == 2 and found.median_seconds == 2
    assert Sampled(torch.empty(0), [1.0, 8.0, 1.0], [1, 1, 1]).median_seconds == 1
