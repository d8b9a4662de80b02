"""Measures a few training steps on this machine and writes the config that fills the hours there are.

    python plan_budget.py --config configs/image/text_to_image_32gb.yaml --hours 168 --dataset_size 1000000
    accelerate launch train_text_to_image_ldm.py --config plan.yaml --train_data_dir photos --output_dir runs/mine

Takes the flags of both trainers of latent diffusion, and no data: latents and conditions are random numbers of the
shapes that --latents_dir or --resolution tells. On CUDA the largest micro-batch that fits is taken, elsewhere the
quickest. docs/scale.md extends this to many GPUs and many images.
"""

import argparse
from pathlib import Path

from utils.args import checks as arg_checks
from utils.args import groups as shared
from utils.args.parsing import parse_with_config, required, run_script
from utils.errors import UserError
from utils.image.args import data, text, validation
from utils.image.args import data as input_args
from utils.image.args import model as args_model
from utils.plan import args as plan_args


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    plan_flags = plan_args.add_plan_args(parser)
    plan_args.add_trainer_args(parser)
    shared.add_run_args(parser)
    args_model.add_model_args(parser)
    shared.add_lora_args(parser)
    shared.add_objective_args(parser)
    shared.add_optimizer_args(parser)
    shared.add_ema_args(parser)
    shared.add_power_ema_args(parser)
    validation.add_evaluation_args(parser)
    validation.add_validation_args(parser, "prompts or labels")
    input_args.add_dataset_args(parser)
    text.add_condition_args(parser)
    input_args.add_cache_args(parser)
    args = parse_with_config(parser)
    required(args, "hours")
    data.check_codec_args(args)
    plan_args.check_plan_args(args)
    arg_checks.check_lora_args(args)
    arg_checks.check_objective_args(args)
    args_model.check_routing_args(args)
    arg_checks.check_optimizer_args(args)
    arg_checks.check_ema_args(args)
    arg_checks.check_power_ema_args(args)
    arg_checks.check_evaluation_args(args)
    args.given -= {*plan_flags, *plan_args.PLANNED, "config"}  # what goes into the plan's file as it is
    return args


def planned_spec(args: argparse.Namespace):
    """The spec of the cache: that of --latents_dir, or of the one that the flags would make."""
    from utils.latents.spec import LatentSpec
    from utils.plan.instruments import synthetic_spec

    if args.latents_dir:
        return LatentSpec.read(args.latents_dir)
    side = args.resolution // args.vae_factor
    # Supposing a caption of its own for each image: above the limit the text encoder runs in the training loop.
    content = "input_ids" if (args.dataset_size or 0) > args.max_cached_captions else "hidden_states"
    states_shape = (args.sequence_length, args.text_width)
    latent_shape = (args.latent_channels, side, side)
    return synthetic_spec(latent_shape, args.latent_content or "moments", args.num_classes, states_shape, content)


def main(args: argparse.Namespace) -> None:
    import time

    import torch

    from utils.draws import SampleDraws
    from utils.image import networks as build
    from utils.image.text import load_text_encoder
    from utils.latents.cache import LatentStream
    from utils.plan import arithmetic as planning
    from utils.plan import instruments as measuring
    from utils.training import flops as budget
    from utils.training import optimizers as optimization
    from utils.training import setup

    # Load
    accelerator = setup.make_accelerator(
        mixed_precision=args.mixed_precision, seed=args.seed, allow_tf32=args.allow_tf32
    )
    if accelerator.num_processes > 1:
        raise UserError("plan_budget.py measures one process; start it with python, or with --num_processes 1")
    device = accelerator.device
    memory_limit = measuring.usable_bytes(device, args.memory_gb) * (1 - args.memory_margin)
    spec = planned_spec(args)
    cache = measuring.SyntheticCache(spec)
    objective, _ = setup.make_objective(args, device)
    condition = "none" if args.unconditional else args.trainer
    denoiser = build.build_denoiser(args, cache, condition)
    encodes_in_loop = condition == "text" and cache.caption_content == "input_ids"
    if encodes_in_loop:
        names = (args.pretrained_text_encoder_name_or_path, args.text_encoder_library, args.tokenizer_name)
        text_encoder = load_text_encoder(*names)[1].to(device)
    if args.enable_xformers_memory_efficient_attention:
        optimization.enable_xformers(denoiser.model, device)

    # Prepare
    optimizer = setup.make_optimizer(args, denoiser)
    denoiser, optimizer = accelerator.prepare(denoiser, optimizer)
    model = accelerator.unwrap_model(denoiser)
    ema = setup.make_ema(args, model, args.ema_sigma_rels)  # None without --use_ema
    stream = LatentStream(cache, args.seed)
    denoiser.train()
    startup = measuring.process_age()

    # Loop
    def measure(network: torch.nn.Module, batch_size: int, micro_steps: int, seconds: float = 0.0) -> planning.Pace:
        """The pace of two training steps, or of as many as take `seconds`, after one that is not counted."""
        accelerator.gradient_accumulation_steps, accelerator.step = micro_steps, 0
        optimizer.zero_grad()
        clock, started = measuring.StageClock(device), time.perf_counter()
        while len(clock.steps) < 3 or time.perf_counter() - started < seconds:
            clock.start_step()
            for _ in range(micro_steps):
                batch = stream.__getitems__(list(range(batch_size)))
                draws = SampleDraws(args.seed, batch.pop("positions"), device)
                draws.seed_dropout()
                batch = {name: tensor.to(device) for name, tensor in batch.items()}
                if encodes_in_loop:
                    with torch.no_grad(), accelerator.autocast():
                        batch["encoder_hidden_states"] = text_encoder(batch["input_ids"])[0]  # (B, S, D)
                with accelerator.accumulate(network):
                    latents = cache.normalise(batch, draws)  # (B, C, H, W)
                    noise = objective.sample_noise(latents, draws)  # (B, C, H, W)
                    timesteps = objective.sample_timesteps(draws.uniform("timestep"))  # (B,)
                    noisy_latents = objective.add_noise(latents, objective.perturb(noise, draws), timesteps)
                    drop = model.draw_drop(draws, args.cond_drop_prob)  # (B,), once a sample
                    kept_tokens = model.draw_kept_tokens(draws, args.tread_ratio)  # (B, K) or None
                    clock.end_stage("other")
                    model_pred = network(noisy_latents, timesteps, batch, drop, kept_tokens)
                    target = objective.target(latents, noise, timesteps)
                    loss = objective.loss(model_pred, target, timesteps, batch.get("attention_mask"))
                    accelerator.backward(loss)
                    clock.end_stage("forward + backward")
                    if accelerator.sync_gradients:
                        grad_norm = optimization.clip_grad_norm_(accelerator, network.parameters(), args.max_grad_norm)
                        torch.isfinite(loss.detach() + grad_norm).item()  # the trainers wait for the device here too
                        optimizer.step()
                        optimizer.zero_grad()
                        clock.end_stage("optimizer")
            if ema is not None:
                ema.step(len(clock.steps))
                clock.end_stage("EMA")
        return clock.pace(micro_steps)

    def pace_of(batch_size: int) -> planning.Pace | None:
        """Of a micro-batch; with two, where there will be more, because gradients then stay in memory in between."""
        micro_steps = 1 if batch_size >= args.effective_batch_size else 2
        return measuring.pace_or_none(lambda: measure(denoiser, batch_size, micro_steps), device)

    effective = args.effective_batch_size
    limit = args.max_micro_batch_size or effective
    largest = planning.find_micro_batch(pace_of, effective, limit, memory_limit, by_memory=device.type == "cuda")
    batch_size, micro_steps = planning.settle_batch(effective, largest)
    network = denoiser
    if args.torch_compile:
        network = torch.compile(denoiser)
        startup += measuring.seconds_of(lambda: measure(network, batch_size, 1), device, warm_up=0)
    pace = measure(network, batch_size, min(micro_steps, 2), args.measure_seconds)

    # Export
    place = measuring.existing_folder(Path(args.output_dir or "."))
    state_bytes = measuring.tensor_bytes([model.state_dict(), optimizer.state_dict(), ema and ema.shadows])
    write_seconds = measuring.write_seconds(place, state_bytes)
    grid = measuring.guided_batch(cache, args.num_validation_images, args.validation_guidance_scale, device)
    with torch.no_grad(), accelerator.autocast():
        denoise_seconds = measuring.seconds_of(lambda: model(*grid), device)
        settings = (args.eval_batch_size, args.validation_inference_steps, args.eval_guidance_scale, device)
        evaluation = measuring.evaluation_seconds(model, cache, *plan_args.evaluated(args), *settings)
    rows = plan_args.validation_rows(args, spec.labels["num_classes"] if spec.labels else 0)
    precompute = precompute_seconds(args, accelerator) if args.measure_precompute else 0.0
    overheads = planning.Overheads(
        once=startup + precompute + write_seconds,  # the export writes a little less than a checkpoint
        checkpoint=write_seconds,
        validation=rows * args.validation_inference_steps * denoise_seconds,
        evaluation=evaluation,
    )
    step_seconds = pace.step_seconds(micro_steps)
    args.train_batch_size, args.gradient_accumulation_steps, args.max_train_hours = batch_size, micro_steps, args.hours
    args.max_train_steps = planning.planned_steps(
        args.hours,
        step_seconds,
        overheads,
        args.checkpointing_steps,
        args.validation_steps,
        eval_steps=args.eval_steps,
    )
    num_text_tokens = spec.captions["shape"][0] if condition == "text" else 0
    flops = budget.training_flops(model, spec.shape, num_text_tokens, args.tread_ratio)
    peak = budget.peak_flops(device, accelerator.mixed_precision)
    samples = batch_size * micro_steps
    mfu = budget.model_flops_utilisation(samples / step_seconds, flops, peak)
    stages = ", ".join(f"{name} {seconds / step_seconds:.0%}" for name, seconds in pace.stages(micro_steps).items())
    size = setup.millions_of_parameters(model)
    report = [
        f"{args.trainer} trainer on {measuring.name_of(device)}, precision {accelerator.mixed_precision}",
        f"model: {args.model} of {size:.1f}M parameters, {flops / 1e9:.4g} GFLOP a sample",
        f"batch: {batch_size} x {micro_steps} accumulated = {samples} samples a step",
        f"memory: {planning.readable(pace.peak_bytes)} at most, {planning.readable(memory_limit)} allowed",
        f"speed: {samples / step_seconds:.4g} samples/s, {step_seconds:.4g} s a step ({stages})",
        f"MFU: {mfu:.1%} of {peak.flops / 1e12:.4g} TFLOP/s ({peak.source})",
        f"not training: start, precompute and export {overheads.once:.1f} s, each checkpoint {write_seconds:.1f} s, "
        f"each validation {overheads.validation:.1f} s, each evaluation {evaluation:.1f} s (without the VAE)",
        f"plan: {args.max_train_steps} steps of {args.hours:g} h, {args.max_train_steps * samples} samples, "
        f"{args.max_train_steps * step_seconds / 36 / args.hours:.1f} % of the time in training steps",
        f"schedule: {args.lr_scheduler} after a warm-up of {args.lr_warmup_steps / args.max_train_steps:.2%} of "
        f"the steps, {args.max_train_steps // args.logging_steps} values in the log",
        f"disk: {planning.readable(state_bytes)} for each of {args.checkpoints_total_limit} checkpoints",
        *plan_args.dataset_lines(args, spec, args.max_train_steps * samples),
    ]
    print("\n".join(report))
    plan_args.write_config(args, report)
    print(f"wrote {args.output_config}: give it to {plan_args.SCRIPTS[args.trainer]} as --config")


def precompute_seconds(args: argparse.Namespace, accelerator) -> float:
    """Estimate for the cache of --dataset_size images, with a caption of its own for each, but for their decoding."""
    from utils.image import precompute
    from utils.plan import instruments as measuring

    with_text = args.trainer == "text"
    encoders = precompute.load_encoders(args, has_captions=with_text)
    per_image = measuring.encoding_seconds(
        encoders, args.resolution, args.random_flip, args.encode_batch_size, accelerator
    )
    return per_image * (args.dataset_size or args.max_samples)


if __name__ == "__main__":
    run_script(main, parse_args)
