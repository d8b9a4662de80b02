"""Tiny models, and flags of runs that take a second."""

from pathlib import Path

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
