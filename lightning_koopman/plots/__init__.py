"""Figures, drawn with matplotlib.  None is registered with pyplot, so none has to be closed."""
