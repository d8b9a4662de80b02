"""Reading crystals needs no network."""

import datasets
import pytest


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    """No test talks to the hub or writes to the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
