"""Comparison of two kinds of trainings by their spectra, where the answer is known and where it is not."""
