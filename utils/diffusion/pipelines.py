"""The diffusers pipeline of every model that StableDiffusionPipeline cannot run: class-conditional, unconditional,
DiT, flow.

This file is copied into exported runs with the files it imports, so that `DiffusionPipeline.from_pretrained(run,
custom_pipeline=run, trust_remote_code=True)` works where this repository is not installed. It imports torch and
diffusers only.
"""

from collections.abc import Callable
from functools import partial

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .conditions import CONDITIONS, Conditioning, encode_text
from .guidance import Guidance, denoise

ASKED_BY = {each.argument: name for name, each in CONDITIONS.items()}  # argument of a call -> the condition it is for


class LatentDiffusionPipeline(DiffusionPipeline):
    """Samples images from text prompts, class labels or nothing, whichever the run was trained on.

    `unet` (UNet2DConditionModel) or `transformer` (DiT) is the denoiser. `latents_mean` and `latents_std` are
    per-channel lists: the VAE decodes latents * std + mean; by default the VAE's scaling says both.
    """

    _optional_components = ("unet", "transformer", "text_encoder", "tokenizer")
    model_cpu_offload_seq = "text_encoder->conditions->unet->transformer->vae"

    def __init__(
        self,
        vae,
        scheduler,
        conditions,
        unet=None,
        transformer=None,
        text_encoder=None,
        tokenizer=None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
    ):
        super().__init__()
        self.register_modules(
            vae=vae,
            scheduler=scheduler,
            conditions=conditions,
            unet=unet,
            transformer=transformer,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        channels = self.denoiser.config.in_channels
        latents_mean = list(latents_mean or [0.0] * channels)
        latents_std = list(latents_std or [1.0 / (vae.config.get("scaling_factor") or 1.0)] * channels)
        self.register_to_config(latents_mean=latents_mean, latents_std=latents_std)
        self.image_processor = VaeImageProcessor()

    @property
    def denoiser(self):
        """The model that predicts, U-Net or transformer."""
        return self.unet if self.unet is not None else self.transformer

    def encode_condition(
        self, prompt, class_labels, negative_prompt, num_images: int
    ) -> tuple[dict[str, Tensor], int]:
        """The condition's values for the conditional branch followed by the unconditional one, and the number of
        images.

        A negative prompt stands in the place of the null; without one the null branch only repeats the values, for the
        drop mask to hide. Raises ValueError where the run was trained on another condition.
        """
        taken = self.conditions.argument
        asked = {"prompt": prompt, "class_labels": class_labels}
        given = asked | {"prompt": negative_prompt if prompt is None else prompt}
        for argument, value in given.items():
            if value is not None and argument != taken:
                found = type(self.conditions).__name__
                raise ValueError(f"this run has no {ASKED_BY[argument]} condition ({found}): it takes no {argument}")
        values, count = self.conditions.request_values(asked.get(taken), num_images, self.encode_prompts)
        null_values = values
        if negative_prompt is not None:
            negatives = [negative_prompt] * count if isinstance(negative_prompt, str) else list(negative_prompt)
            null_values = self.encode_prompts(negatives)
        return {name: torch.cat([value, null_values[name]]) for name, value in values.items()}, count

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """What the text encoder makes of prompts (B,); one that comes more than once is encoded once."""
        distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        rows = torch.tensor([distinct[prompt] for prompt in prompts])
        encoded = encode_text(self.tokenizer, self.text_encoder, list(distinct))
        return {name: values[rows.to(values.device)] for name, values in encoded.items()}

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, values: dict[str, Tensor], drop: Tensor) -> Tensor:
        """One call of the denoiser, told the condition's `values` (B, ...), or the null where `drop` (B,)."""
        return self.predict_from(self.conditions(values, drop), noisy_latents, timesteps)

    def predict_from(self, conditioning: Conditioning, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """One call of the denoiser, told the first `len(noisy_latents)` of `conditioning`."""
        count = len(noisy_latents)
        conditioning = Conditioning(*(None if each is None else each[:count] for each in conditioning))
        return self.denoiser(
            noisy_latents,
            timesteps,
            encoder_hidden_states=conditioning.encoder_hidden_states,
            class_labels=conditioning.pooled_projections,
            encoder_attention_mask=conditioning.encoder_attention_mask,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        class_labels: int | list[int] | Tensor | None = None,
        negative_prompt: str | list[str] | None = None,
        guidance_scale: float = 4.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        guide_model: Callable[..., Tensor] | None = None,
        num_inference_steps: int = 50,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ):
        """Images for `prompt` or `class_labels`, `num_images_per_prompt` of each (or that many in all,
        unconditionally).

        `guidance_scale` 1 is off. Guidance is on at timesteps whose share of the training timesteps (0 = clean, 1 =
        noise) lies in `guidance_interval`. `guidance_rescale` moves the guided prediction's std towards the
        conditional one's, 1 all the way. `guide_model` is what guidance leads away from in place of the unconditional
        branch: `predict` of a pipeline around a weaker model of the same latents, conditions and noise schedule.

        `output_type`: "pil", "np", "pt" (B, 3, H, W) in [0, 1], or "latent". With a list of generators, one an image,
        an image does not depend on the batch it was made in. Raises ValueError for guidance that would do nothing.
        """
        values, count = self.encode_condition(prompt, class_labels, negative_prompt, num_images_per_prompt)
        if not values and guide_model is None:
            guidance_scale = 1.0  # unconditional: there is nothing to guide towards
        with_negative_prompt = negative_prompt is not None
        guidance = Guidance(guidance_scale, guidance_interval, guidance_rescale, num_inference_steps)
        guidance.check(guide_model is not None, with_negative_prompt)
        config, device = self.denoiser.config, self._execution_device
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (count, config.in_channels, height, width)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.denoiser.dtype)
        latents = latents.to(device) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        drop = torch.arange(2 * count, device=device) >= count  # the second half is the unconditional branch
        if with_negative_prompt:
            drop = torch.zeros_like(drop)
        given = {k: v[:count] for k, v in values.items()}  # the conditional branch, all that a guide sees
        predict_weaker = None if guide_model is None else partial(guide_model, values=given, drop=drop[:count])

        latents = denoise(
            self.scheduler,
            partial(self.predict_from, self.conditions(values, drop)),  # which no step changes
            latents,
            guidance,
            predict_weaker,
            generator=generator,
            progress_bar=self.progress_bar,
        )
        if output_type == "latent":
            images = latents
        else:
            images = self.image_processor.postprocess(self.decode(latents), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, h, w) -> images (B, 3, H, W) in about [-1, 1]."""
        mean, std = (
            torch.tensor(values, device=latents.device, dtype=torch.float32).view(1, -1, 1, 1)
            for values in (self.config.latents_mean, self.config.latents_std)
        )
        return self.vae.decode((latents.float() * std + mean).to(self.vae.dtype), return_dict=False)[0]
