"""What images can be conditioned on, one row each: which arguments of a network it decides, how its encoder is made
from a cache, what a request for images is, and by which flags it is asked.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from diffusers.models.modeling_utils import ModelMixin

from utils.diffusion.conditions import ClassCondition, Condition, NoCondition, TextCondition
from utils.errors import UserError
from utils.image.cache import ImageCache
from utils.latents.spec import LatentSpec
from utils.runs.base import BASE_FLAG


class ImageCondition:
    """Nothing, and what the conditions below share. One of your own is a subclass and a row in `IMAGE_CONDITIONS`."""

    encoder: type[Condition] = NoCondition
    trained = "unconditional: leave it out"  # what a run is, and by which flag it is asked
    flags: tuple[str, ...] = ()  # that ask for it
    adds_to_unet = False  # whether a U-Net adds its pooled projections to the timestep embedding

    def text_dim(self, spec: LatentSpec) -> int | None:
        """Width of the states that a network attends to; None if it attends to none."""
        return None

    def dit_arguments(self, is_plain: bool, hidden_size: int, text_dim: int | None) -> dict[str, Any]:
        """Arguments of a DiT that the condition decides; `is_plain`: of the paper's own blocks."""
        return {
            "cross_attention_dim": text_dim,
            "projection_class_embeddings_input_dim": text_dim,  # of text the pooled state
            "class_embed_type": None,
        }

    def added_to_unet(self) -> dict[str, Any]:
        """Arguments in which an unconditional U-Net changes to take this condition. Raises UserError if it cannot."""
        return {}

    def make_encoder(self, cache: ImageCache, config: dict[str, Any], is_dit: bool) -> ModelMixin:
        """The encoder, of the width that a network of this `config` takes. Raises UserError for a cache that lacks the
        condition.
        """
        return NoCondition()

    def requests(self, cache: ImageCache, rows: np.ndarray) -> list[dict[str, Any]]:
        """The pipeline's arguments for images like those of `rows` (N,)."""
        return [{} for _ in rows]

    def asked(self, given: Mapping[str, Any], encoder: Condition, run_dir: Path) -> list[dict[str, Any]]:
        """The pipeline's arguments for what is `given`, the values of flags (None = not given), or for the default of
        a run. Raises UserError for what the run does not know.
        """
        return [{}]

    def title(self, request: Mapping[str, Any], encoder: Condition) -> str:
        """A request in a few words."""
        return ""


class ClassLabels(ImageCondition):
    """Labels of the cache."""

    encoder = ClassCondition
    trained = "class-conditional: use --class_labels"
    flags = ("--class_labels",)
    adds_to_unet = True

    def dit_arguments(self, is_plain: bool, hidden_size: int, text_dim: int | None) -> dict[str, Any]:
        """A plain DiT adds labels as they are, as the paper does."""
        return {
            "cross_attention_dim": None,
            "projection_class_embeddings_input_dim": None if is_plain else hidden_size,
            "class_embed_type": "identity" if is_plain else None,
        }

    def added_to_unet(self) -> dict[str, Any]:
        return {"class_embed_type": "identity"}

    def make_encoder(self, cache: ImageCache, config: dict[str, Any], is_dit: bool) -> ModelMixin:
        labels = cache.spec.labels
        if labels is None:
            raise UserError(
                "--latents_dir: this cache has no labels; precompute with --label_column, or add --unconditional"
            )
        if is_dit:  # of its own width, where it is added to the timestep embedding without a projection
            width = config["projection_class_embeddings_input_dim"] or config["hidden_size"]
        else:
            width = 4 * config["block_out_channels"][0]
        return ClassCondition(labels["num_classes"], width, labels["names"])

    def requests(self, cache: ImageCache, rows: np.ndarray) -> list[dict[str, Any]]:
        assert cache.class_labels is not None
        return [{"class_labels": int(label)} for label in cache.class_labels[rows]]

    def asked(self, given: Mapping[str, Any], encoder: Condition, run_dir: Path) -> list[dict[str, Any]]:
        """By default every class."""
        num_classes = encoder.config.num_classes
        labels = given["--class_labels"] or range(num_classes)
        for label in labels:
            if label >= num_classes:
                raise UserError(f"--class_labels: {label}, but the classes of {run_dir} are 0 to {num_classes - 1}")
        return [{"class_labels": label} for label in labels]

    def title(self, request: Mapping[str, Any], encoder: Condition) -> str:
        names, label = encoder.config.get("label_names"), request["class_labels"]
        return names[label] if names else str(label)


class Captions(ImageCondition):
    """Captions of the cache, as states of a text encoder."""

    encoder = TextCondition
    trained = "text-to-image: use --prompt"
    flags = ("--prompt", "--negative_prompt")

    def text_dim(self, spec: LatentSpec) -> int | None:
        return spec.captions["hidden_size"] if spec.captions else None

    def added_to_unet(self) -> dict[str, Any]:
        raise UserError(
            f"{BASE_FLAG}: an unconditional U-Net has other blocks than one with text; start from a text-to-image "
            "run, or from a DiT"
        )

    def make_encoder(self, cache: ImageCache, config: dict[str, Any], is_dit: bool) -> ModelMixin:
        captions = cache.spec.captions
        if captions is None:
            raise UserError("--latents_dir: this cache has no captions; precompute with --caption_column")
        # A U-Net gets what Stable Diffusion's gets, the tokens alone; a DiT gets the pooled state too.
        encoder = TextCondition(captions["hidden_size"], captions["shape"][0], use_pooled=is_dit)
        if captions["content"] == "hidden_states":
            encoder.set_null(*cache.null_caption())
        return encoder

    def requests(self, cache: ImageCache, rows: np.ndarray) -> list[dict[str, Any]]:
        return [{"prompt": caption} for caption in cache.first_captions(rows)]

    def asked(self, given: Mapping[str, Any], encoder: Condition, run_dir: Path) -> list[dict[str, Any]]:
        """By default the validation prompts that the run was trained with."""
        prompts, negative_prompt = given["--prompt"] or validation_prompts(run_dir), given["--negative_prompt"]
        negative = {} if negative_prompt is None else {"negative_prompt": negative_prompt}
        return [{"prompt": prompt} | negative for prompt in prompts]

    def title(self, request: Mapping[str, Any], encoder: Condition) -> str:
        return request["prompt"]


def validation_prompts(run_dir: Path) -> list[str]:
    """The validation prompts a run was trained with. Raises UserError if there are none."""
    path = next(
        (folder / "args.yaml" for folder in (run_dir, run_dir.parent) if (folder / "args.yaml").is_file()), None
    )
    prompts = yaml.safe_load(path.read_text(encoding="utf-8")).get("validation_prompts") if path else None
    if not prompts:
        raise UserError(f"--prompt: the run {run_dir} is text-to-image; give --prompt or --prompts_file")
    return prompts


IMAGE_CONDITIONS: dict[str, ImageCondition] = {"none": ImageCondition(), "class": ClassLabels(), "text": Captions()}


def condition_of(encoder: Condition) -> ImageCondition:
    """The row of a run, by the encoder that it has."""
    return next(row for row in IMAGE_CONDITIONS.values() if row.encoder is type(encoder))
