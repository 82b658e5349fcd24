"""Gradient helpers: comparison at float64 precision and the bytes that autograd saves."""

import torch

EXACT = 1e-10


def gradients(out, *leaves):
    """Return the gradients of a weighted sum of `out`; distinct weights expose permuted elements."""
    return torch.autograd.grad((out * torch.linspace(0.5, 2, out.numel(), dtype=out.dtype).view_as(out)).sum(), leaves)


def all_close(first, second):
    return all(a.shape == b.shape and bool((a - b).abs().max() <= EXACT) for a, b in zip(first, second, strict=True))


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Count the bytes that a forward pass saves for backward, except the given tensors."""

    def __init__(self, *excluded):
        self.storages, self.bytes = {tensor.untyped_storage().data_ptr() for tensor in excluded}, 0
        super().__init__(self.pack, lambda tensor: tensor)

    def __enter__(self):
        super().__enter__()
        return self

    def pack(self, tensor):
        storage = tensor.untyped_storage().data_ptr()
        if storage not in self.storages:
            self.storages.add(storage)
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor
