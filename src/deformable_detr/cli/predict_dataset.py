"""`deformable-detr predict-dataset`."""

from typing import Annotated

from cyclopts import Parameter

from ..predict_dataset.options import PredictDatasetOptions
from .options import Model


def predict_dataset(
    model: Model,
    sources: Annotated[list[str], Parameter(negative=())],
    /,
    *,
    out: str,
    options: Annotated[PredictDatasetOptions | None, Parameter(name="*")] = None,
) -> None:
    """Detect objects in any number of images, on one machine or a Ray cluster, and write Parquet files.

    Run the same command again to resume after an interruption.

    Args:
        sources: Folders of images, Parquet files or WebDataset shards (.tar), single files, and patterns with *. Paths
            or URLs such as s3://bucket/images.
        out: Folder or URL for the results.
    """
    from ..predict_dataset.run import predict_dataset as run

    run(model, sources, out, options or PredictDatasetOptions())
