"""Attention, rotary positions and norms against brute force."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.models import randomise
from utils.models.attention import Attention, RMSNorm, rotate
from utils.models.dit import rotary_table

# Attention


def rms(values, weight):
    return values / (values.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize(("dim", "heads"), [(24, 2), (36, 3), (32, 8)])
def test_attention_is_a_softmax(cross, dim, heads):
    """Attention with normalised queries and keys, rotation and mask equals loops over heads and queries in float64."""
    torch.manual_seed(0)
    attention = randomise(Attention(dim, heads, 7 if cross else None)).double()
    values = torch.randn(2, 6, dim, dtype=torch.float64)
    context = torch.randn(2, 5, 7, dtype=torch.float64) if cross else values
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]]).bool() if cross else None
    head_dim = dim // heads
    rotary = None if cross else tuple(t.double() for t in rotary_table(2, 3, head_dim, torch.device("cpu")))
    output = attention(values, context if cross else None, rotary, mask)

    wk, wv = attention.to_kv.weight.chunk(2)
    bk, bv = attention.to_kv.bias.chunk(2)
    expected = torch.zeros_like(values)
    for b in range(2):
        for h in range(heads):
            part = slice(h * head_dim, (h + 1) * head_dim)
            q = rms((values[b] @ attention.to_q.weight.T + attention.to_q.bias)[:, part], attention.norm_q.weight)
            k = rms((context[b] @ wk.T + bk)[:, part], attention.norm_k.weight)
            v = (context[b] @ wv.T + bv)[:, part]
            if rotary is not None:
                q, k = turn(q, head_dim), turn(k, head_dim)
            for i in range(6):
                weights = torch.stack([(q[i] @ k[j] / head_dim**0.5).exp() for j in range(len(k))])
                if mask is not None:
                    weights = weights * mask[b]
                expected[b, i, part] = (weights / weights.sum()) @ v
    expected = expected @ attention.to_out.weight.T + attention.to_out.bias
    tolerance = 1e-10 if cross else 1e-5  # angles are computed in float32
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)


def turn(values, head_dim):
    """Rotates (6, head_dim) at the places of a 2 x 3 grid pair by pair: complex numbers, one angle for each."""
    turned = values.clone()
    half, quarter = head_dim // 2, head_dim // 4
    for place in range(6):
        y, x = divmod(place, 3)
        for i in range(half):
            angle = (y if i < quarter else x) * 100.0 ** (-(i % quarter) / quarter)
            pair = torch.complex(values[place, i], values[place, i + half])
            pair = pair * torch.polar(torch.tensor(1.0, dtype=torch.float64), torch.tensor(angle, dtype=torch.float64))
            turned[place, i], turned[place, i + half] = pair.real, pair.imag
    return turned


@pytest.mark.parametrize("head_dim", [8, 12, 72])
def test_rotary_positions_are_relative(head_dim):
    """A query and a key that are moved together keep their product; moved apart, along y or x, they change it."""
    height, width = 7, 5
    rotary = rotary_table(height, width, head_dim, torch.device("cpu"))
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, head_dim), torch.randn(1, 1, 1, head_dim)
    everywhere = height * width
    queries = rotate(q.expand(1, 1, everywhere, -1), *rotary)[0, 0]
    keys = rotate(k.expand(1, 1, everywhere, -1), *rotary)[0, 0]
    logits = (queries @ keys.T).view(height, width, height, width)
    by_offset = {}
    for y1 in range(height):
        for x1 in range(width):
            for y2 in range(height):
                for x2 in range(width):
                    by_offset.setdefault((y2 - y1, x2 - x1), []).append(logits[y1, x1, y2, x2].item())
    assert max(max(group) - min(group) for group in by_offset.values()) < 1e-4
    means = torch.tensor([sum(group) / len(group) for group in by_offset.values()])
    distances = (means[:, None] - means).abs() + torch.eye(len(means))
    assert distances.min() < distances.max()
    assert len(torch.unique((means * 1e4).round())) > 0.9 * len(means)  # (dy, dx) is told from every other offset
    torch.testing.assert_close(queries.norm(dim=-1), q.norm().expand(everywhere))  # a rotation


@pytest.mark.parametrize("elementwise_affine", [True, False])
def test_a_norm_of_half_precision_is_in_half_precision(monkeypatch, elementwise_affine):
    """Weight and values reach the kernel in one dtype, which autocast does not change; its sums are float32."""
    norm = randomise(RMSNorm(64, eps=1e-6, elementwise_affine=elementwise_affine))
    values = (300 * torch.randn(5, 64)).bfloat16()
    expected = nn.RMSNorm.forward(norm, values.float())
    kernel, seen = F.rms_norm, []

    def seen_kernel(values, shape, weight, eps):
        seen.append((values.dtype, weight if weight is None else weight.dtype, torch.is_autocast_enabled("cpu")))
        return kernel(values, shape, weight, eps)

    monkeypatch.setattr(F, "rms_norm", seen_kernel)
    with torch.autocast("cpu", torch.bfloat16):
        normalised = norm(values)
    assert seen == [(torch.bfloat16, torch.bfloat16 if elementwise_affine else None, False)]
    assert normalised.dtype == torch.bfloat16
    torch.testing.assert_close(normalised.float(), expected, rtol=0.012, atol=1e-3)
    if elementwise_affine:
        normalised.float().sum().backward()
        assert norm.weight.grad.dtype == torch.float32
