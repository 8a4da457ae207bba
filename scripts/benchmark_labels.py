"""Measures how long labels, `init` and `update` take to trace, by number of groups.

    python scripts/benchmark_labels.py

The parameters are those of a transformer of 96 layers, 2,882 arrays of shape [8 8]. Each number of
groups divides the layers evenly. For each, AdamW is built with `jaxft.plan`, with
`jaxft.multi_transform` and with `optax.multi_transform` over the same labels, and compared with
one `optax.adamw` over all arrays. The columns are

    labels     seconds to build the labels
    init       seconds to trace `init`
    update     seconds to trace and lower `update`
    compile    seconds to compile `update`
    equations  equations in the jaxpr of `update`
    ratio      init, update and compile together, relative to one `optax.adamw`

All transforms are measured in turn, in each round. Times are medians over the rounds, the ratio is
the median of the rounds' ratios.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxft

LAYERS, ARRAYS_PER_LAYER = 96, 30
LR, LR_DECAY = 1e-3, 0.9
Tree = Any


class Row(NamedTuple):
    """Seconds of one transform in one round, and its number of equations."""

    labels: float
    init: float
    update: float
    compile: float
    equations: int

    @property
    def total(self) -> float:
        """Seconds without the labels, which are built once per stage."""
        return self.init + self.update + self.compile


def transformer_shapes() -> Tree:
    """Returns the shapes of the parameters."""
    array = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    layer = {f"m{i}": {"kernel": array} for i in range(ARRAYS_PER_LAYER)}
    return {"embed": array, "head": array, "layers": {str(i): dict(layer) for i in range(LAYERS)}}


def learning_rates(num_groups: int) -> dict[str, float]:
    """Returns a learning rate per pattern; at most one group per layer, embedding and head."""
    blocks = ["embed", *(f"layers.{i}" for i in range(LAYERS)), "head"]
    group_of = {block: i * num_groups // len(blocks) for i, block in enumerate(blocks)}
    return {block: LR * LR_DECAY**group for block, group in group_of.items()}


def with_plan(params: Tree, rates: dict[str, float]) -> optax.GradientTransformation:
    """Returns the transform of a stage."""
    (plan,) = jaxft.plan(jaxft.Stage("all", rates, 1), params)
    return plan.transform(jaxft.AdamW())


def with_labels(
    params: Tree, rates: dict[str, float], multi_transform: Callable[..., Any]
) -> optax.GradientTransformation:
    """Returns a `multi_transform` with a label per learning rate."""
    labels = jaxft.label(params, {block: f"{lr:.3e}" for block, lr in rates.items()})
    transforms = {f"{lr:.3e}": optax.adamw(lr) for lr in set(rates.values())}
    return multi_transform(transforms, labels)  # type: ignore[no-any-return]


def measured(build: Callable[[], optax.GradientTransformation], params: Tree) -> Row:
    """Builds a transform, traces and compiles it; clears JAX's caches before."""
    jax.clear_caches()
    times = [time.perf_counter()]

    def mark() -> None:
        times.append(time.perf_counter())

    tx = build()
    mark()
    state = jax.eval_shape(tx.init, params)
    mark()
    lowered = jax.jit(tx.update).lower(params, state, params)
    mark()
    lowered.compile()
    mark()
    equations = len(jax.make_jaxpr(tx.update)(params, state, params).eqns)
    labels, init, update, compiled = (after - before for before, after in pairwise(times))
    return Row(labels, init, update, compiled, equations)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 10, LAYERS + 2])
    parser.add_argument("--rounds", type=int, default=3, help="rounds over all transforms")
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    params = transformer_shapes()

    builders: dict[tuple[str, int], Callable[[], optax.GradientTransformation]] = {
        ("optax.adamw", 1): lambda: optax.adamw(LR)
    }
    for count in args.groups:
        rates = learning_rates(count)
        number = len(set(rates.values()))
        builders["jaxft.plan", number] = lambda rates=rates: with_plan(params, rates)
        for name, function in (
            ("jaxft.multi_transform", jaxft.multi_transform),
            ("optax.multi_transform", optax.multi_transform),
        ):
            builders[name, number] = lambda rates=rates, function=function: with_labels(
                params, rates, function
            )
    rounds = [
        {key: measured(build, params) for key, build in builders.items()}
        for _ in range(args.rounds)
    ]

    print("| transform | groups | labels | init | update | compile | equations | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for name, number in builders:
        rows = [results[name, number] for results in rounds]
        seconds = [statistics.median(column) for column in zip(*rows, strict=True)][:4]
        plain = [results["optax.adamw", 1].total for results in rounds]
        ratio = statistics.median(
            row.total / reference for row, reference in zip(rows, plain, strict=True)
        )
        cells = " | ".join(f"{x:.2f}" for x in seconds)
        print(f"| {name} | {number} | {cells} | {rows[0].equations:,} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
