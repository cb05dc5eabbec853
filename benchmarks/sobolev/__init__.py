"""Evidence for the Sobolev losses: ``python -m benchmarks.sobolev``."""
