"""A Flax Linen module of the user's own as a `Model`."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike

from jaxft.errors import ModelError
from jaxft.models.model import NormMode, Tree
from jaxft.models.user_model import OwnModel, check_values, rows_of

_COLLECTIONS = {"params", "batch_stats"}


@dataclass(frozen=True)
class Linen(OwnModel):
    """A Linen module as a network; see `OwnModel` for what else to say.

        model = Linen(CNN(), shape=(32, 32, 3), head="Dense_1")
        params, stats = model.init(jax.random.key(0))  # or those of your variables

    `params` and `stats` are the module's collections `params` and `batch_stats`, with the paths
    that the module gives them: `Conv_0.kernel`.

    Raises ModelError for a module that has other collections, that keeps running statistics
    elsewhere than in `nn.BatchNorm`, or whose output is not logits.
    """

    module: nn.Module = field(hash=False)  # a module whose fields cannot be hashed serves as well

    def __post_init__(self) -> None:
        if not isinstance(self.module, nn.Module):
            given = self.module.__name__ if isinstance(self.module, type) else None
            kind = f"the class {given}" if given else f"a {type(self.module).__name__}"
            call = f": call it, {given}(...)" if given else ""
            raise ModelError(f"Linen takes a flax.linen module, not {kind}{call}.")
        super().__post_init__()

    @property
    def name(self) -> str:
        """The module's class."""
        return type(self.module).__name__

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Fresh `(params, stats)`, bit for bit those of `module.init(key, ...)`."""
        return self._init(key, _Governor({}, None, None))

    def _init(self, key: jax.Array, governor: "_Governor") -> tuple[Tree, Tree]:
        images = jnp.zeros((1, *self.shape))
        with nn.intercept_methods(governor):
            variables = self.module.init(key, images, method=self._method(trains=False))
        if others := sorted(variables.keys() - _COLLECTIONS):
            raise ModelError(
                f"{self.name} also has the collections {', '.join(others)}: only params and "
                "batch_stats are trained, saved and resumed. Without others (caches, losses that "
                "are sown) it can serve."
            )
        variables = nn.meta.unbox(variables)
        return variables.get("params", {}), variables.get("batch_stats", {})

    def _run(
        self,
        params: Tree,
        stats: Tree,
        images: jax.Array,
        modes: Mapping[str, NormMode],
        mask: ArrayLike | None,
        key: jax.Array | None,
    ) -> tuple[jax.Array, Tree]:
        # Streams of other names than dropout fall back on that of `params`.
        rngs = {} if key is None else {"dropout": key, "params": jax.random.fold_in(key, 1)}
        with nn.intercept_methods(_Governor(modes, mask, key)):
            logits, moved = self.module.apply(
                {"params": params, "batch_stats": stats},
                images,
                rngs=rngs,
                mutable=["batch_stats"],
                method=self._method(trains=key is not None),
            )
        return logits, moved.get("batch_stats", {})

    def _batch_norms(self) -> set[str]:
        governor = _Governor({}, None, None)
        jax.eval_shape(lambda key: self._init(key, governor), jax.random.key(0))
        return governor.seen

    def _method(self, *, trains: bool) -> Callable[[nn.Module, jax.Array], jax.Array]:
        return lambda module, images: self.call(module, images, trains)


class _Governor:
    """Intercepts the calls of batch norms and dropouts: which statistics, which rows, whether.

    A layer whose mode is not given uses the running statistics. `seen` are the norms' paths.
    """

    def __init__(
        self, modes: Mapping[str, NormMode], mask: ArrayLike | None, key: jax.Array | None
    ) -> None:
        self.modes, self.mask, self.key = modes, mask, key
        self.seen: set[str] = set()

    def __call__(
        self, method: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        """As `nn.intercept_methods` calls it."""
        layer, takes = context.module, inspect.signature(context.orig_method).parameters
        # A subclass that has a call of its own comes by again when that calls its base's.
        if context.method_name != "__call__":
            return method(*args, **kwargs)
        if isinstance(layer, nn.BatchNorm) and "mask" in takes:
            path = ".".join(layer.path)
            self.seen.add(path)
            # What the layer says of itself must not contradict what it is told. It is bound to
            # this one call, so that nobody else sees it changed.
            object.__setattr__(layer, "use_running_average", None)
            return self._normalize(path, method, *args, **kwargs)
        if isinstance(layer, nn.Dropout) and "deterministic" in takes and self.key is None:
            object.__setattr__(layer, "deterministic", None)
            return method(*args[:1], **{**kwargs, "deterministic": True})
        return method(*args, **kwargs)

    def _normalize(
        self,
        path: str,
        method: Any,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        running = self.modes.get(path, "running") == "running"
        if not running:
            check_values(path, x)
        return method(x, running, mask=rows_of(path, x, self.mask, mask))
