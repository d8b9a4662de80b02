"""Tiny models, and flags of runs that take a second."""

from pathlib import Path

import torch

from utils.models.dit import DiT
from utils.models.unet import build_unet, unet_config

# A DiT and a U-Net small enough to train for a few steps in a second.
DIT_CONFIG = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2}


UNET_CONFIG = {"block_out_channels": [8, 16], "norm_num_groups": 4, "attention_head_dim": 2}


# fmt: off
TRAIN_FLAGS = [
    "--max_train_steps", 8, "--train_batch_size", 4, "--lr_warmup_steps", 2, "--learning_rate", 1e-3,
    "--checkpointing_steps", 4, "--logging_steps", 2,
]


GRID_FLAGS = ["--num_validation_images", 2, "--validation_inference_steps", 2]


# fmt: on


def cache_flags(images: Path, vae: Path, text_encoder: Path) -> list[str | Path | int]:
    """Flags of a cache of `image_folder` with everything in it."""
    return [
        *("--train_data_dir", images, "--caption_column", "text", "--label_column", "label"),
        *("--resolution", 16, "--random_flip", "--rows_per_shard", 10, "--encode_batch_size", 4),
        *("--pretrained_vae_model_name_or_path", vae, "--pretrained_text_encoder_name_or_path", text_encoder),
    ]


def num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def randomise(model, std=0.1):
    """Gives every parameter, the zero-initialised ones too, seeded random values."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def tiny_dit(**settings):
    """A random DiT with both kinds of condition."""
    config = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 2,
        "hidden_size": 48,
        "num_attention_heads": 4,
        "cross_attention_dim": 10,
        "projection_class_embeddings_input_dim": 6,
    }
    torch.manual_seed(0)
    return DiT(**(config | settings))


def tiny_unet(cross_attention_dim, class_conditional):
    config = unet_config("tiny", 8, 4, cross_attention_dim, class_conditional)
    torch.manual_seed(0)
    return build_unet(config)


def tiny_inputs(batch=3, size=8, tokens=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 4, size, size, generator=generator),
        "timestep": torch.tensor([3.0, 500.0, 999.0])[:batch],
        "encoder_hidden_states": torch.randn(batch, tokens, 10, generator=generator),
        "class_labels": torch.randn(batch, 6, generator=generator),
    }


# What accelerate launch makes of that configuration.
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "DiTBlock",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
