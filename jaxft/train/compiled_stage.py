"""Compiled programs of a stage: compiled in the background, called with one batch or several.

With `steps_per_execution` above 1, one call processes several batches, so that a small network does
not wait for Python (as in Keras). Calls differ in how many batches they fill; the results do not
depend on where calls begin, to the last bit. The host looks for signals, and at a stage's time
limit, between calls only.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft.data import Batch
from jaxft.distributed import Devices
from jaxft.labels import Tree
from jaxft.train.metrics import GradientNorms, StepRecord
from jaxft.train.train_step import TrainState
from jaxft.weights.download import cache_folder

T = TypeVar("T")

_POLL_SECONDS = 0.2  # between two looks at whether the run must stop


class CompiledStage(NamedTuple):
    """Programs of a stage, compiled for its shapes.

    Attributes:
      fresh: `params -> opt_state`, the state of the optimizer before its first step.
      copy: copies a training state to other buffers.
      step: `(state, frozen, batch, number, start) -> (state, record)`, see `train_step`; `number`
        is the global step. The state is donated. With `steps_per_execution` above 1, batches and
        records are stacked, and the number of batches follows them. None: the stage has a solver.
      gradient_norms: see `StageProgram.gradient_norms`; by tensor. None without `auto_rgn`.
      prefix: see `compile_prefix`; empty if nothing of the prefix is cached.
      score: see `eval_step`; of batches of features. None: they are not cached.
      flops: floating-point operations of a step.
      prefix_flops: floating-point operations of the prefix on a batch.
    """

    fresh: Callable[[Tree], optax.OptState]
    copy: Callable[[TrainState], TrainState]
    step: Any
    gradient_norms: Callable[..., GradientNorms] | None
    prefix: Mapping[str, Callable[[Tree, Tree, jax.Array], jax.Array]]
    score: Callable[..., Any] | None
    flops: float
    prefix_flops: float


@dataclass(frozen=True)
class ByRows:
    """Compiled programs of one function, by the number of rows of the batch they receive.

    Attributes:
      programs: a compiled program for each number of rows.
      full: rows of a full batch.
    """

    programs: Mapping[int, Any]
    full: int

    def __call__(self, state: TrainState, frozen: Tree, batch: Batch, *rest: Any) -> Any:
        """Calls the program for batches like this one."""
        return self.programs[batch.mask.shape[-1]](state, frozen, batch, *rest)

    def cost_analysis(self) -> Any:
        """Returns XLA's cost analysis of a full batch."""
        return self.programs[self.full].cost_analysis()

    def memory_analysis(self) -> Any:
        """Returns XLA's memory analysis of a full batch."""
        return self.programs[self.full].memory_analysis()


def flops(compiled: Any) -> float:
    """Returns the floating-point operations of one call on each device, as XLA counts them."""
    return float((compiled.cost_analysis() or {}).get("flops", 0.0))


class Ahead(Generic[T]):
    """Runs a function in a background thread.

    XLA compiles without the GIL, so training in the meantime loses only the cores that it takes.

    Attributes:
      seconds: duration of the function.
    """

    def __init__(self, function: Callable[[], T]) -> None:
        self.seconds = 0.0
        self._error: BaseException | None = None
        x64 = bool(jax.numpy.zeros(0, float).dtype == "float64")  # of the calling thread

        def work() -> None:
            started = time.perf_counter()
            try:
                with jax.enable_x64(x64):
                    self._result = function()
            except BaseException as error:
                self._error = error
            self.seconds = time.perf_counter() - started

        # No daemon: at the end of Python the compiler would abort.
        self._thread = threading.Thread(target=work, name="jaxft-compile")
        self._thread.start()

    def result(self, glance: Callable[[], None] = lambda: None) -> T:
        """Waits for the function; returns its result or raises its error.

        While it waits it calls `glance`, which may raise.
        """
        while self._thread.is_alive():
            glance()
            self._thread.join(_POLL_SECONDS)
        if self._error is not None:
            raise self._error
        return self._result


def keep_programs() -> None:
    """Turns on JAX's persistent compilation cache, unless the user has set a folder for it.

    It lies under `programs` in the folder of downloaded weights. `JAX_COMPILATION_CACHE_DIR` names
    another folder, and `JAX_ENABLE_COMPILATION_CACHE=false` turns it off. Without a folder that can
    be written, as without a home, nothing is cached.
    """
    folder = cache_folder() / "programs"
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(folder))


def groups(batches: Iterable[Batch], steps_per_call: int) -> Iterator[list[Batch]]:
    """Yields up to `steps_per_call` consecutive batches at a time, all of one shape."""
    for _, same_shape in groupby(batches, lambda batch: len(batch.mask)):
        while group := list(islice(same_shape, steps_per_call)):
            yield group


def sent(devices: Devices, batches: Sequence[Batch], steps_per_call: int) -> tuple[Any, ...]:
    """Starts to send batches to the devices; returns the arguments of a compiled program.

    With `steps_per_call == 1`, returns `(batch,)`. Otherwise stacks the batches along a new leading
    axis, zero-pads it to `steps_per_call`, and returns `(stacked, count)`.
    """
    if steps_per_call == 1:
        return (devices.batch(batches[0]),)

    def stack(*arrays: np.ndarray) -> np.ndarray:
        filled = np.zeros((steps_per_call, *arrays[0].shape), arrays[0].dtype)
        np.stack(arrays, out=filled[: len(arrays)])
        return filled

    return devices.batch(jax.tree.map(stack, *batches), stacked=True), np.int32(len(batches))


def one_by_one(
    step: Callable[[T, Batch, jax.Array], tuple[T, Any]],
    carry: T,
    batches: Batch,
    count: jax.Array,
) -> tuple[T, Any]:
    """Calls `step(carry, batch, i) -> (carry, record)` for the first `count` of stacked batches.

    Returns the last carry, and the records along a leading axis; those beyond `count` are zero.
    """

    def batch(i: Any) -> Batch:
        return jax.tree.map(lambda x: x[i], batches)

    steps_per_call = len(batches.mask)
    _, record = jax.eval_shape(step, carry, batch(0), count)
    records = jax.tree.map(lambda x: jnp.zeros((steps_per_call, *x.shape), x.dtype), record)

    def body(i: jax.Array, sofar: tuple[T, Any]) -> tuple[T, Any]:
        carry, records = sofar
        carry, record = step(carry, batch(i), i)
        return carry, jax.tree.map(lambda stacked, x: stacked.at[i].set(x), records, record)

    result: tuple[T, Any] = jax.lax.fori_loop(0, count, body, (carry, records))
    return result


def apart(records: T, count: int, steps_per_call: int) -> list[T]:
    """Returns the first `count` of stacked records, or the only one."""
    if steps_per_call == 1:
        return [records]
    return [jax.tree.map(lambda x, i=i: x[i], records) for i in range(count)]


def several_steps(
    step: Callable[..., tuple[TrainState, StepRecord]], devices: Devices
) -> Callable[..., tuple[TrainState, StepRecord]]:
    """Returns `(state, frozen, batches, count, number, start) -> (state, records)`.

    It takes the first `count` of stacked batches; `number` is the global step of the first.
    """

    def steps(
        state: TrainState,
        frozen: Tree,
        batches: Batch,
        count: jax.Array,
        number: jax.Array,
        start: Tree,
    ) -> tuple[TrainState, StepRecord]:
        def one(state: TrainState, batch: Batch, i: Any) -> tuple[TrainState, StepRecord]:
            return step(state, frozen, batch, number + i, start)

        # The loop leaves the sharding of its results open.
        return devices.constrain(one_by_one(one, state, batches, count))

    return steps
