"""Recording of snapshots: their Gram matrix, and files beside checkpoints; independent of Lightning."""
