"""Latents that are held out, and the loss on them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from utils.diffusion.objectives import OBJECTIVES, training_scheduler
from utils.draws import SampleDraws
from utils.errors import UserError
from utils.image.cache import ImageCache
from utils.latents.cache import LatentStream
from utils.latents.spec import LatentSpec
from utils.training.held_out import check_split, hold_out, open_split, stratified, validation_losses

# ---- which rows -----------------------------------------------------------------------------------------------------


def test_held_out_rows_are_random_the_same_and_nested(opened):
    few, more = hold_out(opened, 5), hold_out(opened, 20)
    assert set(few.rows) < set(more.rows)
    assert sorted([*more.rows, *more.training_rows]) == list(range(48))
    assert len(set(more.rows % 3)) == 3  # the labels of the data set go round
    assert sorted(more.rows) != list(more.rows)
    assert few.identity != more.identity
    with pytest.raises(UserError, match="--num_validation_samples 48: the cache has 48 rows"):
        hold_out(opened, 48)


def test_a_stream_without_held_out_rows(opened):
    """Over three epochs each training row comes three times, and no other; with none held out it is as it always was."""
    held_out = hold_out(opened, 12)
    stored = opened.gather(np.arange(48))["latents"].flatten(1)
    mirrored = opened.gather(np.arange(48), lambda name: np.zeros(48))["latents"].flatten(1)

    def rows_of(stream, count):
        latents = stream.__getitems__(list(range(count)))["latents"].flatten(1)
        found = [(stored == each).all(1) | (mirrored == each).all(1) for each in latents]
        return [int(each.nonzero()[0, 0]) for each in found]

    seen = rows_of(LatentStream(opened, 3, held_out.training_rows), 108)
    assert sorted(seen) == sorted(list(held_out.training_rows) * 3)
    stream = LatentStream(opened, 3)
    assert rows_of(stream, 96) == stream.order.rows(np.arange(96)).tolist()


def test_another_split(opened, other_split, cache):
    held_out = open_split(opened, other_split)
    assert (len(held_out), held_out.training_rows) == (15, None)
    assert held_out.cache.normalisation == opened.normalisation
    ours, other = opened.spec, LatentSpec.read(other_split)
    for changed, words in (
        ({"shape": (4, 8, 8)}, r"shape = \(4, 8, 8\)"),
        ({"fingerprint": other.fingerprint | {"resolution": 32}}, "resolution = 32"),
        ({"fingerprint": other.fingerprint | {"content": "mean"}}, "content = mean"),
        ({"captions": None}, "captions = None"),
        ({"labels": None}, "labels = None"),
        ({"labels": {"num_classes": 4, "names": None}}, "labels up to 3"),
    ):
        with pytest.raises(UserError, match=f"--validation_latents_dir: .*{words}"):
            check_split(ours, replace(other, **changed))
    with pytest.raises(UserError, match="the cache that is trained on"):
        open_split(opened, cache)
    with pytest.raises(UserError, match=r"--validation_latents_dir: .* does not exist"):
        open_split(opened, "nowhere")


# ---- the loss -------------------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """Predicts the same share of its input, and notes the timesteps."""

    def __init__(self, share: float):
        super().__init__()
        self.share, self.timesteps = share, []

    def forward(self, noisy_latents, timesteps, values, drop):
        assert not drop.any()
        self.timesteps += timesteps.tolist()
        return self.share * noisy_latents


def test_timesteps_lie_one_in_each_stratum():
    rows = np.random.default_rng(0).permutation(1000)[:50]
    drawn = torch.cat([stratified(rows, np.arange(50), 50, quarter) for quarter in range(4)])
    assert ((drawn * 200).long() == torch.arange(200)).all()
    parts = torch.cat([stratified(rows[i : i + 7], np.arange(50)[i : i + 7], 50, 3) for i in range(0, 50, 7)])
    assert torch.equal(parts, drawn[150:])
    assert stratified(np.array([0]), np.array([10**9 - 1]), 10**9, 3) < 1


def test_the_loss_by_closed_form(accelerator, opened):
    """Of epsilon = noise ~ N(0, 1) predicted as 0 the loss is 1; with x0 as target, the second moment of the latents."""
    held_out = hold_out(opened, 40)
    epsilon = OBJECTIVES["epsilon"](training_scheduler("epsilon"))
    losses = validation_losses(accelerator, Model(0.0), held_out, epsilon, batch_size=16)
    assert losses == pytest.approx([1] * 4, abs=4 * (2 / (40 * 64)) ** 0.5)
    model = Model(0.0)
    losses = validation_losses(
        accelerator, model, held_out, OBJECTIVES["sample"](training_scheduler("sample")), batch_size=16
    )
    moments = opened.gather(held_out.rows)["latents"].double()
    mean, std = (torch.tensor(v).view(1, 4, 1, 1) for v in (opened.normalisation.mean, opened.normalisation.std))
    expected = (((moments[:, 0] - mean) / std).square() + (moments[:, 1] / std).square()).mean().item()
    assert sum(losses) / 4 == pytest.approx(expected, rel=0.1)
    assert sorted(int(t) * 4 // 1000 for t in model.timesteps) == sorted([0, 1, 2, 3] * 40)


def test_the_loss_by_hand(accelerator, opened, flow):
    """Sample by sample, with the formulas of rectified flow written out."""
    held_out, total = hold_out(opened, 6), [0.0] * 4
    for quarter in range(4):
        for place, row in enumerate(held_out.rows):
            draws = SampleDraws(4_242_424_242 + quarter, torch.tensor([row]))
            latents = opened.normalise(opened.gather(np.array([row])), draws)
            noise = draws.normal("noise", latents.shape)
            uniform = stratified(np.array([row]), np.array([place]), 6, quarter).double()
            sigma = torch.sigmoid(torch.special.ndtri(uniform)).item()
            prediction = 0.5 * ((1 - sigma) * latents + sigma * noise)
            total[quarter] += (prediction - (noise - latents)).square().mean().item() / 6
    found = validation_losses(accelerator, Model(0.5), held_out, flow, batch_size=4)
    assert found == pytest.approx(total, rel=1e-5)


def test_the_loss_depends_on_nothing_but_the_weights(accelerator, opened, flow):
    """Neither on the random state, which it leaves alone, nor on the batch size."""
    held_out = hold_out(opened, 12)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = validation_losses(accelerator, Model(0.5), held_out, flow, batch_size=5)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert validation_losses(accelerator, Model(0.5), held_out, flow, batch_size=5) == first
    assert validation_losses(accelerator, Model(0.5), held_out, flow, batch_size=12) == pytest.approx(first, rel=1e-6)
    assert validation_losses(accelerator, Model(0.4), held_out, flow, batch_size=5) != first


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_a_cache_in_parts_holds_nothing_out(cache):
    part = ImageCache(cache)
    part.reader = object()
    with pytest.raises(UserError, match="--num_validation_samples with a cache in parts"):
        hold_out(part, 4)
