"""What a user can get wrong. Each error names the thing, the place and the way out."""

from collections.abc import Iterable


class JaxftError(ValueError):
    """Base of all errors that a user can cause; scripts print it without a traceback."""


class PatternError(JaxftError):
    """A pattern selects nothing, or can never be reached."""


class RecipeError(JaxftError):
    """A recipe, or the run it should start or continue, does not hold together."""


class ModelError(JaxftError):
    """A module of the user's own cannot serve as a network."""


class WeightsError(JaxftError):
    """A weights file does not fit the network."""


class CheckpointError(JaxftError):
    """A checkpoint does not hold what the run needs."""


class DataError(JaxftError):
    """A data source is missing, empty, or holds something unreadable."""


class LabelError(JaxftError):
    """A label tree does not fit the parameters or the transforms."""


class ParallelError(JaxftError):
    """The processes of a run, or their devices, do not come together."""


class NonFiniteError(JaxftError):
    """A loss or a gradient has become infinite or NaN."""


class InterruptedRunError(JaxftError):
    """A signal has ended a run, which had nothing to lose or has saved its position.

    Attributes:
      signal: the number of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


def first_of(entries: Iterable[str], most: int, rest: str = "and {} more") -> list[str]:
    """Returns the first entries of a message's list, and one that counts the rest, if any.

    >>> ", ".join(first_of("abcde", 3))
    'a, b, c, and 2 more'
    """
    entries = list(entries)
    more = [rest.format(len(entries) - most)] if len(entries) > most else []
    return entries[:most] + more
