"""What the reading says of trainings, beside what then happened."""
