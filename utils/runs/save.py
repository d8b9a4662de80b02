"""Writing a run's folder: frozen parts when training starts, weights and model card when it ends."""

from pathlib import Path
from typing import Protocol

from diffusers import SchedulerMixin
from diffusers.models.modeling_utils import ModelMixin

from utils.diffusion.denoiser import ConditionalDenoiser
from utils.files import write_json, write_text
from utils.latents.spec import Normalisation
from utils.training import lora


class Parts(Protocol):
    """What a run consists of: `CrystalPipeline` and `ExpressionPipeline` do."""

    denoiser: ConditionalDenoiser
    scheduler: SchedulerMixin
    vae: ModelMixin
    normalisation: Normalisation


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
