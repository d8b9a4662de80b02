"""What a training costs in arithmetic: FLOPs of a forward pass, peaks of devices, and the share that is used.

A multiply and an add are two FLOPs. Counted are convolutions, linear layers and the two products of attention, which
are what peaks are quoted for; not counted are biases, norms, activations, softmax, embeddings and rotations, well
under 1 % of a model that is worth a budget.
"""

import time
from dataclasses import dataclass
from functools import cache

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from utils.diffusion.denoiser import ConditionalDenoiser
from utils.models.dit import DiT
from utils.training.lora import is_adapted
from utils.training.sharding import new_like

# A backward pass computes two products for each one of the forward pass: by the inputs and by the weights. What
# gradient checkpointing computes again counts as time, not as work (PaLM, arXiv 2204.02311, appendix B).
TRAINING_FORWARDS = 3


def forward_flops(
    denoiser: nn.Module, latent_shape: tuple[int, ...], sequence_length: int = 0, tread_ratio: float = 0.0
) -> int:
    """FLOPs of one sample's forward pass, by PyTorch's counter: of a new model of the same config, without adapters,
    on the meta device, where nothing is computed.

    `denoiser` is a UNet2DConditionModel, a DiT or a ConditionalDenoiser of one, `latent_shape` (C, H, W),
    `sequence_length` the number of text tokens, `tread_ratio` the share of a DiT's tokens that is routed past the
    middle blocks. Raises ValueError for another model, or without a length for a model with cross-attention.
    """
    model = denoiser.model if isinstance(denoiser, ConditionalDenoiser) else denoiser
    if not isinstance(model, DiT | UNet2DConditionModel):
        raise ValueError(f"the FLOPs of {type(model).__name__} are not known: give a DiT or a UNet2DConditionModel")
    config, is_dit = model.config, isinstance(model, DiT)
    reads_text = config.cross_attention_dim if is_dit else "CrossAttn" in str(config.down_block_types)
    if reads_text and not sequence_length:
        raise ValueError("a model with cross-attention needs the number of its tokens: sequence_length")
    identity_width = config.hidden_size if is_dit else 4 * config.block_out_channels[0]
    with torch.device("meta"), torch.no_grad():
        model = new_like(model)
        routing = {}
        if tread_ratio:
            tokens = latent_shape[-2] * latent_shape[-1] // config.patch_size**2
            routing["kept_tokens"] = torch.arange(tokens - int(tokens * tread_ratio))[None]
        with FlopCounterMode(display=False) as counter:
            model(
                torch.empty(1, *latent_shape),
                torch.empty(1),
                encoder_hidden_states=torch.empty(1, sequence_length, config.cross_attention_dim or 1),
                class_labels=torch.empty(1, config.projection_class_embeddings_input_dim or identity_width),
                **routing,
            )
    return counter.get_total_flops()


def training_flops(
    denoiser: nn.Module, latent_shape: tuple[int, ...], sequence_length: int = 0, tread_ratio: float = 0.0
) -> int:
    """FLOPs that training spends on one sample: three forward passes' worth, or with adapters, which are not counted,
    two: frozen weights need no gradient. Arguments of `forward_flops`.
    """
    forwards = 2 if isinstance(denoiser, ConditionalDenoiser) and is_adapted(denoiser.model) else TRAINING_FORWARDS
    return forwards * forward_flops(denoiser, latent_shape, sequence_length, tread_ratio)


@dataclass(frozen=True)
class Peak:
    """The most FLOPs a second that a device does; `source` is "published" or "measured"."""

    flops: float
    source: str


# Dense peaks in TFLOP/s as NVIDIA publishes them: data sheets of V100, T4, A10, A40, A100, L4, L40, L40S, RTX A6000,
# H100, H200 and HGX B200; appendices of the whitepapers "GA102 GPU Architecture" (RTX 30), "Ada GPU Architecture"
# (RTX 40) and "RTX Blackwell GPU Architecture" (RTX 50). Where a data sheet quotes 2:4 sparsity, half of it. Of
# GeForce the rate with fp32 accumulation, which is what PyTorch uses. None: the device has no such mode.
# fmt: off
PUBLISHED_TFLOPS: dict[str, dict[str, float | None]] = {
    name: dict(zip(("fp16", "bf16", "tf32", "fp32"), values, strict=True))
    for name, values in {
        #              fp16    bf16    tf32   fp32
        "V100":       (125.0,  None,   None,  15.7),
        "V100 PCIE":  (112.0,  None,   None,  14.0),
        "V100S PCIE": (130.0,  None,   None,  16.4),
        "T4":         (65.0,   None,   None,  8.1),
        "A10":        (125.0,  125.0,  62.5,  31.2),
        "A40":        (149.7,  149.7,  74.8,  37.4),
        "RTX A6000":  (154.8,  154.8,  77.4,  38.7),
        "A100":       (312.0,  312.0,  156.0, 19.5),
        "A100 PCIE":  (312.0,  312.0,  156.0, 19.5),
        "L4":         (121.0,  121.0,  60.0,  30.3),
        "L40":        (181.0,  181.0,  90.5,  90.5),
        "L40S":       (362.0,  362.0,  183.0, 91.6),
        "RTX 3090":   (71.0,   71.0,   35.6,  35.6),
        "RTX 4090":   (165.2,  165.2,  82.6,  82.6),
        "RTX 5090":   (209.5,  209.5,  104.8, 104.8),
        "H100":       (989.4,  989.4,  494.7, 66.9),
        "H100 PCIE":  (756.0,  756.0,  378.0, 51.2),
        "H100 NVL":   (835.5,  835.5,  417.5, 60.0),
        "H200":       (989.4,  989.4,  494.7, 66.9),
        "H200 NVL":   (835.5,  835.5,  417.5, 60.0),
        "B200":       (2250.0, 2250.0, 1125.0, 75.0),
    }.items()
}
# fmt: on
FILLERS = ("NVIDIA", "TESLA", "GEFORCE", "SXM2", "SXM3", "SXM4", "SXM5", "SXM", "HBM2", "HBM2E", "HBM3", "HBM3E")


def published_name(device_name: str) -> str:
    """ "NVIDIA A100-SXM4-80GB" -> "A100": what is left tells laptop chips, slices (MIG) and other variants apart."""
    words = device_name.upper().replace("-", " ").split()
    return " ".join(word for word in words if word not in FILLERS and not (word[:-2].isdigit() and word[-2:] == "GB"))


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}


def peak_flops(device: torch.device | str, mixed_precision: str = "no") -> Peak:
    """The peak of a device in a precision of `--mixed_precision` ("no", "fp16", "bf16"): published where the device is
    known by name, otherwise (CPUs too) measured once by matrix products, for about a second.

    A measured peak is one that the device can reach now, with the threads it has, and lower than a published one would
    be: shares of the two do not compare.
    """
    device = torch.device(device)
    is_cuda = device.type == "cuda"
    full = "tf32" if is_cuda and torch.backends.cuda.matmul.allow_tf32 else "fp32"
    precision = mixed_precision if mixed_precision in ("fp16", "bf16") else full
    if is_cuda:
        published = PUBLISHED_TFLOPS.get(published_name(torch.cuda.get_device_name(device)), {}).get(precision)
        if published is not None:
            return Peak(published * 1e12, "published")
    return Peak(measured_flops(device, precision, torch.get_num_threads()), "measured")


@cache
def measured_flops(device: torch.device, precision: str, num_threads: int, seconds: float = 1.0) -> float:
    """FLOPs a second of the quickest of many matrix products. `num_threads` is a key of the cache and sets nothing."""
    size = 1024 if device.type == "cpu" else 8192
    left, right = (torch.ones(size, size, device=device, dtype=DTYPES[precision]) for _ in range(2))
    quickest, started = float("inf"), time.perf_counter()
    with torch.no_grad():
        while time.perf_counter() - started < seconds:
            before = time.perf_counter()
            # Read one number: the device has finished when it is here.
            (left @ right)[0, 0].item()
            quickest = min(quickest, time.perf_counter() - before)
    return 2 * size**3 / quickest


def model_flops_utilisation(
    samples_per_second: float, flops_per_sample: float, peak: Peak, num_devices: int = 1
) -> float:
    """Share of the peak that is spent on the model, in [0, 1]: MFU (PaLM, arXiv 2204.02311, appendix B).
    `samples_per_second` is that of all devices together, `flops_per_sample` that of training.
    """
    return samples_per_second * flops_per_sample / (peak.flops * num_devices)
