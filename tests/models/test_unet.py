"""U-Nets: sizes and presets."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention as UNetAttention

from tests.support.models import num_parameters
from utils.models.unet import UNET_PRESETS, build_unet, unet_config


@pytest.mark.parametrize(
    ("preset", "text_width", "parameters"),
    [
        ("base", 768, 314_000_000),  # "a 314M (192, 384, 768, 768)"
        ("sd-v1", 768, 859_520_964),  # diffusers' UNet of Stable Diffusion 1.5
        ("sd-v2", 1024, 865_910_724),  # and of 2.1
        ("ldm-kl-8", 1280, 872_300_000),  # "DiffusionWrapper has 872.30 M params": CompVis' txt2img-1p4B
    ],
)
def test_unet_sizes_are_the_published_ones(preset, text_width, parameters):
    """U-Net presets have as many parameters as the models they are named after; Stable Diffusion's exactly."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config(preset, 64, 4, text_width, class_conditional=False))
    exact = preset.startswith("sd")
    assert num_parameters(unet) == (parameters if exact else pytest.approx(parameters, rel=1e-3))


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("sd-v1", {"cross_attention_dim": 768}),
        ("sd-v2", {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}),
    ],
)
def test_sd_presets_are_stable_diffusions_configs(preset, settings):
    """The presets and the hub's configs, over diffusers' defaults, give the same names, shapes and numbers of heads."""
    with torch.device("meta"):
        config = unet_config(preset, 64, 4, settings["cross_attention_dim"], class_conditional=False)
        ours = UNet2DConditionModel.from_config(config)
        stock = UNet2DConditionModel(sample_size=64, **settings)
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in stock.state_dict().items()}
    heads = {name: module.heads for name, module in ours.named_modules() if hasattr(module, "heads")}
    assert heads == {name: module.heads for name, module in stock.named_modules() if hasattr(module, "heads")}
    assert set(heads.values()) == ({8} if preset == "sd-v1" else {5, 10, 20})


@pytest.mark.parametrize("preset", UNET_PRESETS)
def test_heads_without_text_have_64_channels(preset):
    """On the way down and on the way up. (Of a list of sizes, one a level, diffusers reverses none for the way up.)"""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config(preset, 32, 4, None, class_conditional=True))
    attentions = [module for module in unet.modules() if isinstance(module, UNetAttention)]
    assert len(attentions) >= 3
    assert {module.query_dim // module.heads for module in attentions} == {64}


def test_a_level_without_a_head_is_refused():
    config = unet_config("tiny", 32, 4, None, class_conditional=True) | {"block_out_channels": (16, 32)}
    with pytest.raises(ValueError, match="attention_head_dim 64 is more than the 32 channels"):
        build_unet(config)
    build_unet(config | {"attention_head_dim": 16})
