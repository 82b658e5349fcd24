"""Request parameters and response bodies, as validated and as described by OpenAPI."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from ..explanation import Trace
from ..explanation.explanation import DecoderLayerSampling
from ..structures import Detections
from ..utils.tiles import DEFAULT_OVERLAP, MAX_OVERLAP, MIN_TILE, Tiling, check_tiling

_BOX = "x1, y1, x2, y2 in pixels of the upright image"
_TILE = "side in pixels of the tiles that larger images are cut into; top_k applies to each; default: the server's"
_OVERLAP = "minimum overlap of neighboring tiles as a share of their side; only with tile"
Point = Annotated[list[float], Field(min_length=2, max_length=2, description="x, y in pixels of the upright image")]
Box = Annotated[list[float], Field(min_length=4, max_length=4, description=_BOX)]
Score = Annotated[float, Field(ge=0, le=1)]
Side = Annotated[int, Field(ge=1)]


class DetectParameters(BaseModel):
    """Unknown parameters, such as a `url`, are refused instead of ignored."""

    model_config = ConfigDict(extra="forbid")
    threshold: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, description="minimum score")] = 0.5
    top_k: Annotated[int, Field(ge=1, le=1000, description="maximum detections per image")] = 100


class TileParameters(DetectParameters):
    tile: Annotated[int | None, Field(ge=MIN_TILE, le=8192, description=_TILE)] = None
    tile_overlap: Annotated[float, Field(ge=0, le=MAX_OVERLAP, allow_inf_nan=False, description=_OVERLAP)] = (
        DEFAULT_OVERLAP
    )

    @property
    def tiling(self) -> Tiling | None:
        """The tiles that the client asks for."""
        return check_tiling(self.tile, self.tile_overlap)


class ExplainParameters(DetectParameters):
    top_k: Annotated[int, Field(ge=1, le=50, description="maximum detections to explain")] = 10


class Mask(BaseModel):
    """COCO's compressed RLE."""

    size: Annotated[list[Side], Field(min_length=2, max_length=2, description="height, width of the upright image")]
    counts: str


class Detection(BaseModel):
    box: Box
    score: Score
    label: Annotated[int, Field(ge=0, description="index of the class in the model")]
    category_id: Annotated[int, Field(description="id of the class in the dataset")]
    name: str
    mask: Annotated[Mask | None, Field(description="only of models with masks, and never null")] = None


class _Image(BaseModel):
    name: Annotated[str | None, Field(description="file name sent by the client, or null")]
    height: Side
    width: Side


class DetectedImage(_Image):
    detections: Annotated[list[Detection], Field(description="best first")]


class Detected(BaseModel):
    images: Annotated[list[DetectedImage], Field(description="in the order of the request")]


class Layer(BaseModel):
    reference_point: Point
    reference_box: Annotated[Box | None, Field(description="box that the layer starts from, or null")]
    box: Annotated[Box, Field(description="box that the layer predicts; it may extend beyond the image")]
    score: Annotated[Score, Field(description="score of the detection's class after the layer")]
    share_inside_box: Annotated[float, Field(description="share of the attention weight inside the detected box")]
    points: Annotated[
        list[Annotated[list[float], Field(min_length=5, max_length=5)]],
        Field(description="sampling points: x, y, weight, level, head"),
    ]


class ExplainedDetection(Detection):
    layers: Annotated[list[Layer], Field(description="decoder layers, first to last")]


class Explained(_Image):
    levels: Annotated[list[list[int]], Field(description="height and width of the feature map of each level")]
    heads: int
    detections: list[ExplainedDetection]


class Class(BaseModel):
    label: int
    category_id: int
    name: str


class RequestLimits(BaseModel):
    body_bytes: Annotated[int, Field(description="per request")]
    pixels: Annotated[int, Field(description="per image")]
    images: Annotated[int, Field(description="per request")]
    tiles: Annotated[int, Field(description="per image")]
    timeout: Annotated[float, Field(description="seconds from the end of the request to the response")]


class Model(BaseModel):
    name: str
    version: Annotated[str, Field(description="version of deformable-detr")]
    classes: list[Class]
    resize: Annotated[str, Field(description="shortest_edge keeps the aspect ratio; fixed stretches images")]
    short_side: Annotated[int, Field(description="pixels that images are resized to")]
    long_side: int
    explains: Annotated[bool, Field(description="whether /v1/explain is available")]
    formats: list[str]
    limits: RequestLimits


class State(BaseModel):
    status: str


class Problem(BaseModel):
    detail: Annotated[str, Field(description="what is wrong, in one line")]


def detected_image(detections: Detections, name: str | None) -> dict[str, Any]:
    """Return the `DetectedImage` of an image."""
    result = detections.to_dict()
    del result["image"]
    return {"name": name, **result}


def explained_image(traced: Trace, name: str | None) -> dict[str, Any]:
    """Return the `Explained` of an image."""
    detections = []
    for index, record in enumerate(traced.detections.to_dict()["detections"]):
        explanation = traced.detection(index)
        layers = zip(explanation.layer_summaries(), explanation.layers, strict=True)
        detections.append({**record, "layers": [{**summary, "points": _points(layer)} for summary, layer in layers]})
    height, width = traced.image_size
    return {
        "name": name,
        "height": height,
        "width": width,
        "levels": [list(shape) for shape in traced.spatial_shapes],
        "heads": traced.outputs["decoder_attention"][0].weights.shape[2],
        "detections": detections,
    }


def _points(layer: DecoderLayerSampling) -> list[list[float]]:
    """[x, y, weight, level, head] of each sampling point, in the order M, L, P, without those that fill up a level."""
    used = layer.weights > 0
    heads, levels, _ = used.nonzero().T.tolist()
    xs, ys = layer.locations[used].clamp(-1e6, 1e6).T.tolist()
    rows = zip(xs, ys, layer.weights[used].tolist(), levels, heads, strict=True)
    return [[round(x, 1), round(y, 1), round(weight, 5), level, head] for x, y, weight, level, head in rows]
