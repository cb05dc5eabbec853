"""Averages of the weights: which snapshots, how much of each, and which of several averages is best."""
