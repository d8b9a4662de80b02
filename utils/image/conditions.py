"""What images can be conditioned on, one row each: which arguments of a network it decides, how its encoder is made
from a cache, and what a request for images is.
"""

from typing import Any

import numpy as np
from diffusers.models.modeling_utils import ModelMixin

from utils.diffusion.conditions import ClassCondition, Condition, NoCondition, TextCondition
from utils.errors import UserError
from utils.image.cache import ImageCache
from utils.latents.spec import LatentSpec
from utils.runs.base import BASE_FLAG


class ImageCondition:
    """Nothing, and what the conditions below share. One of your own is a subclass and a row in `IMAGE_CONDITIONS`."""

    encoder: type[Condition] = NoCondition
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


class ClassLabels(ImageCondition):
    """Labels of the cache."""

    encoder = ClassCondition
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


class Captions(ImageCondition):
    """Captions of the cache, as states of a text encoder."""

    encoder = TextCondition

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


IMAGE_CONDITIONS: dict[str, ImageCondition] = {"none": ImageCondition(), "class": ClassLabels(), "text": Captions()}
