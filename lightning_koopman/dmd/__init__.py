"""Dynamic mode decomposition: one small matrix in, a :class:`Spectrum` out."""
