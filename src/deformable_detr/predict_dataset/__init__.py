"""Prediction over datasets of any size, on one machine or a Ray cluster, with resumable Parquet output.

`sources` lists the images as ranges, `manifest` groups ranges into numbered units, a `worker` predicts one unit and
writes one Parquet file, and `run` distributes the units without a file to a pool of workers with Ray Data.
"""
