"""Options of `predict_dataset`; nothing here imports torch or Ray."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from ..utils.errors import UserError
from ..utils.tiles import DEFAULT_OVERLAP, Tiling, check_tiling

RESULT_OPTIONS = ("format", "threshold", "top_k", "batch_size", "unit_size", "image_column", "id_column")


@dataclass(frozen=True)
class PredictDatasetOptions:
    """Options of `predict_dataset`. Those of `result_settings` affect the results; others may change on resume.

    Attributes:
        threshold: Minimum score of a detection, 0 to 1.
        top_k: Maximum number of detections per image, or per tile.
        batch_size: Maximum number of images of one size, or of tiles, per batch.
        format: Format of the sources; auto: detect it.
        image_column: Parquet column with image bytes. Default: "image", or the only column with bytes.
        id_column: Parquet column for the `key` column of the results.
        unit_size: Images per output file, which are the unit of work. Default: 8 to 256, by the number of images.
        concurrency: Number of workers. Default: as many as fit.
        num_cpus: Processors per worker; may be a fraction.
        num_gpus: GPUs per worker; may be a fraction. Default: 1 if there are GPUs.
        tile: Side in pixels of the tiles that larger images are cut into, beside the whole image, to find small
            objects. Default: no tiles.
        tile_overlap: Minimum overlap of neighboring tiles as a share of their side.
        device: auto (cuda if there are GPUs), cpu, cuda or mps.
        readers: Threads per worker that decode images.
        address: Running Ray cluster, HOST:PORT or auto. Default: start one on this machine.
        object_store_memory: Shared memory in MiB for a cluster started here, in addition to the model's size.
    """

    threshold: float = 0.5
    top_k: int = 100
    batch_size: int = 8
    format: Literal["auto", "images", "parquet", "webdataset"] = "auto"
    image_column: str | None = None
    id_column: str | None = None
    unit_size: int | None = None
    concurrency: int | None = None
    num_cpus: float | None = None
    num_gpus: float | None = None
    device: str = "auto"
    readers: int = 2
    address: str | None = None
    object_store_memory: int = 256
    tile: int | None = None
    tile_overlap: float = DEFAULT_OVERLAP

    @property
    def result_settings(self) -> dict[str, Any]:
        """What affects the results: `RESULT_OPTIONS`, and the tiles if there are any."""
        tiles = ("tile", "tile_overlap") if self.tile is not None else ()
        return {name: getattr(self, name) for name in (*RESULT_OPTIONS, *tiles)}

    @property
    def tiling(self) -> Tiling | None:
        """How larger images are cut. Raises UserError if an option is out of range."""
        return check_tiling(self.tile, self.tile_overlap, self.batch_size)

    def validate(self) -> None:
        """Raise UserError for an option that is out of range."""
        if not 0 <= self.threshold <= 1:
            raise UserError(f"--threshold {self.threshold}: must be from 0 to 1")
        for name in ("top_k", "batch_size", "unit_size", "concurrency", "readers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be 1 or more")
        check_tiling(self.tile, self.tile_overlap)
        if self.object_store_memory < 80:
            raise UserError(f"--object-store-memory {self.object_store_memory}: Ray needs at least 80 MiB")
        if self.num_cpus is not None and not 0 < self.num_cpus < math.inf:
            raise UserError(f"--num-cpus {self.num_cpus}: must be greater than 0, for example 0.5")
        gpus = self.num_gpus
        if gpus is not None and not (0 <= gpus < math.inf and (gpus <= 1 or gpus == int(gpus))):
            raise UserError(f"--num-gpus {gpus}: must be 0, a fraction such as 0.5, or a whole number")
        if self.device not in ("auto", "cpu", "cuda", "mps"):
            raise UserError(f"--device {self.device}: must be auto, cpu, cuda or mps; Ray assigns the GPUs")
        if self.device == "cuda" and gpus == 0:
            raise UserError("--device cuda requires --num-gpus above 0")
