"""Reading a run's folder: finding it, its weights, its settings."""

from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import SchedulerMixin, UNet2DConditionModel
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file

from utils import frozen
from utils.diffusion import conditions
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.diffusion.sampling import SAMPLERS
from utils.errors import UserError
from utils.files import read_json
from utils.latents.spec import Normalisation
from utils.models import dit, vector_mlp
from utils.runs.save import Parts
from utils.training import lora
from utils.training.checkpoints import MANIFEST, checkpoint_steps, damage
from utils.training.ema import EMA_FILE, reconstruct

MODEL_CLASSES: dict[str, type[ModelMixin]] = {
    "UNet2DConditionModel": UNet2DConditionModel,
    "DiT": dit.DiT,
    "VectorMLP": vector_mlp.VectorMLP,
    "NoCondition": conditions.NoCondition,
    "ClassCondition": conditions.ClassCondition,
    "TextCondition": conditions.TextCondition,
    "ConditionSum": conditions.ConditionSum,
}
OF_VAE = "vae."  # how the names of an autoencoder's weights begin, where it was trained together with its denoiser
SCHEDULER_CLASSES = {scheduler.__name__: scheduler for scheduler in SAMPLERS.values()}


def check_weights(model: torch.nn.Module, name: str, expected: str) -> None:
    """Raises UserError if a frozen model is no longer the one whose outputs were cached."""
    if frozen.weights_hash(model) != expected:
        raise UserError(
            f"--latents_dir: {name} now has other weights than when the latents were computed; precompute again"
        )


def find_run(path: Path, flag: str) -> tuple[Path, str, Path | None]:
    """A run's folder, the name of the denoiser's folder in it, and the checkpoint that has the weights of a run that
    is not finished (the newest), or that `path` is. Raises UserError, which names the flag, for a folder that is none.
    """
    if not path.is_dir():
        raise UserError(f"{flag}: {path} does not exist; give a run's folder or one of its checkpoints")
    checkpoint = path if (path / MANIFEST).is_file() else None
    run_dir = path.parent if checkpoint else path
    name = next((each for each in ("unet", "transformer") if (run_dir / each / "config.json").is_file()), None)
    if name is None or not (run_dir / "vae").is_dir() or not (run_dir / "scheduler").is_dir():
        raise UserError(
            f"{flag}: {path} is no run (no unet/ or transformer/ beside vae/ and scheduler/); "
            "give a run's folder or a checkpoint"
        )
    if checkpoint is None and not (run_dir / "model_index.json").is_file():
        steps = checkpoint_steps(run_dir)
        if not steps:
            raise UserError(f"{flag}: {run_dir} was never finished and has no checkpoint; train it first")
        checkpoint = run_dir / f"checkpoint-{steps[-1]}"
    return run_dir, name, checkpoint


def load_settings(run_dir: Path) -> tuple[SchedulerMixin, Normalisation]:
    """The scheduler and the normalisation of latents that a run was trained with."""
    scheduler_class = SCHEDULER_CLASSES[read_json(run_dir / "scheduler" / "scheduler_config.json")["_class_name"]]
    normalisation = {k: tuple(v) for k, v in read_json(run_dir / "latent_normalisation.json").items()}
    return scheduler_class.from_pretrained(run_dir / "scheduler"), Normalisation(**normalisation)


def use_average(denoiser: ConditionalDenoiser, run_dir: Path, checkpoint: Path | None, ema_sigma_rel: float) -> None:
    """Gives a denoiser the average of a relative width, made of its run's snapshots up to the checkpoint."""
    last_step = read_json(checkpoint / MANIFEST)["global_step"] if checkpoint else None
    denoiser.load_state_dict(denoiser.state_dict() | reconstruct(run_dir, ema_sigma_rel, last_step))


def load_denoiser(run_dir: Path, name: str, checkpoint: Path | None, flag: str) -> ConditionalDenoiser:
    """Denoiser and conditions of a finished run, or with the weights of a checkpoint of it."""
    folders = (run_dir / name, run_dir / "conditions")
    classes = [MODEL_CLASSES[read_json(folder / "config.json")["_class_name"]] for folder in folders]
    if checkpoint is None:
        model, condition = (cls.from_pretrained(folder) for cls, folder in zip(classes, folders, strict=True))
        return ConditionalDenoiser(model, condition).eval()
    found = damage(checkpoint)
    if found:
        raise UserError(f"{flag}: {checkpoint} cannot be used: {found}")
    model, condition = (cls.from_config(cls.load_config(folder)) for cls, folder in zip(classes, folders, strict=True))
    denoiser = ConditionalDenoiser(model, condition)
    weights = checkpoint_weights(checkpoint)
    if (run_dir / lora.FOLDER / lora.CONFIG_FILE).is_file():
        weights = lora.merge_weights(weights, lora.scaling_of(read_json(run_dir / lora.FOLDER / lora.CONFIG_FILE)))
    denoiser.load_state_dict({name: tensor for name, tensor in weights.items() if not name.startswith(OF_VAE)})
    return denoiser.eval()


def checkpoint_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint, averaged where it has an average."""
    weights = load_file(checkpoint / "model.safetensors")
    if (checkpoint / EMA_FILE).is_file():
        weights |= load_file(checkpoint / EMA_FILE)  # the average has no buffers: those come from the model
    return weights


def newest_run(folder: Path) -> Path:
    """The most recently finished run below `folder`. Raises UserError if there is none."""
    indices = folder.glob("**/model_index.json")
    # `best/` of a run is a model too, and has no args.yaml of its own.
    finished = (path for path in indices if (path.parent / "args.yaml").is_file())
    found = sorted(finished, key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"--model: there is no finished run below {folder}/; train one, or name a run's folder")
    return found[-1].parent


def next_folder(parent: Path) -> Path:
    """The first of parent/0000, parent/0001, ... that does not exist."""
    number = 0
    while (parent / f"{number:04d}").exists():
        number += 1
    return parent / f"{number:04d}"


def same_weights(ours: torch.nn.Module | None, its: torch.nn.Module | None) -> bool:
    """Whether two models are the same, to rounding; None is the same as None."""
    if ours is None or its is None:
        return ours is its
    first, second = ours.state_dict(), its.state_dict()
    return first.keys() == second.keys() and all(
        tensor.shape == second[name].shape and torch.allclose(tensor, second[name], rtol=1e-4, atol=1e-6)
        for name, tensor in first.items()
    )


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
