"""Averages of the weights, beside the last weights and other averages."""
