"""Prediction over data sets of any size, on one machine or a Ray cluster: Parquet files out, resumable.

The way the work goes: `sources` lists what there is to read as pieces; `plan` groups the pieces into numbered units and
writes them down with all that decides the results; a `worker` predicts one unit and writes one Parquet file, whole or
not at all; `run` hands the units that have no file yet to a pool of workers by Ray Data.
"""
