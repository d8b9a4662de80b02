"""Conditions: what a denoiser is told beside the noisy latents, and the null it is told instead when that is dropped.

Every condition reaches a denoiser through one of the two channels of `Conditioning`. An encoder maps a batch's values
and a drop mask to it, and owns its null embedding, so that training and sampling cannot disagree about what
"unconditional" means. This file is copied into exported runs: it imports torch and diffusers only.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class Conditioning(NamedTuple):
    pooled_projections: Tensor | None = None  # (B, D)    added to the timestep embedding
    encoder_hidden_states: Tensor | None = None  # (B, S, D) cross-attention
    encoder_attention_mask: Tensor | None = None  # (B, S)    True = attend


class Condition(ModelMixin, ConfigMixin):
    """What the encoders of `CONDITIONS` share: `forward(values, drop)` -> `Conditioning`, and how a pipeline of images
    is asked for it.
    """

    argument: str | None = None  # of the pipeline's call, if one asks for this condition

    def request_values(
        self, asked: Any, num_images: int, encode_prompts: Callable[[list[str]], dict[str, Tensor]]
    ) -> tuple[dict[str, Tensor], int]:
        """The values that `forward` takes for what the pipeline's `argument` asks, `num_images` of each, and how many
        these are. Raises ValueError where nothing is asked, or what is not known.
        """
        return {}, num_images


class NoCondition(Condition):
    """The condition of an unconditional model: nothing, dropped or not."""

    @register_to_config
    def __init__(self):
        super().__init__()
        self.register_buffer("dtype_holder", torch.zeros(()))  # a pipeline asks each component for its dtype

    def forward(self, values: dict[str, Tensor], drop: Tensor) -> Conditioning:
        return Conditioning()


class ClassCondition(Condition):
    """Class labels (B,) in [0, num_classes) as learnt embeddings; the row after the last class is the null class."""

    argument = "class_labels"

    @register_to_config
    def __init__(self, num_classes: int, embedding_dim: int, label_names: list[str] | None = None):
        super().__init__()
        self.embedding = nn.Embedding(num_classes + 1, embedding_dim)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, values: dict[str, Tensor], drop: Tensor) -> Conditioning:
        """`values["class_labels"]` (B,), `drop` (B,) True = null."""
        labels = torch.where(drop, self.config.num_classes, values["class_labels"])
        return Conditioning(pooled_projections=self.embedding(labels))  # (B, D)

    def request_values(
        self, asked: Any, num_images: int, encode_prompts: Callable[[list[str]], dict[str, Tensor]]
    ) -> tuple[dict[str, Tensor], int]:
        """`asked`: one label or several, as numbers or a tensor."""
        if asked is None:
            raise ValueError("this run is class-conditional: give class_labels")
        labels = torch.as_tensor(asked, device=self.device).flatten().repeat_interleave(num_images)
        if labels.min() < 0 or labels.max() >= self.config.num_classes:
            raise ValueError(f"class_labels must be in 0 to {self.config.num_classes - 1}")
        return {"class_labels": labels}, len(labels)


class TextCondition(Condition):
    """Text-encoder states (B, S, D), unmasked over all S tokens as Stable Diffusion trains them.

    The null is the state of the empty caption, as the latent cache holds it. With `use_pooled` the state of the
    caption's last real token (what CLIP pools) goes to the timestep embedding too.
    """

    argument = "prompt"

    @register_to_config
    def __init__(self, hidden_size: int, sequence_length: int, use_pooled: bool = False):
        super().__init__()
        self.register_buffer("null_hidden_states", torch.zeros(sequence_length, hidden_size))
        self.register_buffer("null_num_tokens", torch.tensor(2))  # start and end of text

    def set_null(self, hidden_states: Tensor, num_tokens: int) -> None:
        """Takes the states (S, D) of the empty caption and its count of real tokens."""
        self.null_hidden_states.copy_(hidden_states)
        self.null_num_tokens.fill_(num_tokens)

    def forward(self, values: dict[str, Tensor], drop: Tensor) -> Conditioning:
        """`values["encoder_hidden_states"]` (B, S, D), `values["num_tokens"]` (B,), `drop` (B,) True = null."""
        given_states = values["encoder_hidden_states"].to(self.null_hidden_states.dtype)
        hidden_states = torch.where(drop[:, None, None], self.null_hidden_states, given_states)
        num_tokens = torch.where(drop, self.null_num_tokens, values["num_tokens"])
        pooled = None
        if self.config.use_pooled:
            pooled = hidden_states[torch.arange(len(drop), device=drop.device), num_tokens - 1]  # (B, D)
        return Conditioning(pooled, hidden_states)

    def request_values(
        self, asked: Any, num_images: int, encode_prompts: Callable[[list[str]], dict[str, Tensor]]
    ) -> tuple[dict[str, Tensor], int]:
        """`asked`: one prompt or several."""
        if asked is None:
            raise ValueError("this run is text-conditional: give a prompt")
        prompts = [asked] if isinstance(asked, str) else list(asked)
        prompts = [text for text in prompts for _ in range(num_images)]
        return encode_prompts(prompts), len(prompts)


class ColumnCondition(ModelMixin, ConfigMixin):
    """What the conditions of `ConditionSum` share: one value a sample, by the name of its column, embedded into
    (B, D), with a learnt null embedding where it is dropped or missing.

    One of your own is a subclass with `embed`, and a row in `COLUMN_CONDITIONS`: `kind` of `--condition KIND:COLUMN`.
    """

    def __init__(self, embedding_dim: int):
        super().__init__()
        self.null_embedding = nn.Parameter(0.02 * torch.randn(embedding_dim))

    def embed(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Values (B, ...) -> embeddings (B, D), and which of the values are missing (B,)."""
        raise NotImplementedError

    def null(self, count: int) -> Tensor:
        """What stands for no value, (`count`, D)."""
        return self.null_embedding.expand(count, -1)

    def forward(self, values: Tensor, drop: Tensor) -> Tensor:
        """Values (B, ...) and `drop` (B,), True = null -> (B, D)."""
        embedded, missing = self.embed(values)
        return torch.where((drop | missing)[:, None], self.null_embedding.to(embedded.dtype), embedded)


class PropertyCondition(ColumnCondition):
    """A number (B,), not finite = missing, standardised by the `mean` and `std` of the training set."""

    @register_to_config
    def __init__(self, embedding_dim: int, mean: float = 0.0, std: float = 1.0):
        super().__init__(embedding_dim)
        self.mlp = nn.Sequential(nn.Linear(7, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim))

    def embed(self, values: Tensor) -> tuple[Tensor, Tensor]:
        missing = ~values.isfinite()
        standardised = (values.float() - self.config.mean) / self.config.std
        standardised = standardised.masked_fill(missing, 0.0)[:, None]  # (B, 1)
        waves = standardised * torch.tensor([1.0, 2.0, 4.0], device=values.device)  # (B, 3)
        features = torch.cat([standardised, waves.sin(), waves.cos()], dim=1)
        return self.mlp(features.to(self.null_embedding.dtype)), missing


class ElementsCondition(ColumnCondition):
    """A number for each element (B, `num_elements`), all zero = missing: of `composition` the share of the atoms, of
    `chemical_system` 1 for each that is there.
    """

    @register_to_config
    def __init__(self, embedding_dim: int, num_elements: int = 118):
        super().__init__(embedding_dim)
        self.mlp = nn.Sequential(
            nn.Linear(num_elements, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim)
        )

    def embed(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return self.mlp(values.to(self.null_embedding.dtype)), ~values.any(dim=1)


class CategoryCondition(ColumnCondition):
    """The number of a category (B,), -1 = missing. `names` are those of the training set."""

    @register_to_config
    def __init__(self, embedding_dim: int, names: list[str]):
        super().__init__(embedding_dim)
        self.embedding = nn.Embedding(len(names), embedding_dim)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def embed(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return self.embedding(values.clamp(min=0)), values < 0


COLUMN_CONDITIONS: dict[str, type[ColumnCondition]] = {
    "property": PropertyCondition,
    "composition": ElementsCondition,
    "chemical_system": ElementsCondition,
    "class": CategoryCondition,
}


class ConditionSum(Condition):
    """Several conditions at once: the sum of their embeddings, each of which can be dropped, or not given, by itself.

    `columns` names each with its kind (a row of `COLUMN_CONDITIONS`) and the arguments of that class:
    {"band_gap": {"kind": "property", "mean": 1.1, "std": 1.5}}.
    """

    @register_to_config
    def __init__(self, embedding_dim: int, columns: dict[str, dict]):
        super().__init__()
        self.names = sorted(columns)  # the order that they have in a config.json too
        self.encoders = nn.ModuleList()  # in that order; the names may hold what no module's may
        for name in self.names:
            settings = {key: value for key, value in columns[name].items() if key != "kind"}
            self.encoders.append(COLUMN_CONDITIONS[columns[name]["kind"]](embedding_dim, **settings))

    def forward(self, values: dict[str, Tensor], drop: Tensor) -> Conditioning:
        """`values` by the names of the columns; one that is not there is null. `drop` (B,), or (B, number of columns)
        in alphabetical order, True = null.
        """
        drops = drop if drop.ndim == 2 else drop[:, None].expand(-1, len(self.encoders))
        encoders: list[Any] = list(self.encoders)
        embeddings = [
            encoder(values[name], dropped) if name in values else encoder.null(len(drop))  # (B, D)
            for name, encoder, dropped in zip(self.names, encoders, drops.unbind(1), strict=True)
        ]
        return Conditioning(pooled_projections=torch.stack(embeddings).sum(dim=0))


CONDITIONS: dict[str, type[Condition]] = {
    "none": NoCondition,
    "class": ClassCondition,
    "text": TextCondition,
    "columns": ConditionSum,
}


def tokenize(tokenizer, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Captions -> token ids (B, S) padded or cut to the tokenizer's `model_max_length`, and counts of real tokens
    (B,).
    """
    length = tokenizer.model_max_length
    tokens = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask.sum(dim=1)


@torch.no_grad()
def encode_text(tokenizer, text_encoder, captions: list[str]) -> dict[str, Tensor]:
    """The values that `TextCondition` takes, of the last layer after its final norm: what StableDiffusionPipeline
    uses.
    """
    input_ids, num_tokens = tokenize(tokenizer, captions)
    device = text_encoder.device
    hidden_states = text_encoder(input_ids.to(device))[0]  # (B, S, D)
    return {"encoder_hidden_states": hidden_states, "num_tokens": num_tokens.to(device)}
