"""A Flax Linen module as a `Model`."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike

from jaxft.errors import ModelError
from jaxft.models.block_cuts import InputEdits
from jaxft.models.model import NormMode, Tree
from jaxft.models.norm_modes import check_batch_statistics, statistics_mask
from jaxft.models.user_model import UserModel

_COLLECTIONS = {"params", "batch_stats"}


@dataclass(frozen=True)
class Linen(UserModel):
    """Wraps a Linen module as a network; `UserModel` describes the other arguments.

    `params` and `stats` are the module's collections `params` and `batch_stats`, with the module's
    paths, such as `Conv_0.kernel`.

    Attributes:
      module: the module.

    Raises:
      ModelError: if the module has other collections, keeps running statistics elsewhere than in
        `nn.BatchNorm`, or does not return logits.

    Example:
        model = Linen(CNN(), shape=(32, 32, 3), head="Dense_1", blocks=("ResBlock_0", "ResBlock_2"))
        model.blocks  # ("stem", "ResBlock_0", "ResBlock_2", "head")
        params, stats = model.init(jax.random.key(0))
    """

    module: nn.Module = field(hash=False)  # so that its fields need not be hashable

    def __post_init__(self) -> None:
        if not isinstance(self.module, nn.Module):
            class_name = self.module.__name__ if isinstance(self.module, type) else None
            kind = f"the class {class_name}" if class_name else f"a {type(self.module).__name__}"
            hint = f": create an instance, {class_name}(...)" if class_name else ""
            raise ModelError(f"Linen takes a flax.linen module, not {kind}{hint}.")
        super().__post_init__()

    @property
    def name(self) -> str:
        """Name of the module's class."""
        return type(self.module).__name__

    def _init(self, key: jax.Array, interceptor: "_Interceptor | None" = None) -> tuple[Tree, Tree]:
        images = jnp.zeros((1, *self.shape))
        with nn.intercept_methods(interceptor or _Interceptor()):
            variables = self.module.init(key, images, method=self._method(is_training=False))
        if others := sorted(variables.keys() - _COLLECTIONS):
            raise ModelError(
                f"{self.name} also has the collections {', '.join(others)}: only params and "
                "batch_stats are trained, saved and resumed. Remove the other collections "
                "(caches, sown losses) from the module."
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
        edits: InputEdits,
    ) -> tuple[jax.Array, Tree]:
        # Flax draws from the stream `params` if a module asks for a stream that is not given.
        rngs = {} if key is None else {"dropout": key, "params": jax.random.fold_in(key, 1)}
        with nn.intercept_methods(_Interceptor(modes, mask, key, edits)):
            logits, updated = self.module.apply(
                {"params": params, "batch_stats": stats},
                images,
                rngs=rngs,
                mutable=["batch_stats"],
                method=self._method(is_training=key is not None),
            )
        return logits, updated.get("batch_stats", {})

    def _submodules(self, kind: tuple[type, ...] = (object,)) -> list[str]:
        return [path for path, layer in self._called.items() if issubclass(layer, kind)]

    @cached_property
    def _called(self) -> dict[str, type[nn.Module]]:
        """Classes of the submodules that are called, by path."""
        interceptor = _Interceptor()
        jax.eval_shape(lambda key: self._init(key, interceptor), jax.random.key(0))
        return interceptor.called

    def _method(self, *, is_training: bool) -> Callable[[nn.Module, jax.Array], jax.Array]:
        return lambda module, images: self.call(module, images, is_training)


class _Interceptor:
    """Intercepts calls of submodules, for `nn.intercept_methods`.

    Sets the statistics and the mask of each batch norm layer, disables dropout if there is no key,
    and edits inputs. A batch norm layer without a mode uses its running statistics.

    Attributes:
      called: classes of the submodules that were called, by path.
    """

    def __init__(
        self,
        modes: Mapping[str, NormMode] = MappingProxyType({}),
        mask: ArrayLike | None = None,
        key: jax.Array | None = None,
        edits: InputEdits | None = None,
    ) -> None:
        self.modes, self.mask, self.key, self.edits = modes, mask, key, edits or InputEdits()
        self.called: dict[str, type[nn.Module]] = {}

    def __call__(
        self, method: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        """Calls a submodule's method."""
        path = ".".join(context.module.path)
        if context.method_name != "__call__" or not path:
            return method(*args, **kwargs)
        self.called.setdefault(path, type(context.module))
        with self.edits.entered(path, args) as edited:
            return self._call(path, method, edited, kwargs, context)

    def _call(
        self, path: str, method: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        """Calls a submodule, with other arguments if it is a batch norm or a dropout."""
        layer, parameters = context.module, inspect.signature(context.orig_method).parameters
        # The call of a subclass may lack the parameter tested below. It is left alone: the call
        # of its base class is intercepted.
        if isinstance(layer, nn.BatchNorm) and "mask" in parameters:
            # The layer's field must not contradict the argument. The layer is bound to this one
            # call, so nothing else sees the change.
            object.__setattr__(layer, "use_running_average", None)
            if self.modes.get(path) == "batch_replace":
                object.__setattr__(layer, "momentum", 0.0)  # Flax's weight of the old statistics
            return self._batch_norm(path, method, *args, **kwargs)
        if isinstance(layer, nn.Dropout) and "deterministic" in parameters and self.key is None:
            object.__setattr__(layer, "deterministic", None)
            return method(*args[:1], **{**kwargs, "deterministic": True})
        return method(*args, **kwargs)

    def _batch_norm(
        self,
        path: str,
        method: Any,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        use_running = self.modes.get(path, "running") == "running"
        if not use_running:
            check_batch_statistics(path, x)
        return method(x, use_running, mask=statistics_mask(path, x, self.mask, mask))
