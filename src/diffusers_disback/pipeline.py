"""`DisBackOneStepPipeline`: a text-to-image pipeline with one network evaluation.

This file travels with every saved model, as its `pipeline.py`: it imports torch, diffusers and transformers alone.
"""

import inspect
import json
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers import StableDiffusionPipeline as _StockPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer


class DisBackOneStepPipeline(
    DiffusionPipeline, StableDiffusionMixin, TextualInversionLoaderMixin, StableDiffusionLoraLoaderMixin
):
    """Text-to-image generation by a student that was distilled into one step (DisBack, arXiv 2408.15991).

    The conditioning timestep is the scheduler's one and only step. What `save_pretrained` writes is a folder of the
    *stock* pipeline, so that it loads without this class: call the stock pipeline with `num_inference_steps=1,
    guidance_scale=0`.

    Args:
        vae (`AutoencoderKL`): Decodes latents to pictures.
        text_encoder (`CLIPTextModel`): The teacher's.
        tokenizer (`CLIPTokenizer`): The teacher's.
        unet (`UNet2DConditionModel`): The one-step student.
        scheduler (`DDIMScheduler`): Its schedule ends at the conditioning timestep.
        safety_checker (`StableDiffusionSafetyChecker`, *optional*): The teacher's.
        feature_extractor (`CLIPImageProcessor`, *optional*): The safety checker's.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["safety_checker", "feature_extractor"]
    _exclude_from_cpu_offload = ["safety_checker"]
    _callback_tensor_inputs = ["latents", "prompt_embeds"]

    encode_prompt = _StockPipeline.encode_prompt
    run_safety_checker = _StockPipeline.run_safety_checker

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: DDIMScheduler,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        requires_safety_checker: bool = False,
    ):
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
        )
        self.register_to_config(requires_safety_checker=requires_safety_checker)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @classmethod
    def component_names(cls) -> list[str]:
        """The names of the components that the constructor takes."""
        return [
            name
            for name in inspect.signature(cls.__init__).parameters
            if name not in ("self", "requires_safety_checker")
        ]

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Writes `model_index.json` in the stock pipeline's name, and this file beside it as `pipeline.py`."""
        super().save_config(save_directory)
        file = os.path.join(save_directory, self.config_name)
        with open(file) as stream:
            index = json.load(stream)
        index["_class_name"] = _StockPipeline.__name__
        index["requires_safety_checker"] = self.safety_checker is not None
        with open(file, "w") as stream:
            stream.write(json.dumps(index, indent=2, sort_keys=True) + "\n")
        source, copy = inspect.getsourcefile(type(self)), os.path.join(save_directory, "pipeline.py")
        if not (os.path.exists(copy) and os.path.samefile(source, copy)):
            shutil.copyfile(source, copy)
        if push_to_hub:
            raise ValueError("save_config does not push; call `pipeline.push_to_hub(repo_id)`.")

    @property
    def conditioning_timestep(self) -> int:
        """The timestep at which the student is asked."""
        return self.scheduler.config.num_train_timesteps - 1

    def check_inputs(
        self,
        prompt,
        prompt_embeds,
        height,
        width,
        num_inference_steps,
        guidance_scale,
        negative_prompt,
        callback_on_step_end_tensor_inputs,
    ) -> None:
        if num_inference_steps != 1:
            raise ValueError(
                f"num_inference_steps={num_inference_steps}: a one-step student makes a picture in one step; leave "
                "the argument out."
            )
        if guidance_scale > 1:
            raise ValueError(
                f"guidance_scale={guidance_scale}: the student has the teacher's guidance built in and takes none; "
                "leave the argument out."
            )
        if negative_prompt is not None:
            raise ValueError("negative_prompt has no effect without guidance, and a one-step student takes none.")
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("Pass `prompt` or `prompt_embeds`, one of the two.")
        if prompt is not None and not isinstance(prompt, (str, list)):
            raise ValueError(f"`prompt` has to be a `str` or a `list`, but is a {type(prompt).__name__}.")
        if height % self.vae_scale_factor or width % self.vae_scale_factor:
            raise ValueError(
                f"`height` and `width` have to be divisible by {self.vae_scale_factor}, but are {height} and {width}."
            )
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(f"{sorted(unknown)} are no callback inputs; there are {self._callback_tensor_inputs}.")

    def encode_skipping(self, prompt: str | list[str], clip_skip: int, device: torch.device) -> torch.Tensor:
        """Text embeddings without the encoder's last `clip_skip` layers, `[B, tokens, width]`.

        Here because the stock `encode_prompt` of diffusers 0.42 asks for an attribute that transformers 5 has no more.
        """
        tokens = self.tokenizer(
            self.maybe_convert_prompt(prompt, self.tokenizer),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        states = self.text_encoder(tokens.input_ids.to(device), output_hidden_states=True)
        norms = [module for name, module in self.text_encoder.named_modules() if name.endswith("final_layer_norm")]
        return norms[0](states.hidden_states[-(clip_skip + 1)])

    def prepare_latents(self, shape, dtype, device, generator, latents):
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators were passed for a batch of {shape[0]}.")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"`latents` have the shape {tuple(latents.shape)}; these arguments need {shape}.")
        return latents.to(device=device, dtype=dtype) * self.scheduler.init_noise_sigma

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 1,
        guidance_scale: float = 0.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> StableDiffusionPipelineOutput | tuple:
        """Draws pictures, with one evaluation of the UNet.

        Args:
            prompt (`str` or `list[str]`, *optional*): What to draw; or pass `prompt_embeds`.
            height, width (`int`, *optional*): In pixels; by default those that the student was trained for.
            num_inference_steps (`int`): 1. Here so that a habit gets a clear error.
            guidance_scale (`float`): At most 1, which means none. Likewise.
            negative_prompt (`str`, *optional*): None. Likewise.
            num_images_per_prompt (`int`): Pictures of each prompt.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Makes the latents reproducible.
            latents (`torch.Tensor`, *optional*): Standard normal noise, `[B, C, height / 8, width / 8]` for an
                8x autoencoder.
            prompt_embeds (`torch.Tensor`, *optional*): Text embeddings, `[B, tokens, width]`.
            output_type (`str`): `"pil"`, `"np"`, `"pt"` (`[B, 3, height, width]` in 0..1) or `"latent"`.
            return_dict (`bool`): An output object, or a tuple.
            cross_attention_kwargs (`dict`, *optional*): For the attention processors; `scale` is the LoRA scale.
            clip_skip (`int`, *optional*): Layers of the text encoder to skip from its end.
            callback_on_step_end (`Callable`, *optional*): `(pipeline, 0, timestep, tensors) -> tensors`, called after
                the step and before decoding.
            callback_on_step_end_tensor_inputs (`list[str]`): The tensors that it is given.

        Returns:
            `StableDiffusionPipelineOutput` or `tuple`: The pictures, and for each whether the safety checker objects.

        Raises:
            ValueError: If an argument asks for several steps or for guidance, or the arguments do not fit together.
        """
        size = self.unet.config.sample_size
        rows, columns = (size, size) if isinstance(size, int) else size
        height = height or rows * self.vae_scale_factor
        width = width or columns * self.vae_scale_factor
        self.check_inputs(
            prompt,
            prompt_embeds,
            height,
            width,
            num_inference_steps,
            guidance_scale,
            negative_prompt,
            callback_on_step_end_tensor_inputs,
        )
        device = self._execution_device
        self.scheduler.set_timesteps(1, device=device)
        t = self.scheduler.timesteps[0]
        if t != self.conditioning_timestep:
            raise ValueError(
                f"The scheduler ({type(self.scheduler).__name__}) would ask the student at timestep {int(t)} of "
                f"{self.scheduler.config.num_train_timesteps}, which is not its last: it is no one-step scheduler. "
                "Load the one that was saved with the student."
            )
        if clip_skip is not None and prompt_embeds is None:
            prompt_embeds = self.encode_skipping(prompt, clip_skip, device)
        prompt_embeds, _ = self.encode_prompt(
            prompt,
            device,
            num_images_per_prompt,
            False,
            prompt_embeds=prompt_embeds,
            lora_scale=(cross_attention_kwargs or {}).get("scale"),
        )
        shape = (
            len(prompt_embeds),
            self.unet.config.in_channels,
            height // self.vae_scale_factor,
            width // self.vae_scale_factor,
        )
        latents = self.prepare_latents(shape, prompt_embeds.dtype, device, generator, latents)
        with self.progress_bar(total=1) as progress_bar:
            output = self.unet(
                self.scheduler.scale_model_input(latents, t),
                t,
                encoder_hidden_states=prompt_embeds,
                cross_attention_kwargs=cross_attention_kwargs,
                return_dict=False,
            )[0]
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                available = {"latents": latents, "prompt_embeds": prompt_embeds}
                tensors = {name: available[name] for name in callback_on_step_end_tensor_inputs}
                latents = callback_on_step_end(self, 0, t, tensors).pop("latents", latents)
            progress_bar.update()
        if output_type == "latent":
            images, objections = latents, None
        else:
            images = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
            images, objections = self.run_safety_checker(images, device, prompt_embeds.dtype)
        denormalize = [True] * len(images) if objections is None else [not objection for objection in objections]
        images = self.image_processor.postprocess(images, output_type=output_type, do_denormalize=denormalize)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images, objections)
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=objections)
