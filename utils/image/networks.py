"""The denoiser of a training on images, from its arguments: U-Net or DiT, new or from a run."""

import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel

from utils.diffusion.conditions import NoCondition
from utils.diffusion.denoiser import ConditionalDenoiser, num_tokens, own_config
from utils.errors import UserError
from utils.frozen import weights_hash
from utils.image.cache import ImageCache
from utils.image.codec import folded_normalisation, load_vae
from utils.image.conditions import IMAGE_CONDITIONS, ImageCondition
from utils.latents.spec import LatentSpec, Normalisation
from utils.models.dit import AFTER_ROUTE, BEFORE_ROUTE, DIT_SIZES, DiT
from utils.models.unet import UNET_PRESETS, build_unet, unet_config
from utils.runs.base import BASE_FLAG, DATA_ARGUMENTS, fine_tuned, load_base, read_model_config, take_normalisation
from utils.runs.load import RunFolder

logger = logging.getLogger(__name__)


def build_denoiser(args: Namespace, cache: ImageCache, condition: str) -> ConditionalDenoiser:
    """A new denoiser for the latents and the condition (a row of `IMAGE_CONDITIONS`) of a cache, by `--model` and
    `--model_size`, or from the run that `--pretrained_model_name_or_path` names.
    """
    spec = cache.spec
    channels, height, width = spec.shape
    if height != width:
        raise UserError(f"--latents_dir: latents of {height} x {width}: only square ones can be trained")
    row = IMAGE_CONDITIONS[condition]
    text_dim = row.text_dim(spec)
    data = (height, channels, text_dim, condition)  # which decide a part of any network
    base = load_base(args)
    if base is None:
        config = MODELS[args.model](args.model_size, *data)
        model_class = DiT if args.model == "dit" else UNet2DConditionModel
        config |= read_model_config(args.model_config, model_class, config)
    else:
        take_normalisation(args, cache, check_latents(base, Path(args.pretrained_model_name_or_path), spec))
        config = config_from(base, height, text_dim, row)
        check_same_model(args, config, *data)
    try:
        model = DiT.from_config(config) if args.model == "dit" else build_unet(config)
    except (ValueError, TypeError) as error:
        raise UserError(f"--model_size/--model_config: {error}") from error
    if args.tread_ratio:
        check_routing(args.tread_ratio, model)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    denoiser = ConditionalDenoiser(model, row.make_encoder(cache, config, is_dit=args.model == "dit"))
    return denoiser if base is None else fine_tuned(args, denoiser, base)


def check_latents(base: ConditionalDenoiser, run_dir: Path, spec: LatentSpec) -> Normalisation | None:
    """The normalisation that makes the latents of a cache those that the base was trained in; None, and a warning, if
    they are another VAE's. Raises UserError for latents of another shape.
    """
    if base.model.config.in_channels != spec.shape[0]:
        raise UserError(
            f"{BASE_FLAG}: {run_dir} knows latents of {base.model.config.in_channels} channels, and those of "
            f"--latents_dir have {spec.shape[0]}; precompute with the VAE of that run"
        )
    run = RunFolder.find(run_dir, BASE_FLAG)
    vaes = load_vae(spec.vae), load_vae(str(run.path / "vae"))
    # Of a VAE into which a normalisation was folded only the layers next to the latents have changed.
    ours, theirs = (weights_hash(getattr(each, "decoder", each)) for each in vaes)
    if ours != theirs:
        logger.warning("%s: %s was trained in latents of another VAE than this cache's", BASE_FLAG, run_dir)
        return None
    return folded_normalisation(*vaes, spec.shape[0]).then(run.normalisation())


def config_from(base: ConditionalDenoiser, size: int, text_dim: int | None, row: ImageCondition) -> dict[str, Any]:
    """Arguments of the base's model for latents of `size`, with what the condition needs where the base has none."""
    config = own_config(base.model) | {"sample_size": size}
    is_same = isinstance(base.conditions, row.encoder)
    if is_same and text_dim is not None and config["cross_attention_dim"] != text_dim:
        raise UserError(
            f"{BASE_FLAG}: it knows text of width {config['cross_attention_dim']}, and that of --latents_dir has "
            f"{text_dim}; precompute with the text encoder of that run"
        )
    if is_same or not isinstance(base.conditions, NoCondition):
        return config
    if isinstance(base.model, DiT):
        return config | row.dit_arguments(config["style"] == "plain", config["hidden_size"], text_dim)
    return config | row.added_to_unet()


def check_same_model(args: Namespace, config: dict[str, Any], *data: Any) -> None:
    """Raises UserError where --model_size or --model_config ask for another model than the base's `config`."""
    model_class = DiT if args.model == "dit" else UNet2DConditionModel
    wanted = {"--model_size": MODELS[args.model](args.model_size, *data) if args.model_size else {}}
    wanted["--model_config"] = read_model_config(args.model_config, model_class, config)
    given = set(wanted["--model_config"])
    for flag, values in wanted.items():
        for key, value in values.items():
            is_decided = key in DATA_ARGUMENTS or (flag == "--model_size" and key in given)
            found = config.get(key)
            if not is_decided and value != (tuple(found) if isinstance(found, list) else found):
                raise UserError(f"{flag}: {key} {value}, but the run to start from has {found}; leave it out")


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
    return unet_config(size, sample_size, channels, text_dim, IMAGE_CONDITIONS[condition].adds_to_unet)


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
    return {
        "sample_size": sample_size,
        "patch_size": int(patch),
        "in_channels": channels,
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": heads,
        "style": "plain" if is_plain else "modern",
        "positions": None if is_plain else "both",
    } | IMAGE_CONDITIONS[condition].dit_arguments(is_plain, hidden_size, text_dim)


MODELS = {"unet": unet_arguments, "dit": dit_arguments}
