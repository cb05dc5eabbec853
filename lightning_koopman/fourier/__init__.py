"""Fourier modes and sample points, shared by the Sobolev loss and the depth estimate."""
