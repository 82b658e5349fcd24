"""Request parameters and response bodies, as validated and as described by OpenAPI."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_DETECTIONS, MAX_EXPLAINED = 1000, 50

_BOX = "x1, y1, x2, y2 in pixels of the upright image"
Point = Annotated[list[float], Field(min_length=2, max_length=2, description="x, y in pixels of the upright image")]
Box = Annotated[list[float], Field(min_length=4, max_length=4, description=_BOX)]
Score = Annotated[float, Field(ge=0, le=1)]
Threshold = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, description="minimum score of a detection")]
ImageName = Annotated[str | None, Field(description="file name sent by the client, or null")]
Side = Annotated[int, Field(ge=1)]


class _Parameters(BaseModel):
    """Unknown parameters, such as a `url`, are refused instead of ignored."""

    model_config = ConfigDict(extra="forbid")


class DetectParameters(_Parameters):
    threshold: Threshold = 0.5
    top_k: Annotated[int, Field(ge=1, le=MAX_DETECTIONS, description="maximum detections per image")] = 100


class ExplainParameters(_Parameters):
    threshold: Threshold = 0.5
    top_k: Annotated[int, Field(ge=1, le=MAX_EXPLAINED, description="maximum detections to explain")] = 10


class Detection(BaseModel):
    box: Box
    score: Score
    label: Annotated[int, Field(ge=0, description="index of the class in the model")]
    category_id: Annotated[int, Field(description="id of the class in the dataset")]
    name: str


class DetectedImage(BaseModel):
    name: ImageName
    height: Side
    width: Side
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


class Explained(BaseModel):
    name: ImageName
    height: Side
    width: Side
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
    timeout: Annotated[float, Field(description="seconds from the end of the request to the response")]


class Model(BaseModel):
    name: str
    version: Annotated[str, Field(description="version of deformable-detr")]
    classes: list[Class]
    short_side: Annotated[int, Field(description="pixels that images are resized to")]
    long_side: int
    explains: Annotated[bool, Field(description="whether /v1/explain is available")]
    formats: list[str]
    limits: RequestLimits


class State(BaseModel):
    status: str


class Problem(BaseModel):
    detail: Annotated[str, Field(description="what is wrong, in one line")]
