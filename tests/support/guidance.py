"""What tests of guidance share: numbers, conditions that are dropped wrongly, and what a denoiser was told."""

from types import SimpleNamespace

import torch

from utils.diffusion.conditions import Conditioning


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Faults put back: the null at sampling


def label_of_dropped(label):
    """ClassCondition.forward with another null; None: the given label."""

    def forward(self, values, drop):
        labels = values["class_labels"]
        return Conditioning(self.embedding(labels if label is None else torch.where(drop, label, labels)))

    return forward


def zeros_for_dropped(self, values, drop):
    conditioning = label_of_dropped(None)(self, values, drop)
    return Conditioning(conditioning.pooled_projections * ~drop[:, None])


def told(pipeline, **request):
    """What the denoiser was called with, call by call."""
    calls = []

    def record(module, positional, named):
        calls.append(SimpleNamespace(count=len(positional[0]), timesteps=positional[1], **named))

    handle = pipeline.denoiser.register_forward_pre_hook(record, with_kwargs=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(**request, output_type="latent")
    handle.remove()
    return calls
