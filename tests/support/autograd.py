"""Gradients, comparison at float64 precision, and the bytes that autograd saves."""

import torch

EXACT = 1e-10


def gradients(out, *leaves):
    """Of a sum with weights that differ."""
    return torch.autograd.grad((out * torch.linspace(0.5, 2, out.numel(), dtype=out.dtype).view_as(out)).sum(), leaves)


def near(first, second):
    return all(a.shape == b.shape and bool((a - b).abs().max() <= EXACT) for a, b in zip(first, second, strict=True))


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that a forward pass keeps for the backward pass beside what the caller already has."""

    def __init__(self, *own):
        self.places, self.bytes = {tensor.untyped_storage().data_ptr() for tensor in own}, 0
        super().__init__(self.pack, lambda tensor: tensor)

    def __enter__(self):
        super().__enter__()
        return self

    def pack(self, tensor):
        place = tensor.untyped_storage().data_ptr()
        if place not in self.places:
            self.places.add(place)
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor
