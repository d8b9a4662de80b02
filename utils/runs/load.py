"""Reading a run's folder: finding it, its weights, its settings, and a weaker run that guides it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

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
COMPONENTS = ("unet", "transformer")  # folders of a denoiser, as diffusers names them
OF_VAE = "vae."  # how the names of an autoencoder's weights begin, where it was trained together with its denoiser
NORMALISATION_FILE = "latent_normalisation.json"
SCHEDULER_CLASSES = {scheduler.__name__: scheduler for scheduler in SAMPLERS.values()}


def check_weights(model: torch.nn.Module, name: str, expected: str) -> None:
    """Raises UserError if a frozen model is no longer the one whose outputs were cached."""
    if frozen.weights_hash(model) != expected:
        raise UserError(
            f"--latents_dir: {name} now has other weights than when the latents were computed; precompute again"
        )


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, and which of its weights are meant. Errors of its methods name `flag`."""

    path: Path
    component: str  # folder of the denoiser in it: "unet" or "transformer"
    checkpoint: Path | None  # that has the weights; None: the run is finished and has its own
    flag: str

    @classmethod
    def find(cls, path: str | Path, flag: str = "--model") -> "RunFolder":
        """A finished run, a run that is not finished, with the weights of its newest checkpoint, or a checkpoint of a
        run. Raises UserError for a folder that is none of these.
        """
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"{flag}: {path} does not exist; give a run's folder or one of its checkpoints")
        checkpoint = path if (path / MANIFEST).is_file() else None
        folder = path.parent if checkpoint else path
        component = next((each for each in COMPONENTS if (folder / each / "config.json").is_file()), None)
        if component is None or not (folder / "vae").is_dir() or not (folder / "scheduler").is_dir():
            raise UserError(
                f"{flag}: {path} is no run (no unet/ or transformer/ beside vae/ and scheduler/); "
                "give a run's folder or a checkpoint"
            )
        if checkpoint is None and not (folder / "model_index.json").is_file():
            steps = checkpoint_steps(folder)
            if not steps:
                raise UserError(f"{flag}: {folder} was never finished and has no checkpoint; train it first")
            checkpoint = folder / f"checkpoint-{steps[-1]}"
        return cls(folder, component, checkpoint, flag)

    def denoiser(self, ema_sigma_rel: float | None = None, lora_dir: str | None = None) -> ConditionalDenoiser:
        """Denoiser and conditions, in evaluation mode: with the average of the relative width `ema_sigma_rel`, made of
        the run's snapshots up to the checkpoint, and with the adapters of `lora_dir` merged into the weights. Raises
        UserError for a damaged checkpoint, snapshots that are not there, and adapters of another run.
        """
        folders = (self.path / self.component, self.path / "conditions")
        classes = [MODEL_CLASSES[read_json(folder / "config.json")["_class_name"]] for folder in folders]
        pairs = list(zip(classes, folders, strict=True))
        if self.checkpoint is None:
            denoiser = ConditionalDenoiser(*(cls.from_pretrained(folder) for cls, folder in pairs))
        else:
            weights = self.weights()
            denoiser = ConditionalDenoiser(*(cls.from_config(cls.load_config(folder)) for cls, folder in pairs))
            if (self.path / lora.FOLDER / lora.CONFIG_FILE).is_file():
                scaling = lora.scaling_of(read_json(self.path / lora.FOLDER / lora.CONFIG_FILE))
                weights = lora.merge_weights(weights, scaling)
            denoiser.load_state_dict({name: each for name, each in weights.items() if not name.startswith(OF_VAE)})
        if ema_sigma_rel is not None:
            denoiser.load_state_dict(denoiser.state_dict() | self.average(ema_sigma_rel))
        if lora_dir is not None:
            denoiser = self.adapted(denoiser.eval(), lora_dir)
        return denoiser.eval()

    def weights(self) -> dict[str, torch.Tensor]:
        """All weights of the checkpoint, averaged where it has an average; nothing of a finished run. Raises UserError
        for a damaged checkpoint.
        """
        if self.checkpoint is None:
            return {}
        found = damage(self.checkpoint)
        if found:
            raise UserError(f"{self.flag}: {self.checkpoint} cannot be used: {found}")
        weights = load_file(self.checkpoint / "model.safetensors")
        if (self.checkpoint / EMA_FILE).is_file():
            weights |= load_file(self.checkpoint / EMA_FILE)  # the average has no buffers: those come from the model
        return weights

    def average(self, ema_sigma_rel: float) -> dict[str, torch.Tensor]:
        """The average of a relative width, of the snapshots up to the checkpoint."""
        last_step = read_json(self.checkpoint / MANIFEST)["global_step"] if self.checkpoint else None
        return reconstruct(self.path, ema_sigma_rel, last_step)

    def adapted(self, denoiser: ConditionalDenoiser, lora_dir: str) -> ConditionalDenoiser:
        """The denoiser with adapters merged into its weights. Raises UserError for adapters of another run."""
        adapted = lora.load_lora(denoiser, lora_dir)
        had = denoiser.conditions.config.get("columns")
        if had not in (None, adapted.conditions.config.get("columns")):
            raise UserError(
                f"--lora: {lora_dir} was trained with other conditions than {self.checkpoint or self.path}; give the "
                "run it is of"
            )
        return lora.merge_lora(adapted)

    def scheduler(self) -> SchedulerMixin:
        """The sampler by which the run samples unless another is asked for, with its noise schedule."""
        folder = self.path / "scheduler"
        return SCHEDULER_CLASSES[read_json(folder / "scheduler_config.json")["_class_name"]].from_pretrained(folder)

    def normalisation(self) -> Normalisation:
        """How the latents are normalised that the denoiser takes."""
        return Normalisation(**{k: tuple(v) for k, v in read_json(self.path / NORMALISATION_FILE).items()})


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


# ---- a weaker run that guides


class Parts(Protocol):
    """What a run on columns consists of."""

    denoiser: ConditionalDenoiser
    scheduler: SchedulerMixin
    vae: ModelMixin
    normalisation: Normalisation


def same_weights(ours: torch.nn.Module | None, its: torch.nn.Module | None) -> bool:
    """Whether two models are the same, to rounding; None is the same as None."""
    if ours is None or its is None:
        return ours is its
    first, second = ours.state_dict(), its.state_dict()
    return first.keys() == second.keys() and all(
        tensor.shape == second[name].shape and torch.allclose(tensor, second[name], rtol=1e-4, atol=1e-6)
        for name, tensor in first.items()
    )


def check_guide(
    path: str, differences: Iterator[str], ours: ConditionalDenoiser, its: ConditionalDenoiser
) -> ConditionalDenoiser:
    """The denoiser of a weaker run, `its`, which guides `ours` (autoguidance). Raises UserError for one that was
    trained on something else, of which `differences` says what, and for the run itself.
    """
    found = next(differences, None)
    if found is not None:
        raise UserError(f"--guide_model: {path} has {found}; give a weaker run on the same latents and conditions")
    if same_weights(ours, its):
        raise UserError(f"--guide_model: {path} has the weights of --model, and nothing leads away from itself")
    return its.eval()


def differences_of_parts(ours: Parts, its: Parts, *others: str) -> Iterator[str]:
    """What keeps the predictions of two runs on columns from being compared; `others` is what else was found."""
    columns = [each.denoiser.conditions.config.get("columns") or {} for each in (ours, its)]
    if columns[0] != columns[1]:
        yield "other conditions"
    yield from others
    if dict(ours.scheduler.config) != dict(its.scheduler.config):
        yield "another schedule or prediction type"
    if ours.normalisation != its.normalisation:
        yield "another normalisation of latents"
    if not same_weights(ours.vae, its.vae):
        yield "another VAE"
