"""`on_epoch_end`: the user's function that a run calls with the metrics row of each epoch."""

import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from jaxft.errors import RecipeError
from jaxft.report.metrics_log import to_json

EpochCallback = Callable[[dict[str, Any]], object]
"""Receives the row of an epoch; its result is ignored."""


class _CallbackError(BaseException):
    """Carries an error of the callback to `UnchangedCallbackErrors`.

    It is no `Exception`, so that nothing on the way takes it for an error of the run: the callback
    may run out of memory or lose a connection too.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


def check_callback(callback: object) -> None:
    """Raises RecipeError if `on_epoch_end` is neither None nor a function."""
    if callback is not None and not callable(callback):
        raise RecipeError(
            f"on_epoch_end is {reprlib.repr(callback)}; it must be a function of one argument, the "
            "metrics of an epoch as a dict."
        )


def call(callback: EpochCallback | None, row: Mapping[str, Any]) -> None:
    """Calls the callback with a copy of a row, as `metrics.jsonl` holds it."""
    if callback is None:
        return
    try:
        callback(to_json(row))
    except BaseException as error:
        raise _CallbackError(error) from error


class UnchangedCallbackErrors:
    """Context that raises an error of the callback as the callback has raised it.

    No generator, because none can raise StopIteration.
    """

    def __enter__(self) -> None:
        """Does nothing."""

    def __exit__(self, _: object, carrier: BaseException | None, __: object) -> None:
        """Raises the error that a `_CallbackError` carries."""
        if not isinstance(carrier, _CallbackError):
            return
        error, context = carrier.error, carrier.error.__context__
        try:
            raise error
        finally:
            error.__context__ = context  # the raise has set it to the carrier
