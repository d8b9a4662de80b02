"""A crystal run's folder: what is written when training starts and ends, and how it is loaded again."""

from pathlib import Path
from typing import Any

from utils.crystal.codec import load_crystal_vae
from utils.crystal.pipeline import CrystalPipeline
from utils.crystal.vae.network import CrystalVAE
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.diffusion.sampling import sampling_scheduler
from utils.errors import UserError
from utils.files import read_json, write_json
from utils.image.codec import Normalisation
from utils.image.pipeline import check_weights
from utils.latents.cache import LatentSpec
from utils.runs.run_folder import check_guide, is_run_of, load_parts, save_parts, save_weights
from utils.runs.run_folder import model_card as card_of

NUM_ITEMS_FILE = "num_items.json"


def is_crystal_run(path: Path) -> bool:
    """Whether a run's folder, or one of its checkpoints, is that of a crystal run."""
    return is_run_of(CrystalVAE, path)


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
    save_parts(output_dir, pipeline)
    write_json(output_dir / NUM_ITEMS_FILE, {str(count): times for count, times in pipeline.num_items.items()})


def export_run(output_dir: Path, denoiser: ConditionalDenoiser, pipeline: CrystalPipeline, card: str) -> None:
    """Writes a run that is finished."""
    save_frozen_parts(output_dir, pipeline)
    save_weights(output_dir, denoiser, pipeline, card)


def load_crystal_run(
    path: str | Path, ema_sigma_rel: float | None = None, flag: str = "--model", lora_dir: str | None = None
) -> CrystalPipeline:
    """The pipeline of a crystal run or checkpoint."""
    loaded = load_parts(path, ema_sigma_rel, flag, lora_dir)
    num_items = read_json(loaded.run_dir / NUM_ITEMS_FILE)
    return CrystalPipeline(
        loaded.denoiser,
        loaded.scheduler,
        load_crystal_vae(str(loaded.run_dir / "vae")),
        loaded.normalisation,
        {int(count): times for count, times in num_items.items()},
    )


def load_crystal_guide(path: str, pipeline: CrystalPipeline) -> ConditionalDenoiser:
    """The weaker run or checkpoint that guides `pipeline` (autoguidance), on the CPU, where `pipeline` still must be.
    Raises UserError for one that was trained on something else, and for the run itself.
    """
    if Path(path).is_dir() and not is_crystal_run(Path(path)):
        raise UserError(f"--guide_model: {path} is no run of crystals; give a weaker run on the same latents")
    guide = load_crystal_run(path, flag="--guide_model")
    return check_guide(path, pipeline, guide, {"another number of atoms": pipeline.max_atoms == guide.max_atoms})


def model_card(
    spec: LatentSpec, num_rows: int, conditions: list[str], num_steps: int, use_ema: bool, base: str | None
) -> str:
    """The README.md of a run."""
    name = spec.fingerprint["dataset"]["name"]
    what = f"{name} ({num_rows} crystals of up to {spec.shape[0]} atoms) for\n{num_steps} steps"
    example = "python sample.py --model THIS_FOLDER --num_samples 16"
    title = "A latent diffusion model of crystals"
    return card_of(title, "crystals", what, conditions, base, spec.vae, use_ema, example)
