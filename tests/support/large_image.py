"""Write a BigTIFF of 30,000 × 20,000 pixels, and predict it; the second prints the number of objects and peak KiB."""

import resource
import sys

import numpy as np

from tests.support.blob_finder import GREEN, RED, BlobFinder, scattered

HEIGHT, WIDTH = 20_000, 30_000
OBJECTS = scattered(HEIGHT, WIDTH, 1500, sides=(20, 60), cell=500)


def bands(rows):
    for top in range(0, HEIGHT, rows):
        band = np.full((min(rows, HEIGHT - top), WIDTH, 3), 128, np.uint8)
        for number, (x1, y1, x2, y2) in enumerate(OBJECTS):
            band[max(y1 - top, 0) : max(y2 - top, 0), x1:x2] = GREEN if number % 2 else RED
        yield band


def tiles(side):
    for band in bands(side):
        for left in range(0, WIDTH, side):
            part, tile = band[:, left : left + side], np.zeros((side, side, 3), np.uint8)
            tile[: part.shape[0], : part.shape[1]] = part
            yield tile


def write(path, layout):
    import tifffile

    segments = {"tile": (512, 512)} if layout == "tiles" else {"rowsperstrip": 100}
    tifffile.imwrite(
        path, tiles(512) if layout == "tiles" else bands(100), shape=(HEIGHT, WIDTH, 3), dtype=np.uint8,
        bigtiff=True, photometric="rgb", compression="zlib", metadata=None, **segments,
    )  # fmt: skip


def predict(path):
    detections = BlobFinder(image_size=320).predict(path, tile=1024, batch_size=2)
    distances = np.abs(detections.boxes.numpy()[:, None] - OBJECTS).max(2)
    assert len(detections) == len(OBJECTS)
    assert sorted(distances.argmin(1)) == list(range(len(OBJECTS)))
    assert distances.min(1).max() <= 8
    print(len(detections), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


if __name__ == "__main__":
    {"write": write, "predict": predict}[sys.argv[1]](*sys.argv[2:])
