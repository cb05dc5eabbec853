"""Comparison of trainings by their Koopman spectra."""
