"""Flags of tiny runs on cells."""

import random
from pathlib import Path

import numpy as np

from tests.support.processes import SignalAt, checkpoint_tensors, contents, differing, run, scalars, start
from utils.expression.data.source import open_cells
from utils.expression.data.table import read_table, stratified_split
from utils.expression.validation import CellSamples
from utils.files import fsync_path
from utils.training import checkpoints
from utils.training.evaluator import Evaluator
from utils.training.step_log import StepLog

VAE, CACHE, LDM, SAMPLE = "train_expression_vae.py", "precompute_latents.py", "train_expression_ldm.py", "sample.py"
LATEST = ["--resume_from_checkpoint", "latest"]
BASE = "--pretrained_model_name_or_path"
GENES, CHANNELS = 40, 4
CELLS, NUM_TRAIN, NUM_VAL, NUM_TEST = 700, 490, 70, 140
# fmt: off
TRAIN_VAE = [
    "--label_column", "cell_type", "--latent_channels", CHANNELS, "--hidden_size", 24, "--max_train_steps", 6,
    "--train_batch_size", 16, "--lr_warmup_steps", 0, "--learning_rate", 1e-2, "--ema_decay", 0.8, "--kl_warmup_steps", 2,
    "--checkpointing_steps", 2, "--checkpoints_total_limit", 9, "--logging_steps", 1, "--validation_steps", 3,
]
TRAIN_LDM = [
    "--max_train_steps", 8, "--train_batch_size", 16, "--lr_warmup_steps", 0, "--learning_rate", 1e-3, "--ema_decay", 0.8,
    "--checkpointing_steps", 4, "--logging_steps", 1, "--num_validation_cells", 20, "--validation_inference_steps", 2,
]
# fmt: on
CONDITIONS = ["--condition", "class:cell_type", "property:age"]
MLP_CONFIG = {"num_layers": 2, "hidden_size": 32}


def cache_flags(file, vae) -> list:
    return ["--modality", "expression", "--dataset_name", file, "--pretrained_vae_model_name_or_path", vae,
            "--rows_per_shard", 100, "--encode_batch_size", 64]  # fmt: skip


def make_caches(folder: Path, file: Path, vae: Path) -> dict[str, Path]:
    for split in ("train", "val"):
        run(CACHE, *cache_flags(file, vae), "--split", split, "--latents_dir", folder / split)
    return {split: folder / split for split in ("train", "val")}


def without(flags, *names):
    """Flags without some, and their values."""
    return [each for i, each in enumerate(flags) if each not in names and flags[i - 1] not in names]


def table_of(data, vae, split: str):
    """The cells of a split, as the autoencoder saw them."""
    source, config = open_cells(str(data.few)), vae.config
    rows = np.flatnonzero(split_of(data) == split)
    return read_table(source, rows, config.genes, config.library)


def split_of(data) -> np.ndarray:
    return stratified_split(data.types, CELLS, 0.1, 0.2, 0)


def check_killed(flags, expected, folder, seed):
    chance = random.Random(seed)
    kills = [
        SignalAt(StepLog.step_done, chance.randint(1, 3)),
        SignalAt(fsync_path, 2, within=checkpoints),
        SignalAt(Evaluator._keep, 1),
        SignalAt(StepLog.step_done, 6),
        SignalAt(CellSamples.save, 1),
    ]
    for fault in kills:
        running = start(LDM, *flags, fault=fault)
        assert running.wait_for_kill(), (fault, running.wait().stderr)
        assert not (folder / "model_index.json").exists()
    assert "resuming from" in run(LDM, *flags).stderr
    found = checkpoint_tensors(folder, 8)
    assert len(found) > 50
    assert differing(found, checkpoint_tensors(expected, 8)) == []
    ours, theirs = contents(folder), contents(expected)
    ends = (".safetensors", ".bin", ".json", ".parquet", "README.md")
    same = [name for name in theirs if name.endswith(ends) and not name.endswith(("elapsed.json", "manifest.json"))]
    assert len(same) >= 25
    assert [name for name in same if ours.get(name) != theirs[name]] == []
    for tag in ("train/loss", "validation/loss"):
        assert scalars(folder, tag) == scalars(expected, tag)
