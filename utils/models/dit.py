"""A diffusion transformer (Peebles & Xie 2022, arXiv 2212.09748) with the parts that later work agreed on: RMSNorm,
QK-norm, SwiGLU, rotary positions, and cross-attention for token conditions; or plain, as the paper's code has it.

This file is copied into exported runs, with attention.py: beside that it imports torch and diffusers only.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import Attention, RMSNorm, SwiGLU

# Table 1 of the paper: layers, hidden size, heads.
DIT_SIZES = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
LATENT_KINDS = ("grid", "set", "vector")
# Blocks before and after the route that tokens can take past the others: see `DiT.route_tokens`.
BEFORE_ROUTE, AFTER_ROUTE = 2, 2


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoids of `timesteps` (B,) in [0, 1000] -> (B, dim), as in "Attention is all you need", section 3.5."""
    frequencies = max_period ** (-torch.arange(dim // 2, device=timesteps.device, dtype=torch.float32) / (dim // 2))
    angles = timesteps.float()[:, None] * frequencies  # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def grid_angles(height: int, width: int, count: int, max_period: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """y and x of each position in a grid, row by row, times `count` falling frequencies: two of (height * width,
    count)."""
    frequencies = max_period ** (-torch.arange(count, device=device, dtype=torch.float32) / count)
    y = torch.arange(height, device=device, dtype=torch.float32).repeat_interleave(width)
    x = torch.arange(width, device=device, dtype=torch.float32).repeat(height)
    return y[:, None] * frequencies, x[:, None] * frequencies


def rotary_table(height: int, width: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (height * width, head_dim) of axial positions: half of a head rotates with y, half with x."""
    y, x = grid_angles(height, width, head_dim // 4, 100.0, device)
    angles = torch.cat([y, x, y, x], dim=-1)  # (N, head_dim)
    return angles.cos(), angles.sin()


def position_table(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """Sines and cosines (height * width, dim) of fixed positions, x before y as in the paper's code."""
    y, x = grid_angles(height, width, dim // 4, 10_000.0, device)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=-1)


def modulate(values: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`values` (B, N, D) shifted and scaled by (B, D)."""
    return values * (1 + scale[:, None]) + shift[:, None]


def gelu_mlp(dim: int, mlp_ratio: float) -> nn.Sequential:
    """The feed-forward of the DiT paper."""
    inner_dim = int(dim * mlp_ratio)
    return nn.Sequential(nn.Linear(dim, inner_dim), nn.GELU(approximate="tanh"), nn.Linear(inner_dim, dim))


class Style(NamedTuple):
    """The parts in which the blocks of two styles differ."""

    norm: Callable[..., nn.Module]
    mlp: Callable[[int, float], nn.Module]
    qk_norm: bool
    positions: str  # positions of a grid, one of POSITIONS


# Rotary positions rotate queries and keys; fixed positions are sines and cosines added to the tokens. Rotary ones
# alone encode distances between tokens, not their places in the picture; docs/performance.md has the cost of that.
POSITIONS = ("rotary", "fixed", "both")
STYLES = {
    "modern": Style(RMSNorm, SwiGLU, qk_norm=True, positions="rotary"),
    "plain": Style(nn.LayerNorm, gelu_mlp, qk_norm=False, positions="fixed"),  # the paper's
}


class DiTBlock(nn.Module):
    """adaLN-zero: six shifts, scales and gates from the conditioning vector; the gates start at zero, so that a new
    block is the identity (section 3.2). Cross-attention is not modulated, and its output starts at zero instead.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, context_dim: int | None, style: Style):
        super().__init__()
        self.norm1 = style.norm(dim, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(dim, num_heads, None, style.qk_norm)
        self.cross_norm = style.norm(dim, eps=1e-6) if context_dim else None
        self.cross_attention = Attention(dim, num_heads, context_dim, style.qk_norm) if context_dim else None
        self.norm2 = style.norm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = style.mlp(dim, mlp_ratio)
        self.adaln = nn.Linear(dim, 6 * dim)

    def forward(self, values: Tensor, emb: Tensor, rotary, context: Tensor | None, context_mask, mask=None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(emb).chunk(6, dim=1)  # each (B, D)
        attended = self.attention(modulate(self.norm1(values), shift1, scale1), rotary=rotary, mask=mask)
        values = values + gate1[:, None] * attended
        if self.cross_attention is not None and self.cross_norm is not None:
            values = values + self.cross_attention(self.cross_norm(values), context, mask=context_mask)
        return values + gate2[:, None] * self.mlp(modulate(self.norm2(values), shift2, scale2))


class DiT(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Predicts like its input from noisy latents, timesteps and conditions.

    `latent_kind` "grid": (B, C, H, W), cut into patches that know their places. "set": (B, N, C), up to `sample_size`
    items without places or order, with `attention_mask` (B, N), True = item; padding changes nothing at the items.
    "vector": (B, `sample_size`), cut into pieces of `patch_size` numbers, each with a learnt place.
    `out_channels` may be twice `in_channels`, for a learned variance (arXiv 2102.09672).

    `forward` names its arguments as `UNet2DConditionModel.forward` does, so that `ConditionalDenoiser` and the
    pipelines call either: `class_labels` are pooled projections (B, `projection_class_embeddings_input_dim`),
    `encoder_hidden_states` (B, S, `cross_attention_dim`), `encoder_attention_mask` (B, S), True = attend. With
    `class_embed_type` "identity" pooled projections are (B, `hidden_size`) and are added as they are. A grid has
    `positions` of one of POSITIONS; None: rotary for the modern style, fixed for the plain one.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("DiTBlock",)

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_layers: int = 12,
        hidden_size: int = 384,
        num_attention_heads: int = 6,
        mlp_ratio: float = 4.0,
        cross_attention_dim: int | None = None,
        projection_class_embeddings_input_dim: int | None = None,
        class_embed_type: str | None = None,
        style: str = "modern",
        latent_kind: str = "grid",
        out_channels: int | None = None,
        positions: str | None = None,
    ):
        super().__init__()
        if latent_kind not in LATENT_KINDS:
            raise ValueError(f"latent_kind {latent_kind} is none of {', '.join(LATENT_KINDS)}")
        if latent_kind == "set" and patch_size != 1:
            raise ValueError(f"patch_size {patch_size}: a set has no patches; use 1")
        if latent_kind == "vector" and in_channels != 1:
            raise ValueError(f"in_channels {in_channels}: a vector has one; use 1")
        if latent_kind != "vector" and sample_size % patch_size:
            raise ValueError(f"latents of {sample_size} x {sample_size} do not divide into patches of {patch_size}")
        if hidden_size % (4 * num_attention_heads):
            raise ValueError(f"hidden_size {hidden_size} is no multiple of 4 x {num_attention_heads} heads")
        if style not in STYLES:
            raise ValueError(f"style {style} is none of {', '.join(STYLES)}")
        if positions is not None and positions not in POSITIONS:
            raise ValueError(f"positions {positions} is none of {', '.join(POSITIONS)}")
        self.positions = positions or STYLES[style].positions
        patch_dim = patch_size ** (1 if latent_kind == "vector" else 2)  # values per channel in a token
        self.patch_embed = nn.Linear(in_channels * patch_dim, hidden_size)
        self.places = None
        if latent_kind == "vector":
            self.places = nn.Parameter(0.02 * torch.randn(-(-sample_size // patch_size), hidden_size))
        self.time_embed = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.pooled_embed: nn.Module | None = nn.Identity() if class_embed_type == "identity" else None
        if projection_class_embeddings_input_dim:
            self.pooled_embed = nn.Linear(projection_class_embeddings_input_dim, hidden_size)
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_attention_heads, mlp_ratio, cross_attention_dim, STYLES[style])
            for _ in range(num_layers)
        )
        self.norm_out = STYLES[style].norm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.adaln_out = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj_out = nn.Linear(hidden_size, (out_channels or in_channels) * patch_dim)
        self.gradient_checkpointing = False
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        if self.config.style == "plain":  # as the paper's code
            for layer in ("0.weight", "2.weight"):
                nn.init.normal_(self.time_embed.get_parameter(layer), std=0.02)
        for module in self.modules():
            if isinstance(module, DiTBlock):
                nn.init.zeros_(module.adaln.weight)
                if module.cross_attention is not None:
                    nn.init.zeros_(module.cross_attention.to_out.weight)
        nn.init.zeros_(self.adaln_out.weight)
        nn.init.zeros_(self.proj_out.weight)

    def patchify(self, sample: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, C p p)."""
        batch, channels, height, width = sample.shape
        p = self.config.patch_size
        patches = sample.reshape(batch, channels, height // p, p, width // p, p)
        return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // p) * (width // p), channels * p * p)

    def embed_grid(self, sample: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """(B, C, H, W) as tokens (B, N, D) with positions: as rotary tables, or added to the tokens."""
        height, width = (side // self.config.patch_size for side in sample.shape[-2:])
        values, rotary = self.patch_embed(self.patchify(sample)), None
        if self.positions != "rotary":
            fixed = position_table(height, width, self.config.hidden_size, sample.device)
            values = values + fixed.to(values.dtype)
        if self.positions != "fixed":
            head_dim = self.config.hidden_size // self.config.num_attention_heads
            rotary = rotary_table(height, width, head_dim, sample.device)
        return values, rotary

    def embed_vector(self, sample: Tensor) -> Tensor:
        """(B, D) as tokens (B, N, hidden): pieces of the vector, the last one padded with zeros."""
        missing = -sample.shape[1] % self.config.patch_size
        pieces = F.pad(sample, (0, missing)).unflatten(1, (-1, self.config.patch_size))  # (B, N, p)
        return self.patch_embed(pieces) + self.places

    def embed(self, sample: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """A sample as tokens (B, N, D), with rotary tables if those carry the positions."""
        if self.config.latent_kind == "grid":
            return self.embed_grid(sample)
        return (self.patch_embed(sample) if self.places is None else self.embed_vector(sample)), None

    def unembed(self, values: Tensor, shape: torch.Size) -> Tensor:
        """The output of the tokens (B, N, C p p), in the `shape` of a sample."""
        if self.config.latent_kind == "grid":
            return self.unpatchify(values, *shape[-2:])
        return values if self.places is None else values.flatten(1)[:, : shape[1]]

    def unpatchify(self, patches: Tensor, height: int, width: int) -> Tensor:
        """(B, N, C p p) -> (B, C, H, W)."""
        p = self.config.patch_size
        grid = patches.transpose(1, 2).unflatten(2, (height // p, width // p))  # (B, C p p, H / p, W / p)
        return F.pixel_shuffle(grid, p)

    def run_blocks(self, blocks: Iterable[nn.Module], values: Tensor, *inputs) -> Tensor:
        """`values` (B, N, D) through some of the blocks."""
        recompute = torch.is_grad_enabled() and self.gradient_checkpointing
        for block in blocks:
            values = checkpoint(block, values, *inputs, use_reentrant=False) if recompute else block(values, *inputs)
        return values

    def route_tokens(self, kept_tokens: Tensor, values: Tensor, emb: Tensor, rotary, *context) -> Tensor:
        """TREAD (arXiv 2501.04765): only `kept_tokens` (B, K) of `values` (B, N, D) pass the middle blocks; the others
        rejoin them unchanged."""
        blocks, end = list(self.blocks), max(BEFORE_ROUTE, len(self.blocks) - AFTER_ROUTE)
        values = self.run_blocks(blocks[:BEFORE_ROUTE], values, emb, rotary, *context)
        index = kept_tokens[..., None].expand(-1, -1, values.shape[-1])  # (B, K, D)
        kept_rotary = rotary and tuple(table[kept_tokens][:, None] for table in rotary)  # (B, 1, K, head_dim) each
        kept = self.run_blocks(blocks[BEFORE_ROUTE:end], values.gather(1, index), emb, kept_rotary, *context)
        values = values.scatter(1, index, kept.to(values.dtype))
        return self.run_blocks(blocks[end:], values, emb, rotary, *context)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
        kept_tokens: Tensor | None = None,
    ):
        """`attention_mask` (B, N): items of a set, True = real. `kept_tokens` (B, K), for training: the tokens that
        pass the middle blocks; None: all tokens."""
        values, rotary = self.embed(sample)  # (B, N, D)
        timestep = timestep.expand(len(sample))
        emb = self.time_embed(timestep_embedding(timestep, 256).to(values.dtype))  # (B, D)
        if self.pooled_embed is not None:
            emb = emb + self.pooled_embed(class_labels)
        emb = F.silu(emb)
        inputs = (emb, rotary, encoder_hidden_states, encoder_attention_mask, attention_mask)
        if kept_tokens is None:
            values = self.run_blocks(self.blocks, values, *inputs)
        else:
            values = self.route_tokens(kept_tokens, values, *inputs)
        shift, scale = self.adaln_out(emb).chunk(2, dim=1)
        values = self.proj_out(modulate(self.norm_out(values), shift, scale))  # (B, N, C p p)
        output = self.unembed(values, sample.shape)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)
