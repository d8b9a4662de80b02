"""Trains a text-to-image latent diffusion model from scratch.

    accelerate launch train_text_to_image_ldm.py --latents_dir cache --output_dir runs/mine --model dit
    accelerate launch train_text_to_image_ldm.py --config configs/image/text_to_image_32gb.yaml \\
        --train_data_dir photos ...

From a latent cache (see precompute_latents.py), or from a dataset, whose cache is then made first. Leaves a run's
folder that sample.py and diffusers load.
"""

import argparse
from pathlib import Path

from utils.args import groups as shared
from utils.args.parsing import fraction, parse_with_config, required, run_script
from utils.image.args import data, text
from utils.image.args import data as input_args
from utils.image.args import model as args_model
from utils.image.args import validation as args_validation


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--latents_dir", default=None, help="Latent cache. Default with a dataset: OUTPUT_DIR/latents."
    )
    parser.add_argument(
        "--cond_drop_prob",
        type=fraction,
        default=0.1,
        help="Probability of dropping the caption, for classifier-free guidance.",
    )
    parser.add_argument("--validation_prompts", nargs="+", default=None, help="Prompts to sample during training.")
    shared.add_run_args(parser)
    args_model.add_model_args(parser)
    shared.add_lora_args(parser)
    shared.add_objective_args(parser)
    shared.add_optimizer_args(parser)
    shared.add_ema_args(parser)
    shared.add_power_ema_args(parser)
    args_validation.add_evaluation_args(parser)
    args_validation.add_validation_args(parser, "prompts")
    input_args.add_dataset_args(parser)
    text.add_condition_args(parser)
    input_args.add_cache_args(parser)
    args = parse_with_config(parser)
    required(args, "output_dir")
    data.check_codec_args(args)
    args_model.check_image_denoiser_args(args)
    data.check_condition_column(args, "caption_column")
    args_validation.check_validation_args(args)
    return args


def main(args: argparse.Namespace) -> None:
    import torch
    from tqdm.auto import tqdm

    from utils.diffusion.conditions import encode_text
    from utils.draws import SampleDraws
    from utils.image import networks as build
    from utils.image import pipeline as export
    from utils.image import setup as training_data
    from utils.image import validation
    from utils.image.evaluation.features import load_features
    from utils.latents.cache import LatentStream
    from utils.training import ema as training_ema
    from utils.training import evaluator as evaluation
    from utils.training import optimizers as optimization
    from utils.training import setup
    from utils.training import setup as run
    from utils.training.checkpoints import Checkpoints
    from utils.training.ema import EMA
    from utils.training.flops import training_flops
    from utils.training.lora import identity_of
    from utils.training.step_log import StepLog

    # Load
    output_dir = Path(args.output_dir)
    accelerator = run.make_accelerator(args, output_dir)
    run.check_output_dir(output_dir, args.resume_from_checkpoint, accelerator)
    cache = training_data.open_cache(args, accelerator, output_dir)
    objective, scheduler = setup.build_objective(args, accelerator.device)
    condition = "text"
    denoiser = build.build_denoiser(args, cache, condition)
    frozen = export.load_frozen_parts(cache.spec, cache.normalisation, scheduler, with_text=True)
    encodes_in_loop = cache.caption_content == "input_ids"
    if encodes_in_loop:
        frozen.text_encoder.to(accelerator.device)
        null = encode_text(frozen.tokenizer, frozen.text_encoder, [""])
        denoiser.conditions.set_null(null["encoder_hidden_states"][0], int(null["num_tokens"][0]))
    if args.enable_xformers_memory_efficient_attention:
        optimization.enable_xformers(denoiser.model, accelerator.device)
    grids = validation.Grids(
        accelerator,
        frozen,
        output_dir / "samples",
        args.num_validation_images,
        args.validation_guidance_scale,
        args.validation_inference_steps,
    )
    held_out = setup.open_held_out(args, cache)
    num_rows = cache.spec.num_rows - (args.num_validation_samples or 0)  # that are trained on
    sample_distance = None
    if held_out is not None and args.eval_features:
        sample_distance = validation.SampleDistance(
            accelerator,
            frozen,
            held_out,
            load_features(args.eval_features, accelerator.device, "--eval_features"),
            args.eval_metric,
            args.num_eval_images,
            condition,
            args.eval_guidance_scale,
            args.validation_inference_steps,
            args.eval_batch_size,
        )

    def write_model(folder: Path, weights, num_steps: int) -> None:
        settings = (args.prediction_type, num_steps, args.train_batch_size, args.use_ema)
        card = export.model_card(cache.spec, num_rows, *settings, args.pretrained_model_name_or_path)
        export.save_frozen_parts(folder, weights, frozen)
        export.export_run(folder, weights, frozen, card)

    # Prepare
    optimizer = optimization.make_optimizer(
        denoiser,
        args.learning_rate,
        (args.adam_beta1, args.adam_beta2),
        args.adam_weight_decay,
        args.adam_epsilon,
        args.optimizer,
    )
    num_text_tokens = cache.spec.captions["shape"][0]
    flops = training_flops(denoiser, cache.spec.shape, num_text_tokens, args.tread_ratio)  # of a sample
    denoiser, optimizer = accelerator.prepare(denoiser, optimizer)
    model = accelerator.unwrap_model(denoiser)
    ema = EMA(model, args.ema_decay, args.ema_sigma_rels or ()) if args.use_ema else None
    run_identity = run.identity_of(args, model, cache.identity(), accelerator) | identity_of(model.model)
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
            args.best_metric,
            args.early_stopping_patience,
            args.early_stopping_min_delta,
            sample_distance,
            frozen.text_encoder,
        )
    run.save_args(args, output_dir, accelerator)  # nothing was written until all was found to fit
    if accelerator.is_main_process:
        export.save_frozen_parts(output_dir, model, frozen)
    if args.torch_compile:
        denoiser = torch.compile(denoiser)
    stream = LatentStream(cache, args.seed, None if held_out is None else held_out.training_rows)
    batches = iter(run.make_loader(stream, args, accelerator, first_step))
    run.announce(args, accelerator, model, num_rows, first_step)
    control = run.make_control(args, accelerator, output_dir, first_step)
    if evaluator is not None:
        control.end_early(evaluator.reason_to_end)  # which a run that went on may have reached already
    step_log = StepLog(accelerator, control, run.samples_per_step(args, accelerator), flops)
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
            if encodes_in_loop:
                with torch.no_grad(), accelerator.autocast():
                    batch["encoder_hidden_states"] = frozen.text_encoder(batch["input_ids"])[0]  # (B, S, D)
            with accelerator.accumulate(denoiser):
                latents = cache.normalise(batch, draws)  # (B, C, H, W)
                noise = objective.sample_noise(latents, draws)  # (B, C, H, W)
                timesteps = objective.sample_timesteps(draws.uniform("timestep"))  # (B,)
                noisy_latents = objective.add_noise(latents, objective.perturb(noise, draws), timesteps)
                drop = draws.uniform("condition_drop") < args.cond_drop_prob  # (B,), once a sample
                kept_tokens = model.draw_kept_tokens(draws, args.tread_ratio)  # (B, K) or None
                model_pred = denoiser(noisy_latents, timesteps, batch, drop, kept_tokens)
                target = objective.target(latents, noise, timesteps)
                loss = objective.loss(model_pred, target, timesteps)
                accelerator.backward(loss)
                step_log.add(loss)
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
        if args.validation_prompts and (done % args.validation_steps == 0 or control.is_finished):
            with training_ema.averaged_weights(accelerator, model, ema) as averaged:
                grids.save(averaged, done, prompts=args.validation_prompts)
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
