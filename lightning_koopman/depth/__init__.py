"""How many layers a function needs, before any training (paper, section 5)."""
