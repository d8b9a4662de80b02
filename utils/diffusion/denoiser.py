"""The model that is trained: a denoiser and the encoder of its condition, as one module."""

from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from utils.diffusion.conditions import Conditioning
from utils.draws import SampleDraws


def num_tokens(dit: ModelMixin) -> int:
    """Tokens of a sample in a DiT."""
    if dit.config.latent_kind == "set":
        return dit.config.sample_size
    if dit.config.latent_kind == "vector":
        return -(-dit.config.sample_size // dit.config.patch_size)
    return (dit.config.sample_size // dit.config.patch_size) ** 2


def own_config(model: ModelMixin) -> dict[str, Any]:
    """The arguments that a model was made with, without what diffusers notes beside them."""
    return {name: value for name, value in model.config.items() if not name.startswith("_")}


class ConditionalDenoiser(nn.Module):
    """One module, so that DDP, gradient clipping, EMA, `torch.compile` and checkpoints cannot forget the learnt
    conditions.

    `model` is a UNet2DConditionModel or a DiT, which take the same arguments; `conditions` one of `CONDITIONS`.
    """

    def __init__(self, model: ModelMixin, conditions: ModelMixin):
        super().__init__()
        self.model = model
        self.conditions = conditions

    @property
    def _no_split_modules(self) -> list[str]:
        """The layers that FSDP divides one by one, by the names of their classes: those of the network that it has."""
        present = {type(module).__name__ for module in self.model.modules()}
        return [name for name in self.model._no_split_modules or () if name in present]

    def draw_drop(self, draws: SampleDraws, prob: float) -> Tensor:
        """Which samples are trained without their condition in this step, True = hidden: (B,). Of K conditions (B, K):
        all at once with probability `prob`, and each by itself with the same, so that any part of them can be asked
        for.
        """
        everything = draws.uniform("condition_drop") < prob  # (B,)
        names = sorted(self.conditions.config.get("columns") or {})
        if len(names) < 2:
            return everything
        each = [draws.uniform(f"condition_drop.{name}") < prob for name in names]
        return torch.stack(each, dim=1) | everything[:, None]

    def draw_kept_tokens(self, draws: SampleDraws, tread_ratio: float) -> Tensor | None:
        """The tokens (B, K) of each sample that a DiT routes past no block in this step: all but a share of
        `tread_ratio`. None if that is 0.
        """
        if not tread_ratio:
            return None
        total = num_tokens(self.model)
        return draws.subset("kept_tokens", total, total - int(total * tread_ratio))

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        values: dict[str, Tensor],
        drop: Tensor,
        kept_tokens: Tensor | None = None,
    ) -> Tensor:
        """(B, ...) -> model prediction (B, ...). `values` are the batch's conditions, and of sets (B, N, D) their
        `attention_mask` (B, N); `drop` (B,) True = unconditional, `kept_tokens` those of `draw_kept_tokens`.
        """
        conditioning: Conditioning = self.conditions(values, drop)
        of_dit = {} if kept_tokens is None else {"kept_tokens": kept_tokens}  # a U-Net has no such arguments
        of_dit |= {"attention_mask": values["attention_mask"]} if "attention_mask" in values else {}
        return self.model(
            noisy_latents,
            timesteps,
            encoder_hidden_states=conditioning.encoder_hidden_states,
            class_labels=conditioning.pooled_projections,
            encoder_attention_mask=conditioning.encoder_attention_mask,
            return_dict=False,
            **of_dit,
        )[0]


class JointDenoiser(ConditionalDenoiser):
    """A denoiser and the autoencoder of its latents, trained together: one module, for the same reasons."""

    def __init__(self, denoiser: ConditionalDenoiser, vae: ModelMixin):
        super().__init__(denoiser.model, denoiser.conditions)
        self.vae = vae

    def forward(self, *inputs, reconstruct: bool = False):
        """As `ConditionalDenoiser`; or, with `reconstruct`, as the autoencoder."""
        return self.vae(*inputs) if reconstruct else super().forward(*inputs)
