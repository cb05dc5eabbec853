"""Figures.  The only folder that needs matplotlib; no figure is registered with pyplot, so nothing has to be closed."""
