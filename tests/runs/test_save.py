"""The text of a model card, letter by letter."""

from utils.runs.save import ModelCard, column_settings

IMAGES = """---
library_name: diffusers
tags: [diffusion, latent-diffusion, trained-from-scratch]
---
# A latent diffusion model

Trained from scratch on photos (90 images at 32 pixels) for
7 steps of 4 samples per process, prediction type `flow`,
in the latents of `vae`. The weights are their moving average;
`args.yaml` repeats the run.

    python sample.py --model THIS_FOLDER
"""
CELLS = """---
tags: [diffusion, latent-diffusion, single-cell, fine-tuned]
---
# A model of cells

Fine-tuned from runs/base on 90 cells of pbmc for
7 steps, conditioned on class:type, property:age, in the latents of `vae`. The weights are
the last ones; `args.yaml` repeats the run.

    python sample.py --num_samples 500
"""


def test_a_card_that_the_hub_reads():
    card = ModelCard(
        title="A latent diffusion model",
        data="photos (90 images at 32 pixels)",
        settings=" of 4 samples per process, prediction type `flow`,\nin the latents of `vae`",
        base=None,
        use_ema=True,
        example="python sample.py --model THIS_FOLDER",
        library_name="diffusers",
        breaks=(" ", "\n"),
    )
    assert card.text(7) == IMAGES


def test_a_card_of_a_run_on_columns():
    card = ModelCard(
        title="A model of cells",
        data="90 cells of pbmc",
        settings=column_settings(["class:type", "property:age"], "vae"),
        base="runs/base",
        use_ema=False,
        example="python sample.py --num_samples 500",
        tags=("single-cell",),
    )
    assert card.text(7) == CELLS
    assert column_settings([], "vae") == ", conditioned on nothing, in the latents of `vae`"
