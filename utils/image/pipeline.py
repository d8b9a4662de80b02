"""A run's folder in diffusers format: what is written when training starts and ends, and how it is loaded again.

The frozen parts (VAE, text encoder, tokenizer, scheduler) and the configs of the trained ones are written first, so
that any checkpoint can be sampled; weights and `model_index.json` come at the end. Text-to-image U-Nets become a stock
StableDiffusionPipeline.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffusers import DiffusionPipeline, SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.modeling_utils import ModelMixin

from utils.diffusion import conditions, guidance, pipelines
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.diffusion.pipelines import LatentDiffusionPipeline
from utils.diffusion.sampling import is_flow, sampling_scheduler
from utils.errors import UserError
from utils.files import read_json, write_json, write_text
from utils.image import codec as codecs
from utils.image import pixel_codec
from utils.image.text import load_text_encoder
from utils.latents.spec import LatentSpec, Normalisation
from utils.models import attention, dit
from utils.runs.load import check_weights, find_run, load_denoiser, load_settings, use_average
from utils.training import lora


@dataclass
class FrozenParts:
    """What a run uses and does not train."""

    vae: ModelMixin
    normalisation: Normalisation  # of the VAE as it is here, after folding
    scheduler: SchedulerMixin  # of the training objective
    text_encoder: Any = None
    tokenizer: Any = None


def load_frozen_parts(
    spec: LatentSpec, normalisation: Normalisation, scheduler: SchedulerMixin, with_text: bool = False
) -> FrozenParts:
    """Loads the models that made a cache, and checks that their weights still are the ones that made it."""
    vae = codecs.load_vae(spec.vae)
    check_weights(vae, spec.vae, spec.fingerprint["vae"]["sha256"])
    of_vae = Normalisation.of_vae(vae.config, spec.shape[0])
    if codecs.is_foldable(vae) and not (normalisation == of_vae and of_vae.is_plain_scaling()):
        vae = codecs.fold_normalisation(vae, normalisation)
        normalisation = Normalisation.of_vae(vae.config, spec.shape[0])
    tokenizer = text_encoder = None
    if with_text and spec.text_encoder:
        source = spec.text_encoder
        tokenizer, text_encoder = load_text_encoder(str(source["name"]), str(source["library"]), source["tokenizer"])
        check_weights(text_encoder, str(source["name"]), spec.fingerprint["text_encoder"]["sha256"])
    return FrozenParts(vae, normalisation, scheduler, text_encoder, tokenizer)


def component_name(model: ModelMixin) -> str:
    """The folder of the denoiser, as diffusers names it."""
    return "unet" if isinstance(model, UNet2DConditionModel) else "transformer"


def make_pipeline(denoiser: ConditionalDenoiser, parts: FrozenParts) -> LatentDiffusionPipeline:
    """A pipeline around the live denoiser, for validation."""
    return LatentDiffusionPipeline(
        vae=parts.vae,
        scheduler=sampling_scheduler(parts.scheduler),
        conditions=denoiser.conditions,
        latents_mean=list(parts.normalisation.mean),
        latents_std=list(parts.normalisation.std),
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        **{component_name(denoiser.model): denoiser.model},
    )


def save_frozen_parts(output_dir: Path, denoiser: ConditionalDenoiser, parts: FrozenParts) -> None:
    """Writes all that a checkpoint needs beside it to be sampled."""
    parts.vae.save_pretrained(output_dir / "vae")
    sampling_scheduler(parts.scheduler).save_pretrained(output_dir / "scheduler")
    if parts.text_encoder is not None:
        parts.text_encoder.save_pretrained(output_dir / "text_encoder")
        parts.tokenizer.save_pretrained(output_dir / "tokenizer")
    denoiser.model.save_config(output_dir / component_name(denoiser.model))
    denoiser.conditions.save_config(output_dir / "conditions")
    if lora.is_adapted(denoiser.model):
        lora.save_lora_config(denoiser, output_dir / lora.FOLDER)
    normalisation = {"mean": parts.normalisation.mean, "std": parts.normalisation.std}
    write_json(output_dir / "latent_normalisation.json", normalisation)


def is_stable_diffusion(denoiser: ConditionalDenoiser, parts: FrozenParts) -> bool:
    """Whether the stock StableDiffusionPipeline can run this model and give the same images."""
    return (
        isinstance(denoiser.model, UNet2DConditionModel)
        and isinstance(denoiser.conditions, conditions.TextCondition)
        and not is_flow(parts.scheduler)
        and parts.normalisation.is_plain_scaling()
        and hasattr(parts.vae.config, "block_out_channels")
    )


def export_run(output_dir: Path, denoiser: ConditionalDenoiser, parts: FrozenParts, card: str) -> None:
    """Writes the trained weights, the model card and, last, `model_index.json`. Adapters are merged into the weights,
    and saved apart too.
    """
    (output_dir / "model_index.json").unlink(missing_ok=True)  # of a run that was finished once and has gone on
    if lora.is_adapted(denoiser.model):
        lora.save_lora(denoiser, output_dir / lora.FOLDER)
        denoiser = lora.merge_lora(denoiser)
    name = component_name(denoiser.model)
    denoiser.model.save_pretrained(output_dir / name)
    denoiser.conditions.save_pretrained(output_dir / "conditions")
    write_text(output_dir / "README.md", card)
    if is_stable_diffusion(denoiser, parts):
        pipeline = StableDiffusionPipeline(
            vae=parts.vae,
            text_encoder=parts.text_encoder,
            tokenizer=parts.tokenizer,
            unet=denoiser.model,
            scheduler=sampling_scheduler(parts.scheduler),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        write_json(output_dir / "model_index.json", index_of(pipeline))
        return
    # Our own classes travel with the run: each file holds its class and imports torch and diffusers only.
    pipeline = make_pipeline(denoiser, parts)
    shutil.copy(str(conditions.__file__), output_dir / "conditions" / "conditions.py")
    for module in (pipelines, conditions, guidance):
        shutil.copy(str(module.__file__), output_dir / Path(str(module.__file__)).name)
    index = index_of(pipeline)
    index["_class_name"] = ["pipelines", "LatentDiffusionPipeline"]
    index["conditions"] = ["conditions", type(denoiser.conditions).__name__]
    if isinstance(denoiser.model, dit.DiT):
        # Not as dit.py: diffusers would look for the class in its own pipeline of that name.
        shutil.copy(str(dit.__file__), output_dir / name / "latent_dit.py")
        shutil.copy(str(attention.__file__), output_dir / name / "attention.py")
        index[name] = ["latent_dit", "DiT"]
    if isinstance(parts.vae, pixel_codec.PixelCodec):
        shutil.copy(str(pixel_codec.__file__), output_dir / "vae" / "pixel_codec.py")
        index["vae"] = ["pixel_codec", "PixelCodec"]
    write_json(output_dir / "model_index.json", index)


def index_of(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """What a pipeline would write into model_index.json, which must not be there before it is right."""
    with TemporaryDirectory() as folder:
        pipeline.save_config(folder)
        return read_json(Path(folder) / "model_index.json")


def load_run(
    path: str | Path, ema_sigma_rel: float | None = None, flag: str = "--model", lora_dir: str | None = None
) -> LatentDiffusionPipeline:
    """The pipeline of a finished run, of a run that is not finished (its newest checkpoint), or of a checkpoint. EMA
    weights, where the run kept an average, or the average `ema_sigma_rel` made of the run's snapshots; with the
    adapters of the folder `lora_dir` merged into them. Executes no code from the folder. Raises UserError, which
    names the flag, for a folder that is no run.
    """
    run_dir, name, checkpoint = find_run(Path(path), flag)
    denoiser = load_denoiser(run_dir, name, checkpoint, flag)
    if ema_sigma_rel is not None:
        use_average(denoiser, run_dir, checkpoint, ema_sigma_rel)
    if lora_dir is not None:
        denoiser = lora.merge_lora(lora.load_lora(denoiser, lora_dir))
    vae = codecs.load_vae(str(run_dir / "vae"))
    tokenizer = text_encoder = None
    if (run_dir / "text_encoder").is_dir():
        tokenizer, text_encoder = load_text_encoder(str(run_dir))
    elif isinstance(denoiser.conditions, conditions.TextCondition):
        raise UserError(f"--lora: {lora_dir} needs a text encoder, and {run_dir} has none; sample the fine-tuned run")
    scheduler, normalisation = load_settings(run_dir)
    return make_pipeline(denoiser, FrozenParts(vae, normalisation, scheduler, text_encoder, tokenizer))


def model_card(
    spec: LatentSpec,
    num_rows: int,
    prediction_type: str,
    num_steps: int,
    batch_size: int,
    use_ema: bool,
    base: str | None = None,
) -> str:
    """The README.md of a run: what it is, what it was trained on, how to sample it."""
    origin = f"Fine-tuned from {base}" if base else "Trained from scratch"
    dataset = spec.fingerprint["dataset"]
    name = dataset.get("name") or dataset.get("dataset_name") or "a local dataset"
    return f"""---
library_name: diffusers
tags: [diffusion, latent-diffusion, {"fine-tuned" if base else "trained-from-scratch"}]
---
# A latent diffusion model

{origin} on {name} ({num_rows} images at {spec.fingerprint["resolution"]} pixels) for
{num_steps} steps of {batch_size} samples per process, prediction type `{prediction_type}`,
in the latents of `{spec.vae}`. The weights are {"their moving average" if use_ema else "the last ones"};
`args.yaml` repeats the run.

    python sample.py --model THIS_FOLDER
"""
