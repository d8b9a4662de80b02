"""Samples that are measured while a model trains."""

import pytest
import torch
from datasets import load_from_disk

from utils.image.validation import fid, held_out_requests, kid
from utils.training.held_out import hold_out

# ---- the loss -------------------------------------------------------------------------------------------------------


def test_kid_and_fid_of_few_samples():
    """KID is unbiased: its mean over pairs of small sets of one distribution is 0, as FID's is not."""
    generator = torch.Generator().manual_seed(0)
    sets = torch.randn(200, 2, 16, 4, generator=generator)
    values = torch.tensor([kid(*pair) for pair in sets])
    assert abs(values.mean()) < 4 * values.std() / len(values) ** 0.5
    assert kid(sets[0, 0], sets[0, 1] + 1) > 10 * values.std()
    assert fid(sets[0, 0], sets[0, 0]) == pytest.approx(0, abs=1e-6)
    assert fid(sets[0, 0], sets[0, 0] + 2) == pytest.approx(16, rel=1e-6)


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_samples_are_made_for_the_conditions_of_held_out_rows(cache, opened):
    rows = hold_out(opened, 7).rows
    table = load_from_disk(str(cache / "latents"))
    assert held_out_requests(hold_out(opened, 7), "text", 5) == [
        {"prompt": table[int(i)]["caption"][0]} for i in rows[:5]
    ]
    assert held_out_requests(hold_out(opened, 7), "class", 5) == [
        {"class_labels": table[int(i)]["label"]} for i in rows[:5]
    ]
    assert held_out_requests(hold_out(opened, 7), "none", 2) == [{}, {}]
