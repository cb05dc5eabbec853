"""The network for noisy signals: nine hidden layers of 20 neurons with sine activations (paper, section 6)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

HIDDEN, WIDTH, FREQUENCY = 9, 20, 10.0
LAYERS = [str(layer) for layer in range(HIDDEN - 1)]  # with auxiliary outputs; the last feeds the output layer


class Sine(nn.Module):
    """A layer with sine activations, and a skip connection unless it is the first."""

    def __init__(self, n_inputs: int, first: bool) -> None:
        super().__init__()
        self.linear, self.first = nn.Linear(n_inputs, WIDTH), first
        bound = 1.0 if first else math.sqrt(6 / WIDTH)
        nn.init.uniform_(self.linear.weight, -bound, bound)
        if not first:
            nn.init.uniform_(self.linear.bias, -0.1, 0.1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute the layer's outputs."""
        if self.first:
            return torch.sin(FREQUENCY * self.linear(inputs))
        return inputs + torch.sin(self.linear(inputs))


def sine_network(n_inputs: int, n_outputs: int) -> nn.Sequential:
    """Return the whole network."""
    hidden = [Sine(n_inputs if layer == 0 else WIDTH, first=layer == 0) for layer in range(HIDDEN)]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, n_outputs))
