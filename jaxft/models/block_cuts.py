"""Cuts a user's module into blocks at the inputs of some of its submodules.

A cut is valid if later layers depend on earlier ones only through the input of the submodule. The
jaxpr of a call shows this without running the module.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.errors import ModelError
from jaxft.jaxpr_dependence import Dependence, dependence, mark
from jaxft.labels import paths
from jaxft.models.model import Tree
from jaxft.models.norm_modes import layer
from jaxft.patterns import escape, matches_any


class InputEdits:
    """Changes the inputs of submodules during one call of a module.

    Attributes:
      by_path: function of the first positional argument, for each path of a submodule.
    """

    def __init__(self, by_path: Mapping[str, Callable[[Any], Any]] | None = None) -> None:
        self.by_path = by_path or {}
        self._open: set[str] = set()

    @contextmanager
    def entered(self, path: str, arguments: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        """Yields the arguments with which to call a submodule.

        Calls of the same submodule within this context, such as `super().__call__`, are left alone.
        """
        edit = self.by_path.get(path)
        if edit is None or path in self._open:
            yield arguments
            return
        self._open.add(path)
        try:
            yield (edit(arguments[0] if arguments else None), *arguments[1:])
        finally:
            self._open.remove(path)


def recorded(inputs: list[Any], x: Any) -> Any:
    """Appends `x` to a list and returns it."""
    inputs.append(x)
    return x


Run = Callable[[Tree, Tree, jax.Array, jax.Array | None, InputEdits], tuple[jax.Array, Tree]]
"""`(params, stats, images, key, edits) -> (logits, stats)`: calls a module.

With a key it is called in training mode, and its norm layers use batch statistics.
"""


@dataclass(frozen=True)
class Blocks:
    """The blocks of a module.

    Attributes:
      names: their names.
      begins: path of the submodule at whose input each begins; None for the images.
      patterns: patterns of the parameters of each.
      norms: index of the block of each norm layer.
    """

    names: tuple[str, ...] = ("network",)
    begins: tuple[str | None, ...] = (None,)
    patterns: tuple[tuple[str, ...], ...] = (("*",),)
    norms: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Cutter:
    """Cuts one module.

    Attributes:
      name: its name, for messages.
      run: calls the module.
      init: draws `(params, stats)`.
      shapes: shapes of params and stats.
      shape: shape of an image.
      submodules: paths of its submodules.
    """

    name: str
    run: Run
    init: Callable[[jax.Array], tuple[Tree, Tree]]
    shapes: tuple[Tree, Tree]
    shape: tuple[int, int, int]
    submodules: Sequence[str]

    def blocks(self, given: Sequence[str], head: str, dropouts: Sequence[str]) -> Blocks:
        """Returns the blocks of the module.

        Args:
          given: paths of the submodules at whose inputs blocks begin, or names of all blocks.
          head: path of the head.
          dropouts: paths of the dropout layers.

        Raises:
          ModelError: the module cannot be cut there. Without paths, it is one block instead.
        """
        begins = list(given)
        if begins[:1] in (["stem"], ["network"]):  # the first block begins at the images
            del begins[0]
        if begins[-1:] == [head] or (begins[-1:] == ["head"] and "head" not in self.submodules):
            del begins[-1]
        try:
            dropout = self._dropout_before(head, [path for path in dropouts if path not in begins])
            if dropout:
                try:
                    return self._blocks((*begins, dropout))
                except ModelError:  # such as a layer that is called several times
                    pass
            return self._blocks((*begins, head))
        except ModelError:
            if begins:
                raise
            return Blocks()

    def _blocks(self, begins: Sequence[str]) -> Blocks:
        """Returns the blocks that begin at these submodules; the last one is the head.

        A block without parameters joins the next one.
        """
        for path in begins:
            self._check_path(path)
        names = ["stem", *begins[:-1], "head"]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ModelError(f"{self.name}: two blocks are called {', '.join(sorted(repeated))}.")
        block_of: dict[int, int] = {}  # leaf of the params and stats: the first block that needs it
        for in_training in (False, True):
            traced = self._trace(begins, in_training)
            needs = self._check(begins, traced, in_training)
            for block, leaves in enumerate(needs):
                block_of |= {leaf: min(block, block_of.get(leaf, block)) for leaf in leaves}
            self._check_norms(names, needs)
        params, stats = paths(self.shapes[0]), paths(self.shapes[1])
        # A leaf that no block needs is in the first one: then no stage that trains it is wrong.
        owners = [block_of.get(leaf, 0) for leaf in range(len(params) + len(stats))]
        kept = sorted({*owners[: len(params)], len(begins)})
        joined = [next(k for k, block in enumerate(kept) if block >= owner) for owner in owners]
        if len(kept) == 1:
            return Blocks()
        starts = [None, *begins]
        return Blocks(
            tuple(names[block] for block in kept),
            tuple(starts[before + 1] for before in (-1, *kept[:-1])),
            _patterns([*params, *stats], joined, params),
            dict(zip(map(layer, stats), joined[len(params) :], strict=True)),
        )

    def _dropout_before(self, path: str, dropouts: Sequence[str]) -> str | None:
        """Returns the dropout layer whose output is the input of a submodule, if there is one."""
        inputs: dict[str, Any] = {}

        def edit(at: str) -> Callable[[Any], Any]:
            return lambda x: inputs.setdefault(at, x)

        edits = {at: edit(at) for at in (*dropouts, path)}

        def call(params: Tree, stats: Tree, images: jax.Array) -> jax.Array:
            return self.run(params, stats, images, None, InputEdits(edits))[0]

        jax.eval_shape(call, *self.shapes, self._images)
        # Without a key, dropout returns its input itself.
        before = inputs.get(path)
        return next((at for at in dropouts if at in inputs and inputs[at] is before), None)

    @property
    def _images(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((2, *self.shape), jnp.float32)

    def _check_path(self, path: str) -> None:
        if path not in self.submodules:
            similar = difflib.get_close_matches(path, self.submodules, n=1)
            hint = f"Did you mean {similar[0]!r}?  " if similar else ""
            raise ModelError(
                f"{self.name} calls no submodule {path!r}, where a block would begin.\n  {hint}"
                f"It has {', '.join(self.submodules)}"
            )

    def _trace(self, begins: Sequence[str], in_training: bool) -> Dependence:
        calls: list[str] = []

        def edit(path: str) -> Callable[[Any], Any]:
            def marked(x: Any) -> Any:
                if not isinstance(x, jax.Array):
                    raise ModelError(
                        f"{self.name}: a block cannot begin at {path!r}, because its first "
                        f"positional argument is no array: it is a {type(x).__name__}."
                    )
                calls.append(path)
                return mark(x, path)

            return marked

        def call(params: Tree, stats: Tree, images: jax.Array, key: jax.Array) -> Any:
            edits = InputEdits({path: edit(path) for path in begins})
            return self.run(params, stats, images, key if in_training else None, edits)[0]

        mode = "in training" if in_training else "in evaluation"
        try:
            jaxpr = jax.make_jaxpr(call)(*self.shapes, self._images, jax.random.key(0))
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"{self.name} fails {mode}: {type(error).__name__}: {error}"
            ) from error
        traced = dependence(jaxpr)
        order = [path for path, _ in traced.marks]
        for path in begins:
            problem = ""
            if path not in calls:
                problem = f"it is not called {mode}"
            elif path not in order:
                problem = (
                    "it is called within a transform, such as remat, scan, vmap or jit. Choose a "
                    "submodule outside of it"
                )
            elif (count := order.count(path)) > 1:
                problem = f"it is called {count} times"
            if problem:
                raise ModelError(f"{self.name}: a block cannot begin at {path!r}: {problem}.")
        if order != list(begins):
            raise ModelError(
                f"{self.name} calls its submodules in another order than blocks has: "
                f"{', '.join(order)}."
            )
        return traced

    def _check(
        self, begins: Sequence[str], traced: Dependence, in_training: bool
    ) -> list[set[int]]:
        """Returns the leaves that each block needs; raises ModelError for a wrong cut."""
        num_leaves = len(jax.tree.leaves(self.shapes))
        features = [num_leaves, *(traced.num_inputs + k for k in range(len(begins)))]
        results = [bits for _, bits in traced.marks] + [traced.outputs[0]]
        needs = []
        for block, bits in enumerate(results):
            for past in range(block):
                if bits >> features[past] & 1:
                    path = begins[past]
                    source = f"the input of {begins[past - 1]!r}" if past else "the images"
                    difference, largest = self._difference(path, in_training)
                    raise ModelError(
                        f"{self.name}: a block cannot begin at {path!r}: what follows it also "
                        f"depends on {source} by another way, such as a skip connection. Cut "
                        f"there, logits of random images change by up to {difference:.2g}; the "
                        f"largest is {largest:.2g}. Choose a submodule that all data passes."
                    )
            needs.append({leaf for leaf in range(num_leaves) if bits >> leaf & 1})
        return needs

    def _difference(self, path: str, in_training: bool) -> tuple[float, float]:
        """Returns by how much a cut changes the logits of random images, and the largest logit."""
        params, stats = self.init(jax.random.key(0))
        images = jax.random.normal(jax.random.key(1), self._images.shape)
        key = jax.random.key(2) if in_training else None
        inputs: list[jax.Array] = []
        whole, cut = (
            self.run(params, stats, x, key, InputEdits({path: edit}))[0]
            for x, edit in (
                (images, partial(recorded, inputs)),
                (jnp.zeros_like(images), lambda _: inputs[0]),
            )
        )
        return float(abs(cut - whole).max()), float(abs(whole).max())

    def _check_norms(self, names: Sequence[str], needs: Sequence[set[int]]) -> None:
        """Raises ModelError if blocks share a norm layer: only one would move its statistics."""
        params, stats = self.shapes
        for leaf, path in enumerate(paths(stats), len(paths(params))):
            users = [name for name, leaves in zip(names, needs, strict=True) if leaf in leaves]
            if len(users) > 1:
                raise ModelError(
                    f"{self.name}: the norm layer {layer(path)} is called in several "
                    f"blocks, {' and '.join(users)}: its statistics cannot belong to one of them."
                )


def _patterns(
    leaves: Sequence[str], owners: Sequence[int], params: Sequence[str]
) -> tuple[tuple[str, ...], ...]:
    """Returns the patterns of each block: modules that belong to it alone, or else leaves."""
    owners_below: dict[str, set[int]] = {}
    for path, owner in zip(leaves, owners, strict=True):
        for prefix in _prefixes(path):
            owners_below.setdefault(prefix, set()).add(owner)
    patterns: list[dict[str, None]] = [{} for _ in range(max(owners) + 1)]
    for path, owner in zip(leaves, owners, strict=True):
        shared = takewhile(lambda prefix: len(owners_below[prefix]) > 1, _prefixes(path))
        top = _prefixes(path)[len(list(shared))]
        if matches_any(pattern := escape(top), params):  # a norm layer may have none
            patterns[owner][pattern] = None
    return tuple(map(tuple, patterns))


def _prefixes(path: str) -> list[str]:
    segments = path.split(".")
    return [".".join(segments[: i + 1]) for i in range(len(segments))]
