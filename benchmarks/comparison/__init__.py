"""What the spectra of two kinds of trainings tell, where the answer is known and where it is not."""
