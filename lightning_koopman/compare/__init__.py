"""Whether trainings behave alike, told by their Koopman spectra."""
