"""A model on its way out: convert, export, serve, predict over data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from .app import app
from .options import Device, Flag, at_least_one


@app.command
def convert(source: str, *, to: Literal["native", "transformers", "official"], out: Path) -> None:
    """Write a model in another format, for the tools that read it.

    Args:
        source: A run or model folder, a transformers folder or hub id, or an official .pth.
        to: native, transformers (its Auto classes) or official (the paper authors' code).
        out: Folder for the model; it must not hold one.
    """
    from ..weights.convert import convert as write

    for line in write(source, to, out):
        print(line)


@app.command
def export(
    model: Path,
    *,
    to: Literal["onnx", "openvino", "torch"],
    out: Path,
    precision: Literal["fp32", "fp16", "int8"] = "fp32",
    image_size: str = "dynamic",
    post_processing: Annotated[bool, Flag] = False,
    sampling: Literal["grid_sample", "gather"] = "grid_sample",
    data: Path | None = None,
    split: str = "val",
    limit: int | None = None,
) -> None:
    """Write a model as a file for another runtime, verified against the model before it is put in place.

    Args:
        model: A run or model folder, a transformers folder or hub id, or an official .pth.
        to: onnx, openvino (.xml with a .bin beside it) or torch (.pt2).
        out: The file.
        precision: fp16 makes it half the size, int8 half the size and faster where the processor has instructions for
            it; both need --data, on which AP may fall by 0.005 at most.
        image_size: H,W for inputs of that one size, or dynamic. The batch is open either way.
        post_processing: Also give boxes in pixels, scores and labels of the best 100 detections.
        sampling: gather for runtimes that compute GridSample wrongly or lack it.
        data: Data set to measure AP on, before and after; int8 is calibrated on its training split.
        split: Which part of the data set.
        limit: Only its first so many images.
    """
    from ..detector import DeformableDETR
    from ..export import ExportOptions, export_model
    from ..export.graph import parse_size

    at_least_one(limit=limit)
    options = ExportOptions(precision, parse_size(image_size), post_processing, sampling, data, split, limit)
    export_model(DeformableDETR.from_pretrained(model), out, to, options, report=print)
    print(f"{out} matches {model}. Next: deformable-detr predict {out} IMAGE --out pictures")


@app.command
def serve(
    model: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    device: Device = "auto",
    max_batch_size: int = 8,
    max_queue: int = 64,
    timeout: float = 30.0,
    shutdown_delay: float = 1.0,
) -> None:
    """Serve a model over HTTP, with a web page. Only this machine can reach it unless --host is set.

    Args:
        model: A run or model folder, or an exported file (.onnx, .xml, .pt2).
        host: Address to listen on. Any but localhost needs a token.
        port: Port to listen on. 0: any free port.
        token: Required from clients as `Authorization: Bearer TOKEN`. Prefer the environment variable
            DEFORMABLE_DETR_TOKEN, which process lists do not show.
        max_batch_size: Maximum images per pass of the model.
        max_queue: Maximum images accepted and not answered yet; further requests get 503.
        timeout: Seconds from the end of a request to its response; then the request gets 504.
        shutdown_delay: Seconds after SIGTERM during which requests are still accepted while /readyz answers 503.
    """
    from ..serve import check_installed

    check_installed()
    from ..serve.limits import Limits
    from ..serve.server import ServeOptions
    from ..serve.server import serve as run

    limits = Limits(
        images=min(Limits.images, max_queue), max_queue=max_queue, max_batch_size=max_batch_size, timeout=timeout,
        shutdown_delay=shutdown_delay,
    )  # fmt: skip
    run(model, ServeOptions(host, port, token, device, limits))


@app.command
def predict_dataset(
    model: Path,
    sources: Annotated[list[str], Parameter(negative=())],
    /,
    *,
    out: str,
    threshold: float = 0.5,
    top_k: int = 100,
    batch_size: int = 8,
    format: Literal["auto", "images", "parquet", "webdataset"] = "auto",
    image_column: str | None = None,
    id_column: str | None = None,
    unit_size: int | None = None,
    concurrency: int | None = None,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    device: str = "auto",
    readers: int = 2,
    address: str | None = None,
    object_store_memory: int = 256,
) -> None:
    """Find the objects in any number of images, on one machine or a Ray cluster; Parquet files out.

    What was stopped goes on where the same command is given again.

    Args:
        model: Folder of a run or of a saved model, or an exported file (.onnx, .xml, .pt2).
        sources: Folders of images, of Parquet files with image bytes or of WebDataset shards (.tar), single files, and
            patterns with *; paths, or URLs such as s3://bucket/images.
        out: Folder or URL for the results.
        threshold: Lowest score of a detection, 0 to 1.
        top_k: At most so many detections an image.
        batch_size: Images of one size that go through the model together, at most.
        format: What the sources hold; auto: see for yourself.
        image_column: Of Parquet: the column with image bytes; found by its type where there is one.
        id_column: Of Parquet: the column that is to name the rows.
        unit_size: Images in one file of results, and what is lost at most by each worker when stopped; of shards more.
        concurrency: Workers; as many as fit where none is named.
        num_cpus: Processors of each worker, fractions too.
        num_gpus: GPUs of each worker, fractions too; 1 where there are any.
        device: auto (cuda where there are GPUs), cpu, cuda or mps.
        readers: Threads of each worker that decode images.
        address: A Ray cluster that runs already, HOST:PORT or auto; none: one of its own on this machine.
        object_store_memory: MiB of shared memory for a cluster of its own, beside the model.
    """
    from ..predict_dataset.run import Pool, predict_dataset

    predict_dataset(
        model, sources, out, threshold=threshold, top_k=top_k, batch_size=batch_size, form=format,
        image_column=image_column, id_column=id_column, unit_size=unit_size,
        pool=Pool(concurrency, num_cpus, num_gpus, device, readers, address, object_store_memory),
    )  # fmt: skip
