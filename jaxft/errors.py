"""Errors that jaxft raises on purpose; each message names the cause, the place and a way out.

Wrong input is also a ValueError. An interruption, a full disk or a diverged loss is not.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class JaxftError(Exception):
    """Base class of all errors that jaxft raises on purpose; scripts print them in one line."""


class PatternError(JaxftError, ValueError):
    """A pattern selects nothing, or earlier patterns take all that it selects."""


class LabelError(JaxftError, ValueError):
    """A label tree does not fit the parameters or the transforms."""


class RecipeError(JaxftError, ValueError):
    """A recipe has wrong or contradictory fields, or does not fit the run it should continue."""


class ModelError(JaxftError, ValueError):
    """A user's module cannot serve as a network."""


class WeightsError(JaxftError, ValueError):
    """A weights file is unreadable or does not fit the network."""


class DataError(JaxftError, ValueError):
    """A data source is missing, empty, or holds something unreadable."""


class CheckpointError(JaxftError):
    """A checkpoint cannot be written or read, or does not fit the run."""


class ParallelError(JaxftError):
    """The processes or devices of a run cannot work together."""


class NonFiniteError(JaxftError):
    """A loss, a gradient or a validation score is infinite or NaN."""


class InterruptedRunError(JaxftError):
    """SIGTERM or SIGINT ended a run, which has saved its position or had nothing to save.

    Attributes:
      signal: number of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


def first_of(entries: Iterable[str], most: int, rest: str = "and {} more") -> list[str]:
    """Shortens a list for an error message.

    Args:
      entries: the entries of the list.
      most: maximum number of entries to keep.
      rest: text of the last entry, formatted with the number of entries left out.

    Returns:
      The first `most` entries, followed by `rest` if there are more.

    Example:
      >>> ", ".join(first_of("abcde", 3))
      'a, b, c, and 2 more'
    """
    entries = list(entries)
    more = [rest.format(len(entries) - most)] if len(entries) > most else []
    return entries[:most] + more


def suggestion(name: str, known: Iterable[str]) -> str:
    """Returns a question for an error message about an unknown name; "" if no name is similar.

    >>> suggestion("lpft", ["lp-ft", "full"])
    " Did you mean 'lp-ft'?"
    """
    similar = get_close_matches(name, [*known], n=1)
    return f" Did you mean {similar[0]!r}?" if similar else ""
