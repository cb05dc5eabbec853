"""Averages of the weights: the share of each snapshot, and the choice between several averages."""
