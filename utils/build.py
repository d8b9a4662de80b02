"""The parts of a training, from its arguments: data, cache, denoiser, objective."""

import inspect
import logging
from argparse import Namespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from utils.conditions import ClassCondition, NoCondition, TextCondition
from utils.errors import UserError
from utils.latent_cache import LatentCache
from utils.models.denoiser import ConditionalDenoiser, num_tokens
from utils.models.dit import AFTER_ROUTE, BEFORE_ROUTE, DIT_SIZES, DiT
from utils.models.unet import UNET_PRESETS, build_unet, unet_config
from utils.objectives import OBJECTIVES, Objective, training_scheduler
from utils.parsing import read_yaml

logger = logging.getLogger(__name__)


def build_objective(args: Namespace, device: torch.device) -> tuple[Objective, Any]:
    """The objective, its tables on `device`, and the scheduler that is saved with the model."""
    scheduler = training_scheduler(
        args.prediction_type, args.beta_schedule, args.rescale_betas_zero_snr, args.flow_shift
    )
    if (args.prediction_type, args.beta_schedule) == ("epsilon", "squaredcos_cap_v2"):
        logger.warning(
            "--beta_schedule squaredcos_cap_v2 with --prediction_type epsilon: the last timesteps are all noise, and "
            "a sampler multiplies the model's errors there by thousands; v_prediction has no such trouble"
        )
    if args.prediction_type == "flow":
        settings: dict[str, Any] = {"timestep_density": args.timestep_density}
    else:
        names = ("snr_gamma", "noise_offset", "input_perturbation")
        settings = {name: getattr(args, name) for name in names} | {"device": device}
    return OBJECTIVES[args.prediction_type](scheduler, **settings), scheduler


def build_denoiser(args: Namespace, cache: LatentCache, condition: str) -> ConditionalDenoiser:
    """A new denoiser for the latents and the condition ("text", "class" or "none") of a cache, by `--model` and
    `--model_size`.
    """
    spec = cache.spec
    channels, height, width = spec.shape
    if height != width:
        raise UserError(f"--latents_dir: latents of {height} x {width}: only square ones can be trained")
    text_dim = spec.captions["hidden_size"] if condition == "text" and spec.captions else None
    config = MODELS[args.model](args.model_size, height, channels, text_dim, condition)
    model_class = DiT if args.model == "dit" else UNet2DConditionModel
    config |= read_model_config(args.model_config, model_class, config)
    try:
        model = DiT.from_config(config) if args.model == "dit" else build_unet(config)
    except (ValueError, TypeError) as error:
        raise UserError(f"--model_size/--model_config: {error}") from error
    if args.tread_ratio:
        check_routing(args.tread_ratio, model)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return ConditionalDenoiser(model, build_condition(condition, cache, config, is_dit=args.model == "dit"))


def check_routing(tread_ratio: float, model: DiT) -> None:
    """Raises UserError where no token, or past no block, would be routed."""
    if model.config.num_layers <= BEFORE_ROUTE + AFTER_ROUTE:
        raise UserError(
            f"--tread_ratio: the route passes all blocks but the first {BEFORE_ROUTE} and the last {AFTER_ROUTE}, and "
            f"this model has only {model.config.num_layers}; use a deeper one or leave the flag out"
        )
    if int(num_tokens(model) * tread_ratio) == 0:
        raise UserError(
            f"--tread_ratio: {tread_ratio} of the {num_tokens(model)} tokens of a sample is less than one; use a "
            "larger share"
        )


def build_condition(condition: str, cache: LatentCache, config: dict[str, Any], is_dit: bool):
    """The encoder of a condition, of the width its denoiser takes."""
    spec = cache.spec
    if condition == "none":
        return NoCondition()
    if condition == "class":
        if spec.labels is None:
            raise UserError(
                "--latents_dir: this cache has no labels; precompute with --label_column, or add --unconditional"
            )
        if is_dit:  # of its own width, where it is added to the timestep embedding without a projection
            width = config["projection_class_embeddings_input_dim"] or config["hidden_size"]
        else:
            width = 4 * config["block_out_channels"][0]
        return ClassCondition(spec.labels["num_classes"], width, spec.labels["names"])
    if spec.captions is None:
        raise UserError("--latents_dir: this cache has no captions; precompute with --caption_column")
    # A U-Net gets what Stable Diffusion's gets, the tokens alone; a DiT gets the pooled state too.
    encoder = TextCondition(spec.captions["hidden_size"], spec.captions["shape"][0], use_pooled=is_dit)
    if spec.captions["content"] == "hidden_states":
        encoder.set_null(*cache.null_caption())
    return encoder


def unet_arguments(
    size: str | None, sample_size: int, channels: int, text_dim: int | None, condition: str
) -> dict[str, Any]:
    """Arguments of a U-Net preset."""
    size = size or "base"
    if size not in UNET_PRESETS:
        raise UserError(f"--model_size {size}: a U-Net has the sizes {', '.join(UNET_PRESETS)}")
    factor = 2 ** (len(UNET_PRESETS[size].block_out_channels) - 1)
    if sample_size % factor:
        raise UserError(
            f"--model_size {size}: latents of {sample_size} x {sample_size} cannot be halved often "
            f"enough: use a multiple of {factor} (a larger --resolution) or a smaller size"
        )
    return unet_config(size, sample_size, channels, text_dim, condition == "class")


def dit_arguments(
    size: str | None, sample_size: int, channels: int, text_dim: int | None, condition: str
) -> dict[str, Any]:
    """Arguments of a DiT by its name in the paper, size/patch; with "plain-" before it, of the paper's own blocks."""
    name, _, patch = (size or "B/2").partition("/")
    is_plain, name = name.startswith("plain-"), name.removeprefix("plain-")
    if name not in DIT_SIZES or patch not in ("1", "2", "4", "8"):
        raise UserError(
            f"--model_size {size}: a DiT has sizes {', '.join(DIT_SIZES)} with patch 1, 2, 4 or 8, as in B/2, and "
            "plain-B/2 for the blocks of the paper"
        )
    num_layers, hidden_size, heads = DIT_SIZES[name]
    if sample_size % int(patch):
        raise UserError(
            f"--model_size {size}: latents of {sample_size} x {sample_size} do not divide into patches of {patch}"
        )
    pooled_dim = {"class": hidden_size, "text": text_dim, "none": None}[condition]
    adds_labels = is_plain and condition == "class"  # as the paper does
    return {
        "sample_size": sample_size,
        "patch_size": int(patch),
        "in_channels": channels,
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": heads,
        "cross_attention_dim": text_dim,
        "projection_class_embeddings_input_dim": None if adds_labels else pooled_dim,
        "class_embed_type": "identity" if adds_labels else None,
        "style": "plain" if is_plain else "modern",
    }


MODELS = {"unet": unet_arguments, "dit": dit_arguments}


# Decided by the latents and the condition: a file may repeat them, not contradict them.
DATA_ARGUMENTS = (
    "in_channels",
    "out_channels",
    "cross_attention_dim",
    "class_embed_type",
    "projection_class_embeddings_input_dim",
)


def read_model_config(path: str | None, model_class: type, preset: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the model from a JSON or YAML file (JSON is YAML), such as the config.json of a diffusers model."""
    if path is None:
        return {}
    values = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in read_yaml(path, "--model_config").items()
        if not str(key).startswith("_")
    }
    values.pop("sample_size", None)  # that of the latents
    known = inspect.signature(model_class).parameters
    for key, value in values.items():
        if key not in known:
            raise UserError(f"--model_config {path}: {model_class.__name__} has no argument {key}")
        if key in DATA_ARGUMENTS and value != preset.get(key):
            raise UserError(
                f"--model_config {path}: {key} is {value}, but the data and the condition need "
                f"{preset.get(key)}; leave it out"
            )
    return values
