"""Trains a latent diffusion model of single cells from scratch: latent and library size together, on any columns of
obs or on nothing.

    accelerate launch train_expression_ldm.py --latents_dir cache --condition class:cell_type --output_dir runs/ldm
    accelerate launch train_expression_ldm.py --latents_dir cache --condition class:donor property:age --output_dir ...
    accelerate launch train_expression_ldm.py --pretrained_model_name_or_path runs/ldm --joint_vae \\
        --dataset_name pbmc.h5ad --latents_dir cache --condition class:cell_type --output_dir runs/joint

From a latent cache (precompute_latents.py --modality expression). Leaves a run's folder that sample.py and evaluate.py
load. With --joint_vae the autoencoder is trained on with its denoiser.
"""

import argparse
from pathlib import Path

from utils.args import checks as arg_checks
from utils.args import columns as condition_args
from utils.args import groups as shared
from utils.args.parsing import parse_with_config, required, run_script
from utils.expression import args as expression_args


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents_dir", default=None, help="Latent cache of cells.")
    expression_args.add_vector_model_args(parser)
    condition_args.add_column_condition_args(parser, "class:COLUMN (any values), property:COLUMN (a number)")
    expression_args.add_joint_args(parser)
    shared.add_run_args(parser)
    shared.add_lora_args(parser)
    shared.add_objective_args(parser)
    shared.add_optimizer_args(parser)
    shared.add_ema_args(parser)
    shared.add_power_ema_args(parser)
    shared.add_validation_loss_args(parser)
    expression_args.add_expression_samples_args(parser)
    args = parse_with_config(parser)
    required(args, "output_dir", "latents_dir")
    arg_checks.check_denoiser_args(args)
    condition_args.check_column_condition_args(args)
    expression_args.check_joint_args(args)
    return args


def main(args: argparse.Namespace) -> None:
    import torch
    from tqdm.auto import tqdm

    from utils.diffusion.denoiser import draw_drops
    from utils.draws import SampleDraws
    from utils.expression import pipeline as expression_pipeline
    from utils.expression import setup as expression_runs
    from utils.expression.cache import encode_jointly
    from utils.expression.vae.training import measure_latents
    from utils.expression.validation import CellSamples
    from utils.latents.cache import LatentStream
    from utils.training import ema as training_ema
    from utils.training import evaluator as evaluation
    from utils.training import optimizers as optimization
    from utils.training import setup
    from utils.training import setup as run
    from utils.training.checkpoints import Checkpoints
    from utils.training.ema import EMA
    from utils.training.lora import identity_of
    from utils.training.step_log import StepLog

    # Load
    output_dir = Path(args.output_dir)
    accelerator = run.make_accelerator(args, output_dir)
    run.check_output_dir(output_dir, args.resume_from_checkpoint, accelerator)
    cache = expression_runs.open_vector_cache(args)
    objective, scheduler = setup.build_objective(args, accelerator.device)
    denoiser = expression_runs.build_vector_denoiser(args, cache)
    pipeline = expression_pipeline.make_pipeline(denoiser, cache, scheduler)
    if args.joint_vae:
        denoiser = expression_runs.join(args, denoiser, pipeline.vae, cache)
    held_out = setup.open_held_out(args, cache)
    num_rows = cache.spec.num_rows - (args.num_validation_samples or 0)  # that are trained on
    samples = CellSamples(
        accelerator,
        pipeline,
        cache,
        output_dir / "samples",
        args.num_validation_cells,
        args.validation_guidance_scale,
        args.validation_inference_steps,
    )

    def write_model(folder: Path, weights, num_steps: int) -> None:
        card = expression_pipeline.model_card(
            cache.spec, num_rows, args.condition or [], num_steps, args.use_ema, args.pretrained_model_name_or_path
        )
        if args.joint_vae:
            measure_latents(pipeline.vae, cache.cells, cache.batch_index)
        expression_pipeline.export_run(folder, weights, pipeline, cache.spec, card)

    # Prepare
    optimizer = optimization.make_optimizer(
        denoiser,
        args.learning_rate,
        (args.adam_beta1, args.adam_beta2),
        args.adam_weight_decay,
        args.adam_epsilon,
        args.optimizer,
        {"vae.": {"lr_scale": args.vae_learning_rate / args.learning_rate}} if args.joint_vae else None,
    )
    denoiser, optimizer = accelerator.prepare(denoiser, optimizer)
    model = accelerator.unwrap_model(denoiser)
    ema = EMA(model, args.ema_decay, args.ema_sigma_rels or ()) if args.use_ema else None
    run_identity = run.identity_of(args, model, cache.identity(), accelerator) | identity_of(model.model)
    run_identity |= {"conditions": sorted(args.condition or []), "joint_vae": args.joint_vae}
    saver = Checkpoints(accelerator, output_dir, denoiser, optimizer, ema, run_identity, args.checkpoints_total_limit)
    first_step = saver.resume(args.resume_from_checkpoint)
    evaluator = None
    if held_out is not None:
        evaluator = evaluation.Evaluator(
            accelerator,
            output_dir,
            held_out,
            objective,
            write_model,
            first_step,
            args.eval_batch_size,
            "loss",
            args.early_stopping_patience,
            args.early_stopping_min_delta,
        )
    run.save_args(args, output_dir, accelerator)  # nothing was written until all was found to fit
    if accelerator.is_main_process and not (args.joint_vae and first_step):  # whose autoencoder is not frozen
        expression_pipeline.save_frozen_parts(output_dir, pipeline, cache.spec)
    if args.torch_compile:
        denoiser = torch.compile(denoiser)
    stream = LatentStream(cache, args.seed, None if held_out is None else held_out.training_rows)
    batches = iter(run.make_loader(stream, args, accelerator, first_step))
    run.announce(args, accelerator, model, num_rows, first_step)
    control = run.make_control(args, accelerator, output_dir, first_step)
    if evaluator is not None:
        control.end_early(evaluator.reason_to_end)  # which a run that went on may have reached already
    step_log = StepLog(accelerator, control, run.samples_per_step(args, accelerator))
    progress = tqdm(
        total=args.max_train_steps, initial=first_step, unit="step", disable=not accelerator.is_main_process
    )

    # Loop
    denoiser.train()
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
            draws.seed_dropout()
            with accelerator.accumulate(denoiser):
                if args.joint_vae:
                    latents, nll, kl = encode_jointly(denoiser, cache, batch, draws, args.joint_latents == "live")
                else:
                    latents = cache.normalise(batch, draws)  # (B, D)
                noise = objective.sample_noise(latents, draws)  # (B, D)
                timesteps = objective.sample_timesteps(draws.uniform("timestep"))  # (B,)
                noisy_latents = objective.add_noise(latents, objective.perturb(noise, draws), timesteps)
                drop = draw_drops(draws, args.cond_drop_prob, list(cache.conditions))  # (B,) or (B, K)
                model_pred = denoiser(noisy_latents, timesteps, batch, drop)
                target = objective.target(latents, noise, timesteps)
                loss, terms = objective.loss(model_pred, target, timesteps), {}
                if args.joint_vae:  # one backward for both: the encoder's graph is there once
                    terms = {"diffusion_loss": loss, "nll": nll.mean(), "kl": kl.mean()}
                    loss = loss + (terms["nll"] + args.kl_weight * terms["kl"]) / len(pipeline.genes)
                accelerator.backward(loss)
                step_log.add(loss, **terms)
                if accelerator.sync_gradients:
                    grad_norm = optimization.clip_grad_norm_(accelerator, denoiser.parameters(), args.max_grad_norm)
                    moved = control.may_step(step_log.step_loss, grad_norm)
                    if moved or accelerator.scaler is not None:  # the scaler of fp16 skips, and must know that it did
                        optimizer.step()
                    optimizer.zero_grad()
        if ema is not None and moved:
            ema.step(global_step)
        progress.update()

        done = global_step + 1
        step_log.step_done(moved, args.gradient_accumulation_steps)
        if evaluator is not None and (done % args.eval_steps == 0 or control.is_finished):
            with training_ema.averaged_weights(accelerator, model, ema) as averaged:
                evaluator.evaluate(averaged, done)
            control.end_early(evaluator.reason_to_end)
        if done % args.logging_steps == 0 or control.is_last:
            progress.set_postfix(step_log.flush(learning_rate, done))
        if ema is not None and (done % args.ema_snapshot_steps == 0 or control.is_finished):
            ema.save_snapshots(accelerator, output_dir, done)  # before the checkpoint: a run goes on after that
        if done % args.checkpointing_steps == 0 or control.is_last:
            saver.save(done)
        if done % args.validation_steps == 0 or control.is_finished:
            with training_ema.averaged_weights(accelerator, model, ema) as averaged:
                samples.save(averaged, done)
    progress.close()
    control.say_how_it_ended()

    # Export
    accelerator.wait_for_everyone()
    with training_ema.averaged_weights(accelerator, model, ema) as averaged:
        if accelerator.is_main_process and not control.interrupted:
            write_model(output_dir, averaged, control.steps_done)
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main, parse_args)
