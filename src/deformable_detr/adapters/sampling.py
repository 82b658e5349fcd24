"""Where the decoder of transformers' detectors samples, and what each of its layers predicts."""

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..model.attention import SamplingDetails
from ..ops.accelerate import observe


def run_recorded(network: nn.Module, pixels: Tensor, mask: Tensor | None) -> dict[str, Any]:
    """Run a network of one of the `FAMILIES` and return the outputs of `Detector.forward` with `return_attention`.

    A copy runs that shares all parameters and buffers, so the network stays as it is for others.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    recorder: Any = copy.deepcopy(network, shared)
    decoder = recorder.model.decoder
    if hasattr(decoder, "eval_idx"):  # D-FINE, DEIMv2: the detections are those of this layer, and
        decoder.layers = decoder.layers[: decoder.eval_idx + 1]
        decoder.training = True  # in evaluation mode, this very module skips the class heads of the other layers
    sampled: list[Any] = []
    references: list[Tensor] = []
    observe(recorder.model, lambda *sampling: sampled.append(sampling))
    for module in decoder.modules():
        if hasattr(module, "sampling_offsets"):
            module.register_forward_pre_hook(
                lambda _, __, inputs: references.append(inputs["reference_points"][:, :, 0]), with_kwargs=True
            )
    outputs = recorder(pixel_values=pixels, pixel_mask=mask)
    layers = len(decoder.layers)
    encoder, sampled = sampled[:-layers], sampled[-layers:]
    if hasattr(outputs, "intermediate_logits"):  # D-FINE and DEIMv2 put a prediction before that of the first layer
        logits = outputs.intermediate_logits[:, -layers:].transpose(0, 1)
        boxes = outputs.intermediate_reference_points[:, -layers:].transpose(0, 1)
    elif isinstance(recorder.class_embed, nn.ModuleList):  # Deformable DETR: heads per layer
        states, refined = outputs.intermediate_hidden_states.unbind(1), outputs.intermediate_reference_points.unbind(1)
        references = [outputs.init_reference_points, *refined[:-1]]  # those of the attention are scaled to padded maps
        logits = torch.stack([head(state) for head, state in zip(recorder.class_embed, states, strict=False)])
        deltas = [head(state) for head, state in zip(recorder.bbox_embed, states, strict=False)]
        boxes = torch.stack([_refine(recorder, *pair) for pair in zip(references, deltas, strict=True)])
    else:  # LW-DETR, RF-DETR: the same heads for all layers, which all start from the proposals
        states, proposals = outputs.intermediate_hidden_states, outputs.intermediate_reference_points[-1]
        refine_bboxes = sys.modules[type(network).__module__].refine_bboxes
        logits = recorder.class_embed(states)
        boxes = refine_bboxes(proposals, recorder.bbox_embed(states))
        references = [proposals] * layers  # those of the attention are scaled to padded maps
    return {
        "pred_logits": outputs.logits,
        "pred_boxes": outputs.pred_boxes,
        "layer_logits": logits,
        "layer_boxes": boxes,
        "encoder_attention": [SamplingDetails(locations, weights) for _, locations, weights in encoder],
        "decoder_attention": [SamplingDetails(locations, weights) for _, locations, weights in sampled],
        "decoder_reference_points": references,
        "spatial_shapes": sampled[0][0],
    }


def _refine(network: nn.Module, reference: Tensor, delta: Tensor) -> Tensor:
    """Return the boxes (B, Q, 4) of Deformable DETR for references (B, Q, 2 or 4) and the outputs of a box head."""
    offset = sys.modules[type(network).__module__].inverse_sigmoid(reference)
    size = offset.shape[-1]
    return torch.cat((delta[..., :size] + offset, delta[..., size:]), dim=-1).sigmoid()
