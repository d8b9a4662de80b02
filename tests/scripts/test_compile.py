"""--torch_compile: the compiler sees each model as one graph and compiles it once, and training with it is training."""

from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch._dynamo.utils import counters

from tests.support.models import TRAIN_FLAGS
from tests.support.processes import run_script, scalars
from utils.diffusion.conditions import ClassCondition, TextCondition
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.models.dit import DiT
from utils.models.unet import build_unet, unet_config

DIT = {"sample_size": 8, "num_layers": 5, "hidden_size": 32, "num_attention_heads": 2}


def of_text(model: nn.Module) -> ConditionalDenoiser:
    return ConditionalDenoiser(model, TextCondition(10, 5))


def of_classes(model: nn.Module, width: int) -> ConditionalDenoiser:
    return ConditionalDenoiser(model, ClassCondition(3, width))


# fmt: off
DENOISERS = {
    "dit, text": lambda: of_text(DiT(**DIT, cross_attention_dim=10)),
    "dit, classes": lambda: of_classes(DiT(**DIT, projection_class_embeddings_input_dim=32), 32),
    "plain dit, classes": lambda: of_classes(DiT(**DIT, style="plain", class_embed_type="identity"), 32),
    "unet, text": lambda: of_text(build_unet(unet_config("tiny", 8, 4, 10, False))),
    "unet, classes": lambda: of_classes(build_unet(unet_config("tiny", 8, 4, None, True)), 128),
}
# fmt: on


def batch_of(seed: int, tread: bool) -> tuple:
    """What a trainer gives its denoiser."""
    generator = torch.Generator().manual_seed(seed)
    values = {
        "encoder_hidden_states": torch.randn(4, 5, 10, generator=generator),
        "num_tokens": torch.randint(2, 6, (4,), generator=generator),
        "class_labels": torch.randint(3, (4,), generator=generator),
    }
    drop = torch.rand(4, generator=generator) < 0.5
    kept_tokens = torch.rand(4, 16, generator=generator).argsort(dim=1)[:, :8] if tread else None
    return (
        torch.randn(4, 4, 8, 8, generator=generator),
        1000 * torch.rand(4, generator=generator),
        values,
        drop,
        kept_tokens,
    )


@pytest.fixture
def compiler():
    """Its counters, from zero."""
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


CASES = [(kind, "bf16") for kind in DENOISERS]
CASES += [("dit, text", ""), ("dit, text", "tread"), ("dit, text", "checkpointing"), ("unet, text", "checkpointing")]


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_a_training_step_is_one_graph_and_compiled_once(compiler, kind, settings):
    """A break in the graph would cost a launch of its own on a GPU, and another graph minutes of compiling, on the way."""
    denoiser = DENOISERS[kind]().train()
    if settings == "checkpointing":
        denoiser.model.enable_gradient_checkpointing()
    half = torch.autocast("cpu", torch.bfloat16) if settings == "bf16" else nullcontext()
    compiled = torch.compile(denoiser, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        with half:
            model_pred = compiled(*batch_of(seed, tread=settings == "tread"))
        model_pred.float().square().mean().backward()
    assert compiler["stats"]["unique_graphs"] == 1


def test_what_accelerate_prepares_is_compiled_once(compiler):
    """As the trainers do it: prepared, then compiled."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    compiled = torch.compile(accelerator.prepare(DENOISERS["dit, text"]()), backend="aot_eager")
    for seed in range(3):
        accelerator.backward(compiled(*batch_of(seed, tread=False)).square().mean())
    AcceleratorState._reset_state(reset_partial_state=True)  # which has bf16, for the tests behind this one
    assert compiler["stats"]["unique_graphs"] == 1
    assert not compiler["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_a_compiled_training_has_the_same_losses(cache, model_flags, tmp_path, kind):
    flags = [
        *TRAIN_FLAGS,
        *model_flags[kind],
        "--latents_dir",
        cache,
        "--logging_steps",
        1,
        "--report_to",
        "tensorboard",
    ]
    for name, more in (("plain", []), ("compiled", ["--torch_compile"])):
        run_script("train_text_to_image_ldm.py", *flags, *more, "--output_dir", tmp_path / name)
    plain, compiled = (scalars(tmp_path / name, "train/loss") for name in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, rel=1e-4)
    assert len(set(plain.values())) == 8
