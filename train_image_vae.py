"""Trains an image autoencoder (AutoencoderKL) from scratch, for latents of your own.

    accelerate launch train_image_vae.py --train_data_dir photos --resolution 64 --vae_size small --output_dir runs/vae
    accelerate launch train_image_vae.py --config configs/image/cifar10_vae.yaml --dataset_name uoft-cs/cifar10 ...

Leaves OUTPUT_DIR/vae in diffusers format, with the scaling and shift of its latents measured and stored in its config:
give OUTPUT_DIR to precompute_latents.py as --pretrained_vae_model_name_or_path.
"""

import argparse
from functools import partial

from utils.args import checks as arg_checks
from utils.args import groups as shared
from utils.args.parsing import parse_with_config, required, run_script
from utils.image.args import data as input_args
from utils.image.vae import args as vae_args


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--vae_size",
        choices=["fast", "small", "base", "sd"],
        default="small",
        help="Size. fast, small: downsampling by 4; base, sd (84M, Stable Diffusion's): by 8. All have 4 latent "
        "channels.",
    )
    vae_args.add_vae_loss_args(parser)
    vae_args.add_discriminator_args(parser)
    vae_args.add_vae_validation_args(parser)
    shared.add_trainer_args(parser)
    input_args.add_dataset_args(parser)
    args = parse_with_config(parser)
    required(args, "output_dir")
    arg_checks.check_trainer_args(args)
    vae_args.check_vae_args(args)
    return args


def main(args: argparse.Namespace) -> None:
    import torch

    from utils.image import setup as training_data
    from utils.image.data.stream import to_pixels
    from utils.image.vae import training as vae_training
    from utils.image.vae.discriminator import ADAM_BETAS, Adversary, build_discriminator
    from utils.image.vae.losses import FitLoss, discriminator_losses, generator_loss, load_lpips
    from utils.image.vae.network import TrainableVAE, build_vae
    from utils.latents.posterior import kl_weight_at
    from utils.training import setup
    from utils.training.checkpoints import Checkpoints
    from utils.training.ema import averaged_weights
    from utils.training.optimizers import clip_grad_norm_, set_learning_rate
    from utils.training.step_log import StepLog

    # Load
    run = setup.start(args, is_denoiser=False)  # refuses a folder that is taken
    accelerator = run.accelerator
    vae_args.check_precision(args, accelerator.mixed_precision)
    data = training_data.open_images(args)
    lpips = load_lpips(args.lpips_net, args.lpips_weights, accelerator.device) if args.lpips_weight else None
    fit = FitLoss(args.reconstruction_loss, args.gradient_weight, args.lpips_weight, lpips)
    validation = vae_training.Validation(
        run,
        held_out=data.validation,
        training=data.train,
        batch_size=args.train_batch_size,
        eval_features=args.eval_features,
    )

    # Prepare
    autoencoder = TrainableVAE(build_vae(args.vae_size, args.resolution))
    optimizer = setup.make_optimizer(args, autoencoder)
    autoencoder, optimizer = accelerator.prepare(autoencoder, optimizer)
    model = accelerator.unwrap_model(autoencoder)
    has_adversary = args.disc_start is not None
    if has_adversary:
        adversary = Adversary(build_discriminator(args.disc_num_layers, args.disc_channels, args.resolution))
        disc_optimizer = setup.make_optimizer(args, adversary, name="adamw", betas=ADAM_BETAS)
        adversary, disc_optimizer = accelerator.prepare(adversary, disc_optimizer)  # so checkpoints hold them too
        critic = accelerator.unwrap_model(adversary)
    ema = setup.make_ema(args, model)  # None without --use_ema
    identity = setup.identity_of(args, run, model, data.identity)
    identity["discriminator"] = [args.disc_num_layers, args.disc_channels] if has_adversary else None
    saver = Checkpoints(run, autoencoder, optimizer, ema, identity=identity, keep=args.checkpoints_total_limit)
    first_step = saver.resume(args.resume_from_checkpoint)
    setup.save_args(args, run)  # nothing was written until all was found to fit
    if args.torch_compile:
        model.compile_parts()
    batches = setup.make_batches(args, run, data.train, first_step)
    setup.announce(args, run, model, data.train.order.num_rows, first_step)
    control = setup.make_control(args, run, first_step)  # takes SIGTERM and SIGINT from here on
    schedule = setup.make_schedule(args)
    step_log = StepLog(run, control, setup.samples_per_step(args, run))

    # Loop
    autoencoder.train()
    for global_step in control.steps():
        learning_rate = schedule.at(global_step, control.time_share)
        set_learning_rate(optimizer, learning_rate)
        kl_weight = kl_weight_at(global_step, args.kl_weight, args.kl_warmup_steps)
        is_adversarial = has_adversary and global_step >= args.disc_start
        if is_adversarial:
            set_learning_rate(disc_optimizer, learning_rate)
        for _ in range(args.gradient_accumulation_steps):
            batch, draws = next(batches)  # draws: all random numbers that belong to these samples
            with accelerator.accumulate(autoencoder, *([adversary] if is_adversarial else [])):
                images = to_pixels(batch["images"])  # (B, 3, H, W) in [-1, 1]
                noise = draws.normal("posterior", model.latent_shape(images))  # (B, C, h, w)
                reconstruction, kl = autoencoder(images, noise)
                with accelerator.autocast():
                    fit_loss, terms = fit(reconstruction.float(), images)
                terms["kl"] = kl.mean()
                loss = fit_loss + kl_weight * terms["kl"]
                if is_adversarial:
                    critic.requires_grad_(False)  # what it says of a reconstruction moves the autoencoder, not itself
                    terms["generator_loss"] = generator_loss(critic(reconstruction))
                    critic.requires_grad_(True)
                    critic.measure(fit_loss, terms["generator_loss"], model.last_layer)
                    loss = loss + args.disc_weight * critic.adaptive_weight * terms["generator_loss"]
                    terms["adaptive_weight"] = critic.adaptive_weight
                accelerator.backward(loss)
                if is_adversarial:
                    logits = adversary(torch.cat([images, reconstruction.detach()]))  # one pass: one sync under DDP
                    real_loss, fake_loss = discriminator_losses(*logits.chunk(2))
                    disc_loss = (real_loss + fake_loss) / 2
                    accelerator.backward(disc_loss)
                    terms |= {"disc_loss_real": real_loss, "disc_loss_fake": fake_loss}
                step_log.add(loss, **terms)
                if accelerator.sync_gradients:
                    grad_norm = clip_grad_norm_(accelerator, autoencoder.parameters(), args.max_grad_norm)
                    to_be_finite = step_log.step_loss
                    if is_adversarial:
                        to_be_finite = to_be_finite + clip_grad_norm_(
                            accelerator, adversary.parameters(), args.max_grad_norm
                        )
                    moved = control.may_step(to_be_finite, grad_norm)
                    if moved or accelerator.scaler is not None:  # the scaler of fp16 skips, and must know that it did
                        optimizer.step()
                    optimizer.zero_grad()
                    if is_adversarial and moved:
                        disc_optimizer.step()
                        critic.rebalance(partial(accelerator.reduce, reduction="mean"))
                    if is_adversarial:
                        disc_optimizer.zero_grad()
                        critic.gradients.clear()
        if ema is not None and moved:
            ema.step(global_step)
        step_log.step_done(moved)

        done = global_step + 1
        if control.is_due(args.logging_steps, or_stopped=True):
            step_log.flush(learning_rate, done)
        if control.is_due(args.validation_steps):
            with averaged_weights(run, model, ema):
                validation.run(model, done)
        if control.is_due(args.checkpointing_steps, or_stopped=True):  # last: a resumed run repeats nothing
            saver.save(done)
    step_log.close()  # and says how the run ended

    # Export
    accelerator.wait_for_everyone()
    if run.is_main and not control.interrupted:
        with averaged_weights(run, model, ema):
            statistics = vae_training.measure_latents(
                model.vae, data.train, args.num_statistics_samples, args.train_batch_size, accelerator.device
            )
            vae_training.save_vae(model.vae, statistics, run.folder / "vae")
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main, parse_args)
