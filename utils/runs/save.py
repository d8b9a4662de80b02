"""Writing a run's folder: frozen parts when training starts, weights and model card when it ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from diffusers import SchedulerMixin, UNet2DConditionModel
from diffusers.models.modeling_utils import ModelMixin

from utils.diffusion.denoiser import ConditionalDenoiser
from utils.diffusion.sampling import sampling_scheduler
from utils.files import write_json, write_text
from utils.latents.spec import Normalisation
from utils.runs.load import NORMALISATION_FILE
from utils.training import lora


@dataclass(frozen=True)
class ModelCard:
    """What the README.md of a run says: what the run is, what it was trained on, how to sample it."""

    title: str
    data: str  # "mp_20 (27136 crystals of up to 20 atoms)"
    settings: str  # what follows the number of steps, with the autoencoder
    base: str | None  # the run that it was fine-tuned from
    use_ema: bool
    example: str  # a command that samples the run
    tags: tuple[str, ...] = ()
    library_name: str | None = None  # by which the hub knows what loads the folder
    breaks: tuple[str, str] = ("\n", " ")  # before and after the kind of weights, such that lines stay short

    def text(self, num_steps: int) -> str:
        """The file after so many optimizer steps."""
        tags = ", ".join(
            ["diffusion", "latent-diffusion", *self.tags, "fine-tuned" if self.base else "trained-from-scratch"]
        )
        header = [f"library_name: {self.library_name}"] if self.library_name else []
        origin = f"Fine-tuned from {self.base}" if self.base else "Trained from scratch"
        weights = "their moving average" if self.use_ema else "the last ones"
        before, after = self.breaks
        lines = ["---", *header, f"tags: [{tags}]", "---", f"# {self.title}", ""]
        lines += [f"{origin} on {self.data} for", f"{num_steps} steps{self.settings}. "]
        lines[-1] += f"The weights are{before}{weights};{after}`args.yaml` repeats the run."
        return "\n".join([*lines, "", f"    {self.example}", ""])


def column_settings(conditions: Sequence[str], vae: str) -> str:
    """The settings of a model card for a run that was trained on columns."""
    told = f"on {', '.join(conditions)}" if conditions else "on nothing"
    return f", conditioned {told}, in the latents of `{vae}`"


def component_name(model: ModelMixin) -> str:
    """The folder of the denoiser, as diffusers names it."""
    return "unet" if isinstance(model, UNet2DConditionModel) else "transformer"


@dataclass
class Exporter:
    """What a run uses and does not train, and how its folder is written. Each modality adds what its runs have."""

    vae: ModelMixin
    normalisation: Normalisation  # of the latents that `vae` decodes
    scheduler: SchedulerMixin  # of the training objective
    card: ModelCard
    pipeline_name: ClassVar[str]  # what `model_index.json` says that the run is

    def save_frozen(self, folder: Path, model: ConditionalDenoiser) -> None:
        """Writes all that a checkpoint needs beside it to be sampled."""
        self.vae.save_pretrained(folder / "vae")
        sampling_scheduler(self.scheduler).save_pretrained(folder / "scheduler")
        model.model.save_config(folder / component_name(model.model))
        model.conditions.save_config(folder / "conditions")
        if lora.is_adapted(model.model):
            lora.save_lora_config(model, folder / lora.FOLDER)
        write_json(folder / NORMALISATION_FILE, vars(self.normalisation))

    def write(self, folder: Path, model: ConditionalDenoiser, num_steps: int) -> None:
        """Writes a finished run: all frozen parts, the weights of `model`, the model card and, last,
        `model_index.json`, which says that the run is finished. Adapters are merged into the weights, and saved apart
        too.
        """
        self.save_frozen(folder, model)
        (folder / "model_index.json").unlink(missing_ok=True)  # of a run that was finished once and then resumed
        if lora.is_adapted(model.model):
            lora.save_lora(model, folder / lora.FOLDER)
            model = lora.merge_lora(model)
        model.model.save_pretrained(folder / component_name(model.model))
        model.conditions.save_pretrained(folder / "conditions")
        write_text(folder / "README.md", self.card.text(num_steps))
        write_json(folder / "model_index.json", self.index(folder, model))

    def index(self, folder: Path, model: ConditionalDenoiser) -> dict[str, Any]:
        """The content of `model_index.json`: the class of each part, and the library it is in."""
        parts = {component_name(model.model): model.model, "conditions": model.conditions, "vae": self.vae}
        classes = {name: ["utils", type(part).__name__] for name, part in parts.items()}
        return {"_class_name": self.pipeline_name} | classes
