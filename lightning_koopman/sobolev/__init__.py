"""Sobolev losses and noise estimation."""
