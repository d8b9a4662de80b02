"""Attention and gated feed-forward, the parts of the transformers of denoisers and crystal autoencoders.

This file is copied into exported runs, beside the DiT: it imports torch only."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotate(values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies rotary positions (RoFormer, arXiv 2104.09864, equation 34) to `values` (B, heads, N, head_dim)."""
    first, second = values.chunk(2, dim=-1)
    return (values * cos + torch.cat([-second, first], dim=-1) * sin).to(values.dtype)


class RMSNorm(nn.RMSNorm):
    """RMSNorm in the dtype of its input, under autocast too, with sums in float32. Left to autocast, a norm of
    half-precision values returns float32 (on CUDA, torch 2.12 and later), or takes eight kernels because its weight
    has another dtype (before that, and on CPUs)."""

    def forward(self, values: Tensor) -> Tensor:
        weight = self.weight if self.weight is None else self.weight.to(values.dtype)
        with nullcontext() if values.is_meta else torch.autocast(values.device.type, enabled=False):
            return F.rms_norm(values, self.normalized_shape, weight, self.eps)


class Attention(nn.Module):
    """Self-attention of (B, N, D), or cross-attention to `context` (B, S, context_dim). Normalised queries and keys
    (arXiv 2302.05442) keep bf16 training of deep transformers stable. `mask` (B, N or S), True = attend to it.
    """

    def __init__(self, dim: int, num_heads: int, context_dim: int | None = None, qk_norm: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim)
        self.to_kv = nn.Linear(context_dim or dim, 2 * dim)
        self.norm_q = RMSNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.to_out = nn.Linear(dim, dim)
        self.use_xformers = False

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op=None) -> None:
        """The hook through which diffusers' `enable_xformers_memory_efficient_attention` reaches a module."""
        self.use_xformers = valid

    def forward(self, values: Tensor, context: Tensor | None = None, rotary=None, mask=None) -> Tensor:
        batch, length, dim = values.shape
        q = self.to_q(values).view(batch, length, self.num_heads, -1).transpose(1, 2)  # (B, heads, N, head_dim)
        kv = self.to_kv(values if context is None else context).view(batch, -1, 2, self.num_heads, q.shape[-1])
        k, v = kv.transpose(1, 3).unbind(2)  # (B, heads, S, head_dim)
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
    """Gated feed-forward (arXiv 2002.05202), 2/3 as wide as a plain one, for the same number of parameters."""

    def __init__(self, dim: int, mlp_ratio: float):
        super().__init__()
        inner_dim = (int(dim * mlp_ratio * 2 / 3) + 7) // 8 * 8
        self.proj_in = nn.Linear(dim, 2 * inner_dim)
        self.proj_out = nn.Linear(inner_dim, dim)

    def forward(self, values: Tensor) -> Tensor:
        gate, values = self.proj_in(values).chunk(2, dim=-1)
        return self.proj_out(F.silu(gate) * values)
