"""Groups of flags that scripts share.

Imports no torch: `--help` and every error about a flag come before anything heavy is loaded."""

from argparse import ArgumentParser, BooleanOptionalAction

from utils.args.parsing import fraction, non_negative_float, non_negative_int, positive_float, positive_int


def add_run_args(parser: ArgumentParser) -> None:
    """Adds the flags of a training run: output folder, length, batch size, precision, checkpoints, logs."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--output_dir", default=None, help="Folder of the run: checkpoints, logs, samples and the final model."
    )
    group.add_argument(
        "--seed", type=non_negative_int, default=0, help="Seed of the data order, the noise and the initial weights."
    )
    group.add_argument(
        "--max_train_steps",
        type=positive_int,
        default=None,
        help="Total number of optimizer steps. Default: 100000, or as many as --max_train_hours allows.",
    )
    group.add_argument(
        "--max_train_hours",
        type=positive_float,
        default=None,
        help="Total wall-clock hours, resumed runs included; the learning rate schedule then follows the clock.",
    )
    group.add_argument(
        "--max_nonfinite_steps",
        type=positive_int,
        default=20,
        help="Stop after this many steps in a row whose loss or gradient is not finite. Such a step changes no "
        "weights.",
    )
    group.add_argument(
        "--train_batch_size", type=positive_int, default=64, help="Batch size per process and micro-step."
    )
    group.add_argument(
        "--gradient_accumulation_steps",
        type=positive_int,
        default=1,
        help="Number of micro-steps to accumulate for an optimizer step.",
    )
    group.add_argument(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        default=None,
        help="Autocast precision of the forward pass; weights stay in fp32. Default: the setting of accelerate.",
    )
    group.add_argument(
        "--allow_tf32",
        action=BooleanOptionalAction,
        default=False,
        help="Allow TF32 matrix products on Ampere and newer GPUs.",
    )
    group.add_argument(
        "--torch_compile", action=BooleanOptionalAction, default=False, help="Compile the model with torch.compile."
    )
    group.add_argument(
        "--dataloader_num_workers",
        type=non_negative_int,
        default=0,
        help="Number of subprocesses that load data; 0 loads it in the main process.",
    )
    group.add_argument("--checkpointing_steps", type=positive_int, default=1000, help="Steps between checkpoints.")
    group.add_argument(
        "--checkpoints_total_limit",
        type=positive_int,
        default=3,
        help="Number of newest checkpoints to keep, at least 2.",
    )
    group.add_argument(
        "--resume_from_checkpoint",
        default=None,
        metavar="latest|PATH",
        help="Resume from the newest complete checkpoint of --output_dir (latest; starts anew if there is none) or "
        "from the checkpoint at PATH.",
    )
    group.add_argument("--report_to", default="tensorboard", help="Tracker: tensorboard, wandb, ..., all or none.")
    group.add_argument("--logging_steps", type=positive_int, default=50, help="Steps between logged values.")


def add_trainer_args(parser: ArgumentParser) -> None:
    """Flags of every trainer."""
    add_run_args(parser)
    add_optimizer_args(parser)
    add_ema_args(parser)


def add_denoiser_args(parser: ArgumentParser) -> None:
    """Flags of every trainer of a denoiser."""
    add_trainer_args(parser)
    add_power_ema_args(parser)
    add_objective_args(parser)
    add_lora_args(parser)


def add_lora_args(parser: ArgumentParser) -> None:
    """Adds the flags of fine-tuning: the base run and LoRA adapters."""
    group = parser.add_argument_group("fine-tuning")
    group.add_argument(
        "--pretrained_model_name_or_path",
        default=None,
        help="Trained run of these scripts, or one of its checkpoints, to start from.",
    )
    group.add_argument(
        "--lora_rank",
        type=positive_int,
        default=None,
        help="Rank of LoRA adapters to train while the base model stays frozen. Default: train all weights.",
    )
    group.add_argument(
        "--lora_alpha",
        type=positive_float,
        default=None,
        help="Alpha of LoRA: adapters are scaled by alpha / rank. Default: the rank.",
    )
    group.add_argument(
        "--lora_target_modules",
        nargs="+",
        default=None,
        help="Layers that get adapters, given by how their names end. Default: the model's own choice.",
    )


def add_objective_args(parser: ArgumentParser) -> None:
    """Adds the flags of the objective: prediction target, noise schedule, loss weighting."""
    group = parser.add_argument_group("objective")
    group.add_argument(
        "--prediction_type",
        choices=["epsilon", "v_prediction", "sample", "flow"],
        default="v_prediction",
        help="Prediction target of DDPM (epsilon, v_prediction or sample), or rectified flow (flow).",
    )
    group.add_argument(
        "--beta_schedule",
        choices=["scaled_linear", "linear", "squaredcos_cap_v2"],
        default="scaled_linear",
        help="Noise schedule (DDPM).",
    )
    group.add_argument(
        "--rescale_betas_zero_snr",
        action=BooleanOptionalAction,
        default=False,
        help="Rescale the noise schedule to zero SNR at the last timestep (DDPM).",
    )
    group.add_argument(
        "--snr_gamma",
        type=positive_float,
        default=None,
        help="Gamma of the Min-SNR loss weighting (DDPM); 5.0 is usual. Default: no weighting.",
    )
    group.add_argument(
        "--noise_offset",
        type=non_negative_float,
        default=0.0,
        help="Scale of the noise offset, drawn once per sample and channel (DDPM); 0 is off.",
    )
    group.add_argument(
        "--input_perturbation",
        type=non_negative_float,
        default=0.0,
        help="Scale of the extra noise on the model's input (DDPM); 0.1 is usual, 0 is off.",
    )
    group.add_argument(
        "--timestep_density",
        choices=["logit_normal", "uniform"],
        default="logit_normal",
        help="Distribution of the timesteps in training (flow).",
    )
    group.add_argument(
        "--flow_shift",
        type=positive_float,
        default=1.0,
        help="Shift of the timesteps, for higher resolutions (flow); 1 is no shift.",
    )
    group.add_argument(
        "--latent_normalisation",
        choices=["vae", "measured"],
        default="vae",
        help="Normalise latents by the VAE's scaling and shift (vae), or by each channel's mean and std in the cache "
        "(measured).",
    )


def add_optimizer_args(parser: ArgumentParser) -> None:
    """Adds the flags of the optimizer and of the learning rate."""
    group = parser.add_argument_group("optimizer")
    group.add_argument("--learning_rate", type=positive_float, default=1e-4, help="Peak learning rate.")
    group.add_argument(
        "--lr_scheduler",
        choices=["constant", "linear", "cosine", "constant_with_decay"],
        default="constant",
        help="Schedule of the learning rate after the warm-up; constant_with_decay decays to zero over the last "
        "fifth.",
    )
    group.add_argument(
        "--lr_warmup_steps", type=non_negative_int, default=500, help="Optimizer steps of linear warm-up."
    )
    group.add_argument(
        "--optimizer",
        choices=["adamw", "adamw_8bit", "muon"],
        default="adamw",
        help="adamw_8bit: AdamW with 8-bit states, by bitsandbytes. muon: Muon for a transformer's matrices, AdamW "
        "for the rest.",
    )
    group.add_argument(
        "--use_8bit_adam", action=BooleanOptionalAction, default=False, help="The same as --optimizer adamw_8bit."
    )
    group.add_argument("--adam_beta1", type=fraction, default=0.9, help="Decay rate of AdamW's first moment.")
    group.add_argument("--adam_beta2", type=fraction, default=0.999, help="Decay rate of AdamW's second moment.")
    group.add_argument(
        "--adam_weight_decay", type=non_negative_float, default=0.01, help="Decoupled weight decay, of AdamW and Muon."
    )
    group.add_argument("--adam_epsilon", type=positive_float, default=1e-8, help="Epsilon in AdamW's denominator.")
    group.add_argument(
        "--max_grad_norm", type=positive_float, default=1.0, help="Norm to which gradients are clipped."
    )


def add_ema_args(parser: ArgumentParser) -> None:
    """Adds the flags of the moving average that samples and the exported model come from."""
    group = parser.add_argument_group("ema")
    group.add_argument(
        "--use_ema",
        action=BooleanOptionalAction,
        default=True,
        help="Keep an exponential moving average (EMA) of the weights, in fp32.",
    )
    group.add_argument(
        "--ema_decay", type=fraction, default=0.9999, help="Decay of the EMA per step, after a warm-up."
    )


def add_power_ema_args(parser: ArgumentParser) -> None:
    """Adds the flags of EDM2's averages, whose length is chosen after training."""
    group = parser.add_argument_group("power-function ema")
    group.add_argument(
        "--ema_sigma_rels",
        nargs="+",
        type=positive_float,
        default=None,
        help="Also keep EDM2's power-function EMA of these relative widths, such as 0.05 0.1, as snapshots for "
        "sample.py --ema_sigma_rel.",
    )
    group.add_argument(
        "--ema_snapshot_steps",
        type=positive_int,
        default=5000,
        help="Steps between these snapshots, which are stored in half precision.",
    )


def add_validation_loss_args(parser: ArgumentParser) -> None:
    """Adds the flags of the validation loss on held-out latents, and of early stopping."""
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--eval_steps",
        type=positive_int,
        default=None,
        help="Steps between evaluations of the validation loss, with fixed noise and timesteps. Default: no "
        "evaluation.",
    )
    group.add_argument(
        "--num_validation_samples",
        type=positive_int,
        default=None,
        help="Number of rows of the latent cache to hold out of training for evaluations; the same rows for every "
        "seed.",
    )
    group.add_argument(
        "--validation_latents_dir",
        default=None,
        help="Latent cache of another split to evaluate on, instead of held-out rows.",
    )
    group.add_argument(
        "--eval_batch_size",
        type=positive_int,
        default=32,
        help="Batch size of evaluations, per process.",
    )
    group.add_argument(
        "--early_stopping_patience",
        type=positive_int,
        default=None,
        help="Stop training after this many evaluations in a row without an improvement of the best metric.",
    )
    group.add_argument(
        "--early_stopping_min_delta",
        type=non_negative_float,
        default=0.0,
        help="A smaller decrease of the best metric is no improvement.",
    )
