"""The paper's experiments, reproduced through the public API: ``python -m lightning_koopman.demo reproduce``."""
