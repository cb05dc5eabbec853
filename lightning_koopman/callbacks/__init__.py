"""Lightning callbacks: they decide when; the numerics they call know nothing of Lightning."""
