"""The folder of a run whose samples are no images: what is written when training starts and ends, and how it is loaded
again. Such a run has an autoencoder of our own, and loads by our own scripts.
"""

from pathlib import Path
from typing import NamedTuple, Protocol

from diffusers import SchedulerMixin
from diffusers.models.modeling_utils import ModelMixin

from utils.diffusion.denoiser import ConditionalDenoiser
from utils.errors import UserError
from utils.files import read_json, write_json, write_text
from utils.image.codec import Normalisation
from utils.image.pipeline import find_run, load_denoiser, load_settings, use_average
from utils.image.sampler import same_weights
from utils.training import lora

# What `evaluate.py --modality` calls the samples of a run: by the class of its autoencoder, images by any other.
MODALITIES = {"CrystalVAE": "crystal", "ExpressionVAE": "expression"}
SAMPLES_OF = {"image": "images", "crystal": "crystals", "expression": "cells"}


class Parts(Protocol):
    """What a run consists of: `CrystalPipeline` and `ExpressionPipeline` do."""

    denoiser: ConditionalDenoiser
    scheduler: SchedulerMixin
    vae: ModelMixin
    normalisation: Normalisation


def is_run_of(vae_class: type, path: Path) -> bool:
    """Whether a run's folder, or one of its checkpoints, has an autoencoder of this class."""
    return vae_class.__name__ in autoencoders_of(path)


def autoencoders_of(path: Path) -> list[str]:
    """The class of the autoencoder in a run's folder, or beside one of its checkpoints."""
    configs = (folder / "vae" / "config.json" for folder in (path, path.parent))
    return [str(read_json(each).get("_class_name")) for each in configs if each.is_file()]


def check_modality(path: Path, wanted: str) -> None:
    """Raises UserError for a run, or a checkpoint, whose samples are of another modality than `evaluate.py` judges."""
    found = next((MODALITIES[name] for name in autoencoders_of(path) if name in MODALITIES), "image")
    if found != wanted:
        advice = f"leave out --modality {wanted}" if found == "image" else f"add --modality {found}"
        raise UserError(
            f"--model: {path} is a run of {SAMPLES_OF[found]}; {advice}, or give a run of {SAMPLES_OF[wanted]}"
        )


def save_parts(output_dir: Path, parts: Parts) -> None:
    """Writes all that a checkpoint needs beside it to be sampled."""
    parts.vae.save_pretrained(output_dir / "vae")
    parts.scheduler.save_pretrained(output_dir / "scheduler")
    lora.merge_lora(parts.denoiser).model.save_config(output_dir / "transformer")
    parts.denoiser.conditions.save_config(output_dir / "conditions")
    if lora.is_adapted(parts.denoiser.model):
        lora.save_lora_config(parts.denoiser, output_dir / lora.FOLDER)
    write_json(output_dir / "latent_normalisation.json", vars(parts.normalisation))


def save_weights(output_dir: Path, denoiser: ConditionalDenoiser, parts: Parts, card: str) -> None:
    """Writes the trained weights, the model card and, last, `model_index.json`, which says that the run is finished.
    Adapters are merged into the weights, and saved apart too.
    """
    (output_dir / "model_index.json").unlink(missing_ok=True)  # of a run that was finished once and has gone on
    if lora.is_adapted(denoiser.model):
        lora.save_lora(denoiser, output_dir / lora.FOLDER)
        denoiser = lora.merge_lora(denoiser)
    denoiser.model.save_pretrained(output_dir / "transformer")
    denoiser.conditions.save_pretrained(output_dir / "conditions")
    write_text(output_dir / "README.md", card)
    classes = {"transformer": denoiser.model, "conditions": denoiser.conditions, "vae": parts.vae}
    index = {name: ["utils", type(model).__name__] for name, model in classes.items()}
    write_json(output_dir / "model_index.json", {"_class_name": type(parts).__name__} | index)


class LoadedRun(NamedTuple):
    """What a run's folder holds, beside what is particular to its samples."""

    run_dir: Path
    checkpoint: Path | None  # that has the weights, of a run that is not finished
    denoiser: ConditionalDenoiser  # in evaluation mode
    scheduler: SchedulerMixin
    normalisation: Normalisation


def load_parts(path: str | Path, ema_sigma_rel: float | None, flag: str, lora_dir: str | None) -> LoadedRun:
    """A finished run, one that is not (its newest checkpoint), or a checkpoint, as `export.load_run` loads those of
    images. Raises UserError, which names the flag.
    """
    run_dir, name, checkpoint = find_run(Path(path), flag)
    denoiser = load_denoiser(run_dir, name, checkpoint, flag)
    if ema_sigma_rel is not None:
        use_average(denoiser, run_dir, checkpoint, ema_sigma_rel)
    if lora_dir is not None:
        adapted = lora.load_lora(denoiser, lora_dir)
        if denoiser.conditions.config.get("columns") not in (None, adapted.conditions.config.get("columns")):
            raise UserError(f"--lora: {lora_dir} was trained with other conditions than {path}; give the run it is of")
        denoiser = lora.merge_lora(adapted)
    scheduler, normalisation = load_settings(run_dir)
    return LoadedRun(run_dir, checkpoint, denoiser.eval(), scheduler, normalisation)


def check_guide(path: str, ours: Parts, its: Parts, same: dict[str, bool]) -> ConditionalDenoiser:
    """The denoiser of a weaker run, which guides ours (autoguidance). Raises UserError for one that was trained on
    something else (`same` says of what is particular to the samples whether it agrees), and for the run itself.
    """
    columns = [each.denoiser.conditions.config.get("columns") or {} for each in (ours, its)]
    same = {"other conditions": columns[0] == columns[1]} | same
    same |= {
        "another schedule or prediction type": dict(ours.scheduler.config) == dict(its.scheduler.config),
        "another normalisation of latents": ours.normalisation == its.normalisation,
    }
    found = next((what for what, holds in same.items() if not holds), None)
    if found is None and not same_weights(ours.vae, its.vae):
        found = "another VAE"
    if found:
        raise UserError(f"--guide_model: {path} has {found}; give a weaker run on the same latents and conditions")
    if same_weights(ours.denoiser, its.denoiser):
        raise UserError(f"--guide_model: {path} has the weights of --model, and nothing leads away from itself")
    return its.denoiser


def model_card(
    title: str, tags: str, what: str, conditions: list[str], base: str | None, vae: str, use_ema: bool, example: str
) -> str:
    """The README.md of a run: what it is, what it was trained on (`what`), how to sample it."""
    origin = f"Fine-tuned from {base}" if base else "Trained from scratch"
    asked = f"on {', '.join(conditions)}" if conditions else "on nothing"
    return f"""---
tags: [diffusion, latent-diffusion, {tags}, {"fine-tuned" if base else "trained-from-scratch"}]
---
# {title}

{origin} on {what}, conditioned {asked}, in the latents of `{vae}`. The weights are
{"their moving average" if use_ema else "the last ones"}; `args.yaml` repeats the run.

    {example}
"""
