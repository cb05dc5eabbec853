"""Which weights are observed, which process holds them, and how they are reinitialized."""
