"""Small tensor operations that hold for latents of any rank: grids (B, C, H, W), sets (B, N, D), vectors (B, D)."""

from torch import Tensor


def append_dims(values: Tensor, ndim: int) -> Tensor:
    """Appends singleton axes to `values` (B,) until it has `ndim` axes, so that it broadcasts over a batch."""
    return values.reshape(values.shape + (1,) * (ndim - values.ndim))


def num_channels(latents: Tensor) -> int:
    """Channels of latents: they lead in grids (B, C, H, W), and are last in sets (B, N, C) and vectors (B, C)."""
    return latents.shape[1 if latents.ndim == 4 else -1]


def per_channel(values: Tensor, latents: Tensor) -> Tensor:
    """A number for each channel, (1 or B, C), with the axes that let it broadcast over `latents`."""
    between = (1,) * (latents.ndim - 2)
    shape = (*values.shape, *between) if latents.ndim == 4 else (len(values), *between, values.shape[1])
    return values.reshape(shape)


def masked_mean(values: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Mean of each sample over everything but the batch axis, (B, ...) -> (B,).

    `attention_mask` (B, N), True = real, leaves padded elements of a set (B, N, D) out of both sum and count.
    """
    if attention_mask is None:
        return values.flatten(1).mean(dim=1)
    weights = append_dims(attention_mask.to(values.dtype), values.ndim)  # (B, N, 1, ...)
    elements_per_item = values[0, 0].numel()
    return (values * weights).flatten(1).sum(dim=1) / (attention_mask.sum(dim=1) * elements_per_item).clamp(min=1)
