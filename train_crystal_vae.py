"""Trains a variational autoencoder of crystals from scratch: a latent for each atom.

    accelerate launch train_crystal_vae.py --dataset_name mp_20.parquet --output_dir runs/crystals/vae
    accelerate launch train_crystal_vae.py --config configs/crystal/perov5_vae.yaml --dataset_name perov_5.parquet ...

Leaves OUTPUT_DIR/vae, with the mean and std of its latents measured and stored in its config: give OUTPUT_DIR to
precompute_latents.py --modality crystal as --pretrained_vae_model_name_or_path.
"""

import argparse

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
    shared.add_trainer_args(parser)
    args = parse_with_config(parser)
    required(args, "output_dir")
    arg_checks.check_trainer_args(args)
    crystal_args.check_crystal_data_args(args)
    return args


def main(args: argparse.Namespace) -> None:
    import torch

    from utils.crystal.data.table import CrystalStream, translated
    from utils.crystal.setup import open_crystal_data
    from utils.crystal.vae import training as crystal_training
    from utils.crystal.vae.network import CRYSTAL_VAE_SIZES, CrystalVAE
    from utils.latents.posterior import kl_to_standard_normal, kl_weight_at
    from utils.tensor_ops import masked_mean
    from utils.training import setup
    from utils.training.checkpoints import Checkpoints
    from utils.training.ema import averaged_weights
    from utils.training.optimizers import clip_grad_norm_, set_learning_rate
    from utils.training.step_log import StepLog

    # Load
    run = setup.start(args, is_denoiser=False)  # refuses a folder that is taken
    accelerator = run.accelerator
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
    optimizer = setup.make_optimizer(args, autoencoder)
    autoencoder, optimizer = accelerator.prepare(autoencoder, optimizer)
    model = accelerator.unwrap_model(autoencoder)
    ema = setup.make_ema(args, model)  # None without --use_ema
    identity = setup.identity_of(args, run, model, data.identity)
    saver = Checkpoints(run, autoencoder, optimizer, ema, identity=identity, keep=args.checkpoints_total_limit)
    first_step = saver.resume(args.resume_from_checkpoint)
    setup.save_args(args, run)  # nothing was written until all was found to fit
    if args.torch_compile:
        autoencoder = torch.compile(autoencoder)
    batches = setup.make_batches(args, run, CrystalStream(data.train, args.seed), first_step)
    setup.announce(args, run, model, len(data.train), first_step)
    control = setup.make_control(args, run, first_step)  # takes SIGTERM and SIGINT from here on
    schedule = setup.make_schedule(args)
    step_log = StepLog(run, control, setup.samples_per_step(args, run))

    # Loop
    figures: dict[str, float] = {}
    autoencoder.train()
    for global_step in control.steps():
        learning_rate = schedule.at(global_step, control.time_share)
        set_learning_rate(optimizer, learning_rate)
        kl_weight = kl_weight_at(global_step, args.kl_weight, args.kl_warmup_steps)
        for _ in range(args.gradient_accumulation_steps):
            batch, draws = next(batches)  # draws: all random numbers that belong to these samples
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
                    grad_norm = clip_grad_norm_(accelerator, autoencoder.parameters(), args.max_grad_norm)
                    moved = control.may_step(step_log.step_loss, grad_norm)
                    if moved or accelerator.scaler is not None:  # the scaler of fp16 skips, and must know that it did
                        optimizer.step()
                    optimizer.zero_grad()
        if ema is not None and moved:
            ema.step(global_step)
        step_log.step_done(moved)

        done = global_step + 1
        if control.is_due(args.logging_steps, or_stopped=True):
            step_log.flush(learning_rate, done)
        if control.is_due(args.validation_steps):
            with averaged_weights(run, model, ema):
                figures = reconstructions.run(model, done)
        if control.is_due(args.checkpointing_steps, or_stopped=True):  # last: a resumed run repeats nothing
            saver.save(done)
    step_log.close()  # and says how the run ended

    # Export
    accelerator.wait_for_everyone()
    if run.is_main and not control.interrupted:
        with averaged_weights(run, model, ema):
            figures = figures or reconstructions.run(model, first_step)  # of a run that had no step left
            statistics = crystal_training.measure_latents(model, data.train)
            crystal_training.save_vae(model, statistics, figures, run.folder / "vae")
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main, parse_args)
