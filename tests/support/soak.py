"""Load-test a server: `python -m tests.support.soak --requests 100000 --clients 32`; --model tests a real model.

30% of the requests are invalid. Responses to valid requests must equal serial prediction, and invalid requests must get
their 4xx status. No 5xx except 503 may occur. After the first tenth, memory may grow by at most 5%.
"""

import argparse
import io
import os
import random
import socket
import sys
import threading
import time
import zlib
from collections import Counter
from pathlib import Path

import httpx
import torch
from PIL import Image

from tests.support.server import encode_image, running_server, small_model

SHAPES = ((48, 64), (64, 48), (64, 64), (90, 120))
_HEAD = b"IHDR\0\1\0\0\0\1\0\0\x08\2\0\0\0"  # 65536 × 65536 pixels
HUGE = b"\x89PNG\r\n\x1a\n\0\0\0\r" + _HEAD + zlib.crc32(_HEAD).to_bytes(4, "big") + b"\0\0\0\x09IDAT" + bytes(13)
ATOL = 1e-4  # relative to the image's longer side for boxes; absolute for scores


class Soak:
    """counts: responses per (kind of request, status). problems: unexpected responses."""

    def __init__(self, client, model, requests, clients):
        self.client, self.requests, self.clients = client, requests, clients
        self.images = [
            encode_image(kind, *shape, seed=seed)
            for seed, (kind, shape) in enumerate((kind, shape) for kind in ("PNG", "JPEG", "WEBP") for shape in SHAPES)
        ]
        self.expected = [model.predict(Image.open(io.BytesIO(data)), threshold=0.1, top_k=20) for data in self.images]
        self.counts, self.problems, self.memory = Counter(), [], []
        self.done, self.lock = 0, threading.Lock()

    def run(self):
        threads = [threading.Thread(target=self._client, args=(seed,)) for seed in range(self.clients)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - start

    def growth(self):
        """Return the relative memory growth from the end of the first tenth to the last tenth."""
        tenth = max(1, len(self.memory) // 10)
        return sum(self.memory[-tenth:]) / tenth / max(self.memory[tenth : 2 * tenth]) - 1

    def _client(self, seed):
        draw = random.Random(seed)
        with httpx.Client(base_url=self.client.base_url, timeout=120, trust_env=False) as client:
            while True:
                with self.lock:
                    if self.done >= self.requests or len(self.problems) > 10:
                        return
                    self.done += 1
                    if self.done % max(1, self.requests // 200) == 0:
                        self.memory.append(resident_memory())
                try:
                    if draw.random() < 0.3:
                        self._bad(client, draw)
                    else:
                        self._good(client, draw)
                except httpx.HTTPError as error:
                    self.problems.append(repr(error))

    def _good(self, client, draw):
        indices = [draw.randrange(len(self.images)) for _ in range(draw.choice((1, 1, 1, 3)))]
        query = {"threshold": 0.1, "top_k": 20}
        if len(indices) == 1:
            response = client.post("/v1/detect", params=query, content=self.images[indices[0]],
                                   headers={"Content-Type": "image/png"})  # fmt: skip
        else:
            files = [("images", (f"{index}", self.images[index], "image/png")) for index in indices]
            response = client.post("/v1/detect", params=query, files=files)
        self._note("good", response, (200,))
        if response.status_code == 200:
            for answer, index in zip(response.json()["images"], indices, strict=True):
                if not equal(answer, self.expected[index]):
                    self.problems.append(f"differs from serial prediction: {answer}")

    def _bad(self, client, draw):
        data = draw.choice(self.images)
        image = {"Content-Type": "image/png"}
        kind = draw.choice(("cut", "noise", "json", "path", "query", "part", "form", "left", "large"))
        if kind == "cut":
            self._note(kind, client.post("/v1/detect", content=data[: len(data) // 2], headers=image), (422, 415))
        elif kind == "noise":
            self._note(kind, client.post("/v1/detect", content=draw.randbytes(3000), headers=image), (415, 422))
        elif kind == "json":
            self._note(kind, client.post("/v1/detect", json={"url": "http://127.0.0.1/"}), (415,))
        elif kind == "path":
            self._note(kind, client.get("/../../etc/passwd"), (404,))
        elif kind == "query":
            self._note(kind, client.post("/v1/detect?top_k=x", content=data, headers=image), (422,))
        elif kind == "part":
            self._note(kind, client.post("/v1/detect", files={"url": ("a", b"b")}), (422,))
        elif kind == "form":
            headers = {"Content-Type": "multipart/form-data; boundary=x"}
            self._note(kind, client.post("/v1/detect", content=b"--x\r\n" + data, headers=headers), (400,))
        elif kind == "large":
            self._note(kind, client.post("/v1/detect", content=HUGE, headers=image), (413,))
        else:  # disconnects in the middle of a request
            with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
                connection.sendall(b"POST /v1/detect HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
                                   b"Content-Length: %d\r\n\r\n" % len(data) + data[: len(data) // 2])  # fmt: skip
            self.counts[kind, 0] += 1

    def _note(self, kind, response, expected):
        self.counts[kind, response.status_code] += 1
        # A loaded server may respond with 503.
        if response.status_code not in (*expected, 503):
            self.problems.append(f"{kind}: {response.status_code} {response.text[:200]}")


def equal(answer, expected):
    """Return whether a response equals the detections."""
    if [detection["label"] for detection in answer["detections"]] != expected.labels.tolist():
        return False
    side = max(expected.image_size)
    boxes = torch.tensor([detection["box"] for detection in answer["detections"]]).view(-1, 4)
    scores = torch.tensor([detection["score"] for detection in answer["detections"]])
    return bool(
        ((boxes - expected.boxes).abs() <= ATOL * side).all() and ((scores - expected.scores).abs() <= ATOL).all()
    )


def resident_memory():
    """Return the resident memory of this process, server and clients, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--model", help="folder of a model (default: a tiny one with random weights)")
    options = parser.parse_args()
    if options.model:
        from deformable_detr.detector import load_detector

        model = load_detector(options.model)
    else:
        model = small_model()
    with running_server(model) as client:
        soak = Soak(client, model, options.requests, options.clients)
        seconds = soak.run()
        print(f"{options.requests} requests in {seconds:.0f} s, {options.requests / seconds:.0f} per second")
        for (kind, status), count in sorted(soak.counts.items()):
            print(f"{kind:6} {status or 'left'}: {count}")
        growth = soak.growth()
        print(f"memory: {soak.memory[-1] / 1e6:.0f} MB, {growth:+.1%} after the first tenth")
    for problem in soak.problems:
        print(problem, file=sys.stderr)
    sys.exit(bool(soak.problems) or growth > 0.05)


if __name__ == "__main__":
    main()
