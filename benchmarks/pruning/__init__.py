"""Evidence for the pruner: ``python -m benchmarks.pruning``."""
