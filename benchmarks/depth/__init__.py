"""Evidence for the depth estimate and HSVR: ``python -m benchmarks.depth``."""
