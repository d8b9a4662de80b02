"""Trains a variational autoencoder of single-cell gene expression from scratch: raw counts in, a likelihood out.

    accelerate launch train_expression_vae.py --dataset_name pbmc.h5ad --label_column cell_type --output_dir runs/vae
    accelerate launch train_expression_vae.py --config configs/expression/pbmc_vae.yaml --dataset_name pbmc.h5ad ...

Genes are chosen on the training cells. Leaves OUTPUT_DIR/vae, of the best weights, with the split of the cells and the
statistics of their latents: give OUTPUT_DIR to precompute_latents.py --modality expression as
--pretrained_vae_model_name_or_path.
"""

import argparse
from pathlib import Path

from utils.args import checks as arg_checks
from utils.args import groups as shared
from utils.args.parsing import parse_with_config, required, run_script
from utils.expression import args as expression_args


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    expression_args.add_cell_data_args(parser)
    expression_args.add_gene_args(parser)
    expression_args.add_split_args(parser)
    expression_args.add_expression_vae_args(parser)
    shared.add_run_args(parser)
    shared.add_optimizer_args(parser)
    shared.add_ema_args(parser)
    args = parse_with_config(parser)
    required(args, "output_dir")
    arg_checks.check_run_args(args)
    arg_checks.check_optimizer_args(args)
    arg_checks.check_ema_args(args)
    expression_args.check_cell_data_args(args)
    return args


def main(args: argparse.Namespace) -> None:
    import torch
    from tqdm.auto import tqdm

    from utils.draws import SampleDraws
    from utils.expression.codec import SPLIT_FILE, write_split
    from utils.expression.data.stream import CellStream
    from utils.expression.setup import open_cell_data
    from utils.expression.vae import training as expression_training
    from utils.expression.vae.network import ExpressionVAE
    from utils.latents.posterior import kl_weight_at
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
    data = open_cell_data(args, accelerator)
    batch_numbers = [data.batch_numbers(table, args.batch_column) for table in (data.train, data.validation)]
    num_genes = len(data.train.genes)
    elbo = expression_training.Elbo(args.likelihood)
    held_out = expression_training.HeldOutCells(accelerator, data.validation, batch_numbers[1], args.kl_weight)

    # Prepare
    autoencoder = ExpressionVAE(
        genes=data.train.genes,
        latent_channels=args.latent_channels,
        hidden_size=args.hidden_size,
        num_layers=args.num_layers,
        likelihood=args.likelihood,
        library=args.library,
        batch_column=args.batch_column,
        batch_names=data.batch_names,
        dropout=args.dropout,
    )
    expression_training.initialise(autoencoder, data.train)
    dispersion = {"lr_scale": args.dispersion_learning_rate / args.learning_rate, "weight_decay": 0.0}
    optimizer = optimization.make_optimizer(
        autoencoder,
        args.learning_rate,
        (args.adam_beta1, args.adam_beta2),
        args.adam_weight_decay,
        args.adam_epsilon,
        args.optimizer,
        {"log_theta": dispersion},
    )
    autoencoder, optimizer = accelerator.prepare(autoencoder, optimizer)
    model = accelerator.unwrap_model(autoencoder)
    ema = EMA(model, args.ema_decay) if args.use_ema else None
    run_identity = run.identity_of(args, model, data.identity, accelerator) | {"likelihood": args.likelihood}
    saver = Checkpoints(
        accelerator, output_dir, autoencoder, optimizer, ema, run_identity, args.checkpoints_total_limit
    )
    first_step = saver.resume(args.resume_from_checkpoint)
    best = expression_training.BestWeights(output_dir, first_step)
    run.save_args(args, output_dir, accelerator)
    if accelerator.is_main_process:
        write_split(output_dir, data.source, data.split)
    if args.torch_compile:
        autoencoder = torch.compile(autoencoder)
    stream = CellStream(data.train, args.seed, batch_numbers[0])
    batches = iter(run.make_loader(stream, args, accelerator, first_step))
    run.announce(args, accelerator, model, len(data.train), first_step)
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
        kl_weight = kl_weight_at(global_step, args.kl_weight, args.kl_warmup_steps)
        for _ in range(args.gradient_accumulation_steps):
            batch = run.to_device(next(batches), accelerator.device)
            draws = SampleDraws(args.seed, batch.pop("positions"), accelerator.device)
            draws.seed_dropout()
            with accelerator.accumulate(autoencoder):
                noise = draws.normal("posterior", (len(batch["counts"]), args.latent_channels))  # (B, D)
                parameters, posterior = autoencoder(batch, noise)
                nll, kl = (each.mean() for each in elbo(parameters, posterior, batch["counts"]))  # nats per cell
                loss = (nll + kl_weight * kl) / num_genes  # so that one clipping norm suits any number of them
                accelerator.backward(loss)
                step_log.add(loss, nll=nll, kl=kl)
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
        if accelerator.is_main_process and (done % args.validation_steps == 0 or control.is_finished):
            with training_ema.averaged_weights(accelerator, model, ema):
                figures = held_out.measure(model, done)
                if done > args.kl_warmup_steps:  # before, another bound was trained on
                    best.offer(model, figures, done)
        if done % args.checkpointing_steps == 0 or control.is_last:
            saver.save(done)
    progress.close()
    control.say_how_it_ended()

    # Export
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not control.interrupted:
        with training_ema.averaged_weights(accelerator, model, ema):
            figures = best.restore(model) or held_out.measure(model, control.steps_done)
            statistics = expression_training.measure_latents(model, data.train, batch_numbers[0])
            expression_training.save_vae(model, statistics, figures, output_dir / SPLIT_FILE, output_dir / "vae")
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main, parse_args)
