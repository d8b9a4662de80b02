"""Trains a variational autoencoder of crystals from scratch: a latent for each atom.

    accelerate launch train_crystal_vae.py --dataset_name mp_20.parquet --output_dir runs/crystals/vae
    accelerate launch train_crystal_vae.py --config configs/crystal/perov5_vae.yaml --dataset_name perov_5.parquet ...

Leaves OUTPUT_DIR/vae, with the mean and std of its latents measured and stored in its config: give OUTPUT_DIR to
precompute_latents.py --modality crystal as --pretrained_vae_model_name_or_path.
"""

import argparse
from pathlib import Path

from utils.args import checks as arg_checks
from utils.args import groups as shared
from utils.args.parsing import parse_with_config, required, run_script
from utils.crystal import args as crystal_args


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    crystal_args.add_crystal_data_args(parser)
    crystal_args.add_kept_out_args(parser)
    crystal_args.add_crystal_vae_args(parser)
    crystal_args.add_crystal_validation_args(parser)
    shared.add_run_args(parser)
    shared.add_optimizer_args(parser)
    shared.add_ema_args(parser)
    args = parse_with_config(parser)
    required(args, "output_dir")
    arg_checks.check_run_args(args)
    arg_checks.check_optimizer_args(args)
    arg_checks.check_ema_args(args)
    crystal_args.check_crystal_data_args(args)
    return args


def main(args: argparse.Namespace) -> None:
    import torch
    from tqdm.auto import tqdm

    from utils.crystal.data.table import CrystalStream, translated
    from utils.crystal.setup import open_crystal_data
    from utils.crystal.vae import training as crystal_training
    from utils.crystal.vae.network import CRYSTAL_VAE_SIZES, CrystalVAE
    from utils.draws import SampleDraws
    from utils.latents.posterior import kl_to_standard_normal, kl_weight_at
    from utils.tensor_ops import masked_mean
    from utils.training import ema as training_ema
    from utils.training import optimizers as optimization
    from utils.training import setup as run
    from utils.training.checkpoints import Checkpoints
    from utils.training.ema import EMA
    from utils.training.step_log import StepLog

    # Load
    output_dir = Path(args.output_dir)
    accelerator = run.make_accelerator(args, output_dir)
    run.check_output_dir(output_dir, args.resume_from_checkpoint, accelerator)
    data = open_crystal_data(args)
    fit = crystal_training.ReconstructionLoss(
        element=args.element_weight,
        coordinate=args.coordinate_weight,
        length=args.length_weight,
        angle=args.angle_weight,
    )
    reconstructions = crystal_training.Reconstructions(
        accelerator, data.validation, args.num_validation_crystals, args.num_match_processes
    )

    # Prepare
    size = CRYSTAL_VAE_SIZES[args.vae_size]
    autoencoder = CrystalVAE(**size._asdict(), latent_channels=args.latent_channels, max_atoms=args.max_atoms)
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
    run_identity = run.identity_of(args, model, data.identity, accelerator)
    saver = Checkpoints(
        accelerator, output_dir, autoencoder, optimizer, ema, run_identity, args.checkpoints_total_limit
    )
    first_step = saver.resume(args.resume_from_checkpoint)
    run.save_args(args, output_dir, accelerator)
    if args.torch_compile:
        autoencoder = torch.compile(autoencoder)
    batches = iter(run.make_loader(CrystalStream(data.train, args.seed), args, accelerator, first_step))
    run.announce(args, accelerator, model, len(data.train), first_step)
    control = run.make_control(args, accelerator, output_dir, first_step)
    step_log = StepLog(accelerator, control, run.samples_per_step(args, accelerator))
    progress = tqdm(
        total=args.max_train_steps, initial=first_step, unit="step", disable=not accelerator.is_main_process
    )

    # Loop
    figures: dict[str, float] = {}
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
        kl_weight = kl_weight_at(global_step, args.kl_weight, args.kl_warmup_steps)
        for _ in range(args.gradient_accumulation_steps):
            batch = run.to_device(next(batches), accelerator.device)
            draws = SampleDraws(args.seed, batch.pop("positions"), accelerator.device)
            with accelerator.accumulate(autoencoder):
                if args.random_translation:
                    batch["frac_coords"] = translated(batch["frac_coords"], draws)  # (B, N, 3)
                mask = batch["attention_mask"]  # (B, N), True = atom
                noise = draws.normal("posterior", (*mask.shape, args.latent_channels))  # (B, N, D)
                prediction, posterior = autoencoder(batch, noise)
                fit_loss, terms = fit(prediction, batch)
                terms["kl"] = masked_mean(kl_to_standard_normal(posterior.mean, posterior.logvar), mask).mean()
                loss = fit_loss + kl_weight * terms["kl"]
                accelerator.backward(loss)
                step_log.add(loss, **terms)
                if accelerator.sync_gradients:
                    grad_norm = optimization.clip_grad_norm_(accelerator, autoencoder.parameters(), args.max_grad_norm)
                    moved = control.may_step(step_log.step_loss, grad_norm)
                    if moved or accelerator.scaler is not None:  # the scaler of fp16 skips, and must know that it did
                        optimizer.step()
                    optimizer.zero_grad()
        if ema is not None and moved:
            ema.step(global_step)
        progress.update()

        done = global_step + 1
        step_log.step_done(moved, args.gradient_accumulation_steps)
        if done % args.logging_steps == 0 or control.is_last:
            progress.set_postfix(step_log.flush(learning_rate, done))
        if done % args.checkpointing_steps == 0 or control.is_last:
            saver.save(done)
        if done % args.validation_steps == 0 or control.is_finished:
            with training_ema.averaged_weights(accelerator, model, ema):
                figures = reconstructions.run(model, done)
    progress.close()
    control.say_how_it_ended()

    # Export
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not control.interrupted:
        with training_ema.averaged_weights(accelerator, model, ema):
            figures = figures or reconstructions.run(model, first_step)  # of a run that had no step left
            statistics = crystal_training.measure_latents(model, data.train)
            crystal_training.save_vae(model, statistics, figures, output_dir / "vae")
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main, parse_args)
