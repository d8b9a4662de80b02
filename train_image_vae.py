"""Trains an image autoencoder (AutoencoderKL) from scratch, for latents of your own.

    accelerate launch train_image_vae.py --train_data_dir photos --resolution 64 --vae_size small --output_dir runs/vae
    accelerate launch train_image_vae.py --config configs/cifar10_vae.yaml --dataset_name uoft-cs/cifar10 ...

Leaves OUTPUT_DIR/vae in diffusers format, with the scaling and shift of its latents measured and stored in its config:
give OUTPUT_DIR to precompute_latents.py as --pretrained_vae_model_name_or_path.
"""

import argparse
from pathlib import Path

from utils import arg_checks, input_args
from utils import args as shared
from utils.parsing import non_negative_float, parse_with_config, positive_int, required, run_script


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--vae_size",
        choices=["fast", "small", "base"],
        default="small",
        help="fast and small: 4 x downsampling, base: 8 x; all 4 latent channels.",
    )
    parser.add_argument("--reconstruction_loss", choices=["l1", "mse"], default="l1", help="Error per pixel value.")
    parser.add_argument(
        "--kl_weight",
        type=non_negative_float,
        default=1e-4,
        help="Weight of the KL divergence per latent value, in nats.",
    )
    parser.add_argument(
        "--num_statistics_samples",
        type=positive_int,
        default=10_000,
        help="Images that scaling and shift are measured on.",
    )
    parser.add_argument(
        "--validation_steps", type=positive_int, default=1000, help="Steps between reconstruction grids."
    )
    shared.add_run_args(parser)
    shared.add_optimizer_args(parser)
    shared.add_ema_args(parser)
    input_args.add_dataset_args(parser)
    args = parse_with_config(parser)
    required(args, "output_dir")
    arg_checks.check_run_args(args)
    arg_checks.check_optimizer_args(args)
    arg_checks.check_ema_args(args)
    return args


def main(args: argparse.Namespace) -> None:
    import torch
    from tqdm.auto import tqdm

    from utils import optimization, run, training_data, vae_training
    from utils.checkpoints import Checkpoints
    from utils.draws import SampleDraws
    from utils.ema import EMA
    from utils.image_stream import to_pixels
    from utils.models.image_vae import RECONSTRUCTION_LOSSES, TrainableVAE, build_vae
    from utils.step_log import StepLog

    # Load
    output_dir = Path(args.output_dir)
    accelerator = run.make_accelerator(args, output_dir)
    run.check_output_dir(output_dir, args.resume_from_checkpoint, accelerator)
    stream, data_identity = training_data.open_images(args)
    vae = build_vae(args.vae_size, args.resolution)

    # Prepare
    autoencoder = TrainableVAE(vae)
    optimizer = optimization.make_optimizer(
        autoencoder,
        args.learning_rate,
        (args.adam_beta1, args.adam_beta2),
        args.adam_weight_decay,
        args.adam_epsilon,
        args.optimizer,
    )
    autoencoder, optimizer = accelerator.prepare(autoencoder, optimizer)
    model = accelerator.unwrap_model(autoencoder)
    ema = EMA(model, args.ema_decay) if args.use_ema else None
    run_identity = run.identity_of(args, model, data_identity, accelerator)
    saver = Checkpoints(
        accelerator, output_dir, autoencoder, optimizer, ema, run_identity, args.checkpoints_total_limit
    )
    first_step = saver.resume(args.resume_from_checkpoint)
    run.save_args(args, output_dir, accelerator)
    if args.torch_compile:
        autoencoder = torch.compile(autoencoder)
    batches = iter(run.make_loader(stream, args, accelerator, first_step))
    run.announce(args, accelerator, model, stream.order.num_rows, first_step)
    control = run.make_control(args, accelerator, output_dir, first_step)
    step_log = StepLog(accelerator, control, run.samples_per_step(args, accelerator))
    progress = tqdm(
        total=args.max_train_steps, initial=first_step, unit="step", disable=not accelerator.is_main_process
    )

    # Loop
    autoencoder.train()
    for global_step in control.steps():
        learning_rate = optimization.learning_rate_at(
            global_step,
            args.learning_rate,
            args.lr_scheduler,
            args.lr_warmup_steps,
            args.max_train_steps,
            control.time_share,
        )
        optimization.set_learning_rate(optimizer, learning_rate)
        for _ in range(args.gradient_accumulation_steps):
            batch = run.to_device(next(batches), accelerator.device)
            draws = SampleDraws(args.seed, batch["positions"], accelerator.device)
            with accelerator.accumulate(autoencoder):
                images = to_pixels(batch["images"])  # (B, 3, H, W) in [-1, 1]
                noise = draws.normal("posterior", model.latent_shape(images))  # (B, C, h, w)
                reconstruction, kl = autoencoder(images, noise)
                reconstruction_loss = RECONSTRUCTION_LOSSES[args.reconstruction_loss](reconstruction.float(), images)
                loss = reconstruction_loss + args.kl_weight * kl.mean()
                accelerator.backward(loss)
                step_log.add(loss)
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(autoencoder.parameters(), args.max_grad_norm)
                    moved = control.may_step(step_log.step_loss, grad_norm)
                    if moved or accelerator.scaler is not None:  # the scaler of fp16 skips, and must know that it did
                        optimizer.step()
                    optimizer.zero_grad()
        if ema is not None and moved:
            ema.step(model, global_step)
        progress.update()

        done = global_step + 1
        step_log.step_done(moved, args.gradient_accumulation_steps)
        if done % args.logging_steps == 0 or control.is_last:
            progress.set_postfix(step_log.flush(learning_rate, done))
        if done % args.checkpointing_steps == 0 or control.is_last:
            saver.save(done)
        if done % args.validation_steps == 0 or control.is_finished:
            with run.averaged_weights(accelerator, model, ema):
                vae_training.save_reconstructions(accelerator, output_dir, model, stream, done)
    progress.close()
    control.say_how_it_ended()

    # Export
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not control.interrupted:
        with run.averaged_weights(accelerator, model, ema):
            vae_training.measure_latents(model.vae, stream, args.num_statistics_samples, accelerator)
            model.vae.save_pretrained(output_dir / "vae")
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main, parse_args)
