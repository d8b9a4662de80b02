"""A crystal run's folder: what is written when training starts and ends, and how it is loaded again."""

from pathlib import Path
from typing import Any

from utils import lora
from utils.codecs import Normalisation
from utils.crystal_codec import is_crystal_vae, load_crystal_vae
from utils.crystal_pipeline import CrystalPipeline
from utils.errors import UserError
from utils.export import check_weights, find_run, load_denoiser, load_settings, use_average
from utils.files import read_json, write_json, write_text
from utils.latent_cache import LatentSpec
from utils.models.denoiser import ConditionalDenoiser
from utils.requests import same_weights
from utils.sampling import sampling_scheduler

NUM_ITEMS_FILE = "num_items.json"


def is_crystal_run(path: Path) -> bool:
    """Whether a run's folder, or one of its checkpoints, is that of a crystal run."""
    return any(is_crystal_vae(folder / "vae") for folder in (path, path.parent))


def make_pipeline(
    denoiser: ConditionalDenoiser, spec: LatentSpec, normalisation: Normalisation, scheduler: Any
) -> CrystalPipeline:
    """A pipeline around the live denoiser. Raises UserError if the VAE is no longer the one that made the cache."""
    vae = load_crystal_vae(spec.vae, "--latents_dir")
    check_weights(vae, spec.vae, spec.fingerprint["vae"]["sha256"])
    num_items = {int(count): times for count, times in (spec.num_items or {}).items()}
    return CrystalPipeline(denoiser, sampling_scheduler(scheduler), vae, normalisation, num_items)


def save_frozen_parts(output_dir: Path, pipeline: CrystalPipeline) -> None:
    """Writes all that a checkpoint needs beside it to be sampled."""
    pipeline.vae.save_pretrained(output_dir / "vae")
    pipeline.scheduler.save_pretrained(output_dir / "scheduler")
    lora.merge_lora(pipeline.denoiser).model.save_config(output_dir / "transformer")
    pipeline.denoiser.conditions.save_config(output_dir / "conditions")
    if lora.is_adapted(pipeline.denoiser.model):
        lora.save_lora_config(pipeline.denoiser, output_dir / lora.FOLDER)
    write_json(output_dir / "latent_normalisation.json", vars(pipeline.normalisation))
    write_json(output_dir / NUM_ITEMS_FILE, {str(count): times for count, times in pipeline.num_items.items()})


def export_run(output_dir: Path, denoiser: ConditionalDenoiser, pipeline: CrystalPipeline, card: str) -> None:
    """Writes the trained weights, the model card and, last, `model_index.json`, which says that the run is finished.
    Adapters are merged into the weights, and saved apart too.
    """
    save_frozen_parts(output_dir, pipeline)
    if lora.is_adapted(denoiser.model):
        lora.save_lora(denoiser, output_dir / lora.FOLDER)
        denoiser = lora.merge_lora(denoiser)
    denoiser.model.save_pretrained(output_dir / "transformer")
    denoiser.conditions.save_pretrained(output_dir / "conditions")
    write_text(output_dir / "README.md", card)
    classes = {"transformer": denoiser.model, "conditions": denoiser.conditions, "vae": pipeline.vae}
    index = {name: ["utils", type(model).__name__] for name, model in classes.items()}
    write_json(output_dir / "model_index.json", {"_class_name": CrystalPipeline.__name__} | index)


def load_crystal_run(
    path: str | Path, ema_sigma_rel: float | None = None, flag: str = "--model", lora_dir: str | None = None
) -> CrystalPipeline:
    """The pipeline of a crystal run or checkpoint, as `export.load_run` loads those of images."""
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
    return CrystalPipeline(
        denoiser.eval(),
        scheduler,
        load_crystal_vae(str(run_dir / "vae")),
        normalisation,
        {int(count): times for count, times in read_json(run_dir / NUM_ITEMS_FILE).items()},
    )


def load_crystal_guide(path: str, pipeline: CrystalPipeline) -> ConditionalDenoiser:
    """The weaker run or checkpoint that guides `pipeline` (autoguidance), on the CPU, where `pipeline` still must be.
    Raises UserError for one that was trained on something else, and for the run itself.
    """
    if Path(path).is_dir() and not is_crystal_run(Path(path)):
        raise UserError(f"--guide_model: {path} is no run of crystals; give a weaker run on the same latents")
    guide = load_crystal_run(path, flag="--guide_model")
    same = {
        "other conditions": pipeline.columns == guide.columns,
        "another number of atoms": pipeline.max_atoms == guide.max_atoms,
        "another schedule or prediction type": dict(pipeline.scheduler.config) == dict(guide.scheduler.config),
        "another normalisation of latents": pipeline.normalisation == guide.normalisation,
        "another VAE": same_weights(pipeline.vae, guide.vae),
    }
    found = next((what for what, holds in same.items() if not holds), None)
    if found:
        raise UserError(f"--guide_model: {path} has {found}; give a weaker run on the same latents and conditions")
    if same_weights(pipeline.denoiser, guide.denoiser):
        raise UserError(f"--guide_model: {path} has the weights of --model, and nothing leads away from itself")
    return guide.denoiser


def model_card(
    spec: LatentSpec, num_rows: int, conditions: list[str], num_steps: int, use_ema: bool, base: str | None
) -> str:
    """The README.md of a run: what it is, what it was trained on, how to sample it."""
    origin = f"Fine-tuned from {base}" if base else "Trained from scratch"
    asked = f"on {', '.join(conditions)}" if conditions else "on nothing"
    return f"""---
tags: [diffusion, latent-diffusion, crystals, {"fine-tuned" if base else "trained-from-scratch"}]
---
# A latent diffusion model of crystals

{origin} on {spec.fingerprint["dataset"]["name"]} ({num_rows} crystals of up to {spec.shape[0]} atoms) for
{num_steps} steps, conditioned {asked}, in the latents of `{spec.vae}`. The weights are
{"their moving average" if use_ema else "the last ones"}; `args.yaml` repeats the run.

    python sample.py --model THIS_FOLDER --num_samples 16
"""
