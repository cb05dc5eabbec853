"""The reading of trainings against what happened next."""
