"""Turn failures of the callbacks into warnings, so that training continues."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from types import TracebackType

from lightning_koopman.parameters.process_group import Processes, ProcessLostError

LOG = logging.getLogger("lightning_koopman")


class KoopmanWarning(UserWarning):
    """The Koopman analysis failed or is less reliable than it seems. Training itself continues.

    Example:
        >>> import warnings
        >>> from lightning_koopman import KoopmanWarning
        >>> warnings.simplefilter("ignore", KoopmanWarning)
    """


class Outcome:
    """Whether work has succeeded in all processes."""

    succeeded = False


class Guard:
    """Catches failures in a callback, and warns once per fit of each kind of failure.

    Args:
        owner: Name of the callback, for messages.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.zero = True  # whether this process warns about what concerns all
        self._told: set[str] = set()

    def reset(self, *, zero: bool) -> None:
        """Start a new fit."""
        self.zero = zero
        self._told.clear()

    def __call__(self, doing: str) -> Guarded:
        """Return a context in which a failure becomes one warning. For collectives use :meth:`together`."""
        return Guarded(self, doing)

    @contextlib.contextmanager
    def together(self, doing: str, processes: Processes) -> Iterator[Outcome]:
        """Context for work with collectives: if one process fails, all fail, each with a warning.

        It gives an :class:`Outcome`, which is the same in all processes once the context is left.
        """
        outcome = Outcome()
        with self(doing):
            with processes.together():
                yield outcome
            outcome.succeeded = True

    def warn(self, topic: str, message: str, *, everywhere: bool = False) -> None:
        """Warn once per topic, in the first process only or ``everywhere``."""
        if topic in self._told or not (self.zero or everywhere):
            return
        self._told.add(topic)
        text = f"{self.owner}: {message}"
        try:
            warnings.warn(text, KoopmanWarning, stacklevel=3)
        except KoopmanWarning:  # `python -W error` must not stop training either
            LOG.error(text)


class Guarded:
    """Context that :class:`Guard` returns. It is a class for speed, as it is entered after every batch."""

    __slots__ = ("doing", "guard")

    def __init__(self, guard: Guard, doing: str) -> None:
        self.guard, self.doing = guard, doing

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception) or isinstance(error, ProcessLostError):
            return False
        told = f"{self.doing} failed, training continues without it: {type(error).__name__}: {error}"
        self.guard.warn(self.doing, told, everywhere=True)
        return True
