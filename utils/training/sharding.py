"""Weights that are divided among processes (FSDP2), whole where a file or a sampler needs them whole."""

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from utils.diffusion.denoiser import ConditionalDenoiser, own_config
from utils.errors import UserError

MODEL_FILE, OPTIMIZER_FILE = "model.safetensors", "optimizer.bin"  # the names that Accelerate gives them without FSDP


def join_fsdp(accelerator: Accelerator) -> None:
    """Lets FSDP2 run on the CPU too, where Accelerate leaves it out. Raises UserError for engines that would not keep
    what these scripts promise.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true" and accelerator.device.type == "cpu":
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        # The first holds what the second is made of, whenever Accelerate asks for its state anew.
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise UserError(
            "distributed_type DEEPSPEED in accelerate's configuration: its engine moves the weights before a step "
            "that is not finite could be kept from them; use configs/accelerate/zero2.yaml, which divides the same"
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise UserError("fsdp_version 1 in accelerate's configuration: these scripts run under fsdp_version 2")
        # Accelerate then asks the model itself which of its layers are divided one by one.
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = None
        if accelerator.mixed_precision == "fp16":
            raise UserError("--mixed_precision fp16 with FSDP: the scale of the loss would not be saved; use bf16")


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which each process may hold a part. Every process calls this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_full_(target: Tensor, source: Tensor) -> None:
    """Copies a whole tensor into one of which each process may hold a part. Every process calls this."""
    if isinstance(target, DTensor):
        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements)
    target.copy_(source)


def save_state(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Writes weights and optimizer into a checkpoint. Every process calls this."""
    if not accelerator.is_fsdp2:
        accelerator.save_state(str(folder), safe_serialization=True)
        return
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)  # whole, and on the main process only
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    if accelerator.is_main_process:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / MODEL_FILE)
        torch.save(state, folder / OPTIMIZER_FILE)


def load_state(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Loads what `save_state` wrote under the same engine. Every process calls this."""
    if not accelerator.is_fsdp2:
        accelerator.load_state(str(folder))
        return
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    main = accelerator.is_main_process
    weights: dict[str, Any] = dict(load_file(folder / MODEL_FILE)) if main else {}
    set_model_state_dict(model, weights, options=options)
    state = torch.load(folder / OPTIMIZER_FILE, weights_only=True) if main else {}
    set_optimizer_state_dict(model, optimizer, state, options=options)


def new_like(module: Any) -> Any:
    """A new module of a diffusers model's config and class: the one it had before FSDP2 put its own in front."""
    whole_class = next(each for each in type(module).__mro__ if not issubclass(each, FSDPModule))
    # Not from_config: it takes arguments that were given by position for defaults, and leaves them out.
    return whole_class(**own_config(module))


def whole_copy(
    accelerator: Accelerator, model: ConditionalDenoiser, averages: dict[str, Tensor]
) -> ConditionalDenoiser | None:
    """On the main process an undivided copy of a divided model, with `averages` in the place of the weights they are
    of; None on the others. Every process calls this.
    """
    weights = {}
    for name, tensor in model.state_dict().items():
        whole = full(averages.get(name, tensor).detach())
        if accelerator.is_main_process:
            weights[name] = whole.to(tensor.dtype)
    if not accelerator.is_main_process:
        return None
    with torch.device("meta"):
        copy = ConditionalDenoiser(new_like(model.model), new_like(model.conditions))
    copy.load_state_dict(weights, assign=True)
    return copy
