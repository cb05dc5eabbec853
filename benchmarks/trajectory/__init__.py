"""Cost of recording and spectra, and accuracy of each way to keep snapshots: ``python -m benchmarks``."""
