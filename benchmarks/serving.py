"""Compare the throughput of a server under concurrent requests with batched prediction in one process.

    python benchmarks/serving.py runs/cards DATA/valid --clients 16 --seconds 20

Both decode and resize the same files and run the model on batches of at most --batch. Server and clients are separate
processes, so that the clients' work does not count.
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


def in_process_throughput(model, files, batch, seconds):
    """Return the images per second of `predict` on batches of images in memory."""
    import io

    from PIL import Image

    def predict_batch(start):
        images = [Image.open(io.BytesIO(files[(start + i) % len(files)])) for i in range(batch)]
        model.predict(images, batch_size=batch)

    predict_batch(0)
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        predict_batch(done)
        done += batch
    return done / (time.perf_counter() - start)


def client(address, files, start, seconds, results):
    """Send requests one after another, each when the previous response has arrived."""
    import http.client

    connection = http.client.HTTPConnection(*address, timeout=120)
    connection.connect()
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    times, number = [], start
    end = time.perf_counter() + seconds
    while (request_start := time.perf_counter()) < end:
        connection.request("POST", "/v1/detect", files[number % len(files)], {"Content-Type": "image/jpeg"})
        response = connection.getresponse()
        body = response.read()
        assert response.status == 200, body
        times.append(time.perf_counter() - request_start)
        number += 1
    results.put(times)


def serve_and_measure(source, files, batch, clients, seconds, device):
    """Return requests per second, and the median and 95th percentile of the latency in seconds."""
    command = [sys.executable, "-m", "deformable_detr", "serve", str(source), "--port", "0",
               "--max-batch-size", str(batch), "--device", device]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = server.stdout.readline().split("http://")[1].split()[0].split(":")
        host_and_port = (address[0], int(address[1]))
        results = multiprocessing.Queue()
        for warm_up in (True, False):
            duration = 2.0 if warm_up else seconds
            workers = [
                multiprocessing.Process(target=client, args=(host_and_port, files, 7 * number, duration, results))
                for number in range(clients)
            ]
            start = time.perf_counter()
            for worker in workers:
                worker.start()
            times = [latency for _ in workers for latency in results.get()]
            for worker in workers:
                worker.join()
            elapsed = time.perf_counter() - start
        server.terminate()
        assert server.wait(60) == 0
    cuts = statistics.quantiles(times, n=20)
    return len(times) / elapsed, statistics.median(times), cuts[18]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path, help="folder of JPEGs; those with the size of the first one are used")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3, help="rounds; medians are reported")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    from PIL import Image

    from deformable_detr.detector import load_detector
    from deformable_detr.utils.process import retain_freed_memory

    retain_freed_memory()  # as the server does, which saves page faults
    paths = sorted(path for path in options.images.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
    sizes = {path: Image.open(path).size for path in paths[:200]}
    files = [path.read_bytes() for path, size in sizes.items() if size == sizes[paths[0]]][:64]
    model = load_detector(options.model, options.device)
    rounds = []
    for _ in range(options.rounds):  # interleaved, because the machine's speed varies
        local_rate = in_process_throughput(model, files, options.batch, options.seconds)
        rate, median, p95 = serve_and_measure(
            options.model, files, options.batch, options.clients, options.seconds, options.device
        )
        rounds.append((local_rate, rate, rate / local_rate, median, p95))
        print(f"in process {local_rate:.1f}/s, served {rate:.1f}/s ({rate / local_rate:.2f}), "
              f"median {median * 1000:.0f} ms, 95% under {p95 * 1000:.0f} ms")  # fmt: skip
    names = ("in_process", "served", "ratio", "median_seconds", "p95_seconds")
    medians = {name: statistics.median(values) for name, values in zip(names, zip(*rounds, strict=True), strict=True)}
    settings = {"clients": options.clients, "batch": options.batch, "images": len(files), "size": sizes[paths[0]],
             "processors": os.cpu_count()}  # fmt: skip
    print(json.dumps({**settings, **medians}))
    if options.json:
        options.json.write_text(json.dumps({**settings, **medians, "rounds": rounds}, indent=2) + "\n")


if __name__ == "__main__":
    main()
