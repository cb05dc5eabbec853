"""What recording and spectra cost, and what each way to keep snapshots gives up: ``python -m benchmarks``."""
