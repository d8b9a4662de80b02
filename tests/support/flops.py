"""FLOPs by hand: two for each product of a weight and an input, as the layers of a model see them."""

from typing import Any

from torch import Tensor, nn


def flops_by_hand(model: nn.Module, *inputs: Tensor, **named: Any) -> int:
    """Of linear layers, convolutions and the two products of attention in one forward pass of one sample."""
    found = []

    def of_layer(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        places = output.numel() // module.weight.shape[0]
        found.append(2 * module.weight.numel() * places)

    def of_attention(module: nn.Module) -> None:
        lengths = {}
        to_k = module.to_k if hasattr(module, "to_k") else module.to_kv
        hooks.append(module.to_q.register_forward_hook(lambda *seen: lengths.update(q=seen[-1].shape[1])))
        hooks.append(to_k.register_forward_hook(lambda *seen: lengths.update(k=seen[-1].shape[1])))
        width = module.to_q.out_features
        hooks.append(
            module.register_forward_hook(lambda *_seen: found.append(2 * 2 * lengths["q"] * lengths["k"] * width))
        )

    hooks: list[Any] = []
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            hooks.append(module.register_forward_hook(of_layer))
        elif hasattr(module, "to_q"):
            of_attention(module)
    model(*inputs, **named)
    for hook in hooks:
        hook.remove()
    return sum(found)
