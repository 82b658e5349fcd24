"""Detectors for inference only: the fused model, and exported files run by their runtimes."""
