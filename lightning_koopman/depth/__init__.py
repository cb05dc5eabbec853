"""Depth estimated from frequencies, and the regressor built on it."""
