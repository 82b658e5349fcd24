"""A server in a thread of the test process, and images to send."""

import io
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import numpy as np
import torch
from PIL import Image

from deformable_detr.serve.app import create_app
from deformable_detr.serve.engine import Engine
from deformable_detr.serve.limits import Limits
from deformable_detr.serve.server import Server, listen
from tests.support.models import tiny


def small_model(**changes):
    """Return a model for 64-pixel images with 12 queries and scores around 0.5."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tiny(image_size=64, max_size=128, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "class" in name and name.endswith("bias"):
                parameter.zero_()
    return model


@contextmanager
def running_server(model=None, token=None, origins=(), tiling=None, **limits):
    """Yield an httpx client of a running server, with attributes `server`, `engine` and `port`."""
    limits = Limits(**{"shutdown_delay": 0.0, **limits})
    engine = Engine(small_model() if model is None else model, limits, tiling=tiling)
    server = Server(create_app(engine, token, "tiny", origins), engine, "serving")
    listener = listen("127.0.0.1", 0, token)
    port = listener.getsockname()[1]
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60, trust_env=False) as client:
            client.server, client.engine, client.port = server, engine, port
            yield client
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def wait_until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


def delayed(model, seconds):
    """Delay each forward pass of the model by some seconds."""
    model.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    return model


def pixels(height=48, width=64, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height)))


def encode_image(kind="PNG", height=48, width=64, seed=0, **options):
    """Return the bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels(height, width, seed)).save(file, kind, **options)
    return file.getvalue()


def write_photo(folder, name="a photo.png", seed=0):
    """Write an image of 128 × 96 pixels and return its path."""
    path = folder / name
    path.write_bytes(encode_image("PNG", 96, 128, seed=seed))
    return path


def multipart(*images):
    return [("images", (f"{number}.png", data, "image/png")) for number, data in enumerate(images)]


def post_image(client, data, path="/v1/detect", kind="image/png", **options):
    return client.post(path, content=data, headers={"Content-Type": kind, **options.pop("headers", {})}, **options)


class ServerProcess:
    """`deformable-detr serve` in a separate process."""

    def __init__(self, model, *options, **environment):
        command = [sys.executable, "-m", "deformable_detr", "serve", str(model), "--port", "0", *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
        line = self.process.stdout.readline()
        assert line.startswith("serving "), self.process.stderr.read()
        self.address = line.split(" at ")[1].split()[0]

    def signal(self, number):
        self.process.send_signal(number)

    def wait(self):
        """Return exit code and standard error."""
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors
