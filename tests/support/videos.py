"""Small videos, and a detector that finds the red square in them."""

import json

import numpy as np

from deformable_detr.predict.predictor import predict
from tests.support.red_box import RedBoxFinder


class Finder(RedBoxFinder):
    def predict(self, source, threshold=0.5):
        return predict(self, source, threshold)


def write_video(path, frames=23, size=(96, 64), rate=10, movflags=""):
    """Write a video in which a red square moves to the right; the brightness encodes the frame number."""
    import av

    with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for number in range(frames):
            pixels = np.full((size[1], size[0], 3), 30 + 2 * number % 60, dtype=np.uint8)
            pixels[20:44, 4 + number : 28 + number] = (255, 0, 0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
