"""Reading of a training: a phase and a few numbers, from the steps of the weights and the losses."""
