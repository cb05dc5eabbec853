"""Snapshots become a Gram matrix, and files beside checkpoints; nothing here knows Lightning."""
