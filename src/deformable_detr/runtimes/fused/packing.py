"""Pack the layers of any network, whatever its forward pass looks like."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .folding import ReadCounter, identity
from .onednn import PackedConv2d, PackedLinear, fusable_activation, is_convolution


class CastInput(nn.Module):
    """A layer in another dtype than the tensors around it.

    `output` is the dtype of the result; None: the layer's.
    """

    def __init__(self, layer: nn.Module, dtype: torch.dtype, output: torch.dtype | None = None) -> None:
        super().__init__()
        self.layer, self.dtype, self.output = layer, dtype, output

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x.to(self.dtype))
        return y if self.output is None else y.to(self.output)


def pack_layers(
    network: nn.Module, run: Callable[[], object], dtype_of: Callable[[str], torch.dtype], packed: bool
) -> None:
    """Replace convolutions and linear layers by packed ones, fused with the activation module after them, in place.

    Args:
        network: In evaluation mode, in fp32, without gradients.
        run: Runs the network once; it shows which activation follows which layer.
        dtype_of: Returns the dtype of a layer by its name.
        packed: As in `PackedLinear`.
    """
    activations, run_counts = _activations_after(network, run)
    names = {module: name for name, module in network.named_modules()}
    for layer, name in names.items():
        follower = activations.get(layer)
        activation = None if follower is None else fusable_activation(follower)
        dtype = dtype_of(name)
        if PackedConv2d.supports(layer):
            replacement: Any = PackedConv2d(layer, activation, dtype, packed)  # type: ignore[arg-type]
        elif type(layer) is nn.Linear and run_counts[layer]:  # others are read by functions, as in attention
            replacement = CastInput(PackedLinear(layer.weight, layer.bias, activation, dtype, packed), dtype)
        else:
            continue
        network.set_submodule(name, replacement)
        if follower is not None:
            network.set_submodule(names[follower], nn.Identity())


def _activations_after(
    network: nn.Module, run: Callable[[], object]
) -> tuple[dict[nn.Module, nn.Module], Counter[nn.Module]]:
    """Return the activation that is the only reader of a layer's output, and how often modules run."""
    run_counts: Counter[nn.Module] = Counter()
    producers: dict[tuple[int, int], nn.Module] = {}
    outputs: list[Tensor] = []  # kept alive, so that ids stay unique
    followers: dict[nn.Module, nn.Module] = {}
    reads = ReadCounter()

    def after_layer(module: nn.Module, _: Any, output: Tensor) -> None:
        run_counts[module] += 1
        producers[identity(output)] = module
        outputs.append(reads.watch(output))

    def before_activation(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        run_counts[module] += 1
        layer = producers.get(identity(inputs[0]))
        if layer is not None:
            followers[layer] = module

    hooks = []
    for module in network.modules():
        if is_convolution(module) or type(module) is nn.Linear:
            hooks.append(module.register_forward_hook(after_layer))
        elif fusable_activation(module) is not None:
            hooks.append(module.register_forward_pre_hook(before_activation))
    with torch.inference_mode(False), torch.no_grad(), reads:  # inference tensors do not count writes
        run()
    for hook in hooks:
        hook.remove()
    read_once = {layer for output, layer in producers.items() if reads.counts[output] == 1}
    once = {
        layer: activation
        for layer, activation in followers.items()
        if layer in read_once and run_counts[layer] == run_counts[activation] == 1
    }
    return once, run_counts
