"""What goes over the wire: parameters as they are checked, answers as OpenAPI describes them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Point = Annotated[list[float], Field(min_length=2, max_length=2, description="x, y in pixels of the upright image")]
_BOX = "x1, y1, x2, y2 in pixels of the upright image"
Box = Annotated[list[float], Field(min_length=4, max_length=4, description=_BOX)]
Score = Annotated[float, Field(ge=0, le=1)]
MOST_DETECTIONS, MOST_EXPLAINED = 1000, 50


class _Parameters(BaseModel):
    """Unknown ones are refused, so that nobody thinks a `url` was heard."""

    model_config = ConfigDict(extra="forbid")


class DetectParameters(_Parameters):
    threshold: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, description="lowest score of a detection")] = 0.5
    top_k: Annotated[int, Field(ge=1, le=MOST_DETECTIONS, description="most detections in an image")] = 100


class ExplainParameters(_Parameters):
    threshold: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, description="lowest score of a detection")] = 0.5
    top_k: Annotated[int, Field(ge=1, le=MOST_EXPLAINED, description="most detections that are explained")] = 10


class Detection(BaseModel):
    box: Box
    score: Score
    label: Annotated[int, Field(ge=0, description="position of the class in the model's list")]
    category_id: Annotated[int, Field(description="the data set's own id of the class")]
    name: str


class DetectedImage(BaseModel):
    name: Annotated[str | None, Field(description="file name that the client gave, or null")]
    height: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=1)]
    detections: Annotated[list[Detection], Field(description="best first")]


class Detected(BaseModel):
    images: Annotated[list[DetectedImage], Field(description="in the order of the request")]


class Layer(BaseModel):
    reference_point: Point
    reference_box: Annotated[Box | None, Field(description="box that the layer started from, or null")]
    box: Annotated[Box, Field(description="box that the layer gave; it may reach out of the image")]
    score: Annotated[Score, Field(description="of the detection's class after the layer")]
    share_inside_box: Annotated[float, Field(description="part of the attention weight inside the detected box")]
    points: Annotated[
        list[Annotated[list[float], Field(min_length=5, max_length=5)]],
        Field(description="sampling points: x, y, weight, level, head"),
    ]


class ExplainedDetection(Detection):
    layers: Annotated[list[Layer], Field(description="of the decoder, the first to the last")]


class Explained(BaseModel):
    name: Annotated[str | None, Field(description="file name that the client gave, or null")]
    height: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=1)]
    levels: Annotated[list[list[int]], Field(description="height and width of each level's map")]
    heads: int
    detections: list[ExplainedDetection]


class Class(BaseModel):
    label: int
    category_id: int
    name: str


class Bounds(BaseModel):
    body_bytes: Annotated[int, Field(description="of a request")]
    pixels: Annotated[int, Field(description="of an image")]
    images: Annotated[int, Field(description="in a request")]
    deadline: Annotated[float, Field(description="seconds to the answer")]


class Model(BaseModel):
    name: str
    version: Annotated[str, Field(description="of the package")]
    classes: list[Class]
    short_side: Annotated[int, Field(description="pixels that images are resized to")]
    long_side: int
    explains: Annotated[bool, Field(description="whether there is /v1/explain")]
    formats: list[str]
    limits: Bounds


class State(BaseModel):
    status: str


class Problem(BaseModel):
    detail: Annotated[str, Field(description="one line that says what is wrong")]
