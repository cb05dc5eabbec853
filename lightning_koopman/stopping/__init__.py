"""Rules that judge numbers: converged, or badly started."""
