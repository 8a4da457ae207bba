"""Programs compiled ahead of their use, in the background, and kept for the next run."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar

import jax

from jaxft.weights.download import cache_folder

T = TypeVar("T")

_GLANCE = 0.2  # seconds between two looks at whether the run is to stop


class Ahead(Generic[T]):
    """The result of a function that a thread of its own works out while the caller goes on.

    XLA compiles without the GIL: training in the meantime is slowed by what cores it takes.
    """

    def __init__(self, function: Callable[[], T]) -> None:
        self.seconds = 0.0
        """How long it took."""
        self._error: BaseException | None = None
        x64 = bool(jax.numpy.zeros(0, float).dtype == "float64")  # is the calling thread's own

        def work() -> None:
            started = time.perf_counter()
            try:
                with jax.enable_x64(x64):
                    self._result = function()
            except BaseException as error:
                self._error = error
            self.seconds = time.perf_counter() - started

        # No daemon: Python's end would be the compiler's abort.
        self._thread = threading.Thread(target=work, name="jaxft-compile")
        self._thread.start()

    def result(self, glance: Callable[[], None] = lambda: None) -> T:
        """What the function returned, once it has; raises what it raised.

        While it waits it calls `glance`, which may raise.
        """
        while self._thread.is_alive():
            glance()
            self._thread.join(_GLANCE)
        if self._error is not None:
            raise self._error
        return self._result


def flops(compiled: Any) -> float:
    """Floating-point operations of one call, on each device, as XLA counts them."""
    return float((compiled.cost_analysis() or {}).get("flops", 0.0))


def keep_programs() -> None:
    """Has jax keep compiled programs on disk, where it is not told otherwise.

    They lie under `programs` in the folder of downloaded weights. `JAX_COMPILATION_CACHE_DIR` names
    another place, `JAX_ENABLE_COMPILATION_CACHE=false` keeps none. Where that folder cannot be
    made, as without a home, none are kept.
    """
    folder = cache_folder() / "programs"
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(folder))
