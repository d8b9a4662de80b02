"""A run's folder in diffusers format: what is written when training starts and ends, and how it is loaded again.

The frozen parts (VAE, text encoder, tokenizer, scheduler) and the configs of the trained ones are written first, so
that any checkpoint can be sampled; weights and `model_index.json` come at the end. Text-to-image U-Nets become a stock
StableDiffusionPipeline.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.modeling_utils import ModelMixin

from utils.diffusion.conditions import TextCondition
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.diffusion.pipelines import LatentDiffusionPipeline
from utils.diffusion.sampling import is_flow, sampling_scheduler
from utils.errors import UserError
from utils.files import read_json
from utils.image import codec as codecs
from utils.image.pixel_codec import PixelCodec
from utils.image.text import load_text_encoder
from utils.latents.spec import LatentSpec, Normalisation
from utils.models.dit import DiT
from utils.runs import save
from utils.runs.load import RunFolder, check_guide, check_weights, same_weights
from utils.runs.save import ModelCard, component_name

UTILS = Path(__file__).parent.parent
# Our own classes travel with a run: file -> its name there. Each imports torch, diffusers and its siblings only.
TRAVELS = {
    "diffusion/pipelines": "pipelines.py",
    "diffusion/conditions": "conditions.py",
    "diffusion/guidance": "guidance.py",
    "models/dit": "latent_dit.py",  # not dit.py: diffusers would look for the class in its own pipeline of that name
    "models/attention": "attention.py",
    "image/pixel_codec": "pixel_codec.py",
}


def copy_files(folder: Path, *files: str) -> None:
    """Copies some of the files that travel."""
    for file in files:
        shutil.copy(UTILS / f"{file}.py", folder / TRAVELS[file])


def class_in(file: str, class_name: str) -> list[str]:
    """How `model_index.json` names a class in a file that travels."""
    return [Path(TRAVELS[file]).stem, class_name]


def make_pipeline(
    denoiser: ConditionalDenoiser,
    *,
    vae: ModelMixin,
    normalisation: Normalisation,
    scheduler: SchedulerMixin,
    text_encoder: Any = None,
    tokenizer: Any = None,
) -> LatentDiffusionPipeline:
    """A pipeline around a denoiser, with the default sampler of the noise schedule that `scheduler` has."""
    return LatentDiffusionPipeline(
        vae=vae,
        scheduler=sampling_scheduler(scheduler),
        conditions=denoiser.conditions,
        latents_mean=list(normalisation.mean),
        latents_std=list(normalisation.std),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        **{component_name(denoiser.model): denoiser.model},
    )


@dataclass
class Exporter(save.Exporter):
    """What a run of images uses and does not train, and how its folder is written."""

    text_encoder: Any = None
    tokenizer: Any = None

    @classmethod
    def of_cache(
        cls,
        spec: LatentSpec,
        normalisation: Normalisation,
        scheduler: SchedulerMixin,
        card: ModelCard,
        *,
        with_text: bool = False,
    ) -> "Exporter":
        """With the models that made a cache, whose latents the denoiser sees normalised like this. Raises UserError
        unless their weights still are the ones that made it.
        """
        vae = codecs.load_vae(spec.vae)
        check_weights(vae, spec.vae, spec.fingerprint["vae"]["sha256"])
        of_vae = Normalisation.of_vae(vae.config, spec.shape[0])
        if codecs.is_foldable(vae) and not (normalisation == of_vae and of_vae.is_plain_scaling()):
            vae = codecs.fold_normalisation(vae, normalisation)
            normalisation = Normalisation.of_vae(vae.config, spec.shape[0])
        tokenizer = text_encoder = None
        if with_text and spec.text_encoder:
            source = spec.text_encoder
            tokenizer, text_encoder = load_text_encoder(
                str(source["name"]), str(source["library"]), source["tokenizer"]
            )
            check_weights(text_encoder, str(source["name"]), spec.fingerprint["text_encoder"]["sha256"])
        return cls(vae, normalisation, scheduler, card, text_encoder=text_encoder, tokenizer=tokenizer)

    def pipeline(self, denoiser: ConditionalDenoiser) -> LatentDiffusionPipeline:
        """A pipeline around the live denoiser, for validation."""
        return make_pipeline(
            denoiser,
            vae=self.vae,
            normalisation=self.normalisation,
            scheduler=self.scheduler,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
        )

    def save_frozen(self, folder: Path, model: ConditionalDenoiser) -> None:
        """Writes all that a checkpoint needs beside it to be sampled, the text encoder too."""
        super().save_frozen(folder, model)
        if self.text_encoder is not None:
            self.text_encoder.save_pretrained(folder / "text_encoder")
            self.tokenizer.save_pretrained(folder / "tokenizer")

    def is_stable_diffusion(self, model: ConditionalDenoiser) -> bool:
        """Whether the stock StableDiffusionPipeline can run this model and give the same images."""
        return (
            isinstance(model.model, UNet2DConditionModel)
            and isinstance(model.conditions, TextCondition)
            and not is_flow(self.scheduler)
            and self.normalisation.is_plain_scaling()
            and hasattr(self.vae.config, "block_out_channels")
        )

    def index(self, folder: Path, model: ConditionalDenoiser) -> dict[str, Any]:
        """The content of `model_index.json`; the files of classes that diffusers does not have are copied."""
        if self.is_stable_diffusion(model):
            pipeline = StableDiffusionPipeline(
                vae=self.vae,
                text_encoder=self.text_encoder,
                tokenizer=self.tokenizer,
                unet=model.model,
                scheduler=sampling_scheduler(self.scheduler),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
            return index_of(pipeline)
        index = index_of(self.pipeline(model))
        copy_files(folder, "diffusion/pipelines", "diffusion/conditions", "diffusion/guidance")
        copy_files(folder / "conditions", "diffusion/conditions")
        index["_class_name"] = class_in("diffusion/pipelines", "LatentDiffusionPipeline")
        index["conditions"] = class_in("diffusion/conditions", type(model.conditions).__name__)
        if isinstance(model.model, DiT):
            name = component_name(model.model)
            copy_files(folder / name, "models/dit", "models/attention")
            index[name] = class_in("models/dit", "DiT")
        if isinstance(self.vae, PixelCodec):
            copy_files(folder / "vae", "image/pixel_codec")
            index["vae"] = class_in("image/pixel_codec", "PixelCodec")
        return index


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
    run = RunFolder.find(path, flag)
    denoiser = run.denoiser(ema_sigma_rel, lora_dir)
    vae = codecs.load_vae(str(run.path / "vae"))
    tokenizer = text_encoder = None
    if (run.path / "text_encoder").is_dir():
        tokenizer, text_encoder = load_text_encoder(str(run.path))
    elif isinstance(denoiser.conditions, TextCondition):
        raise UserError(f"--lora: {lora_dir} needs a text encoder, and {run.path} has none; sample the fine-tuned run")
    return make_pipeline(
        denoiser,
        vae=vae,
        normalisation=run.normalisation(),
        scheduler=run.scheduler(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def load_guide(path: str, pipeline: LatentDiffusionPipeline) -> ConditionalDenoiser:
    """The weaker run or checkpoint that guides `pipeline` (autoguidance), on the CPU, where `pipeline` still must be.
    Raises UserError for one that was trained on something else, and for the run itself.
    """
    guide = load_run(path, flag="--guide_model")
    ours, its = (ConditionalDenoiser(each.denoiser, each.conditions) for each in (pipeline, guide))
    return check_guide(path, differences(pipeline, guide), ours, its)


def differences(pipeline: LatentDiffusionPipeline, guide: LatentDiffusionPipeline) -> Iterator[str]:
    """What keeps the predictions of two runs from being compared. Size and architecture may differ."""
    ours, its = (
        {
            "another condition": type(each.conditions).__name__,
            "another number of classes": each.conditions.config.get("num_classes"),
            "another shape of text (tokens, width)": (
                each.conditions.config.get("sequence_length"),
                each.conditions.config.get("hidden_size"),
            ),
            "another shape of latents (channels, size)": (
                each.denoiser.config.in_channels,
                each.denoiser.config.sample_size,
            ),
            "another prediction type": "flow" if is_flow(each.scheduler) else each.scheduler.config.prediction_type,
            "another normalisation of latents (mean, std)": (each.config.latents_mean, each.config.latents_std),
        }
        for each in (pipeline, guide)
    )
    yield from (f"{what}: {its[what]}, not {value}" for what, value in ours.items() if its[what] != value)
    if pipeline.conditions.config.get("label_names") != guide.conditions.config.get("label_names"):
        yield "other names of classes"
    if not same_weights(pipeline.vae, guide.vae):
        # A normalisation may have been folded into the VAE: that it differs shows here only.
        yield "another VAE, or another normalisation of its latents"
    if not same_weights(pipeline.text_encoder, guide.text_encoder):
        yield "another text encoder"
    if not is_flow(pipeline.scheduler) and not torch.allclose(
        pipeline.scheduler.alphas_cumprod, guide.scheduler.alphas_cumprod
    ):
        yield "another noise schedule"
