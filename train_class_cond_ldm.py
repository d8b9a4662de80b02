"""Trains a class-conditional or unconditional latent diffusion model from scratch.

    accelerate launch train_class_cond_ldm.py --latents_dir cache --output_dir runs/mine --model dit --model_size B/2
    accelerate launch train_class_cond_ldm.py --config configs/image/cifar10_unet.yaml \\
        --dataset_name uoft-cs/cifar10 ...

From a latent cache (see precompute_latents.py), or from a dataset, whose cache is then made first. Leaves a run's
folder that sample.py and diffusers load.
"""

import argparse

from utils.args.parsing import non_negative_int, parse_with_config, run_script
from utils.image.args.data import check_condition_column
from utils.image.args.trainer import add_image_trainer_args, check_image_trainer_args


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--unconditional",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="Train without labels, even if the data have some.",
    )
    parser.add_argument(
        "--validation_labels",
        nargs="+",
        type=non_negative_int,
        default=None,
        help="Class labels to sample during training. Default: the first ten.",
    )
    add_image_trainer_args(parser, condition="label", samples="labels")
    args = parse_with_config(parser)
    check_image_trainer_args(args)
    if not args.unconditional:
        check_condition_column(args, "label_column")
    return args


def main(args: argparse.Namespace) -> None:
    import torch

    from utils.image import setup as image
    from utils.image import validation
    from utils.latents.cache import LatentStream
    from utils.training import setup
    from utils.training.checkpoints import Checkpoints
    from utils.training.ema import averaged_weights
    from utils.training.flops import training_flops
    from utils.training.lora import identity_of
    from utils.training.optimizers import clip_grad_norm_, set_learning_rate
    from utils.training.step_log import StepLog

    # Load
    run = setup.start(args)  # refuses a folder that is taken
    accelerator = run.accelerator
    cache = image.open_cache(args, run)
    held_out = setup.open_held_out(args, cache)  # None without --eval_steps
    objective, scheduler = setup.make_objective(args, run.device)
    condition = "none" if args.unconditional else "class"
    denoiser = image.make_denoiser(args, run, cache, condition)
    exporter = image.make_exporter(args, cache, scheduler, condition)
    labels, label_names = image.validation_labels(args, cache.spec.labels), (cache.spec.labels or {}).get("names")
    grids = validation.Grids(run, exporter, num_images=args.num_validation_images, **setup.validation_sampling(args))
    sample_distance = image.make_sample_distance(args, run, exporter, held_out, condition)
    num_rows = cache.spec.num_rows - (args.num_validation_samples or 0)  # that are trained on

    # Prepare
    optimizer = setup.make_optimizer(args, denoiser)
    flops = training_flops(denoiser, cache.spec.shape, tread_ratio=args.tread_ratio)  # of a sample
    denoiser, optimizer = accelerator.prepare(denoiser, optimizer)
    model = accelerator.unwrap_model(denoiser)
    ema = setup.make_ema(args, model, args.ema_sigma_rels)  # None without --use_ema
    identity = setup.identity_of(args, run, model, cache.identity(), **identity_of(model.model))
    saver = Checkpoints(run, denoiser, optimizer, ema, identity=identity, keep=args.checkpoints_total_limit)
    first_step = saver.resume(args.resume_from_checkpoint)
    evaluator = setup.make_evaluator(
        args,
        run,
        held_out=held_out,
        objective=objective,
        write_model=exporter.write,
        first_step=first_step,
        best_metric=args.best_metric,
        sample_metric=sample_distance,
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
    step_log = StepLog(run, control, setup.samples_per_step(args, run), flops_per_sample=flops)

    # Loop
    denoiser.train()
    for global_step in control.steps():
        learning_rate = schedule.at(global_step, control.time_share)
        set_learning_rate(optimizer, learning_rate)
        for _ in range(args.gradient_accumulation_steps):
            batch, draws = next(batches)  # draws: all random numbers that belong to these samples
            with accelerator.accumulate(denoiser):
                latents = cache.normalise(batch, draws)  # (B, C, H, W)
                noise = objective.sample_noise(latents, draws)  # (B, C, H, W)
                timesteps = objective.sample_timesteps(draws.uniform("timestep"))  # (B,)
                noisy_latents = objective.add_noise(latents, objective.perturb(noise, draws), timesteps)
                drop = model.draw_drop(draws, args.cond_drop_prob)  # (B,), once a sample
                kept_tokens = model.draw_kept_tokens(draws, args.tread_ratio)  # (B, K) or None
                model_pred = denoiser(noisy_latents, timesteps, batch, drop, kept_tokens)
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
                grids.save(averaged, done, class_labels=labels, label_names=label_names)
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
