"""An exponential moving average of the weights, in fp32."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class EMA:
    """Shadow weights: shadow += (1 - decay) * (weights - shadow) after every optimizer step.

    The decay warms up as min(decay, (1 + step) / (10 + step)), so that the average forgets the random start. Buffers
    are copied, not averaged. The shadow is fp32 whatever the model is: an average kept in bf16 would never move.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {name: tensor.detach().clone().float() for name, tensor in model.named_parameters()}
        self.averaged = list(self.shadow.values())

    @torch.no_grad()
    def step(self, model: nn.Module, global_step: int) -> None:
        """Moves the average towards the weights that optimizer step `global_step` (counted from 0) left."""
        decay = min(self.decay, (1 + global_step) / (10 + global_step))
        weights = [parameter.detach().float() for parameter in model.parameters()]
        torch._foreach_lerp_(self.averaged, weights, 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Writes the average into a model of the same shape."""
        for name, parameter in model.named_parameters():
            parameter.copy_(self.shadow[name])

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchanges weights and average; a second call undoes the first, bit for bit where the weights are fp32,
        as those of a training are."""
        for name, parameter in model.named_parameters():
            weights = parameter.detach().clone()
            parameter.copy_(self.shadow[name])
            self.shadow[name].copy_(weights)

    def save(self, path: Path) -> None:
        """Writes the average as safetensors."""
        save_file({name: tensor.contiguous().cpu() for name, tensor in self.shadow.items()}, path)

    def load(self, path: Path) -> None:
        """Reads an average that `save` wrote. Raises KeyError if a weight is missing."""
        saved: dict[str, Tensor] = load_file(path)
        for name, tensor in self.shadow.items():
            tensor.copy_(saved[name])
