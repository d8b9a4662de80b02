"""Trains a latent diffusion model of crystals from scratch: sets of atoms, unconditional or on what is known of them.

    accelerate launch train_crystal_ldm.py --latents_dir cache --output_dir runs/crystals/ldm
    accelerate launch train_crystal_ldm.py --latents_dir cache --condition composition property:gap --output_dir ...
    accelerate launch train_crystal_ldm.py --pretrained_model_name_or_path runs/crystals/ldm --lora_rank 16 ...

From a latent cache (precompute_latents.py --modality crystal). Leaves a run's folder that sample.py and evaluate.py
load.
"""

import argparse

from utils.args import checks as arg_checks
from utils.args import columns as condition_args
from utils.args import groups as shared
from utils.args.parsing import parse_with_config, required, run_script
from utils.crystal import args as crystal_args


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents_dir", default=None, help="Latent cache of crystals.")
    crystal_args.add_crystal_model_args(parser)
    shared.add_denoiser_args(parser)
    shared.add_validation_loss_args(parser)
    crystal_args.add_crystal_samples_args(parser)
    args = parse_with_config(parser)
    required(args, "output_dir", "latents_dir")
    arg_checks.check_denoiser_args(args)
    condition_args.check_column_condition_args(args)
    crystal_args.check_learned_variance(args)
    return args


def main(args: argparse.Namespace) -> None:
    import torch

    from utils.crystal import setup as crystal
    from utils.crystal.validation import CrystalSamples
    from utils.latents.cache import LatentStream
    from utils.training import setup
    from utils.training.checkpoints import Checkpoints
    from utils.training.ema import averaged_weights
    from utils.training.lora import identity_of
    from utils.training.optimizers import clip_grad_norm_, set_learning_rate
    from utils.training.step_log import StepLog

    # Load
    run = setup.start(args)  # refuses a folder that is taken
    accelerator = run.accelerator
    cache = crystal.open_set_cache(args)
    held_out = setup.open_held_out(args, cache)  # None without --eval_steps
    objective, scheduler = setup.make_objective(args, run.device, args.learned_variance)
    denoiser = crystal.build_set_denoiser(args, cache)
    exporter = crystal.make_exporter(args, cache, scheduler)
    samples = CrystalSamples(
        run, exporter, cache, num_crystals=args.num_validation_crystals, **setup.validation_sampling(args)
    )
    num_rows = cache.spec.num_rows - (args.num_validation_samples or 0)  # that are trained on

    # Prepare
    optimizer = setup.make_optimizer(args, denoiser)
    denoiser, optimizer = accelerator.prepare(denoiser, optimizer)
    model = accelerator.unwrap_model(denoiser)
    ema = setup.make_ema(args, model, args.ema_sigma_rels)  # None without --use_ema
    identity = setup.identity_of(args, run, model, cache.identity(), **identity_of(model.model))
    identity["conditions"] = sorted(args.condition or [])
    saver = Checkpoints(run, denoiser, optimizer, ema, identity=identity, keep=args.checkpoints_total_limit)
    first_step = saver.resume(args.resume_from_checkpoint)
    evaluator = setup.make_evaluator(
        args,
        run,
        held_out=held_out,
        objective=objective,
        write_model=exporter.write,
        first_step=first_step,
    )
    setup.save_args(args, run)  # nothing was written until all was found to fit
    if run.is_main:
        exporter.save_frozen(run.folder, model)
    if args.torch_compile:
        denoiser = torch.compile(denoiser)
    stream = LatentStream(cache, args.seed, held_out and held_out.training_rows)
    batches = setup.make_batches(args, run, stream, first_step)
    setup.announce(args, run, model, num_rows, first_step)
    control = setup.make_control(args, run, first_step, evaluator)  # takes SIGTERM and SIGINT from here on
    schedule = setup.make_schedule(args)
    step_log = StepLog(run, control, setup.samples_per_step(args, run))

    # Loop
    denoiser.train()
    for global_step in control.steps():
        learning_rate = schedule.at(global_step, control.time_share)
        set_learning_rate(optimizer, learning_rate)
        for _ in range(args.gradient_accumulation_steps):
            batch, draws = next(batches)  # draws: all random numbers that belong to these samples
            with accelerator.accumulate(denoiser):
                latents = cache.normalise(batch, draws)  # (B, N, D)
                noise = objective.sample_noise(latents, draws)  # (B, N, D)
                timesteps = objective.sample_timesteps(draws.uniform("timestep"))  # (B,)
                noisy_latents = objective.add_noise(latents, objective.perturb(noise, draws), timesteps)
                drop = model.draw_drop(draws, args.cond_drop_prob)  # (B,), or (B, K) of K conditions
                model_pred = denoiser(noisy_latents, timesteps, batch, drop)
                target = objective.target(latents, noise, timesteps)
                loss = objective.loss(model_pred, target, timesteps, batch.get("attention_mask"))
                accelerator.backward(loss)
                step_log.add(loss)
                if accelerator.sync_gradients:
                    grad_norm = clip_grad_norm_(accelerator, denoiser.parameters(), args.max_grad_norm)
                    moved = control.may_step(step_log.step_loss, grad_norm)
                    if moved or accelerator.scaler is not None:  # the scaler of fp16 skips, and must know that it did
                        optimizer.step()
                    optimizer.zero_grad()
        if ema is not None and moved:
            ema.step(global_step)
        step_log.step_done(moved)

        done = global_step + 1
        if control.is_due(args.eval_steps):
            with averaged_weights(run, model, ema) as averaged:
                evaluator.evaluate(averaged, done)
            control.end_early(evaluator.reason_to_end)
        if control.is_due(args.logging_steps, or_stopped=True):
            step_log.flush(learning_rate, done)
        if ema is not None and control.is_due(args.ema_snapshot_steps):
            ema.save_snapshots(run, done)  # before the checkpoint, from which a run resumes
        if control.is_due(args.validation_steps):
            with averaged_weights(run, model, ema) as averaged:
                samples.save(averaged, done)
        if control.is_due(args.checkpointing_steps, or_stopped=True):  # last: a resumed run repeats nothing
            saver.save(done)
    step_log.close()  # and says how the run ended

    # Export
    accelerator.wait_for_everyone()
    with averaged_weights(run, model, ema) as averaged:
        if run.is_main and not control.interrupted:
            exporter.write(run.folder, averaged, control.steps_done)
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main, parse_args)
