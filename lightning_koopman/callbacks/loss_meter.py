"""The training loss of an epoch, from what ``training_step`` returned for each batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PENDING = 512  # batch losses held before they are summed: bounds memory in epochs of a million batches


def batch_loss(outputs: Any) -> Tensor | None:
    """The loss in what ``training_step`` returned or ``on_train_batch_end`` was given, if it is one real number."""
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    if isinstance(loss, Tensor) and loss.layout == torch.strided and loss.numel() == 1 and not loss.is_complex():
        return loss
    return None


class LossMeter:
    """Sum and number of the batch losses since the last :meth:`take`; costs next to nothing for a batch."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0
        self._pending: list[Tensor] = []

    def add(self, outputs: Any) -> None:
        """Note the batch's loss."""
        loss = batch_loss(outputs)
        if loss is not None:
            self._pending.append(loss.detach())
            if len(self._pending) == PENDING:
                self.fold()

    def fold(self) -> None:
        """Add what is pending to the sum, with one operation and one transfer for each device."""
        pending, self._pending = self._pending, []
        for device in {loss.device for loss in pending}:
            losses = [loss.reshape(()).float() for loss in pending if loss.device == device]
            self.total += sum(torch.stack(losses).tolist())
        self.count += len(pending)

    def take(self) -> tuple[float, int]:
        """Sum and number since the last call."""
        self.fold()
        taken, self.total, self.count = (self.total, self.count), 0.0, 0
        return taken

    def restore(self, total: float, count: int) -> None:
        """Start from what a checkpoint within an epoch held."""
        self._pending, self.total, self.count = [], total, count
