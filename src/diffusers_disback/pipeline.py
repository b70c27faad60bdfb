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
from diffusers import StableDiffusionXLPipeline as _StockXLPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


class DisBackOneStepPipeline(
    DiffusionPipeline, StableDiffusionMixin, TextualInversionLoaderMixin, StableDiffusionXLLoraLoaderMixin
):
    """Text-to-image generation by a student that was distilled into one step (DisBack, arXiv 2408.15991).

    One class for Stable Diffusion 1.x and 2.x and for SDXL, which has a second text encoder. The conditioning timestep is
    the scheduler's one and only step. What `save_pretrained` writes is a folder of the
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
        requires_safety_checker (`bool`): Of the stock Stable Diffusion pipeline's config.
        text_encoder_2 (`CLIPTextModelWithProjection`, *optional*): SDXL's second.
        tokenizer_2 (`CLIPTokenizer`, *optional*): SDXL's second.
        force_zeros_for_empty_prompt (`bool`): Of the stock SDXL pipeline's config.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"
    _optional_components = ["safety_checker", "feature_extractor", "text_encoder_2", "tokenizer_2"]
    _exclude_from_cpu_offload = ["safety_checker"]
    _callback_tensor_inputs = ["latents", "prompt_embeds"]

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
        text_encoder_2: CLIPTextModelWithProjection | None = None,
        tokenizer_2: CLIPTokenizer | None = None,
        force_zeros_for_empty_prompt: bool = True,
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
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
        )
        self.register_to_config(
            requires_safety_checker=requires_safety_checker, force_zeros_for_empty_prompt=force_zeros_for_empty_prompt
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @classmethod
    def component_names(cls) -> list[str]:
        """The names of the components that the constructor takes."""
        settings = ("self", "requires_safety_checker", "force_zeros_for_empty_prompt")
        return [name for name in inspect.signature(cls.__init__).parameters if name not in settings]

    @property
    def is_xl(self) -> bool:
        """Whether it has SDXL's two tokenizers; text encoders may be left out where embeddings are passed."""
        return self.tokenizer_2 is not None

    @property
    def stock_class(self) -> type[DiffusionPipeline]:
        """The class of diffusers in whose name it is saved."""
        return _StockXLPipeline if self.is_xl else _StockPipeline

    def encode_prompt(self, *arguments: Any, **keywords: Any) -> tuple:
        """As of the stock pipeline."""
        return self.stock_class.encode_prompt(self, *arguments, **keywords)

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Writes `model_index.json` in the stock pipeline's name, and this file beside it as `pipeline.py`."""
        super().save_config(save_directory)
        file = os.path.join(save_directory, self.config_name)
        with open(file) as stream:
            index = json.load(stream)
        index["_class_name"] = self.stock_class.__name__
        if not self.is_xl:
            foreign = ("text_encoder_2", "tokenizer_2", "force_zeros_for_empty_prompt")
            index["requires_safety_checker"] = self.safety_checker is not None
        else:
            foreign = ("safety_checker", "requires_safety_checker")
        index = {name: value for name, value in index.items() if name not in foreign}
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
        pooled_prompt_embeds,
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
        if (prompt_embeds is not None) != (pooled_prompt_embeds is not None) and self.is_xl:
            raise ValueError("SDXL takes `prompt_embeds` and `pooled_prompt_embeds` together.")
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

    def encode(
        self,
        prompt: str | list[str] | None,
        prompt_2: str | list[str] | None,
        num_images_per_prompt: int,
        prompt_embeds: torch.Tensor | None,
        pooled_prompt_embeds: torch.Tensor | None,
        lora_scale: float | None,
        clip_skip: int | None,
        device: torch.device,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Text embeddings, `[B, tokens, width]`, and for SDXL the pooled ones, `[B, pooled width]`."""
        if self.is_xl:
            prompt_embeds, _, pooled_prompt_embeds, _ = self.encode_prompt(
                prompt,
                prompt_2,
                device,
                num_images_per_prompt,
                False,
                prompt_embeds=prompt_embeds,
                pooled_prompt_embeds=pooled_prompt_embeds,
                lora_scale=lora_scale,
                clip_skip=clip_skip,
            )
            return prompt_embeds, pooled_prompt_embeds
        if clip_skip is not None and prompt_embeds is None:
            prompt_embeds = self.encode_skipping(prompt, clip_skip, device)
        prompt_embeds, _ = self.encode_prompt(
            prompt, device, num_images_per_prompt, False, prompt_embeds=prompt_embeds, lora_scale=lora_scale
        )
        return prompt_embeds, None

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures, `[B, 3, H, W]` around -1..1.

        An autoencoder that overflows in half precision, as SDXL's, computes in float32 where its config says so.
        """
        config = self.vae.config
        upcast = self.vae.dtype == torch.float16 and config.force_upcast
        if upcast:
            self.vae.to(dtype=torch.float32)
            latents = latents.float()
        if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
            mean, std = (
                torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1)
                for values in (config.latents_mean, config.latents_std)
            )
            latents = latents * std / config.scaling_factor + mean
        else:
            latents = latents / config.scaling_factor
        images = self.vae.decode(latents, return_dict=False)[0]
        if upcast:
            self.vae.to(dtype=torch.float16)
        return images

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
        prompt_2: str | list[str] | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
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
            prompt_2 (`str` or `list[str]`, *optional*): For SDXL's second text encoder; by default `prompt`.
            pooled_prompt_embeds (`torch.Tensor`, *optional*): SDXL's, with `prompt_embeds`, `[B, pooled width]`.
            original_size, crops_coords_top_left, target_size (`tuple[int, int]`, *optional*): What SDXL is told of the
                picture's size and crop, in pixels, height first; by default an uncropped picture of `(height, width)`.
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
            pooled_prompt_embeds,
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
        prompt_embeds, pooled = self.encode(
            prompt,
            prompt_2,
            num_images_per_prompt,
            prompt_embeds,
            pooled_prompt_embeds,
            (cross_attention_kwargs or {}).get("scale"),
            clip_skip,
            device,
        )
        # Where text encoder, UNet and autoencoder are of different precisions, each computes in its own.
        dtype = next(self.unet.parameters()).dtype
        prompt_embeds, pooled = prompt_embeds.to(dtype), None if pooled is None else pooled.to(dtype)
        added = None
        if pooled is not None:
            sizes = (*(original_size or (height, width)), *crops_coords_top_left, *(target_size or (height, width)))
            time_ids = torch.tensor([sizes] * len(pooled), device=device, dtype=prompt_embeds.dtype)
            added = {"text_embeds": pooled.to(device), "time_ids": time_ids}
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
                added_cond_kwargs=added,
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
            images = self.decode(latents.to(self.vae.dtype))
            images, objections = self.run_safety_checker(images, device, prompt_embeds.dtype)
        denormalize = [True] * len(images) if objections is None else [not objection for objection in objections]
        images = self.image_processor.postprocess(images, output_type=output_type, do_denormalize=denormalize)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images, objections)
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=objections)
