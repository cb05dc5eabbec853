"""What the training is doing: the steps of the weights and the losses, read in one word and a few numbers."""
