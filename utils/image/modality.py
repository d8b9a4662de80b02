"""The row of images in the table of modalities. Imports no torch."""

from utils.args.modality import Modality
from utils.image.args.data import add_precompute_args, check_precompute_args
from utils.image.args.requests import add_count_args, add_request_args, check_request_args
from utils.image.evaluation.args import add_evaluation_args, check_evaluation_args

IMAGE = Modality(
    name="image",
    samples="images",
    autoencoder="",
    guidance_scale=7.5,
    batch_size=16,
    precompute_flags=(add_precompute_args, check_precompute_args),
    evaluation_flags=(add_evaluation_args, check_evaluation_args),
    request_flags=(add_request_args, add_count_args),
    check_requests=check_request_args,
)
