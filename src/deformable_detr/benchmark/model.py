"""`deformable-detr benchmark model`: the detector as it is and optimized, beside transformers' with its weights."""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import presets
from ..detector import DeformableDETR
from ..runtimes.fused.onednn import has_bf16
from ..utils.device import pick_device
from ..utils.errors import UserError
from ..utils.files import write_json, write_text
from .machine import gemm_gflops, memory_peak
from .parts import TimedParts, around
from .rounds import BASELINE, bars, by_allocator, described, in_turn

DEFAULT_SIZES = ((480, 640), (800, 1333))
WAYS = (BASELINE, "model", "optimized")
RUNTIMES = {"onnxruntime": ("onnx", "m.onnx"), "openvino": ("openvino", "m.xml")}  # by name: format and file


@dataclass(frozen=True)
class Row:
    """One way to compute one input. `ratio`: transformers' median of the same rounds / this one's.

    gflop: of products and convolutions, twice the multiplications. of_limit: their time at the machine's own rate for
    products, measured before and after the rounds / this time. memory_mib: extra at the peak. error: greatest
    difference of boxes (0..1) from ours. parts_ms: medians of the same rounds, so their sum is near the median only.
    """

    way: str
    precision: str
    batch: int
    height: int
    width: int
    allocator: str
    median_ms: float
    p95_ms: float
    images_per_second: float
    ratio: float | None
    memory_mib: float | None
    gflop: float
    of_limit: float
    parameters: int
    error: float
    parts_ms: dict[str, float]


def transformers_twin(model: DeformableDETR) -> nn.Module | None:
    """transformers' model with the same weights; none: it is not installed or has no such network."""
    try:
        from transformers import AutoModelForObjectDetection
    except ImportError:
        return None
    from ..weights import transformers_format

    try:
        transformers_format.check_parts(model.config)
    except UserError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        transformers_format.save(model, Path(folder))
        return AutoModelForObjectDetection.from_pretrained(folder).eval()


def random_model(preset: str, device: str, changes: dict[str, Any] | None = None) -> DeformableDETR:
    """A preset's model in evaluation mode with batch norms as a trained one has, always with the same random weights.

    Where training starts from zero, in offsets and heads, there are random weights too: else all tokens would look at
    the same places, and boxes would not tell whether what is measured computes the right thing.
    """
    torch.manual_seed(0)
    base = {"backbone_weights": "none", "backbone_norm": "frozen", **(changes or {})}
    model = DeformableDETR(presets.PRESETS[preset](**base)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("sampling_offsets.weight", "attention_weights.weight")) or "heads.boxes" in name:
                parameter += 0.05 * torch.randn(parameter.shape)
    return model.to(device)


def ways(
    model: DeformableDETR, precisions: Sequence[str], wanted: Sequence[str], folder: Path
) -> dict[tuple[str, str], tuple[Callable[[Tensor, Tensor], Tensor], nn.Module | None]]:
    """What is measured: a call (pixels, mask) → boxes, and the module whose parts are timed, by name and precision.

    model: on the device that all but the other runtimes use, which run on the CPU.
    """
    device = model.get_buffer("pixel_mean").device
    found: dict[tuple[str, str], Any] = {}

    def ours(module: Any) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda pixels, mask: module(pixels, mask)["pred_boxes"]

    theirs: Any = transformers_twin(model) if BASELINE in wanted else None
    if theirs is not None:
        theirs.to(device)
        found[BASELINE, "fp32"] = (lambda pixels, mask: theirs(pixels, pixel_mask=(~mask).long()).pred_boxes, theirs)
    if "model" in wanted:
        found["model", "fp32"] = (ours(model), model)
    for precision in precisions:
        if precision == "bf16" and not (has_bf16() or device.type == "cuda"):
            continue
        if "optimized" in wanted:
            fast = model.optimize(precision)
            found["optimized", precision] = (ours(fast), fast)
        if "compiled" in wanted:
            found["compiled", precision] = (ours(model.optimize(precision, compile=True)), None)
    for runtime, (kind, name) in RUNTIMES.items():
        if runtime in wanted:
            from ..export import export_model, load_exported

            export_model(model, folder / name, kind)  # type: ignore[arg-type]  # of the table above
            found[runtime, "fp32"] = (ours(load_exported(folder / name, "cpu", threads=torch.get_num_threads())), None)
    return found


def gflop_of(model: DeformableDETR, pixels: Tensor) -> float:
    """10⁹ operations of all products and convolutions of a forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    frozen = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        frozen(pixels)
    return counter.get_total_flops() / 1e9


def measure(
    preset: str,
    sizes: Sequence[Sequence[int]],
    batches: Sequence[int],
    precisions: Sequence[str],
    wanted: Sequence[str],
    repeats: int,
    allocator: str,
    device: str = "cpu",
    changes: dict[str, Any] | None = None,
) -> list[Row]:
    """All rows of one process, of `random_model`."""
    model = random_model(preset, device, changes)
    # Outside of inference mode, in which the counter cannot look into modules.
    gflops = {tuple(size): gflop_of(model, torch.zeros(1, 3, *size, device=device)) for size in sizes}
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        every = ways(model, precisions, wanted, Path(folder))
        for height, width in sizes:
            for batch in batches:
                pixels = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device)
                mask = torch.zeros(batch, height, width, dtype=torch.bool, device=device)
                plain = {key: partial(call, pixels, mask) for key, (call, _) in every.items()}
                timed = {
                    key: TimedParts(plain[key], module) for key, (_, module) in every.items() if module is not None
                }
                calls = {**plain, **(timed if device == "cpu" else {})}
                limits = _limits(precisions, device)
                times = in_turn({str(key): call for key, call in calls.items()}, repeats)
                limits = {name: max(value, limits[name]) for name, value in _limits(precisions, device).items()}
                if device != "cpu":
                    in_turn({str(key): call for key, call in timed.items()}, repeats)
                gflop = gflops[height, width] * batch
                outputs = model(pixels, mask)
                beside = around(model, device, batch, height, width, outputs)
                baseline = times.get(str((BASELINE, "fp32")))
                for key, call in plain.items():
                    found, made = times[str(key)], []
                    memory = memory_peak(lambda made=made, call=call: made.append(call()), device)
                    memory = None if key[0] in RUNTIMES else memory  # their arenas keep what they once took
                    inside = timed[key].medians(repeats) if key in timed else None
                    rows.append(
                        Row(
                            way=key[0],
                            precision=key[1],
                            batch=batch,
                            height=height,
                            width=width,
                            allocator=allocator,
                            median_ms=found.median_ms,
                            p95_ms=found.p95_ms,
                            images_per_second=batch / found.median_ms * 1e3,
                            ratio=None if baseline is None else baseline.median_ms / found.median_ms,
                            memory_mib=memory,
                            gflop=gflop,
                            of_limit=gflop / limits.get(key[1], limits[precisions[0]]) / found.median_ms * 1e3,
                            parameters=sum(p.numel() for p in model.parameters()),
                            error=float((made[0].cpu() - outputs["pred_boxes"].cpu()).abs().max()),
                            parts_ms={"pre": beside["pre"], **inside, "post": beside["post"]} if inside else {},
                        )
                    )
        every.clear()
    return rows


def _limits(precisions: Sequence[str], device: str) -> dict[str, float]:
    """The machine's rate for products, 10⁹ operations a second, in each precision."""
    return {name: gemm_gflops(torch.bfloat16 if name == "bf16" else torch.float32, device) for name in precisions}


def run(
    preset: str = "refine",
    sizes: Sequence[tuple[int, int]] = DEFAULT_SIZES,
    batches: Sequence[int] = (1,),
    precisions: Sequence[str] = ("fp32", "bf16"),
    wanted: Sequence[str] = WAYS,
    threads: int | None = None,
    repeats: int = 5,
    json_path: Path | None = None,
    picture: Path | None = None,
    allocators: Sequence[str] = ("default", "tuned"),
    device: str = "cpu",
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measures in a process for each allocator, prints a table, writes JSON and picture where asked to.

    Raises UserError for a device that there is not, and for CUDA graphs without a GPU.
    """
    pick_device(device)
    if device != "cuda" and "graphs" in wanted:
        raise UserError("--also graphs: CUDA graphs need --device cuda")
    arguments = {
        "preset": preset, "sizes": list(sizes), "batches": list(batches), "precisions": list(precisions),
        "wanted": list(wanted), "repeats": repeats, "device": device, "changes": changes,
    }  # fmt: skip
    # The C library's allocator is the CPU's matter.
    rows = by_allocator(
        "deformable_detr.benchmark.model", arguments, threads, allocators if device == "cpu" else ["default"]
    )
    report = {**described(threads, device), "preset": preset, "repeats": repeats, "rows": rows}
    print(table(report))
    if json_path is not None:
        write_json(json_path, report)
    if picture is not None:
        last = [row for row in rows if row["allocator"] == rows[-1]["allocator"] and row["parts_ms"]]
        largest = max(row["height"] * row["width"] for row in last)
        shown = [row for row in last if row["height"] * row["width"] == largest and row["batch"] == batches[0]]
        one = shown[0]
        title = f"{preset}, {one['batch']}×3×{one['height']}×{one['width']}, {report['threads']} threads"
        title += f", {one['allocator']} allocator: median ms of each part"
        write_text(picture, bars(title, {f"{row['way']} {row['precision']}": row["parts_ms"] for row in shown}))
    return report


def table(report: dict[str, Any]) -> str:
    """The report for people."""

    def cell(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    gemm = report["gemm_gflops"]
    lines = [
        f"{report['machine']['name']}, {report['threads']} threads; measured: "
        f"products {gemm['fp32']:.0f} GFLOP/s fp32, {gemm['bf16']:.0f} bf16, "
        f"copy {report['machine']['copy_gb_s']:.0f} GB/s",
        "| way | precision | allocator | input | median ms | p95 ms | images/s | × transformers | extra MiB "
        "| of limit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        cells = [
            row["way"], row["precision"], row["allocator"], f"{row['batch']}×3×{row['height']}×{row['width']}",
            cell(row["median_ms"], ".0f"), cell(row["p95_ms"], ".0f"), cell(row["images_per_second"], ".2f"),
            cell(row["ratio"], ".2f"), cell(row["memory_mib"], ".0f"), cell(row["of_limit"], ".0%"),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    first = report["rows"][0]
    return "\n".join(
        [*lines, f"{first['parameters'] / 1e6:.1f} M parameters, {first['gflop']:.0f} GFLOP at the first input"]
    )


if __name__ == "__main__":
    print(json.dumps([asdict(row) for row in measure(**json.loads(sys.argv[1]))]))
