"""How much of a model's speed its server keeps: requests of many clients against batched prediction in process.

    python benchmarks/serving.py runs/cards DATA/valid --clients 16 --seconds 20

Both read the same files, decode and resize them and run the model on batches of at most --batch. The server is a
process of its own; so are the clients, for their work should not count as its.
"""

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path


def in_process(model, files, batch, seconds):
    """Images a second of `predict` on batches, read from memory as the server reads them."""
    import io

    from PIL import Image

    def once(start):
        chosen = [Image.open(io.BytesIO(files[(start + i) % len(files)])) for i in range(batch)]
        model.predict(chosen, batch_size=batch)

    once(0)
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        once(done)
        done += batch
    return done / (time.perf_counter() - began)


def client(address, files, start, seconds, results):
    """One client that sends a request when it has the answer to the last."""
    import http.client

    connection = http.client.HTTPConnection(*address, timeout=120)
    connection.connect()
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    times, number = [], start
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        connection.request("POST", "/v1/detect", files[number % len(files)], {"Content-Type": "image/jpeg"})
        response = connection.getresponse()
        body = response.read()
        assert response.status == 200, body
        times.append(time.perf_counter() - began)
        number += 1
    results.put(times)


def served(source, files, batch, clients, seconds, device):
    """Requests a second, and the median and 95th percentile of their seconds."""
    command = [sys.executable, "-m", "deformable_detr", "serve", str(source), "--port", "0",
               "--max-batch-size", str(batch), "--device", device]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = server.stdout.readline().split("http://")[1].split()[0].split(":")
        place = (address[0], int(address[1]))
        results = multiprocessing.Queue()
        for warm in (True, False):
            length = 2.0 if warm else seconds
            workers = [
                multiprocessing.Process(target=client, args=(place, files, 7 * number, length, results))
                for number in range(clients)
            ]
            began = time.perf_counter()
            for worker in workers:
                worker.start()
            times = [one for _ in workers for one in results.get()]
            for worker in workers:
                worker.join()
            took = time.perf_counter() - began
        server.terminate()
        assert server.wait(60) == 0
    cuts = statistics.quantiles(times, n=20)
    return len(times) / took, statistics.median(times), cuts[18]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path, help="folder of JPEGs; those of the first one's size are taken")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3, help="the medians count")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    from PIL import Image

    from deformable_detr.detector import load_detector
    from deformable_detr.utils.process import retain_freed_memory

    retain_freed_memory()  # as the server does, or it would win by page faults
    paths = sorted(path for path in options.images.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
    sizes = {path: Image.open(path).size for path in paths[:200]}
    files = [path.read_bytes() for path, size in sizes.items() if size == sizes[paths[0]]][:64]
    model = load_detector(options.model, options.device)
    rounds = []
    for _ in range(options.rounds):  # by turns, for the machine's mood changes
        alone = in_process(model, files, options.batch, options.seconds)
        rate, median, slowest = served(
            options.model, files, options.batch, options.clients, options.seconds, options.device
        )
        rounds.append((alone, rate, rate / alone, median, slowest))
        print(f"in process {alone:.1f}/s, served {rate:.1f}/s ({rate / alone:.2f}), "
              f"median {median * 1000:.0f} ms, 95% under {slowest * 1000:.0f} ms")  # fmt: skip
    names = ("in_process", "served", "ratio", "median_seconds", "p95_seconds")
    figures = {name: statistics.median(values) for name, values in zip(names, zip(*rounds, strict=True), strict=True)}
    facts = {"clients": options.clients, "batch": options.batch, "images": len(files), "size": sizes[paths[0]],
             "processors": os.cpu_count()}  # fmt: skip
    print(json.dumps({**facts, **figures}))
    if options.json:
        options.json.write_text(json.dumps({**facts, **figures, "rounds": rounds}, indent=2) + "\n")


if __name__ == "__main__":
    main()
