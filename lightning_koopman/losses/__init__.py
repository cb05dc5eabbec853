"""Losses on the Fourier modes of what a network misses (paper, section 6)."""
