"""A backbone in which every convolution does the addition and the activation that follow it."""

from __future__ import annotations

import logging
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ...utils.errors import first_line
from .onednn import Activation, PackedConv2d, activation_of

_log = logging.getLogger(__name__)
_SUMS = {operator.add, operator.iadd, torch.add}
_RELUS = {F.relu, torch.relu}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(True for _ in m.children())


def fused(body: nn.Module, pixels: Tensor, dtype: torch.dtype, packed: bool) -> nn.Module:
    """The body (batch norms folded, evaluation mode) as a graph of `PackedConv2d`s and what is left, in `dtype`.

    pixels: an input of it, which shows the sizes of what is added. A body whose forward pass depends on values or that
    hooks into its modules cannot be written as a graph: it stays as it is, in `dtype`.
    """
    from torch.fx.passes.shape_prop import ShapeProp

    try:
        module = fx.GraphModule(body, _Tracer().trace(body))
        with torch.no_grad():
            wanted = [x.float() for x in body(pixels)]
            ShapeProp(module).propagate(pixels)
            _fuse(module, dtype, packed)
            found = [x.float() for x in module(pixels.to(dtype))]
    except Exception as error:  # tracing meets whatever the backbone's code does with what are no tensors
        _log.info("the backbone stays as it is: %s", first_line(error))
        return body.to(dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    pairs = zip(wanted, found, strict=False)
    if len(wanted) == len(found) and all(a.shape == b.shape and _error(a, b) < tolerance for a, b in pairs):
        return module
    _log.warning("the backbone stays as it is: its graph computes something else")
    return body.to(dtype)


def _error(wanted: Tensor, found: Tensor) -> float:
    """The root mean square of the difference, relative to that of what was wanted; NaN for what is not finite."""
    return float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt().clamp(min=1e-12))


def _fuse(module: fx.GraphModule, dtype: torch.dtype, packed: bool) -> None:
    graph = module.graph
    modules: dict[str, Any] = dict(module.named_modules())

    def called(node: Any) -> Any:
        return modules.get(str(node.target)) if isinstance(node, fx.Node) and node.op == "call_module" else None

    for node in list(graph.nodes):
        if type(called(node)) in (nn.Identity, nn.Dropout):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)

    def activation_after(node: fx.Node) -> tuple[fx.Node | None, Activation | None]:
        """The only user of a node, where that is an activation that can be part of the call."""
        user = next(iter(node.users)) if len(node.users) == 1 else None
        if user is None:
            return None, None
        module_ = called(user)
        if module_ is not None:
            known = activation_of(module_)
        elif (user.op == "call_function" and user.target in _RELUS) or (user.op, user.target) == (
            "call_method",
            "relu",
        ):
            known = activation_of(nn.ReLU())
        else:
            known = None
        return (user, known) if known else (None, None)

    def sum_after(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
        """The only user of a node, where that adds another map of the same size, and that map."""
        user = next(iter(node.users)) if len(node.users) == 1 else None
        if user is None or user.op != "call_function" or user.target not in _SUMS or user.kwargs or len(user.args) != 2:
            return None, None
        other = user.args[1] if user.args[0] is node else user.args[0]
        if not isinstance(other, fx.Node) or other is node or _shape(other) is None or _shape(other) != _shape(node):
            return None, None
        return user, other

    order = {node: index for index, node in enumerate(graph.nodes)}
    counts = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    for node in list(graph.nodes):
        convolution = called(node)
        if not PackedConv2d.takes(convolution) or counts.count(str(node.target)) > 1:
            continue
        last, arguments = node, node.args[:1]
        added, other = sum_after(node)
        # Of two convolutions that are added, the later one does it: the other's result is there by then.
        if (
            added is not None
            and other is not None
            and (not PackedConv2d.takes(called(other)) or order[other] < order[node])
        ):
            last, arguments = added, (node.args[0], other)
        user, activation = activation_after(last)
        last = user or last
        modules[str(node.target)] = made = PackedConv2d(convolution, activation, dtype, packed)
        if other is not None and len(arguments) == 2:  # nobody reads the other map later, and it is no view of another
            before = all(order[reader] < order[added] for reader in other.users if reader is not added)
            made.in_place = before and isinstance(called(other), PackedConv2d | nn.MaxPool2d)
        module.set_submodule(str(node.target), made)
        with graph.inserting_before(last):
            call = graph.call_module(str(node.target), arguments)
        call.meta = dict(last.meta)
        order[call] = order[last]
        last.replace_all_uses_with(call)
        for old in (user, added if len(arguments) == 2 else None, node):
            if old is not None:
                graph.erase_node(old)
    graph.eliminate_dead_code()
    graph.lint()
    module.delete_all_unused_submodules()
    module.recompile()
    module.to(dtype)


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    shape = getattr(node.meta.get("tensor_meta"), "shape", None)
    return None if shape is None else tuple(shape)
