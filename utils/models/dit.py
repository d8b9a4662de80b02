"""A diffusion transformer (Peebles & Xie 2022, arXiv 2212.09748) with the parts that later work agreed on: RMSNorm,
QK-norm, SwiGLU, rotary positions, and cross-attention for token conditions.

This file is copied into exported runs: it imports torch and diffusers only.
"""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Table 1 of the paper: layers, hidden size, heads.
DIT_SIZES = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoids of `timesteps` (B,) in [0, 1000] -> (B, dim), as in "Attention is all you need", section 3.5."""
    frequencies = max_period ** (-torch.arange(dim // 2, device=timesteps.device, dtype=torch.float32) / (dim // 2))
    angles = timesteps.float()[:, None] * frequencies  # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def rotary_table(height: int, width: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (height * width, head_dim) of axial rotary positions: half of each head turns with y, half
    with x.
    """
    frequencies = 100.0 ** (-torch.arange(head_dim // 4, device=device, dtype=torch.float32) / (head_dim // 4))
    y = torch.arange(height, device=device, dtype=torch.float32)[:, None] * frequencies  # (H, head_dim / 4)
    x = torch.arange(width, device=device, dtype=torch.float32)[:, None] * frequencies
    angles = torch.cat(
        [y[:, None].expand(-1, width, -1), x[None].expand(height, -1, -1)], dim=-1
    )  # (H, W, head_dim / 2)
    angles = torch.cat([angles, angles], dim=-1).flatten(0, 1)  # (N, head_dim)
    return angles.cos(), angles.sin()


def rotate(values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies rotary positions (RoFormer, arXiv 2104.09864, equation 34) to `values` (B, heads, N, head_dim)."""
    first, second = values.chunk(2, dim=-1)
    return (values * cos + torch.cat([-second, first], dim=-1) * sin).to(values.dtype)


def modulate(values: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`values` (B, N, D) shifted and scaled by (B, D)."""
    return values * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    """Self-attention of (B, N, D), or cross-attention to `context` (B, S, context_dim). Queries and keys are
    normalised (arXiv 2302.05442), which keeps bf16 training of deep transformers stable.
    """

    def __init__(self, dim: int, num_heads: int, context_dim: int | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim)
        self.to_kv = nn.Linear(context_dim or dim, 2 * dim)
        self.norm_q = nn.RMSNorm(dim // num_heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(dim // num_heads, eps=1e-6)
        self.to_out = nn.Linear(dim, dim)
        self.use_xformers = False

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op=None) -> None:
        """The hook through which diffusers' `enable_xformers_memory_efficient_attention` reaches a module."""
        self.use_xformers = valid

    def forward(
        self, values: Tensor, context: Tensor | None = None, rotary=None, mask: Tensor | None = None
    ) -> Tensor:
        batch, length, dim = values.shape
        q = self.to_q(values).view(batch, length, self.num_heads, -1).transpose(1, 2)  # (B, heads, N, head_dim)
        k, v = (
            self.to_kv(values if context is None else context)
            .view(batch, -1, 2, self.num_heads, q.shape[-1])
            .unbind(2)
        )
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, S, head_dim)
        q, k = self.norm_q(q).to(v.dtype), self.norm_k(k).to(v.dtype)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if self.use_xformers:
            attended = self._xformers_attention(q, k, v, mask)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None])
        return self.to_out(attended.transpose(1, 2).reshape(batch, length, dim))

    def _xformers_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        import xformers.ops

        bias = None
        if mask is not None:
            bias = torch.zeros(q.shape[0], self.num_heads, q.shape[2], k.shape[2], dtype=q.dtype, device=q.device)
            bias.masked_fill_(~mask[:, None, None], float("-inf"))
        q, k, v = (each.transpose(1, 2).contiguous() for each in (q, k, v))  # (B, N, heads, head_dim)
        return xformers.ops.memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2)


class SwiGLU(nn.Module):
    """Gated feed-forward (arXiv 2002.05202); its inner size is 2/3 of a plain one's, for the same number of
    parameters.
    """

    def __init__(self, dim: int, mlp_ratio: float):
        super().__init__()
        inner_dim = (int(dim * mlp_ratio * 2 / 3) + 7) // 8 * 8
        self.proj_in = nn.Linear(dim, 2 * inner_dim)
        self.proj_out = nn.Linear(inner_dim, dim)

    def forward(self, values: Tensor) -> Tensor:
        gate, values = self.proj_in(values).chunk(2, dim=-1)
        return self.proj_out(F.silu(gate) * values)


class DiTBlock(nn.Module):
    """adaLN-zero: six shifts, scales and gates from the conditioning vector; the gates start at zero, so that a new
    block is the identity (section 3.2). Cross-attention is not modulated, and its output starts at zero instead.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, context_dim: int | None):
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(dim, num_heads)
        self.cross_norm = nn.RMSNorm(dim, eps=1e-6) if context_dim else None
        self.cross_attention = Attention(dim, num_heads, context_dim) if context_dim else None
        self.norm2 = nn.RMSNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = SwiGLU(dim, mlp_ratio)
        self.adaln = nn.Linear(dim, 6 * dim)

    def forward(
        self, values: Tensor, emb: Tensor, rotary, context: Tensor | None, context_mask: Tensor | None
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(emb).chunk(6, dim=1)  # each (B, D)
        values = values + gate1[:, None] * self.attention(modulate(self.norm1(values), shift1, scale1), rotary=rotary)
        if self.cross_attention is not None and self.cross_norm is not None:
            values = values + self.cross_attention(self.cross_norm(values), context, mask=context_mask)
        return values + gate2[:, None] * self.mlp(modulate(self.norm2(values), shift2, scale2))


class DiT(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Predicts like its input (B, C, H, W) from noisy latents, timesteps and conditions.

    `forward` names its arguments as `UNet2DConditionModel.forward` does, so that `ConditionalDenoiser` and the
    pipelines call either: `class_labels` are pooled projections (B, `projection_class_embeddings_input_dim`),
    `encoder_hidden_states` (B, S, `cross_attention_dim`), `encoder_attention_mask` (B, S), True = attend.
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
    ):
        super().__init__()
        if sample_size % patch_size:
            raise ValueError(f"latents of {sample_size} x {sample_size} do not divide into patches of {patch_size}")
        if hidden_size % (4 * num_attention_heads):
            raise ValueError(
                f"hidden_size {hidden_size} must be a multiple of 4 x num_attention_heads ({num_attention_heads})"
            )
        patch_dim = in_channels * patch_size**2
        self.patch_embed = nn.Linear(patch_dim, hidden_size)
        self.time_embed = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.pooled_embed = None
        if projection_class_embeddings_input_dim:
            self.pooled_embed = nn.Linear(projection_class_embeddings_input_dim, hidden_size)
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_attention_heads, mlp_ratio, cross_attention_dim) for _ in range(num_layers)
        )
        self.norm_out = nn.RMSNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.adaln_out = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj_out = nn.Linear(hidden_size, patch_dim)
        self.gradient_checkpointing = False
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
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

    def unpatchify(self, patches: Tensor, height: int, width: int) -> Tensor:
        """(B, N, C p p) -> (B, C, H, W)."""
        p = self.config.patch_size
        sample = patches.reshape(len(patches), height // p, width // p, self.config.in_channels, p, p)
        return sample.permute(0, 3, 1, 4, 2, 5).reshape(len(patches), self.config.in_channels, height, width)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ):
        height, width = sample.shape[-2:]
        p = self.config.patch_size
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        rotary = rotary_table(height // p, width // p, head_dim, sample.device)
        values = self.patch_embed(self.patchify(sample))  # (B, N, D)
        timestep = timestep.expand(len(sample))
        emb = self.time_embed(timestep_embedding(timestep, 256).to(values.dtype))  # (B, D)
        if self.pooled_embed is not None:
            emb = emb + self.pooled_embed(class_labels)
        emb = F.silu(emb)
        for block in self.blocks:
            inputs = (values, emb, rotary, encoder_hidden_states, encoder_attention_mask)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                values = checkpoint(block, *inputs, use_reentrant=False)
            else:
                values = block(*inputs)
        shift, scale = self.adaln_out(emb).chunk(2, dim=1)
        values = self.proj_out(modulate(self.norm_out(values), shift, scale))  # (B, N, C p p)
        output = self.unpatchify(values, height, width)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)
