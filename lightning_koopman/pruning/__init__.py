"""Masks and channel removal, for any PyTorch loop."""
