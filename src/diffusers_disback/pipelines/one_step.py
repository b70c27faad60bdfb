"""`DisBackOneStepPipeline`: a text-to-image pipeline with one network evaluation.

This file travels with every saved model, as its `pipeline.py`: it imports torch, diffusers and transformers alone.
"""

import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers import StableDiffusionPipeline as _StockPipeline
from diffusers import StableDiffusionXLPipeline as _StockXLPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import (
    IPAdapterMixin,
    StableDiffusionLoraLoaderMixin,
    StableDiffusionXLLoraLoaderMixin,
    TextualInversionLoaderMixin,
)
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.pipelines.stable_diffusion_xl import StableDiffusionXLPipelineOutput
from diffusers.pipelines.stable_diffusion_xl.watermark import StableDiffusionXLWatermarker
from diffusers.utils import logging
from diffusers.utils.import_utils import is_invisible_watermark_available
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)


logger = logging.get_logger(__name__)
_DEPRECATED = {"callback": None, "callback_steps": None}  # the stock pipelines take them beside their signature


def _arguments_of(pipeline: type[DiffusionPipeline]) -> dict[str, Any]:
    """The names of the arguments that a stock pipeline's call takes, and their defaults."""
    parameters = inspect.signature(pipeline.__call__).parameters.values()
    named = {one.name: one.default for one in parameters if one.kind is not one.VAR_KEYWORD and one.name != "self"}
    return {**named, **_DEPRECATED}


@contextmanager
def _in_the_older_form(encoder: torch.nn.Module | None) -> Iterator[None]:
    """Gives a text encoder of transformers 5 the attribute for which the stock `clip_skip` of diffusers 0.42 asks."""
    if encoder is None or hasattr(encoder, "text_model"):
        yield
        return
    encoder.__dict__["text_model"] = encoder  # beside its modules, of which it is to be none
    try:
        yield
    finally:
        encoder.__dict__.pop("text_model", None)


class DisBackOneStepPipeline(
    DiffusionPipeline,
    StableDiffusionMixin,
    TextualInversionLoaderMixin,
    StableDiffusionXLLoraLoaderMixin,
    StableDiffusionLoraLoaderMixin,
    IPAdapterMixin,
):
    """Text-to-image generation by a student that was distilled into one step (DisBack, arXiv 2408.15991).

    One class for Stable Diffusion 1.x and 2.x and for SDXL, which has a second text encoder. The conditioning timestep is
    the scheduler's one and only step. What `save_pretrained` writes is a folder of the
    *stock* pipeline, so that it loads without this class: call the stock pipeline with `num_inference_steps=1,
    guidance_scale=0`. A call here *is* that call, after what makes no sense of a one-step student was refused.

    Args:
        vae (`AutoencoderKL`): Decodes latents to images.
        text_encoder (`CLIPTextModel`): The teacher's.
        tokenizer (`CLIPTokenizer`): The teacher's.
        unet (`UNet2DConditionModel`): The one-step student.
        scheduler (`DDIMScheduler`): Its schedule ends at the conditioning timestep.
        safety_checker (`StableDiffusionSafetyChecker`, *optional*): The teacher's.
        feature_extractor (`CLIPImageProcessor`, *optional*): The safety checker's and the image encoder's.
        requires_safety_checker (`bool`): Of the stock Stable Diffusion pipeline's config.
        text_encoder_2 (`CLIPTextModelWithProjection`, *optional*): SDXL's second.
        tokenizer_2 (`CLIPTokenizer`, *optional*): SDXL's second.
        force_zeros_for_empty_prompt (`bool`): Of the stock SDXL pipeline's config.
        image_encoder (`CLIPVisionModelWithProjection`, *optional*): For IP-Adapters.
        add_watermarker (`bool`, *optional*): Whether SDXL's images get an invisible watermark; by default, as the stock
            pipeline's, if the package for it is installed.

    Raises:
        ValueError: If there is a safety checker and no feature extractor.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->unet->vae"
    _optional_components = ["safety_checker", "feature_extractor", "text_encoder_2", "tokenizer_2", "image_encoder"]
    _exclude_from_cpu_offload = ["safety_checker"]

    # What the stock pipelines' calls ask of themselves; where both have it, it is the same.
    run_safety_checker = _StockPipeline.run_safety_checker
    encode_image = _StockPipeline.encode_image
    prepare_ip_adapter_image_embeds = _StockPipeline.prepare_ip_adapter_image_embeds
    prepare_extra_step_kwargs = _StockPipeline.prepare_extra_step_kwargs
    get_guidance_scale_embedding = _StockPipeline.get_guidance_scale_embedding
    guidance_scale = _StockPipeline.guidance_scale
    guidance_rescale = _StockPipeline.guidance_rescale
    clip_skip = _StockPipeline.clip_skip
    do_classifier_free_guidance = _StockPipeline.do_classifier_free_guidance
    cross_attention_kwargs = _StockPipeline.cross_attention_kwargs
    num_timesteps = _StockPipeline.num_timesteps
    interrupt = _StockPipeline.interrupt
    denoising_end = _StockXLPipeline.denoising_end
    upcast_vae = _StockXLPipeline.upcast_vae
    _get_add_time_ids = _StockXLPipeline._get_add_time_ids

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
        image_encoder: CLIPVisionModelWithProjection | None = None,
        add_watermarker: bool | None = None,
    ):
        super().__init__()
        if safety_checker is not None and feature_extractor is None:
            raise ValueError(
                "A safety checker needs a feature extractor; pass `feature_extractor`, or `safety_checker=None`."
            )
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
            image_encoder=image_encoder,
        )
        self.register_to_config(
            requires_safety_checker=requires_safety_checker, force_zeros_for_empty_prompt=force_zeros_for_empty_prompt
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.default_sample_size = unet.config.sample_size
        self._is_unet_config_sample_size_int = isinstance(unet.config.sample_size, int)
        if add_watermarker is None:
            add_watermarker = is_invisible_watermark_available()
        self.watermark = StableDiffusionXLWatermarker() if self.is_xl and add_watermarker else None

    @classmethod
    def component_names(cls) -> list[str]:
        """The names of the components that the constructor takes."""
        settings = ("self", "requires_safety_checker", "force_zeros_for_empty_prompt", "add_watermarker")
        return [name for name in inspect.signature(cls.__init__).parameters if name not in settings]

    @property
    def is_xl(self) -> bool:
        """Whether the student is told images' sizes, as SDXL's are; text encoders may be left out where embeddings are
        passed."""
        return self.unet.config.addition_embed_type == "text_time"

    @property
    def stock_class(self) -> type[DiffusionPipeline]:
        """The class of diffusers in whose name it is saved."""
        return _StockXLPipeline if self.is_xl else _StockPipeline

    @property
    def _callback_tensor_inputs(self) -> list[str]:
        return self.stock_class._callback_tensor_inputs

    @property
    def _lora_loadable_modules(self) -> list[str]:
        return self.stock_class._lora_loadable_modules

    def load_lora_weights(self, *arguments: Any, **keywords: Any) -> None:
        """As of the stock pipeline."""
        self.stock_class.load_lora_weights(self, *arguments, **keywords)

    def fuse_lora(self, *arguments: Any, **keywords: Any) -> None:
        """As of the stock pipeline."""
        self.stock_class.fuse_lora(self, *arguments, **keywords)

    def unfuse_lora(self, *arguments: Any, **keywords: Any) -> None:
        """As of the stock pipeline."""
        self.stock_class.unfuse_lora(self, *arguments, **keywords)

    def check_inputs(self, *arguments: Any, **keywords: Any) -> None:
        """As of the stock pipeline."""
        self.stock_class.check_inputs(self, *arguments, **keywords)

    def encode_prompt(self, *arguments: Any, **keywords: Any) -> tuple:
        """As of the stock pipeline, in the UNet's precision: where parts are of different ones, each computes in its own."""
        with _in_the_older_form(self.text_encoder):
            encoded = self.stock_class.encode_prompt(self, *arguments, **keywords)
        return tuple(None if tensor is None else tensor.to(self.unet.dtype) for tensor in encoded)

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As of the stock pipeline; noise of another precision is cast, and of another number told."""
        if latents is not None:
            if tuple(latents.shape[:2]) != (batch_size, num_channels_latents):
                raise ValueError(
                    f"`latents` have the shape {tuple(latents.shape)}; these arguments need {batch_size} of "
                    f"{num_channels_latents} channels."
                )
            latents = latents.to(dtype)
        return _StockPipeline.prepare_latents(
            self, batch_size, num_channels_latents, height, width, dtype, device, generator, latents
        )

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes `model_index.json` in the stock pipeline's name, and this file beside it as `pipeline.py`."""
        super().save_config(save_directory)
        file = Path(save_directory, self.config_name)
        index = {**json.loads(file.read_text()), "_class_name": self.stock_class.__name__}
        if not self.is_xl:
            index["requires_safety_checker"] = self.safety_checker is not None
        of_xl = ("text_encoder_2", "tokenizer_2", "force_zeros_for_empty_prompt")
        foreign = ("safety_checker", "requires_safety_checker") if self.is_xl else of_xl
        index = {name: value for name, value in index.items() if name not in foreign}
        file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        source, copy = inspect.getfile(type(self)), os.path.join(save_directory, "pipeline.py")
        if not (os.path.exists(copy) and os.path.samefile(source, copy)):
            shutil.copyfile(source, copy)
        if push_to_hub:
            raise ValueError("save_config does not push; call `pipeline.push_to_hub(repo_id)`.")

    @property
    def conditioning_timestep(self) -> int:
        """The timestep at which the student is evaluated."""
        return self.scheduler.config.num_train_timesteps - 1

    def check_one_step(self, num_inference_steps: int, guidance_scale: float) -> None:
        """Refuses what a one-step student cannot do.

        Raises:
            ValueError: If several steps or guidance are asked for, or the scheduler is another than the student's.
        """
        if num_inference_steps != 1:
            raise ValueError(
                f"num_inference_steps={num_inference_steps}: a one-step student makes an image in one step; leave "
                "the argument out."
            )
        if guidance_scale > 1:
            raise ValueError(
                f"guidance_scale={guidance_scale}: the student has the teacher's guidance built in and takes none; "
                "leave the argument out."
            )
        self.scheduler.set_timesteps(1)
        t = self.scheduler.timesteps[0]
        if t != self.conditioning_timestep:
            raise ValueError(
                f"The scheduler ({type(self.scheduler).__name__}) would ask the student at timestep {int(t)} of "
                f"{self.scheduler.config.num_train_timesteps}, which is not its last: it is no one-step scheduler. "
                "Load the one that was saved with the student."
            )

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
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        **others: Any,
    ) -> StableDiffusionPipelineOutput | StableDiffusionXLPipelineOutput | tuple:
        """Draws images, with one evaluation of the UNet.

        Args:
            prompt (`str` or `list[str]`, *optional*): What to draw; or pass `prompt_embeds`.
            height, width (`int`, *optional*): In pixels; by default those that the student was trained for.
            num_inference_steps (`int`): 1. Here so that a habit gets a clear error.
            guidance_scale (`float`): At most 1, which means none. Likewise.
            negative_prompt (`str`, *optional*): Has no effect without guidance; there is a warning.
            num_images_per_prompt (`int`): Images of each prompt.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Makes the latents reproducible.
            latents (`torch.Tensor`, *optional*): Standard normal noise, `[B, C, height / 8, width / 8]` for an
                8x autoencoder.
            prompt_embeds (`torch.Tensor`, *optional*): Text embeddings, `[B, tokens, width]`.
            prompt_2 (`str` or `list[str]`, *optional*): For SDXL's second text encoder; by default `prompt`.
            pooled_prompt_embeds (`torch.Tensor`, *optional*): SDXL's, with `prompt_embeds`, `[B, pooled width]`.
            original_size, crops_coords_top_left, target_size (`tuple[int, int]`, *optional*): What SDXL is told of the
                image's size and crop, in pixels, height first; by default an uncropped image of `(height, width)`.
            output_type (`str`): `"pil"`, `"np"`, `"pt"` (`[B, 3, height, width]` in 0..1) or `"latent"`.
            return_dict (`bool`): An output object, or a tuple.
            cross_attention_kwargs (`dict`, *optional*): For the attention processors; `scale` is the LoRA scale.
            clip_skip (`int`, *optional*): Layers of the text encoder to skip from its end.
            callback_on_step_end (`Callable`, *optional*): `(pipeline, 0, timestep, tensors) -> tensors`, called after
                the step and before decoding.
            callback_on_step_end_tensor_inputs (`list[str]`): The tensors that it is given.
            ip_adapter_image, ip_adapter_image_embeds (*optional*): For IP-Adapters that are loaded.
            others: All else that the stock pipeline takes, with what it does there.

        Returns:
            `StableDiffusionPipelineOutput`, `StableDiffusionXLPipelineOutput` or `tuple`: As of the stock pipeline: the
            images, and of the former for each whether the safety checker objects.

        Raises:
            ValueError: If an argument asks for several steps or for guidance, or the arguments do not fit together.
            TypeError: If neither family's stock pipeline has an argument of a name.
        """
        self.check_one_step(num_inference_steps, guidance_scale)
        given = {
            "prompt": prompt,
            "height": height,
            "width": width,
            "num_inference_steps": 1,
            "guidance_scale": guidance_scale,
            "negative_prompt": negative_prompt,
            "num_images_per_prompt": num_images_per_prompt,
            "generator": generator,
            "latents": latents,
            "prompt_embeds": prompt_embeds,
            "prompt_2": prompt_2,
            "pooled_prompt_embeds": pooled_prompt_embeds,
            "original_size": original_size,
            "crops_coords_top_left": crops_coords_top_left,
            "target_size": target_size,
            "output_type": output_type,
            "return_dict": return_dict,
            "cross_attention_kwargs": cross_attention_kwargs,
            "clip_skip": clip_skip,
            "callback_on_step_end": callback_on_step_end,
            "callback_on_step_end_tensor_inputs": callback_on_step_end_tensor_inputs,
            "ip_adapter_image": ip_adapter_image,
            "ip_adapter_image_embeds": ip_adapter_image_embeds,
            **others,
        }
        own, either = (
            _arguments_of(self.stock_class),
            {**_arguments_of(_StockPipeline), **_arguments_of(_StockXLPipeline)},
        )
        for name, value in given.items():
            if name not in either:
                raise TypeError(f"There is no argument {name!r}; neither family's pipeline takes one.")
            idle = name not in own or name.startswith("negative_") or name == "guidance_rescale"
            if idle and value is not either[name] and value != either[name]:
                logger.warning(f"`{name}` has no effect: {'no guidance is used' if name in own else 'it is of SDXL'}.")
        given = {name: value for name, value in given.items() if name in own}
        upcasts = self.is_xl and self.vae.dtype == torch.float16 and self.vae.config.force_upcast
        if output_type != "latent" and self.vae.dtype != self.unet.dtype and not upcasts:
            given |= self._handing_on(callback_on_step_end, callback_on_step_end_tensor_inputs)
        return self.stock_class.__call__(self, **given)

    def _handing_on(self, callback: Callable | None, names: list[str]) -> dict[str, Any]:
        """The arguments of a callback that hands latents on in the autoencoder's precision, after the caller's own."""
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            names = callback.tensor_inputs

        def hand_on(pipeline: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            changed = {} if callback is None else callback(pipeline, step, t, {name: tensors[name] for name in names})
            return {**changed, "latents": changed.get("latents", tensors["latents"]).to(self.vae.dtype)}

        inputs = list(dict.fromkeys([*names, "latents"]))
        return {"callback_on_step_end": hand_on, "callback_on_step_end_tensor_inputs": inputs}
