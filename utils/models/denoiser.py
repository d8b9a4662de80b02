"""The model that is trained: a denoiser and the encoder of its condition, as one module."""

from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from utils.conditions import Conditioning


class ConditionalDenoiser(nn.Module):
    """One module, so that DDP, gradient clipping, EMA, `torch.compile` and checkpoints cannot forget the learnt
    conditions.

    `model` is a UNet2DConditionModel or a DiT, which take the same arguments; `conditions` one of `CONDITIONS`.
    """

    def __init__(self, model: ModelMixin, conditions: ModelMixin):
        super().__init__()
        self.model = model
        self.conditions = conditions

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, values: dict[str, Tensor], drop: Tensor) -> Tensor:
        """(B, ...) -> model prediction (B, ...). `values` are the batch's conditions, `drop` (B,) True =
        unconditional.
        """
        conditioning: Conditioning = self.conditions(values, drop)
        return self.model(
            noisy_latents,
            timesteps,
            encoder_hidden_states=conditioning.encoder_hidden_states,
            class_labels=conditioning.pooled_projections,
            encoder_attention_mask=conditioning.encoder_attention_mask,
            return_dict=False,
        )[0]
