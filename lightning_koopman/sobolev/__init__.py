"""Sobolev losses and the noise estimate beside them."""
