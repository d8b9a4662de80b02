"""The small classifier that evaluation reads classes with, and the script that trains it."""

import sys

import pytest
import torch

from tests.support.data import DATA
from tests.support.processes import ROOT, run
from utils.image.evaluation.classifier import ImageClassifier

sys.path.insert(0, str(ROOT / "benchmarks"))
from train_classifier import accuracy, augment

sys.path.pop(0)


def test_shapes_and_saving(tmp_path):
    torch.manual_seed(0)
    model = ImageClassifier(3, 16, (8, 16), ["red", "green", "blue"]).eval()
    images = torch.randn(2, 3, 16, 16)
    assert model.features(images).shape == (2, 16)
    model.save_pretrained(tmp_path)
    loaded = ImageClassifier.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(images), model(images))
    assert loaded.config.label_names == ["red", "green", "blue"]


def test_augmentation_shifts_and_mirrors():
    """Every image is one of the 2 x 5 x 5 shifts of itself or its mirror image, found by brute force."""
    torch.manual_seed(0)
    images = torch.randint(256, (40, 3, 16, 16), dtype=torch.uint8)
    moved = augment(images, torch.Generator().manual_seed(0))
    seen = set()
    for image, result in zip(images, moved, strict=True):
        found = [
            (mirrored, down, right)
            for mirrored in (False, True)
            for padded in [torch.nn.functional.pad((image.flip(2) if mirrored else image).float(), (2,) * 4, mode="reflect")]
            for down in range(5)
            for right in range(5)
            if torch.equal(padded[:, down : down + 16, right : right + 16].byte(), result)
        ]  # fmt: skip
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 20


def test_accuracy_counts():
    class Constant(torch.nn.Module):
        def forward(self, images):
            return torch.eye(3)[torch.ones(len(images), dtype=torch.long)]

    labels = torch.tensor([1, 1, 0, 2])
    assert accuracy(Constant(), torch.zeros(4, 3, 8, 8, dtype=torch.uint8), labels, "cpu") == 0.5


@pytest.mark.skipif(not (DATA / "cifar10").is_dir(), reason="CIFAR-10 is not here")
def test_the_script_learns(tmp_path):
    """On 640 images of CIFAR-10 for two epochs no more is asked than that all of it runs, and what it stores."""
    result = run(
        "benchmarks/train_classifier.py", "--dataset_name", DATA / "cifar10", "--label_column", "label", "--epochs", 2,
        "--max_samples", 640, "--block_out_channels", 8, 16, 32, 32, "--batch_size", 64, "--output_dir", tmp_path,
    )  # fmt: skip
    model = ImageClassifier.from_pretrained(tmp_path)
    assert len(model.config.label_names) == 10
    assert f"{model.config.test_accuracy:.4f}" in result.stdout
