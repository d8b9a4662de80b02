"""FLOPs against those of the layers, one by one, and the peaks of devices."""

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from tests.support.flops import flops_by_hand
from tests.support.models import UNET_CONFIG
from utils.diffusion.conditions import ClassCondition
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.models.dit import DIT_SIZES, DiT
from utils.models.unet import UNET_PRESETS, build_unet, unet_config
from utils.training import flops as budget

# ---- FLOPs


def counted(model, shape, length, device) -> int:
    """FLOPs of one forward pass, layer by layer."""
    config = model.config
    pooled = config.get("projection_class_embeddings_input_dim")
    if isinstance(model, UNet2DConditionModel) and config.class_embed_type == "identity":
        pooled = 4 * config.block_out_channels[0]
    with torch.no_grad():
        return flops_by_hand(
            model,
            torch.zeros(1, *shape, device=device),
            torch.zeros(1, device=device),
            encoder_hidden_states=torch.zeros(1, length, config.cross_attention_dim, device=device)
            if length
            else None,
            class_labels=torch.zeros(1, pooled, device=device) if pooled else None,
            return_dict=False,
        )


@pytest.mark.parametrize("length", [0, 77])
@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("preset", UNET_PRESETS)
def test_flops_of_unets(preset, with_labels, length):
    config = unet_config(preset, 32, 4, 768 if length else None, with_labels)
    with torch.device("meta"):
        model = build_unet(config)
    assert budget.forward_flops(model, (4, 32, 32), length) == counted(model, (4, 32, 32), length, "meta")


@pytest.mark.parametrize("shape", [(4, 15, 15), (4, 8, 24), (4, 6, 10)])
def test_flops_of_a_unet_on_odd_and_oblong_latents(shape):
    with torch.device("meta"):
        model = build_unet(unet_config("cifar10", 16, 4, 8, False))
    assert budget.forward_flops(model, shape, 5) == counted(model, shape, 5, "meta")


DITS = {
    "paper's S/2": {"num_layers": 12, "hidden_size": 384, "num_attention_heads": 6},
    "plain, labels": {"style": "plain", "projection_class_embeddings_input_dim": 384},
    "text as wide as the model": {"cross_attention_dim": 384, "projection_class_embeddings_input_dim": 384},
    "text, patch 4": {"cross_attention_dim": 96, "patch_size": 4, "num_layers": 3},
}


@pytest.mark.parametrize("name", DITS)
def test_flops_of_dits(name):
    length = 77 if "text" in name else 0
    with torch.device("meta"):
        model = DiT(**DITS[name])
    assert budget.forward_flops(model, (4, 32, 32), length) == counted(model, (4, 32, 32), length, "meta")


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_flops_of_a_forward_on_the_cpu(kind):
    """A model with weights: the count is made on the meta device, and leaves it as it is."""
    config = unet_config("tiny", 8, 4, 16, False) | {
        k: tuple(v) if isinstance(v, list) else v for k, v in UNET_CONFIG.items()
    }
    model = (
        build_unet(config)
        if kind == "unet"
        else DiT(8, num_layers=2, hidden_size=32, num_attention_heads=2, cross_attention_dim=16)
    )
    assert budget.forward_flops(model, (4, 8, 8), 7) == counted(model, (4, 8, 8), 7, "cpu")


def test_flops_of_the_paper():
    """Table 1 of arXiv 2212.09748 gives 6.06, 23.01, 80.71 and 118.64 "Gflops" for S/2 to XL/2 at 32 x 32: there a
    multiply and an add are one. SwiGLU's width is rounded up, hence 2 %."""
    for size, expected in {"S": 6.06, "B": 23.01, "L": 80.71, "XL": 118.64}.items():
        num_layers, hidden_size, heads = DIT_SIZES[size]
        with torch.device("meta"):
            model = DiT(num_layers=num_layers, hidden_size=hidden_size, num_attention_heads=heads)
        assert budget.forward_flops(model, (4, 32, 32)) / 2e9 == pytest.approx(expected, rel=0.02)


def test_training_is_three_forwards_and_a_conditional_denoiser_is_its_model():
    with torch.device("meta"):
        model = DiT(8, hidden_size=32, num_attention_heads=2, num_layers=1, class_embed_type="identity")
        denoiser = ConditionalDenoiser(model, ClassCondition(3, 32))
    forward = budget.forward_flops(model, (4, 8, 8))
    assert budget.forward_flops(denoiser, (4, 8, 8)) == forward
    assert budget.training_flops(denoiser, (4, 8, 8)) == 3 * forward


def test_flops_that_cannot_be_known():
    with torch.device("meta"):
        with pytest.raises(ValueError, match="sequence_length"):
            budget.forward_flops(DiT(cross_attention_dim=8), (4, 32, 32))
        with pytest.raises(ValueError, match="UNet2DModel"):
            budget.forward_flops(UNet2DModel(), (4, 32, 32))


# ---- peaks


GPU_NAMES = {
    "NVIDIA GeForce RTX 5090": 209.5,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 3090": 71.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA A10": 125.0,
    "NVIDIA A40": 149.7,
    "NVIDIA L4": 121.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H200": 989.4,
    "NVIDIA B200": 2250.0,
}

STRANGERS = [
    "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA A10G",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GH200 480GB", "NVIDIA H20", "Tesla V100-SXM2-32GB", "Tesla T4",
]  # fmt: skip


@pytest.fixture
def gpu_called(monkeypatch):
    """A CUDA device of a name; what would be measured is 1."""

    def be(name: str) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(budget, "measured_flops", lambda *_: 1.0)

    return be


@pytest.mark.parametrize("name", GPU_NAMES)
def test_published_peaks(gpu_called, name):
    gpu_called(name)
    for precision in ("bf16", "fp16"):
        assert budget.peak_flops("cuda", precision) == budget.Peak(GPU_NAMES[name] * 1e12, "published")


@pytest.mark.parametrize("name", STRANGERS)
def test_a_device_or_mode_that_is_not_in_the_table_is_measured(gpu_called, name):
    """Volta and Turing are in it, without bf16."""
    gpu_called(name)
    assert budget.peak_flops("cuda", "bf16") == budget.Peak(1.0, "measured")


def test_peaks_in_full_precision_follow_tf32(gpu_called):
    gpu_called("NVIDIA A100-SXM4-40GB")
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        for allowed, expected in ((False, 19.5e12), (True, 156e12)):
            matmul.allow_tf32 = allowed
            assert budget.peak_flops("cuda", "no") == budget.Peak(expected, "published")
    finally:
        matmul.allow_tf32 = before


def test_the_peak_of_a_cpu_is_measured_once():
    budget.measured_flops.cache_clear()
    peak = budget.peak_flops("cpu")
    assert peak.source == "measured"
    assert 1e8 < peak.flops < 1e14
    assert budget.peak_flops("cpu") == peak
    assert budget.measured_flops.cache_info().misses == 1


def test_utilisation():
    peak = budget.Peak(100e12, "published")
    assert budget.model_flops_utilisation(500, 60e9, peak) == pytest.approx(0.3)
    assert budget.model_flops_utilisation(500, 60e9, peak, num_devices=4) == pytest.approx(0.075)
