"""Arguments that scripts share, in groups.

Imports no torch: `--help` and every complaint about a flag come before anything heavy is loaded.
"""

from argparse import ArgumentParser, BooleanOptionalAction

from utils.args.parsing import fraction, non_negative_float, non_negative_int, positive_float, positive_int


def add_run_args(parser: ArgumentParser) -> None:
    """Where a training writes, how long it runs, and how it goes on."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--output_dir", default=None, help="Folder of the run: checkpoints, logs, samples, final model."
    )
    group.add_argument("--seed", type=non_negative_int, default=0, help="Seed of data order, noise and new weights.")
    group.add_argument(
        "--max_train_steps",
        type=positive_int,
        default=None,
        help="Optimizer steps in all. Default: 100000, or as many as --max_train_hours allow.",
    )
    group.add_argument(
        "--max_train_hours",
        type=positive_float,
        default=None,
        help="Wall-clock hours in all, resumes included; the learning rate's schedule then follows the clock.",
    )
    group.add_argument(
        "--max_nonfinite_steps",
        type=positive_int,
        default=20,
        help="Stop after so many steps in a row whose loss or gradient was not finite; such steps change no weight.",
    )
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


def add_lora_args(parser: ArgumentParser) -> None:
    """Starting from a trained run."""
    group = parser.add_argument_group("fine-tuning")
    group.add_argument(
        "--pretrained_model_name_or_path", default=None, help="A run or checkpoint of these scripts to start from."
    )
    group.add_argument("--lora_rank", type=positive_int, default=None, help="Train adapters of this rank (LoRA) only.")
    group.add_argument("--lora_alpha", type=positive_float, default=None, help="Scale x rank. Default: the rank.")
    group.add_argument("--lora_target_modules", nargs="+", default=None, help="Layers, by how their names end.")


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
        "--optimizer",
        choices=["adamw", "adamw_8bit", "muon"],
        default="adamw",
        help="adamw_8bit: 8-bit states, by bitsandbytes. muon: for a transformer's matrices, with AdamW for the rest.",
    )
    group.add_argument(
        "--use_8bit_adam", action=BooleanOptionalAction, default=False, help="The same as --optimizer adamw_8bit."
    )
    group.add_argument("--adam_beta1", type=fraction, default=0.9, help="Decay of the first moment.")
    group.add_argument("--adam_beta2", type=fraction, default=0.999, help="Decay of the second moment.")
    group.add_argument(
        "--adam_weight_decay", type=non_negative_float, default=0.01, help="Decoupled weight decay, of Muon too."
    )
    group.add_argument("--adam_epsilon", type=positive_float, default=1e-8, help="Added to the denominator.")
    group.add_argument("--max_grad_norm", type=positive_float, default=1.0, help="Gradients are clipped to this norm.")


def add_ema_args(parser: ArgumentParser) -> None:
    """The moving average that samples and the exported model come from."""
    group = parser.add_argument_group("ema")
    group.add_argument("--use_ema", action=BooleanOptionalAction, default=True, help="Keep an fp32 moving average.")
    group.add_argument("--ema_decay", type=fraction, default=0.9999, help="Decay per step, after a warm-up.")


def add_power_ema_args(parser: ArgumentParser) -> None:
    """Averages whose length is chosen after training."""
    group = parser.add_argument_group("power-function ema")
    group.add_argument(
        "--ema_sigma_rels",
        nargs="+",
        type=positive_float,
        default=None,
        help="Also keep EDM2's averages of these relative widths, 0.05 0.1 say, as snapshots for sample.py "
        "--ema_sigma_rel.",
    )
    group.add_argument(
        "--ema_snapshot_steps", type=positive_int, default=5000, help="Steps between those snapshots (half precision)."
    )


def add_validation_loss_args(parser: ArgumentParser) -> None:
    """The loss on latents that are not trained on, and what hangs on it."""
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--eval_steps",
        type=positive_int,
        default=None,
        help="Steps between evaluations: the validation loss, with fixed noise and timesteps. Default: none.",
    )
    group.add_argument(
        "--num_validation_samples",
        type=positive_int,
        default=None,
        help="Rows of the latent cache that are kept out of training, for evaluations; the same for every seed.",
    )
    group.add_argument(
        "--validation_latents_dir", default=None, help="Latent cache of another split, for evaluations, instead."
    )
    group.add_argument(
        "--eval_batch_size",
        type=positive_int,
        default=32,
        help="Samples that a process evaluates at once.",
    )
    group.add_argument(
        "--early_stopping_patience",
        type=positive_int,
        default=None,
        help="End after so many evaluations in a row in which the best metric did not fall.",
    )
    group.add_argument(
        "--early_stopping_min_delta", type=non_negative_float, default=0.0, help="A smaller fall counts as none."
    )
