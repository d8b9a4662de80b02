"""diffusers' UNet2DConditionModel from presets, initialised for training from scratch."""

from dataclasses import dataclass

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn


@dataclass(frozen=True)
class UNetPreset:
    block_out_channels: tuple[int, ...]
    attention_levels: tuple[bool, ...]  # the levels whose blocks attend, highest resolution first
    layers_per_block: int
    num_heads: int | tuple[int, ...]  # heads of the blocks with cross-attention: one number, or one per level
    norm_num_groups: int = 32
    use_linear_projection: bool = False


# diffusers reads `attention_head_dim` as the *number* of heads of blocks with cross-attention, and as the size of a
# head of those without. There ADM's size (arXiv 2105.05233, section 4.1) serves every preset.
SELF_ATTENTION_HEAD_DIM = 64

# fmt: off
UNET_PRESETS = {
    #                         channels                attention                    layers  heads
    "tiny":     UNetPreset((32, 64),              (False, True),               1, 4, norm_num_groups=8),
    "cifar10":  UNetPreset((128, 256, 256),       (False, True, True),         1, 4),
    "base":     UNetPreset((192, 384, 768, 768),  (True, True, True, False),   2, 8),
    "sd-v1":    UNetPreset((320, 640, 1280, 1280), (True, True, True, False),  2, 8),
    "sd-v2":    UNetPreset((320, 640, 1280, 1280), (True, True, True, False),  2, (5, 10, 20, 20), 32, True),
    "ldm-kl-8": UNetPreset((320, 640, 1280, 1280), (True, True, True, False),  2, 8),
}
# fmt: on


def unet_config(
    preset: str, sample_size: int, in_channels: int, cross_attention_dim: int | None, class_conditional: bool
) -> dict:
    """Arguments of UNet2DConditionModel for `preset`.

    With `cross_attention_dim` attending levels have cross-attention to (B, S, cross_attention_dim); without it they
    attend to themselves, and diffusers' middle block does not attend. `class_conditional` adds pooled projections
    (B, 4 * block_out_channels[0]) to the timestep embedding.
    """
    chosen = UNET_PRESETS[preset]
    attends, plain = ("CrossAttn", "") if cross_attention_dim else ("Attn", "")
    down = [f"{attends if level else plain}DownBlock2D" for level in chosen.attention_levels]
    up = [f"{attends if level else plain}UpBlock2D" for level in reversed(chosen.attention_levels)]
    return {
        "sample_size": sample_size,
        "in_channels": in_channels,
        "out_channels": in_channels,
        "block_out_channels": chosen.block_out_channels,
        "layers_per_block": chosen.layers_per_block,
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
        "mid_block_type": "UNetMidBlock2DCrossAttn" if cross_attention_dim else "UNetMidBlock2D",
        "attention_head_dim": chosen.num_heads if cross_attention_dim else SELF_ATTENTION_HEAD_DIM,
        "cross_attention_dim": cross_attention_dim or 1280,
        "norm_num_groups": chosen.norm_num_groups,
        "use_linear_projection": chosen.use_linear_projection,
        "class_embed_type": "identity" if class_conditional else None,
    }


def build_unet(config: dict) -> UNet2DConditionModel:
    """A UNet2DConditionModel with the zero initialisation that its class lacks.

    Output convolution, last convolution of each residual block and output of each transformer start at zero, as in the
    code of DDPM, ADM and LDM: each block starts as the identity. Raises ValueError for a level too narrow for one
    head.
    """
    unet = UNet2DConditionModel.from_config(config)
    zero_layers: list[nn.Module] = [unet.conv_out]
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            zero_layers.append(module.conv2)
        elif isinstance(module, Transformer2DModel):
            zero_layers.append(module.proj_out)
        elif isinstance(module, Attention) and module.heads < 1:
            raise ValueError(
                f"attention_head_dim {config['attention_head_dim']} is more than the {module.query_dim} channels of a "
                "level that attends; without cross-attention it is the size of a head, so give a divisor of them"
            )
    for layer in zero_layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
    return unet
