"""transformers' detectors with multi-scale deformable attention as detectors of this package."""
