"""Rules for whether a training has converged, or started badly."""
