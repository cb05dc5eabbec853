"""Nothing of ours ends a training: a failure becomes one warning."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from types import TracebackType

from lightning_koopman.parameters.process_group import Processes, ProcessLostError

LOG = logging.getLogger("lightning_koopman")


class KoopmanWarning(UserWarning):
    """Something about the Koopman analysis went wrong or means less than it seems; the training itself goes on.

    Example:
        >>> import warnings
        >>> from lightning_koopman import KoopmanWarning
        >>> warnings.simplefilter("ignore", KoopmanWarning)
    """


class Guard:
    """Catches what fails in a callback, and warns of each kind of failure once a fit.

    Args:
        owner: Name of the callback, for messages.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.zero = True  # whether this is the process that tells what concerns all
        self._told: set[str] = set()

    def reset(self, *, zero: bool) -> None:
        """Begin a fit."""
        self.zero = zero
        self._told.clear()

    def __call__(self, doing: str) -> Guarded:
        """Context in which a failure is one warning.  Collectives do not belong in it: see :meth:`together`."""
        return Guarded(self, doing)

    def together(self, doing: str, processes: Processes) -> contextlib.AbstractContextManager[None, bool]:
        """Context for work with collectives: where it fails in one process it fails in all, each with a warning."""

        @contextlib.contextmanager
        def both() -> Iterator[None]:
            with self(doing), processes.together():
                yield

        return both()  # type: ignore[return-value]  # it does swallow errors

    def warn(self, topic: str, message: str, *, everywhere: bool = False) -> None:
        """Warn, once a topic; in the first process only, or ``everywhere``."""
        if topic in self._told or not (self.zero or everywhere):
            return
        self._told.add(topic)
        text = f"{self.owner}: {message}"
        try:
            warnings.warn(text, KoopmanWarning, stacklevel=3)
        except KoopmanWarning:  # python -W error: that is about the user's code, whose training goes on all the same
            LOG.error(text)


class Guarded:
    """The context that :class:`Guard` gives; a class, as it is entered after every batch."""

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
        told = f"{self.doing} failed, training goes on without it: {type(error).__name__}: {error}"
        self.guard.warn(self.doing, told, everywhere=True)
        return True
