"""The parts of a training on cells, from its arguments: data, split, genes, cache, denoiser."""

import logging
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator
from diffusers import SchedulerMixin

from utils.args.columns import parse_conditions
from utils.diffusion.denoiser import ConditionalDenoiser, own_config
from utils.errors import UserError
from utils.expression.cache import CONDITION_KINDS, JointCache, VectorCache
from utils.expression.data.genes import choose_genes
from utils.expression.data.source import CellSource, open_cells
from utils.expression.data.table import SPLITS, CellTable, check_labels, read_table, stratified_split
from utils.expression.modality import EXPRESSION
from utils.expression.pipeline import Exporter, load_run_vae
from utils.files import remove_unfinished, sha256_json
from utils.frozen import weights_hash
from utils.latents.columns import category_name, category_numbers, describe_column
from utils.models.dit import DIT_SIZES, DiT
from utils.models.vector_mlp import VECTOR_MLP_SIZES, VectorMLP
from utils.runs.base import (
    assembled,
    load_base,
    read_model_config,
    refuse_model_flags,
    take_normalisation,
    use_conditions_of,
    warn_of_missing,
)
from utils.runs.load import RunFolder
from utils.runs.save import ModelCard, column_settings

logger = logging.getLogger(__name__)
COUNTS_FOLDER = "counts"  # of a run, with --low_memory


class CellData(NamedTuple):
    """Cells to train on and to watch training by, and what decides them."""

    source: CellSource
    split: np.ndarray  # (R,) of the whole source
    train: CellTable
    validation: CellTable
    batch_names: list[str] | None  # of --batch_column
    identity: str

    def batch_numbers(self, table: CellTable, column: str | None) -> np.ndarray | None:
        """(n,) the batch of each cell of a table; None without batches."""
        return None if column is None else category_numbers(table.obs[column], self.batch_names or [])


def open_cell_data(args: Namespace, accelerator: Accelerator) -> CellData:
    """The cells of the data flags, with genes chosen on those that are trained on. Raises UserError for bad input."""
    source = open_cells(args.dataset_name, args.counts_layer)
    split = split_of(args, source)
    rows = {name: np.flatnonzero(split == name) for name in SPLITS}
    if not len(rows["val"]):
        column = args.split_column
        said = "--validation_fraction 0" if column is None else f"--split_column {column}: no cell is of val"
        raise UserError(f"{said}: there would be none to choose the best weights by; give some")
    batch_names = None if args.batch_column is None else names_of_batches(source, rows["train"], args.batch_column)
    genes = choose_genes(
        source, rows["train"], args.num_genes, args.gene_selection, args.min_cells, seed=args.split_seed
    )
    tables = []
    for name in ("train", "val"):
        folder = Path(args.output_dir) / COUNTS_FOLDER / name if args.low_memory else None
        with accelerator.main_process_first():  # the main process writes the files that others read
            if folder is not None and accelerator.is_main_process:
                remove_unfinished(folder)  # as large as the data
            table = read_table(
                source, rows[name], genes, args.library, folder, max_skipped_fraction=args.max_skipped_fraction
            )
        tables.append(table)
    logger.info(
        "%d cells to train on, %d to watch it, %d kept for the test; %d of %d genes; median library size %.0f",
        *(len(rows[name]) for name in SPLITS),
        len(genes),
        len(source.genes),
        np.median(tables[0].library_sizes),
    )
    identity = sha256_json([*(table.identity() for table in tables), args.batch_column])
    return CellData(source, split, tables[0], tables[1], batch_names, identity=identity)


def split_of(args: Namespace, source: CellSource) -> np.ndarray:
    """(R,) of train, val and test, by --split_column or stratified by --label_column. Raises UserError."""
    labels = None
    if args.label_column is not None:
        labels = check_labels(source, args.label_column, "--label_column")
    if args.split_column is None:
        return stratified_split(labels, len(source), args.validation_fraction, args.test_fraction, args.split_seed)
    column = args.split_column
    if column not in source.obs:
        raise UserError(f"--split_column: there is no column {column} in obs; there are {', '.join(source.obs)}")
    split = np.array([str(category_name(value)) for value in source.obs[column]])
    strange = sorted(set(split.tolist()) - set(SPLITS))
    if strange or "train" not in split:
        found = ", ".join(sorted(set(split.tolist()))[:5])
        raise UserError(f"--split_column {column}: expected {', '.join(SPLITS)}, found {found}; rename the values")
    return split


def names_of_batches(source: CellSource, rows: np.ndarray, column: str) -> list[str]:
    """The batches of the training cells. Raises UserError for a column that is not there, that says nothing, or that
    the other cells have more in.
    """
    if column not in source.obs:
        raise UserError(f"--batch_column: there is no column {column} in obs; there are {', '.join(source.obs)}")
    found = [category_name(value) for value in source.obs[column]]
    missing = sum(name is None for name in found)
    if missing:
        raise UserError(f"--batch_column {column}: {missing} cells have none; give each a batch, or leave them out")
    names = sorted({str(found[row]) for row in rows})
    if len(names) < 2:
        raise UserError(f"--batch_column {column}: the cells have one batch ({names[0]}); leave the flag out")
    unseen = sorted({str(name) for name in found} - set(names))
    if unseen:
        raise UserError(
            f"--batch_column {column}: no training cell is of {', '.join(unseen[:5])}, and the decoder could not know "
            "it; put cells of each batch into training"
        )
    return names


# ---- latents


def open_vector_cache(args: Namespace) -> VectorCache:
    """The cache of --latents_dir, which gives the values of the conditions asked for; with --joint_vae a `JointCache`.
    Raises UserError for a column that is not there or says nothing, and for cells that are not those of the cache.
    """
    if args.joint_vae:
        source = open_cells(args.dataset_name, args.counts_layer)
        cache: VectorCache = JointCache(args.latents_dir, args.latent_normalisation, source=source)
    else:
        cache = VectorCache(args.latents_dir, args.latent_normalisation)
    asked = parse_conditions(args.condition, CONDITION_KINDS, example="cell_type")
    cache.use_conditions({name: describe_column(cache, kind, name) for name, kind in asked.items()})
    warn_of_missing(cache)
    return cache


def make_exporter(args: Namespace, cache: VectorCache, scheduler: SchedulerMixin) -> Exporter:
    """What writes the run's folder, with the autoencoder of a cache. Raises UserError if it has other weights now."""
    spec = cache.spec
    num_rows = spec.num_rows - (args.num_validation_samples or 0)
    card = ModelCard(
        title="A latent diffusion model of gene expression",
        data=f"{num_rows} cells of {spec.fingerprint['dataset']['name']}",
        settings=column_settings(args.condition or [], spec.vae),
        base=args.pretrained_model_name_or_path,
        use_ema=args.use_ema,
        example="python sample.py --model THIS_FOLDER --num_samples 500",
        tags=("single-cell",),
    )
    return Exporter.of_cache(cache, scheduler, card)


def mlp_arguments(size: str, dimensions: int) -> dict[str, Any]:
    """Arguments of a VectorMLP by its size."""
    num_layers, hidden_size = VECTOR_MLP_SIZES[size]
    return {"sample_size": dimensions, "num_layers": num_layers, "hidden_size": hidden_size}


def dit_arguments(size: str, dimensions: int) -> dict[str, Any]:
    """Arguments of a DiT of vectors by its name in the paper; a token is a piece of four numbers."""
    num_layers, hidden_size, heads = DIT_SIZES[size]
    config = {"num_layers": num_layers, "hidden_size": hidden_size, "num_attention_heads": heads}
    return config | {"latent_kind": "vector", "sample_size": dimensions, "patch_size": 4, "in_channels": 1}


ARCHITECTURES: dict[str, tuple[Any, Callable[[str, int], dict[str, Any]]]] = {
    "mlp": (VectorMLP, mlp_arguments),
    "dit": (DiT, dit_arguments),
}


def build_vector_denoiser(args: Namespace, cache: VectorCache) -> ConditionalDenoiser:
    """A new denoiser for the vectors and the conditions of a cache, or the run of --pretrained_model_name_or_path."""
    (dimensions,) = cache.spec.shape
    base = load_base(args)
    if base is None:
        model_class, arguments = ARCHITECTURES[args.architecture]
        config = arguments(args.model_size or "S", dimensions)
        config |= read_model_config(args.model_config, model_class, config)
        if config.get("latent_kind", "vector") != "vector":
            raise UserError(
                f"--model_config {args.model_config}: latent_kind {config['latent_kind']}; a cell is a vector"
            )
    else:
        check_base(args, base, cache)
        model_class, config = type(base.model), own_config(base.model)
    return assembled(args, model_class, config, cache, base)


def check_base(args: Namespace, base: ConditionalDenoiser, cache: VectorCache) -> None:
    """Raises UserError for a run to start from that is of other latents, and for flags that say what it is."""
    flag, run_dir = "--pretrained_model_name_or_path", Path(args.pretrained_model_name_or_path)
    refuse_model_flags(args)
    if "architecture" in args.typed:
        raise UserError(f"--architecture with {flag}: the run says what its model is; leave it out")
    if not EXPRESSION.is_run(run_dir):
        raise UserError(f"{flag}: {run_dir} is no run of cells; give one of train_expression_ldm.py")
    run = RunFolder.find(run_dir, flag)
    if weights_hash(load_run_vae(run)) != cache.spec.fingerprint["vae"]["sha256"]:
        raise UserError(
            f"{flag}: {run_dir} knows latents of another VAE; precompute --latents_dir with {run.path / 'vae'}"
            f"{', and start from the finished run' if run.checkpoint else ''}"
        )
    take_normalisation(args, cache, run.normalisation())
    use_conditions_of(base, cache, str(run_dir))
