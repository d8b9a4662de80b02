"""The row of cells in the table of modalities. Imports no torch."""

from utils.args.columns import add_column_request_args
from utils.args.modality import Modality
from utils.expression.args import CELLS_AT_ONCE, add_precompute_args, add_request_args, check_precompute_args
from utils.expression.evaluation.args import add_evaluation_args, check_evaluation_args

EXPRESSION = Modality(
    name="expression",
    samples="cells",
    autoencoder="ExpressionVAE",
    guidance_scale=1.0,  # a guided cell is too pure: the variance of a type is what is asked for
    batch_size=CELLS_AT_ONCE,
    precompute_flags=(add_precompute_args, check_precompute_args),
    evaluation_flags=(add_evaluation_args, check_evaluation_args),
    request_flags=(add_column_request_args, add_request_args),
)
