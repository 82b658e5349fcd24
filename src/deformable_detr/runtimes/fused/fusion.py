"""Fuse a backbone's convolutions with the addition and the activation that follow them."""

import logging
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ...utils.errors import first_line
from .onednn import Activation, PackedConv2d, fusable_activation

_log = logging.getLogger(__name__)
_ADDITIONS = {operator.add, operator.iadd, torch.add}
_RELUS = {F.relu, torch.relu}
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1}


class _LeafTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(True for _ in m.children())


def fuse_backbone(body: nn.Module, pixels: Tensor, dtype: torch.dtype, packed: bool) -> nn.Module:
    """Rewrite a backbone (evaluation mode, batch norms folded) as a graph of `PackedConv2d` and other operations.

    A backbone that cannot be traced, or whose graph returns other values for `pixels`, is returned unfused.
    """
    try:
        module = fx.GraphModule(body, _LeafTracer().trace(body))
        with torch.no_grad():
            expected = [x.float() for x in body(pixels)]
            _note_shapes(module, pixels)
            _GraphFuser(module, dtype, packed).run()
            outputs = [x.float() for x in module(pixels.to(dtype))]
    except Exception as error:  # tracing runs the backbone's own Python code on symbolic values
        _log.info("the backbone is not fused: %s", first_line(error))
        return body.to(dtype)
    pairs = zip(expected, outputs, strict=False)
    if len(expected) == len(outputs) and all(
        a.shape == b.shape and _relative_rmse(a, b) < _TOLERANCES[dtype] for a, b in pairs
    ):
        return module
    _log.warning("the backbone is not fused: its graph returns different values")
    return body.to(dtype)


def _note_shapes(module: fx.GraphModule, pixels: Tensor) -> None:
    """Note the shape of each node. `ShapeProp.run` would make a progress bar, which fixes how processes start."""
    from torch.fx.passes.shape_prop import ShapeProp

    notes = ShapeProp(module)
    notes.args_iter = iter([pixels])
    for node in module.graph.nodes:
        notes.env[node] = notes.run_node(node)


def _relative_rmse(expected: Tensor, output: Tensor) -> float:
    """Root mean square of the difference relative to that of the expected values; NaN if not finite."""
    return float((output - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp(min=1e-12))


class _GraphFuser:
    """One pass over a traced backbone that replaces convolutions, in place."""

    def __init__(self, module: fx.GraphModule, dtype: torch.dtype, packed: bool) -> None:
        self.module, self.graph = module, module.graph
        self.dtype, self.packed = dtype, packed
        self.modules: dict[str, Any] = dict(module.named_modules())

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if type(self._called(node)) in (nn.Identity, nn.Dropout):
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)
        self.order = {node: index for index, node in enumerate(self.graph.nodes)}
        calls = [str(node.target) for node in self.graph.nodes if node.op == "call_module"]
        for node in list(self.graph.nodes):
            if PackedConv2d.supports(self._called(node)) and calls.count(str(node.target)) == 1:
                self._fuse_convolution(node)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        self.module.delete_all_unused_submodules()
        self.module.recompile()
        self.module.to(self.dtype)

    def _fuse_convolution(self, node: fx.Node) -> None:
        """Replace a convolution, the addition after it and the activation after that by one call."""
        addition, other = self._addition_after(node)
        # If both summands are convolutions, the later one adds: the other result exists by then.
        if other is not None and PackedConv2d.supports(self._called(other)) and self.order[other] >= self.order[node]:
            addition = other = None
        last = addition or node
        activation_node, activation = self._activation_after(last)
        last = activation_node or last
        name = str(node.target)
        convolution = PackedConv2d(self._called(node), activation, self.dtype, self.packed)
        if other is not None and addition is not None:
            # In place only if `other` has no later reader and is not a view of another map.
            read_before = all(self.order[user] < self.order[addition] for user in other.users if user is not addition)
            convolution.in_place = read_before and isinstance(self._called(other), PackedConv2d | nn.MaxPool2d)
        self.modules[name] = convolution
        self.module.set_submodule(name, convolution)
        arguments = node.args[:1] if other is None else (node.args[0], other)
        with self.graph.inserting_before(last):
            call = self.graph.call_module(name, arguments)
        call.meta = dict(last.meta)
        self.order[call] = self.order[last]
        last.replace_all_uses_with(call)
        for replaced in (activation_node, addition, node):
            if replaced is not None:
                self.graph.erase_node(replaced)

    def _called(self, node: Any) -> Any:
        """The module that a node calls, or None."""
        is_call = isinstance(node, fx.Node) and node.op == "call_module"
        return self.modules.get(str(node.target)) if is_call else None

    def _activation_after(self, node: fx.Node) -> tuple[fx.Node | None, Activation | None]:
        """The only user of a node, if it is an activation that can be fused."""
        user = _only_user(node)
        is_relu = user is not None and (user.target in _RELUS or (user.op, user.target) == ("call_method", "relu"))
        activation = fusable_activation(nn.ReLU() if is_relu else self._called(user))
        return (user, activation) if activation else (None, None)

    def _addition_after(self, node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
        """The only user of a node, if it adds another map of the same size, and that map."""
        user = _only_user(node)
        if user is None or user.target not in _ADDITIONS or user.kwargs or len(user.args) != 2:
            return None, None
        other = user.args[1] if user.args[0] is node else user.args[0]
        if not isinstance(other, fx.Node) or other is node or _shape(other) is None or _shape(other) != _shape(node):
            return None, None
        return user, other


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    shape = getattr(node.meta.get("tensor_meta"), "shape", None)
    return None if shape is None else tuple(shape)
