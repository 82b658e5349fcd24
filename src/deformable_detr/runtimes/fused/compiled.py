"""Few shapes, each computed by code or a graph made for it: torch.compile, buckets of sizes, CUDA graphs."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import fields, replace
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from .detector import OptimizedDetector
from .layout import PositionalInputs

GRAPHS = 8  # CUDA graphs that are kept: each holds the memory of a forward pass


def specialize(detector: OptimizedDetector, compile: bool, bucket: int | None) -> None:
    """Gives the detector its compiled parts and the padding to buckets, in place.

    compile: the two halves of the model are compiled with sizes left open, after the first call for each kind of
        batch. bucket: height and width become multiples of it; what is added is padding, as in a batch with a larger
        image, and group normalization sees it: scores may differ in the second decimal. On a GPU, with a bucket,
        each size of batch and canvas is one CUDA graph.
    """
    detector.bucket = bucket
    if compile:
        for part in (detector.encoder, detector.proposals if detector.config.two_stage else None):
            if part is not None:
                part.rows = None  # the compiler does its own blocking
        detector.features = torch.compile(detector.features, dynamic=True)
        detector.detect = torch.compile(detector.detect, dynamic=True)
    if bucket is not None and detector.pixel_mean.is_cuda:
        detector.graphs = CudaGraphs(detector)


class CudaGraphs:
    """The detector's two halves as one CUDA graph for each size of batch and canvas; the latest are kept.

    One call at a time: the graphs' tensors are shared. Not run on a GPU yet.
    """

    def __init__(self, detector: OptimizedDetector) -> None:
        self.detector = detector
        self.graphs: OrderedDict[Any, tuple[Any, Tensor, PositionalInputs, tuple[Tensor, Tensor]]] = OrderedDict()
        self._lock = Lock()

    @torch.inference_mode()  # tensors of a graph that `predict` captured cannot be written outside of it
    def __call__(self, pixels: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits and boxes, copied out of the graph's own memory."""
        with self._lock:
            return self._replayed(pixels, padding_mask)

    def _replayed(self, pixels: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        detector = self.detector
        canvas = (pixels.shape[2], pixels.shape[3])
        key = (pixels.shape, padding_mask is None)
        if key not in self.graphs:
            self.graphs[key] = self._captured(pixels, padding_mask)
            while len(self.graphs) > GRAPHS:
                self.graphs.popitem(last=False)
        self.graphs.move_to_end(key)
        graph, inputs, layout, outputs = self.graphs[key]
        inputs.copy_(pixels)
        wanted = detector.layouts(canvas, layout.spatial_shapes, padding_mask)
        for field in fields(PositionalInputs):
            place, value = getattr(layout, field.name), getattr(wanted, field.name)
            if isinstance(place, Tensor):
                place.copy_(value)
        graph.replay()
        return outputs[0].clone(), outputs[1].clone()

    def _captured(self, pixels: Tensor, padding_mask: Tensor | None) -> tuple[Any, Tensor, PositionalInputs, Any]:
        detector = self.detector
        inputs = pixels.clone(memory_format=torch.channels_last)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries choose their ways and allocate before the capture
            for _ in range(3):
                maps = detector.features(inputs)
                shapes = tuple((x.shape[1], x.shape[2]) for x in maps)
                layout = detector.layouts((pixels.shape[2], pixels.shape[3]), shapes, padding_mask)
                changes = {f.name: getattr(layout, f.name) for f in fields(PositionalInputs)}
                layout = replace(layout, **{k: v.clone() for k, v in changes.items() if isinstance(v, Tensor)})
                detector.detect(maps, layout)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = detector.detect(detector.features(inputs), layout)
        return graph, inputs, layout, outputs
