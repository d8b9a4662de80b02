"""Samples that are measured while a model trains."""

import pytest
import torch

from utils.image.validation import fid, kid

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
