"""Depth estimation from frequencies, and the regressor built on it."""
