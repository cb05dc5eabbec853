"""Evidence for the stop and the restart: ``python -m benchmarks.stopping``."""
