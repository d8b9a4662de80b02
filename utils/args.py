"""Arguments that scripts share, in groups.

Imports no torch: `--help` and every complaint about a flag come before anything heavy is loaded.
"""

import os
from argparse import ArgumentParser, BooleanOptionalAction

from utils.parsing import (
    fraction,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
)


def add_run_args(parser: ArgumentParser) -> None:
    """Where a training writes, how long it runs, and how it goes on."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--output_dir", default=None, help="Folder of the run: checkpoints, logs, samples, final model."
    )
    group.add_argument("--seed", type=non_negative_int, default=0, help="Seed of data order, noise and new weights.")
    group.add_argument("--max_train_steps", type=positive_int, default=100_000, help="Optimizer steps in all.")
    group.add_argument("--train_batch_size", type=positive_int, default=64, help="Samples per process and micro-step.")
    group.add_argument(
        "--gradient_accumulation_steps", type=positive_int, default=1, help="Micro-steps per optimizer step."
    )
    group.add_argument(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        default=None,
        help="Autocast of the forward pass; weights stay fp32. Default: what accelerate's config says.",
    )
    group.add_argument(
        "--allow_tf32", action=BooleanOptionalAction, default=False, help="TF32 matrix products on Ampere and later."
    )
    group.add_argument("--torch_compile", action=BooleanOptionalAction, default=False, help="Compile the denoiser.")
    group.add_argument("--dataloader_num_workers", type=non_negative_int, default=0, help="Processes that read ahead.")
    group.add_argument("--checkpointing_steps", type=positive_int, default=1000, help="Steps between checkpoints.")
    group.add_argument(
        "--checkpoints_total_limit", type=positive_int, default=3, help="Newest checkpoints that are kept, at least 2."
    )
    group.add_argument(
        "--resume_from_checkpoint",
        default=None,
        metavar="latest|PATH",
        help="Go on from the newest complete checkpoint of --output_dir (or start, if there is none) or a named one.",
    )
    group.add_argument("--report_to", default="tensorboard", help="Tracker: tensorboard, wandb, ..., all or none.")
    group.add_argument("--logging_steps", type=positive_int, default=50, help="Steps between values in the tracker.")


def add_dataset_args(parser: ArgumentParser) -> None:
    """Which images, and how they are cut."""
    group = parser.add_argument_group("dataset")
    group.add_argument("--dataset_name", default=None, help="Hub name, local folder, or .parquet file or pattern.")
    group.add_argument("--dataset_config_name", default=None, help="Configuration of a dataset that has several.")
    group.add_argument("--dataset_revision", default=None, help="Branch, tag or commit of a hub dataset.")
    group.add_argument("--dataset_split", default="train", help="Split to read.")
    group.add_argument(
        "--train_data_dir", default=None, help="Image folder with metadata.jsonl, or with one folder a class."
    )
    group.add_argument("--image_column", default=None, help="Default: the only image column.")
    group.add_argument(
        "--resolution", type=positive_int, default=256, help="Pixels of a side after resizing and cropping."
    )
    group.add_argument(
        "--center_crop", action=BooleanOptionalAction, default=False, help="Crop the centre instead of a random place."
    )
    group.add_argument(
        "--random_flip",
        action=BooleanOptionalAction,
        default=False,
        help="Also encode the mirrored image; one is drawn per epoch.",
    )
    group.add_argument(
        "--alpha_background",
        choices=["white", "grey", "black"],
        default="white",
        help="What transparent images are laid on.",
    )
    group.add_argument("--max_samples", type=positive_int, default=None, help="Use the first N rows only.")


def add_condition_args(parser: ArgumentParser) -> None:
    """What is cached beside the images, and how the dataset is read for it."""
    group = parser.add_argument_group("captions and labels")
    group.add_argument(
        "--caption_column", default=None, help="Text, or a list of texts of which one is drawn per epoch."
    )
    group.add_argument("--label_column", default=None, help="Class label: an integer.")
    group.add_argument(
        "--streaming",
        action=BooleanOptionalAction,
        default=False,
        help="Read the dataset without downloading it whole.",
    )
    group.add_argument(
        "--max_skipped_fraction",
        type=fraction,
        default=0.05,
        help="Stop if more than this share of images is unreadable.",
    )


def add_cache_args(parser: ArgumentParser) -> None:
    """The frozen models and what is stored of what they give."""
    group = parser.add_argument_group("latent cache")
    group.add_argument(
        "--pretrained_vae_model_name_or_path",
        default="stabilityai/sd-vae-ft-mse",
        help="Any diffusers autoencoder: hub name or folder.",
    )
    group.add_argument(
        "--pretrained_text_encoder_name_or_path",
        default="laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
        help="CLIP text encoder: hub name or folder; with open_clip also ARCHITECTURE:CHECKPOINT_FILE.",
    )
    group.add_argument(
        "--text_encoder_library",
        choices=["transformers", "open_clip"],
        default="transformers",
        help="What loads the text encoder.",
    )
    group.add_argument("--tokenizer_name", default=None, help="Default: the tokenizer beside the text encoder.")
    group.add_argument(
        "--latent_content",
        choices=["moments", "mean"],
        default=None,
        help="Store the posterior's mean and std (default, where the VAE has one) or its mean.",
    )
    group.add_argument("--encode_batch_size", type=positive_int, default=16, help="Images per VAE call.")
    group.add_argument(
        "--rows_per_shard", type=positive_int, default=512, help="Images per shard: what a kill can cost."
    )
    group.add_argument(
        "--max_cached_captions",
        type=non_negative_int,
        default=200_000,
        help="Above so many distinct captions token ids are cached and the text encoder runs in the training loop.",
    )
    group.add_argument(
        "--decode_workers", type=positive_int, default=min(8, os.cpu_count() or 1), help="Threads that decode images."
    )


def add_model_args(parser: ArgumentParser) -> None:
    """The denoiser."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", choices=["unet", "dit"], default="unet", help="UNet2DConditionModel or DiT.")
    group.add_argument(
        "--model_size",
        default=None,
        help="U-Net: tiny, cifar10, base (314M), sd-v1, sd-v2, ldm-kl-8. DiT: S/2, B/4, XL/8, ... (size/patch). "
        "Default: base, B/2.",
    )
    group.add_argument(
        "--model_config",
        default=None,
        metavar="FILE",
        help="JSON or YAML of the model's own arguments, over --model_size.",
    )
    group.add_argument(
        "--gradient_checkpointing", action=BooleanOptionalAction, default=False, help="Less memory, slower."
    )
    group.add_argument(
        "--enable_xformers_memory_efficient_attention",
        action=BooleanOptionalAction,
        default=False,
        help="Attention by xformers (CUDA only).",
    )


def add_objective_args(parser: ArgumentParser) -> None:
    """What is learnt."""
    group = parser.add_argument_group("objective")
    group.add_argument(
        "--prediction_type",
        choices=["epsilon", "v_prediction", "sample", "flow"],
        default="v_prediction",
        help="DDPM with one of three targets, or rectified flow.",
    )
    group.add_argument(
        "--beta_schedule",
        choices=["scaled_linear", "linear", "squaredcos_cap_v2"],
        default="scaled_linear",
        help="DDPM's noise schedule.",
    )
    group.add_argument(
        "--rescale_betas_zero_snr",
        action=BooleanOptionalAction,
        default=False,
        help="Zero SNR at the last timestep (DDPM).",
    )
    group.add_argument(
        "--snr_gamma", type=positive_float, default=None, help="Min-SNR loss weight (DDPM); 5.0 is usual."
    )
    group.add_argument(
        "--noise_offset", type=non_negative_float, default=0.0, help="Scale of an offset per channel (DDPM)."
    )
    group.add_argument(
        "--input_perturbation",
        type=non_negative_float,
        default=0.0,
        help="Extra noise on the model's input (DDPM); 0.1 is usual.",
    )
    group.add_argument(
        "--timestep_density",
        choices=["logit_normal", "uniform"],
        default="logit_normal",
        help="Which sigmas flow trains on.",
    )
    group.add_argument(
        "--flow_shift", type=positive_float, default=1.0, help="Shift of flow's timesteps for resolution."
    )
    group.add_argument(
        "--latent_normalisation",
        choices=["vae", "measured"],
        default="vae",
        help="Normalise latents by the VAE's scaling and shift, or by each channel's mean and std in the cache.",
    )


def add_optimizer_args(parser: ArgumentParser) -> None:
    """How weights move."""
    group = parser.add_argument_group("optimizer")
    group.add_argument("--learning_rate", type=positive_float, default=1e-4, help="Peak learning rate.")
    group.add_argument(
        "--lr_scheduler",
        choices=["constant", "linear", "cosine", "constant_with_decay"],
        default="constant",
        help="After the warm-up; constant_with_decay falls to zero over the last fifth.",
    )
    group.add_argument(
        "--lr_warmup_steps", type=non_negative_int, default=500, help="Optimizer steps of linear warm-up."
    )
    group.add_argument(
        "--use_8bit_adam", action=BooleanOptionalAction, default=False, help="AdamW of bitsandbytes, 8-bit states."
    )
    group.add_argument("--adam_beta1", type=fraction, default=0.9, help="Decay of the first moment.")
    group.add_argument("--adam_beta2", type=fraction, default=0.999, help="Decay of the second moment.")
    group.add_argument("--adam_weight_decay", type=non_negative_float, default=0.01, help="Decoupled weight decay.")
    group.add_argument("--adam_epsilon", type=positive_float, default=1e-8, help="Added to the denominator.")
    group.add_argument("--max_grad_norm", type=positive_float, default=1.0, help="Gradients are clipped to this norm.")


def add_ema_args(parser: ArgumentParser) -> None:
    """The moving average that samples and the exported model come from."""
    group = parser.add_argument_group("ema")
    group.add_argument("--use_ema", action=BooleanOptionalAction, default=True, help="Keep an fp32 moving average.")
    group.add_argument("--ema_decay", type=fraction, default=0.9999, help="Decay per step, after a warm-up.")


def add_validation_args(parser: ArgumentParser, what: str) -> None:
    """Pictures on the way."""
    group = parser.add_argument_group("validation")
    group.add_argument(
        "--validation_steps", type=positive_int, default=1000, help=f"Steps between grids of validation {what}."
    )
    group.add_argument(
        "--validation_guidance_scale", type=non_negative_float, default=4.0, help="Guidance of those grids."
    )
    group.add_argument("--num_validation_images", type=positive_int, default=4, help=f"Images for each of the {what}.")
    group.add_argument(
        "--validation_inference_steps", type=positive_int, default=25, help="Sampler steps of those grids."
    )
