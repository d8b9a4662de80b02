"""Trains a variational autoencoder of single-cell gene expression from scratch: raw counts in, a likelihood out.

    accelerate launch train_expression_vae.py --dataset_name pbmc.h5ad --label_column cell_type --output_dir runs/vae
    accelerate launch train_expression_vae.py --config configs/expression/pbmc_vae.yaml --dataset_name pbmc.h5ad ...

Genes are chosen on the training cells. Leaves OUTPUT_DIR/vae, of the best weights, with the split of the cells and the
statistics of their latents: give OUTPUT_DIR to precompute_latents.py --modality expression as
--pretrained_vae_model_name_or_path.
"""

import argparse

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
    shared.add_trainer_args(parser)
    args = parse_with_config(parser)
    required(args, "output_dir")
    arg_checks.check_trainer_args(args)
    expression_args.check_cell_data_args(args)
    return args


def main(args: argparse.Namespace) -> None:
    import torch

    from utils.expression.codec import SPLIT_FILE, write_split
    from utils.expression.data.stream import CellStream
    from utils.expression.setup import open_cell_data
    from utils.expression.vae import training as expression_training
    from utils.expression.vae.network import ExpressionVAE
    from utils.latents.posterior import kl_weight_at
    from utils.training import setup
    from utils.training.checkpoints import Checkpoints
    from utils.training.ema import averaged_weights
    from utils.training.optimizers import clip_grad_norm_, set_learning_rate
    from utils.training.step_log import StepLog

    # Load
    run = setup.start(args, is_denoiser=False)  # refuses a folder that is taken
    accelerator = run.accelerator
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
    optimizer = setup.make_optimizer(args, autoencoder, own={"log_theta": dispersion})
    autoencoder, optimizer = accelerator.prepare(autoencoder, optimizer)
    model = accelerator.unwrap_model(autoencoder)
    ema = setup.make_ema(args, model)  # None without --use_ema
    identity = setup.identity_of(args, run, model, data.identity, likelihood=args.likelihood)
    saver = Checkpoints(run, autoencoder, optimizer, ema, identity=identity, keep=args.checkpoints_total_limit)
    first_step = saver.resume(args.resume_from_checkpoint)
    best = expression_training.BestWeights(run.folder, first_step)
    setup.save_args(args, run)  # nothing was written until all was found to fit
    if run.is_main:
        write_split(run.folder, data.source, data.split)
    if args.torch_compile:
        autoencoder = torch.compile(autoencoder)
    stream = CellStream(data.train, args.seed, batch_numbers[0])
    batches = setup.make_batches(args, run, stream, first_step)
    setup.announce(args, run, model, len(data.train), first_step)
    control = setup.make_control(args, run, first_step)  # takes SIGTERM and SIGINT from here on
    schedule = setup.make_schedule(args)
    step_log = StepLog(run, control, setup.samples_per_step(args, run))

    # Loop
    autoencoder.train()
    for global_step in control.steps():
        learning_rate = schedule.at(global_step, control.time_share)
        set_learning_rate(optimizer, learning_rate)
        kl_weight = kl_weight_at(global_step, args.kl_weight, args.kl_warmup_steps)
        for _ in range(args.gradient_accumulation_steps):
            batch, draws = next(batches)  # draws: all random numbers that belong to these samples
            with accelerator.accumulate(autoencoder):
                noise = draws.normal("posterior", (len(batch["counts"]), args.latent_channels))  # (B, D)
                parameters, posterior = autoencoder(batch, noise)
                nll, kl = (each.mean() for each in elbo(parameters, posterior, batch["counts"]))  # nats per cell
                loss = (nll + kl_weight * kl) / num_genes  # so that one clipping norm suits any number of them
                accelerator.backward(loss)
                step_log.add(loss, nll=nll, kl=kl)
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
        if run.is_main and control.is_due(args.validation_steps):
            with averaged_weights(run, model, ema):
                figures = held_out.measure(model, done)
                if done > args.kl_warmup_steps:  # before, another bound was trained on
                    best.offer(model, figures, done)
        if control.is_due(args.checkpointing_steps, or_stopped=True):  # last: a resumed run repeats nothing
            saver.save(done)
    step_log.close()  # and says how the run ended

    # Export
    accelerator.wait_for_everyone()
    if run.is_main and not control.interrupted:
        with averaged_weights(run, model, ema):
            figures = best.restore(model) or held_out.measure(model, control.steps_done)
            statistics = expression_training.measure_latents(model, data.train, batch_numbers[0])
            expression_training.save_vae(model, statistics, figures, run.folder / SPLIT_FILE, run.folder / "vae")
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main, parse_args)
