import json

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline

from diffusers_disback.generator import to_pipeline
from diffusers_disback.hub import save_student
from diffusers_disback.model_reference import ModelReference
from diffusers_disback.pipeline import DisBackOneStepPipeline


def test_the_teachers_files_are_copied_as_they_are(tmp_path, teacher_folder):
    (tmp_path / "teacher").symlink_to(teacher_folder)
    pipe = to_pipeline(tiny.unet(seed=1), 399, tiny.pipeline())
    save_student(pipe, ModelReference(str(tmp_path / "teacher")), tmp_path / "student")
    for component in ("text_encoder", "tokenizer", "vae"):
        files = {file.name for file in (teacher_folder / component).iterdir()}
        assert {file.name for file in (tmp_path / "student" / component).iterdir()} == files
        for name in files - {"config.json"}:
            own, teachers = tmp_path / "student" / component / name, teacher_folder / component / name
            assert own.read_bytes() == teachers.read_bytes()


@pytest.mark.parametrize("wanted", [None, "fp16"])
@pytest.mark.parametrize("shard_size", [None, "50KB"], ids=["whole", "sharded"])
def test_of_two_variants_the_asked_one_is_copied_and_loads_without_its_name(tmp_path, wanted, shard_size):
    folder = tmp_path / "teacher"
    for variant, dtype in ((None, torch.float32), ("fp16", torch.float16)):
        tiny.pipeline().to(dtype=dtype).save_pretrained(folder, variant=variant, max_shard_size=shard_size)
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"pickled")
    save_student(
        to_pipeline(tiny.unet(seed=1), 399, tiny.pipeline()),
        ModelReference(str(folder), None, wanted),
        tmp_path / "out",
    )
    names = {file.name for file in (tmp_path / "out" / "vae").iterdir()}
    assert not any("fp16" in name or name.endswith(".bin") for name in names)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipe.unet.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.float32
    expected = tiny.pipeline().to(dtype=torch.float16 if wanted else torch.float32).vae.state_dict()
    assert all(torch.equal(pipe.vae.state_dict()[key], value.float()) for key, value in expected.items())


def test_a_safety_checker_is_carried_over(tmp_path):
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=small, vision_config={**small, "image_size": 16, "patch_size": 8}, projection_dim=16
    )
    teacher = tiny.pipeline()
    teacher = StableDiffusionPipeline(
        **{
            **teacher.components,
            "safety_checker": StableDiffusionSafetyChecker(config).eval(),
            "feature_extractor": CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16),
        }
    )
    teacher.save_pretrained(tmp_path / "teacher")
    save_student(
        to_pipeline(tiny.unet(seed=1), 399, teacher), ModelReference(str(tmp_path / "teacher")), tmp_path / "student"
    )
    assert json.loads((tmp_path / "student" / "model_index.json").read_text())["requires_safety_checker"] is True
    pipe = DisBackOneStepPipeline.from_pretrained(tmp_path / "student")
    assert isinstance(pipe.safety_checker, StableDiffusionSafetyChecker)
    assert pipe(tiny.PROMPTS[0]).nsfw_content_detected in ([True], [False])
