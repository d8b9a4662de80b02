"""TREAD: which tokens are routed, and what a DiT makes of those that are and of those that are not."""

from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats

from tests.support.flops import flops_by_hand
from utils.diffusion.conditions import ClassCondition
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.draws import SampleDraws
from utils.errors import UserError
from utils.image.args import model as args_model
from utils.models.dit import AFTER_ROUTE, BEFORE_ROUTE, DiT
from utils.training.flops import forward_flops

STYLES = ["modern", "plain"]


def routed_dit(style="modern", num_layers=6):
    """A random DiT of 16 tokens with both kinds of condition."""
    torch.manual_seed(0)
    dit = DiT(8, 2, 4, num_layers, 48, 4, cross_attention_dim=10, projection_class_embeddings_input_dim=6, style=style)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return dit


def inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(3, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([3.0, 500.0, 999.0]),
        "encoder_hidden_states": torch.randn(3, 5, 10, generator=generator),
        "class_labels": torch.randn(3, 6, generator=generator),
    }


KEPT = torch.tensor([[0, 3, 4, 9, 15], [1, 2, 5, 6, 7], [8, 10, 11, 12, 14]])


def record(dit):
    """What goes into each block from now on: one tensor a block and call."""
    seen = [[] for _ in dit.blocks]
    for block, into in zip(dit.blocks, seen, strict=True):
        block.register_forward_pre_hook(lambda _, arguments, into=into: into.append(arguments[0].detach()))
    return seen


# ---- the model


@pytest.mark.parametrize("style", STYLES)
def test_middle_blocks_see_kept_tokens_and_routed_ones_come_back_as_they_were(style):
    dit = routed_dit(style)
    seen = record(dit)
    dit(**inputs(), kept_tokens=KEPT)
    lengths = [into[0].shape[1] for into in seen]
    assert lengths == [16] * BEFORE_ROUTE + [5] * (6 - BEFORE_ROUTE - AFTER_ROUTE) + [16] * AFTER_ROUTE
    last = 6 - AFTER_ROUTE
    kept = torch.zeros(3, 16, dtype=torch.bool).scatter(1, KEPT, True)
    first, behind = seen[BEFORE_ROUTE][0], seen[last][0]
    assert torch.equal(
        first, torch.stack([each[index] for each, index in zip(before_route(style), KEPT, strict=True)])
    )
    assert torch.equal(behind[~kept], before_route(style)[~kept])
    assert (behind[kept] - before_route(style)[kept]).abs().amax(dim=-1).min() > 1e-3


def before_route(style):
    """What leaves the first blocks, of the whole grid."""
    dit = routed_dit(style)
    seen = record(dit)
    dit(**inputs())
    return seen[BEFORE_ROUTE][0]


def masked_attention(forward, kept, values, rotary, mask):
    """In the place of an attention's `forward`, which is given no mask."""
    assert mask is None
    return forward(values, rotary=rotary, mask=kept)


@pytest.mark.parametrize("style", STYLES)
def test_equals_attention_that_is_masked(style):
    """The truth in other words: all tokens pass all blocks, but in the middle ones nobody attends to a routed token, and behind
    them routed tokens are set back. Positions and cross-attention are those of the whole grid."""
    routed = routed_dit(style)(**inputs(), kept_tokens=KEPT).sample
    kept = torch.zeros(3, 16, dtype=torch.bool).scatter(1, KEPT, True)
    dit, stored = routed_dit(style), {}
    middle = list(dit.blocks)[BEFORE_ROUTE : 6 - AFTER_ROUTE]
    middle[0].register_forward_pre_hook(lambda _, arguments: stored.update(values=arguments[0]))
    for block in middle:
        block.attention.forward = partial(masked_attention, block.attention.forward, kept)

    def set_back(_, arguments):
        return (torch.where(kept[..., None], arguments[0], stored["values"]), *arguments[1:])

    dit.blocks[6 - AFTER_ROUTE].register_forward_pre_hook(set_back)
    torch.testing.assert_close(dit(**inputs()).sample, routed, rtol=1e-4, atol=1e-5)
    assert (routed_dit(style)(**inputs()).sample - routed).abs().max() > 1e-3


@pytest.mark.parametrize("style", STYLES)
def test_order_of_kept_tokens_and_keeping_all_change_nothing(style):
    dit = routed_dit(style)
    routed = dit(**inputs(), kept_tokens=KEPT).sample
    torch.testing.assert_close(dit(**inputs(), kept_tokens=KEPT.flip(1)).sample, routed, rtol=1e-4, atol=1e-5)
    everything = torch.arange(16).expand(3, -1)
    torch.testing.assert_close(
        dit(**inputs(), kept_tokens=everything).sample, dit(**inputs()).sample, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_gradient_reaches_everything(style, checkpointing):
    """Every parameter, and every place of the latents, routed or not."""
    dit = routed_dit(style)
    if checkpointing:
        dit.enable_gradient_checkpointing()
    given = inputs()
    given["sample"].requires_grad_(True)
    dit(**given, kept_tokens=KEPT).sample.square().mean().backward()
    assert [
        name for name, parameter in dit.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ] == []
    assert (given["sample"].grad != 0).all()


def test_under_autocast():
    dit = routed_dit()
    exact = dit(**inputs(), kept_tokens=KEPT).sample
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = dit(**inputs(), kept_tokens=KEPT).sample
    assert (output.float() - exact).norm() < 0.1 * exact.norm()


# ---- which tokens


def test_subsets_belong_to_the_sample():
    """The same alone, in any batch, at any time; others for other samples, seeds and names; and nobody's generator moves."""
    positions = torch.tensor([7, 0, 123_456_789_012, 3])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    together = SampleDraws(5, positions).subset("kept_tokens", 64, 20)
    assert torch.equal(torch.get_rng_state(), state)
    assert together.shape == (4, 20)
    assert together.dtype == torch.int64
    for i in range(4):
        assert torch.equal(SampleDraws(5, positions[i : i + 1]).subset("kept_tokens", 64, 20)[0], together[i])
    for other in (
        SampleDraws(6, positions).subset("kept_tokens", 64, 20),
        SampleDraws(5, positions).subset("x", 64, 20),
    ):
        assert not (other == together).all(dim=1).any()
    assert len({tuple(row.tolist()) for row in together}) == 4


@pytest.mark.parametrize(("size", "count"), [(16, 8), (5, 1), (5, 4), (7, 7), (1024, 512)])
def test_subsets_are_ascending_numbers_without_repetition(size, count):
    subsets = SampleDraws(0, torch.arange(100)).subset("kept_tokens", size, count)
    assert (subsets.diff(dim=1) > 0).all()
    assert subsets.min() >= 0
    assert subsets.max() < size


def test_every_subset_is_as_likely():
    """Of 5 numbers 2: each of the ten pairs as often, by a chi-square test; of 16 half: no two kept together too often."""
    pairs = SampleDraws(1, torch.arange(20_000)).subset("kept_tokens", 5, 2).numpy()
    _, counts = np.unique(pairs[:, 0] * 5 + pairs[:, 1], return_counts=True)
    assert len(counts) == 10
    assert stats.chisquare(counts).pvalue > 1e-3
    halves = SampleDraws(1, torch.arange(20_000)).subset("kept_tokens", 16, 8)
    kept = torch.zeros(20_000, 16).scatter(1, halves, 1.0)
    together = (kept.T @ kept / 20_000).fill_diagonal_(8 * 7 / 16 / 15)
    assert (together - 8 * 7 / 16 / 15).abs().max() < 5 * 0.5 / 20_000**0.5


@pytest.mark.parametrize(("ratio", "count"), [(0.5, 8), (0.25, 12), (0.9, 2), (0.99, 1), (0.1, 15)])
def test_share_that_is_kept(ratio, count):
    denoiser = ConditionalDenoiser(routed_dit(), ClassCondition(3, 6))
    kept = denoiser.draw_kept_tokens(SampleDraws(0, torch.arange(3)), ratio)
    assert kept.shape == (3, count)


def test_a_share_of_zero_draws_nothing():
    """And the model is called as it was before there were routes: without the argument."""
    denoiser = ConditionalDenoiser(routed_dit(), ClassCondition(3, 6))
    assert denoiser.draw_kept_tokens(SampleDraws(0, torch.arange(3)), 0.0) is None
    called = []
    denoiser.model.forward = lambda *_, **named: called.append(named) or (torch.zeros(()),)
    values, drop = {"class_labels": torch.tensor([0, 1, 2])}, torch.zeros(3, dtype=torch.bool)
    denoiser(inputs()["sample"], inputs()["timestep"], values, drop, None)
    denoiser(inputs()["sample"], inputs()["timestep"], values, drop, KEPT)
    assert ["kept_tokens" in named for named in called] == [False, True]


# ---- flags and scripts


def test_routes_that_make_no_sense_are_refused():
    args_model.check_routing_args(Namespace(model="unet", tread_ratio=0.0))
    args_model.check_routing_args(Namespace(model="dit", tread_ratio=0.5))
    with pytest.raises(UserError, match=r"--tread_ratio with --model unet: .*use --model dit"):
        args_model.check_routing_args(Namespace(model="unet", tread_ratio=0.5))
    with pytest.raises(UserError, match="--tread_ratio 1: no token"):
        args_model.check_routing_args(Namespace(model="dit", tread_ratio=1.0))


def test_flops_of_a_routed_step():
    """Layer by layer, of a forward pass with three quarters of 64 tokens on the route."""
    model = DiT(sample_size=16, num_layers=6, hidden_size=64, num_attention_heads=2)
    noisy_latents, kept_tokens = torch.randn(1, 4, 16, 16), torch.arange(0, 64, 4)[None]
    expected = flops_by_hand(model, noisy_latents, torch.tensor([1.0]), kept_tokens=kept_tokens)
    assert forward_flops(model, (4, 16, 16), tread_ratio=0.75) == expected
    assert expected < 0.8 * forward_flops(model, (4, 16, 16))
