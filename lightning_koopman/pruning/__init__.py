"""Masks and channel removal for any PyTorch training loop."""
