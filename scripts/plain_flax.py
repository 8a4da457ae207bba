"""A plain ResNet-50 in Flax linen with optax, the reference of `benchmark.py --topology`.

The network is that of Flax's ImageNet example with torchvision's strides and paddings. The step is
what an experienced user would write for one stage of training: gradients of the parameters that
train, statistics of norm layers where they train or everywhere, SGD with momentum per group.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from jaxft.devices import Devices

Tree = Any
BLOCKS = ("stem", "layer1", "layer2", "layer3", "layer4")
LR = {"fc": 1e-3, "layer4": 1e-4, "rest": 1e-5}
TRAINS = {"head": ("fc",), "late": ("fc", "layer4"), "all": ("fc", "layer4", "rest")}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Bottleneck(nn.Module):
    """Residual block of three convolutions."""

    features: int
    conv: Any
    norm: Any
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to `[b h w c]`."""
        shortcut = x
        y = nn.relu(self.norm(name="bn1")(self.conv(self.features, (1, 1), name="conv1")(x)))
        y = self.conv(self.features, (3, 3), self.strides, padding=[(1, 1)] * 2, name="conv2")(y)
        y = nn.relu(self.norm(name="bn2")(y))
        y = self.norm(name="bn3")(self.conv(self.features * 4, (1, 1), name="conv3")(y))
        if shortcut.shape != y.shape:
            shortcut = self.conv(self.features * 4, (1, 1), self.strides, name="down")(x)
            shortcut = self.norm(name="down_bn")(shortcut)
        return nn.relu(shortcut + y)


class ResNet50(nn.Module):
    """ResNet-50, with running statistics in some blocks.

    Attributes:
      running: blocks whose norm layers use running statistics.
      num_classes: number of logits.
      dtype: type of the computation.
      remat: whether the backward pass computes the blocks again.
    """

    running: tuple[str, ...]
    num_classes: int
    dtype: Any
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits `[b k]` of normalised images `[b h w 3]`."""
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)

        def norm(block: str) -> Any:
            is_running = block in self.running
            return partial(
                nn.BatchNorm, use_running_average=is_running, momentum=0.9, dtype=self.dtype
            )

        x = conv(64, (7, 7), (2, 2), padding=[(3, 3)] * 2, name="conv1")(x.astype(self.dtype))
        x = nn.relu(norm("stem")(name="bn1")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        block = nn.remat(Bottleneck) if self.remat else Bottleneck
        for layer, (name, count) in enumerate(zip(BLOCKS[1:], (3, 4, 6, 3), strict=True)):
            for i in range(count):
                strides = (2, 2) if layer and not i else (1, 1)
                module = block(64 * 2**layer, conv, norm(name), strides, name=f"{name}_{i}")
                x = module(x)
        return nn.Dense(self.num_classes, name="fc")(x.mean((1, 2)))


def plain_step(
    stage: str,
    *,
    batch_statistics: bool,
    batch_size: int,
    devices: Devices,
    num_classes: int = 2,
    dtype: Any = jnp.bfloat16,
    remat: bool = False,
    image_size: int = 224,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns a jitted training step and the shapes of its arguments.

    Args:
      stage: `head`, `late` or `all`.
      batch_statistics: whether all norm layers use statistics of the batch; otherwise only those of
        the blocks that train do.
      batch_size: images of a step.
      devices: where it runs.
      num_classes: number of logits.
      dtype: type of the computation.
      remat: whether the backward pass computes the blocks again.
      image_size: side of the images.
    """
    training = {"head": (), "late": ("layer4",), "all": BLOCKS}[stage]
    running = tuple(b for b in BLOCKS if not batch_statistics and b not in training)
    net = ResNet50(running, num_classes, dtype, remat)
    images = jax.ShapeDtypeStruct((batch_size, image_size, image_size, 3), jnp.uint8)
    variables = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, *images.shape[1:])))
    params, stats = variables["params"], variables["batch_stats"]

    def group(path: Any, _: Any) -> str:
        name = path[0].key.partition("_")[0]
        return name if name in LR else "rest"

    groups = jax.tree_util.tree_map_with_path(group, params)
    labels = jax.tree.map(lambda name: name if name in TRAINS[stage] else "frozen", groups)
    rules = {name: optax.sgd(LR[name], momentum=0.9) for name in TRAINS[stage]}
    tx = optax.multi_transform({**rules, "frozen": optax.set_to_zero()}, labels)

    def half(tree: Tree, trains: bool) -> Tree:
        return jax.tree.map(
            lambda x, name: x if (name != "frozen") == trains else None, tree, labels
        )

    def loss(trainable: Tree, frozen: Tree, stats: Tree, batch: Tree) -> tuple[jax.Array, Any]:
        whole = jax.tree.map(
            lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda x: x is None
        )
        pixels, targets = batch
        normalised = (pixels.astype(jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(STD)
        logits, updated = net.apply(
            {"params": whole, "batch_stats": stats}, normalised, mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        hits = jnp.sum(logits.argmax(-1) == targets)
        return losses.mean(), (updated.get("batch_stats", stats), hits)

    def step(state: Tree, batch: Tree) -> tuple[Tree, Tree]:
        params, stats, opt_state = state
        trainable, frozen = half(params, True), half(params, False)
        (mean, (stats, hits)), grads = jax.value_and_grad(loss, has_aux=True)(
            trainable, frozen, stats, batch
        )
        grads = jax.tree.map(
            lambda g, p: jnp.zeros_like(p) if g is None else g,
            grads,
            params,
            is_leaf=lambda x: x is None,
        )
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), (mean, hits)

    state = devices.abstract((params, stats, jax.eval_shape(tx.init, params)))
    targets = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return jax.jit(step, donate_argnums=0), (state, devices.abstract_batch((images, targets)))
