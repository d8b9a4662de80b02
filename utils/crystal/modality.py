"""The row of crystals in the table of modalities. Imports no torch."""

from utils.args.columns import add_column_request_args
from utils.args.modality import Modality
from utils.crystal.args import add_precompute_args, add_request_args, check_precompute_args
from utils.crystal.evaluation.args import add_evaluation_args, check_evaluation_args

CRYSTAL = Modality(
    name="crystal",
    samples="crystals",
    autoencoder="CrystalVAE",
    guidance_scale=2.0,
    batch_size=16,
    precompute_flags=(add_precompute_args, check_precompute_args),
    evaluation_flags=(add_evaluation_args, check_evaluation_args),
    request_flags=(add_column_request_args, add_request_args),
)
