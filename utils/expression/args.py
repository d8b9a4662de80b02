"""Flags of cells: data, genes, autoencoder, cache, denoiser, samples. Imports no torch."""

from argparse import ArgumentParser, BooleanOptionalAction, Namespace

from utils.args.checks import is_launched_under_fsdp
from utils.args.parsing import fraction, non_negative_float, non_negative_int, positive_float, positive_int, required
from utils.errors import UserError

MIN_GENES = 2
CELLS_AT_ONCE = 1024  # that are sampled: they are small


def add_cell_data_args(parser: ArgumentParser) -> None:
    """Adds the flags of the data set."""
    group = parser.add_argument_group("cells")
    group.add_argument("--dataset_name", default=None, help="An .h5ad file with raw counts.")
    group.add_argument(
        "--counts_layer",
        default=None,
        help="Layer with the raw counts; raw stands for adata.raw. Default: X.",
    )
    group.add_argument(
        "--max_skipped_fraction",
        type=fraction,
        default=0.05,
        help="Stop if more than this fraction of the cells has no counts in the chosen genes.",
    )


def add_gene_args(parser: ArgumentParser) -> None:
    """Adds the flags of the genes, which are chosen on the training cells, and of where their counts are kept."""
    group = parser.add_argument_group("genes")
    group.add_argument(
        "--num_genes", type=positive_int, default=2000, help="Number of highly variable genes to model."
    )
    group.add_argument(
        "--gene_selection",
        choices=["pearson_residuals", "seurat_v3"],
        default="pearson_residuals",
        help="Method of scanpy that selects highly variable genes.",
    )
    group.add_argument(
        "--min_cells", type=positive_int, default=3, help="Leave out genes that are expressed in fewer cells."
    )
    group.add_argument(
        "--low_memory",
        action=BooleanOptionalAction,
        default=False,
        help="Keep the counts in files in --output_dir, for data larger than memory.",
    )
    group.add_argument(
        "--library",
        choices=["chosen", "all"],
        default="chosen",
        help="Genes that count towards a cell's library size: the chosen ones, or the whole transcriptome.",
    )


def add_split_args(parser: ArgumentParser) -> None:
    """Adds the flags of the split into training, validation and test cells."""
    group = parser.add_argument_group("held-out cells")
    group.add_argument("--label_column", default=None, help="Column of obs by which the split is stratified.")
    group.add_argument(
        "--split_column",
        default=None,
        help="Column of obs that holds train, val or test for each cell, instead of a random split.",
    )
    group.add_argument(
        "--validation_fraction", type=fraction, default=0.1, help="Fraction of the cells to hold out for validation."
    )
    group.add_argument(
        "--test_fraction",
        type=fraction,
        default=0.2,
        help="Fraction of the cells to hold out for evaluate.py, unseen until then.",
    )
    group.add_argument("--split_seed", type=non_negative_int, default=0, help="Seed of the random split.")


def add_expression_vae_args(parser: ArgumentParser) -> None:
    """Adds the flags of the autoencoder, its likelihood and its ELBO."""
    group = parser.add_argument_group("autoencoder")
    group.add_argument(
        "--likelihood",
        choices=["nb", "zinb", "gaussian"],
        default="nb",
        help="Likelihood of the raw counts: negative binomial, zero-inflated negative binomial or Gaussian.",
    )
    group.add_argument("--latent_channels", type=positive_int, default=16, help="Dimensions of a cell's latent.")
    group.add_argument("--hidden_size", type=positive_int, default=256, help="Width of encoder and decoder.")
    group.add_argument(
        "--num_layers", type=positive_int, default=2, help="Number of hidden layers in the encoder and in the decoder."
    )
    group.add_argument("--dropout", type=fraction, default=0.1, help="Dropout rate in encoder and decoder.")
    group.add_argument(
        "--batch_column",
        default=None,
        help="Column of obs with the batch, which encoder and decoder get as input so that latents need not encode "
        "it.",
    )
    group.add_argument(
        "--kl_weight", type=non_negative_float, default=1.0, help="Weight of the KL divergence; 1 is the ELBO."
    )
    group.add_argument(
        "--kl_warmup_steps", type=non_negative_int, default=300, help="Steps in which the KL weight rises from zero."
    )
    group.add_argument(
        "--dispersion_learning_rate",
        type=positive_float,
        default=1e-2,
        help="Peak learning rate of the likelihood's dispersion theta, one value per gene.",
    )
    group.add_argument(
        "--validation_steps", type=positive_int, default=250, help="Steps between validations on held-out cells."
    )


def check_cell_data_args(args: Namespace) -> None:
    """Refuses a missing data set, and splits that contradict each other."""
    if args.dataset_name is None:
        raise UserError("--dataset_name is required: an .h5ad file with raw counts")
    if args.num_genes < MIN_GENES:
        raise UserError(f"--num_genes {args.num_genes}: a cell of one gene has nothing to share out; give more")
    if args.split_column:
        for name in ("validation_fraction", "test_fraction", "split_seed", "label_column"):
            if name in args.typed:
                raise UserError(f"--{name} with --split_column: the column says which cells are held out; use one")


def add_expression_cache_args(parser: ArgumentParser) -> None:
    """Adds the flags of the latent cache."""
    group = parser.add_argument_group("latent cache")
    group.add_argument(
        "--pretrained_vae_model_name_or_path", default=None, help="Run of train_expression_vae.py, or its folder vae/."
    )
    group.add_argument(
        "--split",
        choices=["train", "val", "test", "all"],
        default="train",
        help="Cells to encode: a split of the autoencoder's training, or all cells of the file.",
    )
    group.add_argument("--encode_batch_size", type=positive_int, default=1024, help="Batch size of the VAE's encoder.")
    group.add_argument("--rows_per_shard", type=positive_int, default=65536, help="Cells per shard.")


def add_precompute_args(parser: ArgumentParser) -> None:
    """All flags of a latent cache of cells."""
    add_cell_data_args(parser)
    add_expression_cache_args(parser)


def check_precompute_args(args: Namespace) -> None:
    """Refuses a cache of nothing, and a seed, which nothing would read."""
    required(args, "dataset_name", "pretrained_vae_model_name_or_path")
    if "seed" in args.typed:
        raise UserError("--seed with --modality expression: nothing about encoding cells is random; leave it out")
    args.mixed_precision = "no"  # latents of cells are small, and encoding them takes no time


JOINT_FLAGS = ("dataset_name", "counts_layer", "vae_learning_rate", "joint_latents", "kl_weight")


def add_joint_args(parser: ArgumentParser) -> None:
    """Adds the flags of training the autoencoder together with its denoiser."""
    group = parser.add_argument_group("joint fine-tuning of the autoencoder")
    group.add_argument(
        "--joint_vae",
        action=BooleanOptionalAction,
        default=False,
        help="Also train the autoencoder of the cache, by the ELBO; the run then has an autoencoder of its own.",
    )
    group.add_argument("--dataset_name", default=None, help="The .h5ad file from which the cache was made.")
    group.add_argument(
        "--counts_layer", default=None, help="Layer with the raw counts; raw stands for adata.raw. Default: X."
    )
    group.add_argument(
        "--vae_learning_rate", type=positive_float, default=1e-5, help="Peak learning rate of the autoencoder."
    )
    group.add_argument(
        "--joint_latents",
        choices=["detached", "live"],
        default="detached",
        help="live: the loss of the denoiser also trains the encoder. detached: only the ELBO does.",
    )
    group.add_argument(
        "--kl_weight", type=non_negative_float, default=1.0, help="Weight of the KL divergence in the ELBO."
    )


def check_joint_args(args: Namespace) -> None:
    """Refuses flags of joint training without --joint_vae, and what cannot be trained jointly."""
    if not args.joint_vae:
        for name in JOINT_FLAGS:
            if name in args.typed:
                raise UserError(f"--{name} without --joint_vae: the autoencoder stays as it is; leave it out")
        return
    if args.dataset_name is None:
        raise UserError("--joint_vae needs --dataset_name: the .h5ad file that the cache was made of")
    for name in ("lora_rank", "ema_sigma_rels"):
        if getattr(args, name):
            raise UserError(f"--{name} with --joint_vae: it applies to the denoiser alone; leave one out")
    if args.optimizer == "muon":
        raise UserError("--optimizer muon with --joint_vae: it has one learning rate for all; use adamw")
    if is_launched_under_fsdp():
        raise UserError(
            "--joint_vae under FSDP: the whole copies that are exported there have no autoencoder; use "
            "configs/accelerate/multi_gpu.yaml"
        )


def add_expression_samples_args(parser: ArgumentParser) -> None:
    """Adds the flags of the samples that are drawn during training."""
    group = parser.add_argument_group("validation")
    group.add_argument("--validation_steps", type=positive_int, default=1000, help="Steps between validation samples.")
    group.add_argument("--num_validation_cells", type=positive_int, default=500, help="Number of cells to sample.")
    group.add_argument(
        "--validation_guidance_scale",
        type=non_negative_float,
        default=1.0,
        help="Guidance scale of validation samples; 1 is off.",
    )
    group.add_argument(
        "--validation_inference_steps",
        type=positive_int,
        default=25,
        help="Number of denoising steps of validation samples.",
    )


def add_request_args(parser: ArgumentParser) -> None:
    """What a run of cells is asked for, beside --num_samples and --property."""
    group = parser.add_argument_group("request of cells")
    group.add_argument(
        "--class_label",
        nargs="+",
        default=None,
        help="Cell types to condition on, --num_samples cells of each. Default: types in the proportions of the "
        "training set.",
    )


def add_vector_model_args(parser: ArgumentParser) -> None:
    """Adds the flags of a denoiser of latent vectors."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--architecture",
        choices=["mlp", "dit"],
        default="mlp",
        help="Residual MLP with adaLN-zero (mlp), or DiT whose tokens are pieces of the latent vector (dit).",
    )
    group.add_argument(
        "--model_size",
        choices=["S", "B", "L", "XL"],
        default=None,
        help="Size. mlp: 3.2M to 319M parameters. dit: DiT size of the paper. Default: S.",
    )
    group.add_argument(
        "--model_config",
        default=None,
        metavar="FILE",
        help="YAML or JSON file of the model's own arguments, which override --model_size.",
    )
    group.add_argument(
        "--gradient_checkpointing",
        action=BooleanOptionalAction,
        default=False,
        help="Recompute activations in the backward pass: less memory, slower steps.",
    )
