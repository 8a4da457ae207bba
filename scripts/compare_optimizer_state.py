"""Compares what happens to optimizer state when a later stage unfreezes parameters.

    pip install -e . rollfast==1.3.0 equimo==2.7.0
    python scripts/compare_optimizer_state.py

Trains the head of a small network with Adam for 20 steps, then head and body for 20 more, in
float64. The reference is Adam in NumPy with a step count per parameter, as torch's Adam has for
parameters that `add_param_group` adds. The first table has a row per library and policy:

    difference  largest relative difference of a final parameter from the reference
    moments     whether the second stage starts with the head's moments
    steps       step counts of head and body at the start of the second stage
    frozen      whether the first stage leaves the body bit-identical
    arrays      number of arrays in the optimizer state of each stage

The second table has a column per kind of parameters: "yes" if the library's last policy trains them
to the reference (up to 1e-6), otherwise the error. "-": the framework is not installed.

rollfast and equimo are optional and need Python 3.12 or newer. The policies of rollfast are those
of `reconfigure_optimizer`. All but `reset_all` use `preserve_shared`, which gives the same rows as
`preserve_by_path_and_shape` and `preserve_exact_group`. `continue_optimizer_step` is short for
`continue_optimizer_step_with_new_schedule`. `adamw8` is 8-bit AdamW whose `min_size` exceeds the
size of every array, so that nothing is quantized; its state has a step count per label.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path

import jaxft
from jaxft import combine

Tree = Any
STEPS = 20
LR = 2.0**-6  # exact in float32, the type of rollfast's learning rates
LAYERS = ("body", "head")
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(8, 4)), RNG.normal(size=(8, 2))
START = {
    "body": {"kernel": RNG.normal(size=(4, 3)), "bias": RNG.normal(size=3)},
    "head": {"kernel": RNG.normal(size=(3, 2)), "bias": RNG.normal(size=2)},
}


@dataclass(frozen=True)
class Network:
    """Parameters of a framework and the network's function."""

    params: Tree
    apply: Callable[[Tree], jax.Array]  # returns the outputs for X, [8 2]

    def loss(self, params: Tree) -> jax.Array:
        """Returns the sum of squared errors, []."""
        return jnp.sum((self.apply(params) - Y) ** 2)


@dataclass(frozen=True)
class Run:
    """Parameters after each stage, and optimizer states between them."""

    params: tuple[Tree, Tree]
    states: tuple[optax.OptState, optax.OptState]  # end of stage one, start of stage two


# ---- Reference -----------------------------------------------------------------------------------


def reference() -> dict[str, np.ndarray]:
    """Returns the final parameters by path, computed with a step count per parameter."""
    p = arrays_of(START)
    m, v = ({path: np.zeros_like(x) for path, x in p.items()} for _ in range(2))
    counts = dict.fromkeys(p, 0)
    for step in range(2 * STEPS):
        for path, g in gradients(p).items():
            if step < STEPS and path.startswith("body"):
                continue
            counts[path] += 1
            m[path] = 0.9 * m[path] + 0.1 * g
            v[path] = 0.999 * v[path] + 0.001 * g**2
            m_hat = m[path] / (1 - 0.9 ** counts[path])
            v_hat = v[path] / (1 - 0.999 ** counts[path])
            p[path] = p[path] - LR * m_hat / (np.sqrt(v_hat) + 1e-8)
    return p


def gradients(p: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the gradients of the loss by path."""
    hidden = np.tanh(X @ p["body.kernel"] + p["body.bias"])
    output = 2 * (hidden @ p["head.kernel"] + p["head.bias"] - Y)
    inner = output @ p["head.kernel"].T * (1 - hidden**2)
    return {
        "body.kernel": X.T @ inner,
        "body.bias": inner.sum(0),
        "head.kernel": hidden.T @ output,
        "head.bias": output.sum(0),
    }


def arrays_of(params: Tree) -> dict[str, np.ndarray]:
    """Returns the parameters of any framework by path, kernels as [in out]."""
    arrays = {}
    for path, leaf in tree_leaves_with_path(params):
        if hasattr(leaf, "ndim"):
            name = f"{layer_of(path)}.{'kernel' if leaf.ndim == 2 else 'bias'}"
            arrays[name] = np.array(leaf.T if "weight" in keystr(path) else leaf)
    return arrays


def layer_of(path: tuple[Any, ...]) -> str:
    return "body" if "body" in keystr(path) else "head"


# ---- Networks ------------------------------------------------------------------------------------


def plain() -> Network:
    def apply(params: Tree) -> jax.Array:
        body, head = params["body"], params["head"]
        return jnp.tanh(X @ body["kernel"] + body["bias"]) @ head["kernel"] + head["bias"]

    return Network(jax.tree.map(jnp.asarray, START), apply)


def linen() -> Network:
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            hidden = nn.Dense(3, name="body", param_dtype=float)(x)
            return nn.Dense(2, name="head", param_dtype=float)(jnp.tanh(hidden))

    net = Net()
    params = net.init(jax.random.key(0), X)["params"]
    params = jax.tree.map(lambda _, x: jnp.asarray(x), params, START)
    return Network(params, lambda params: net.apply({"params": params}, X))


def nnx_module() -> Network:
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.body = nnx.Linear(4, 3, rngs=rngs)
            self.head = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(jnp.tanh(self.body(x)))

    net = Net(nnx.Rngs(0))
    state = nnx.state(net, nnx.Param)
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, START))
    nnx.update(net, state)
    return Network(net, lambda net: net(X))


def nnx_state() -> Network:
    from flax import nnx

    graph, params = nnx.split(nnx_module().params, nnx.Param)
    return Network(params, lambda params: nnx.merge(graph, params)(X))


def equinox_module() -> Network:
    import equinox as eqx

    class Net(eqx.Module):
        body: eqx.nn.Linear
        head: eqx.nn.Linear
        activation: Callable = jnp.tanh

        def __call__(self, x):
            return self.head(self.activation(self.body(x)))

    key = jax.random.key(0)
    net = Net(eqx.nn.Linear(4, 3, key=key), eqx.nn.Linear(3, 2, key=key))
    leaves = [START[layer][name] for layer in LAYERS for name in ("kernel", "bias")]
    net = eqx.tree_at(
        lambda net: [net.body.weight, net.body.bias, net.head.weight, net.head.bias],
        net,
        [jnp.asarray(x.T) for x in leaves],
    )
    return Network(net, lambda net: jax.vmap(net)(X))


def equinox_arrays() -> Network:
    import equinox as eqx

    network = equinox_module()
    arrays, functions = eqx.partition(network.params, eqx.is_inexact_array)
    return Network(arrays, lambda params: network.apply(eqx.combine(params, functions)))


NETWORKS = {
    "dict": plain,
    "Linen": linen,
    "nnx.Module": nnx_module,
    "nnx.State": nnx_state,
    "eqx.Module": equinox_module,
    "eqx.filter": equinox_arrays,
}

# ---- Libraries -----------------------------------------------------------------------------------


def train(
    tx: optax.GradientTransformation,
    params: Tree,
    state: optax.OptState,
    loss: Callable[[Tree], jax.Array],
) -> tuple[Tree, optax.OptState]:
    """Returns parameters and optimizer state after the steps of one stage."""

    @jax.jit
    def step(params: Tree, state: optax.OptState) -> tuple[Tree, optax.OptState]:
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        params, state = step(params, state)
    return params, state


def train_jaxft(network: Network, carry: str) -> Run:
    """Trains with jaxft's stages."""
    params, states, results = network.params, [], []
    stages = (
        jaxft.Stage("head", {"head": LR}, steps=STEPS),
        jaxft.Stage("all", {"head": LR, "body": LR}, steps=STEPS, carry=carry),
    )
    for plan in jaxft.plan(stages, params):
        tx = plan.transform(jaxft.Adam())
        state = tx.init(params)
        if states and plan.stage.carry == "keep":
            state = jaxft.carry(states[-1], state)
        trainable, frozen = jaxft.partition(params, plan.labels)
        trainable, end = train(
            tx, trainable, state, lambda half, frozen=frozen: network.loss(combine(half, frozen))
        )
        params = combine(trainable, frozen)
        states += [state, end]
        results.append(params)
    return Run(tuple(results), (states[1], states[2]))


def frozen_mask(layers: Tree, trained: tuple[str, ...]) -> Tree:
    return jax.tree.map(lambda layer: layer not in trained, layers)


def multi_transform(layers: Tree, trained: tuple[str, ...]) -> optax.GradientTransformation:
    adam, zero = optax.adam(LR), optax.set_to_zero()
    by_layer = {layer: adam if layer in trained else zero for layer in LAYERS}
    # A function of the labels, because optax would call an Equinox module.
    return optax.multi_transform(by_layer, lambda _: layers)


def selective_transform(layers: Tree, trained: tuple[str, ...]) -> optax.GradientTransformation:
    mask = frozen_mask(layers, trained)
    return optax.transforms.selective_transform(optax.adam(LR), freeze_mask=mask)


def freeze_and_adam(layers: Tree, trained: tuple[str, ...]) -> optax.GradientTransformation:
    return optax.chain(optax.freeze(frozen_mask(layers, trained)), optax.adam(LR))


def adam_and_freeze(layers: Tree, trained: tuple[str, ...]) -> optax.GradientTransformation:
    return optax.chain(optax.adam(LR), optax.freeze(frozen_mask(layers, trained)))


def new_state(old: optax.OptState, fresh: optax.OptState) -> optax.OptState:
    return fresh


def same_state(old: optax.OptState, fresh: optax.OptState) -> optax.OptState:
    return old


def copied_head(old: optax.OptState, fresh: optax.OptState) -> optax.OptState:
    return optax.PartitionState({**fresh.inner_states, "head": old.inner_states["head"]})


def train_optax(network: Network, transform: Callable, next_state: Callable) -> Run:
    """Trains with a transform per stage, which receives the layer of each parameter."""
    layers = tree_map_with_path(lambda path, _: layer_of(path), network.params)
    first, second = transform(layers, ("head",)), transform(layers, LAYERS)
    middle, old = train(first, network.params, first.init(network.params), network.loss)
    state = next_state(old, second.init(middle))
    final, _ = train(second, middle, state, network.loss)
    return Run((middle, final), (old, state))


def train_rollfast(
    network: Network, state_policy: str, counter_policy: str, *, adamw8: bool = False
) -> Run:
    """Trains with equimo's plans and rollfast's migration of optimizer state."""
    import equimo.finetune as eqft
    import rollfast.finetune as rfft

    options = {
        "optimizer": rfft.OptimizerConfig(base_lr=LR, weight_decay=0.0, eps=1e-8),
        "schedule": rfft.ScheduleConfig(kind="constant"),
        "gradient_policy": rfft.GradientPolicy(clip_global_norm=None, nonfinite="none"),
        "precision": rfft.PrecisionConfig(moment_dtype=jnp.float64),
    }
    if adamw8:
        options["state_quantization"] = rfft.StateQuantizationConfig(
            enabled=True, min_size=10**9, fallback_dtype=jnp.float64
        )
    head = eqft.prepare_finetune(network.params, trainable=eqft.TrainableSpec(mode="head"))
    bundle = rfft.compile_optimizer(head, **options)
    start = bundle.init(head.trainable)
    trained, old = train(
        bundle.tx, head.trainable, start, lambda half: network.loss(head.combine(half))
    )
    middle = head.combine(trained)

    full = eqft.prepare_finetune(middle, trainable=eqft.TrainableSpec(mode="full"))
    bundle, state, _ = rfft.reconfigure_optimizer(
        old_plan=head,
        old_bundle=bundle,
        old_state=old,
        new_plan=full,
        state_policy=state_policy,
        counter_policy=counter_policy,
        **options,
    )
    trained, _ = train(
        bundle.tx, full.trainable, state, lambda half: network.loss(full.combine(half))
    )
    return Run((middle, full.combine(trained)), (old, state))


# The packages of a library, and the runs of its policies.
PACKAGES = {"optax": ("optax",), "rollfast": ("rollfast", "equimo"), "jaxft": ("jaxft",)}
POLICIES: dict[str, dict[str, Callable[[Network], Run]]] = {
    "optax": {
        "multi_transform, new state": lambda net: train_optax(net, multi_transform, new_state),
        "selective_transform, new state": lambda net: train_optax(
            net, selective_transform, new_state
        ),
        "chain(adam, freeze), same state": lambda net: train_optax(
            net, adam_and_freeze, same_state
        ),
        "chain(freeze, adam), same state": lambda net: train_optax(
            net, freeze_and_adam, same_state
        ),
        "multi_transform, head state copied": lambda net: train_optax(
            net, multi_transform, copied_head
        ),
    },
    "rollfast": {
        "reset_all": lambda net: train_rollfast(net, "reset_all", "restart_schedule"),
        "restart_schedule": lambda net: train_rollfast(net, "preserve_shared", "restart_schedule"),
        "continue_global_step": lambda net: train_rollfast(
            net, "preserve_shared", "continue_global_step"
        ),
        "continue_optimizer_step": lambda net: train_rollfast(
            net, "preserve_shared", "continue_optimizer_step_with_new_schedule"
        ),
        "continue_global_step, adamw8": lambda net: train_rollfast(
            net, "preserve_shared", "continue_global_step", adamw8=True
        ),
    },
    "jaxft": {
        'carry="reset"': lambda net: train_jaxft(net, "reset"),
        'carry="keep"': lambda net: train_jaxft(net, "keep"),
    },
}

# ---- Tables --------------------------------------------------------------------------------------


def largest_difference(params: Tree, expected: dict[str, np.ndarray]) -> float:
    """Returns the largest relative difference of a parameter."""
    arrays = arrays_of(params)
    return max(float(np.max(np.abs(arrays[path] / x - 1))) for path, x in expected.items())


def adam_states(state: optax.OptState, layer: str) -> list[tuple[int, list[np.ndarray]]]:
    """Returns step count and moments of each Adam state that has moments of the layer."""

    def is_adam(node: Any) -> bool:
        return hasattr(node, "mu") and hasattr(node, "count")

    states = []
    for path, adam in tree_leaves_with_path(state, is_leaf=is_adam):
        if is_adam(adam):
            leaves = tree_leaves_with_path((adam.mu, adam.nu))
            moments = [np.asarray(x) for key, x in leaves if layer in keystr((*path, *key))]
            states += [(int(adam.count), moments)] if moments else []
    return states


def row(run: Run, expected: dict[str, np.ndarray]) -> tuple[str, ...]:
    """Returns the cells of the first table."""
    middle, final = run.params
    start, trained = (
        {path: x for path, x in arrays_of(params).items() if path.startswith("body")}
        for params in (START, middle)
    )
    is_frozen = all(x.tobytes() == trained[path].tobytes() for path, x in start.items())
    old, new = (
        [m for _, moments in adam_states(state, "head") for m in moments] for state in run.states
    )
    is_kept = all(np.array_equal(x, y) for x, y in zip(old, new, strict=True))
    counts = (
        ",".join(sorted({str(count) for count, _ in adam_states(run.states[1], layer)}))
        for layer in ("head", "body")
    )
    return (
        f"{largest_difference(final, expected):.1e}",
        "kept" if is_kept else "lost",
        "/".join(counts),
        "yes" if is_frozen else "no",
        "/".join(str(len(jax.tree.leaves(state))) for state in run.states),
    )


def accepts(train: Callable[[Network], Run], name: str, expected: dict[str, np.ndarray]) -> str:
    """Returns "yes" if the framework's parameters end as `expected`, or the kind of error."""
    try:
        run = train(NETWORKS[name]())
    except Exception as error:
        return "-" if isinstance(error, ModuleNotFoundError) else type(error).__name__
    return "yes" if largest_difference(run.params[1], expected) < 1e-6 else "no"


def is_installed(library: str) -> bool:
    return all(find_spec(package) for package in PACKAGES[library])


def tables() -> list[str]:
    """Returns the lines of both tables."""
    expected = reference()
    columns = "{:<36}{:>11}{:>9}{:>8}{:>8}{:>8}"
    lines = [columns.format("", "difference", "moments", "steps", "frozen", "arrays")]
    for library, policies in POLICIES.items():
        if not is_installed(library):
            lines.append(f"{library}: not installed")
            continue
        lines.append(", ".join(f"{package} {version(package)}" for package in PACKAGES[library]))
        for policy, train in policies.items():
            lines.append(columns.format(f"  {policy}", *row(train(plain()), expected)))
    columns = "{:<8}" + "{:>12}" * len(NETWORKS)
    lines += ["", columns.format("", *NETWORKS)]
    for library, policies in POLICIES.items():
        if is_installed(library):
            *_, train = policies.values()
            cells = [accepts(train, name, expected) for name in NETWORKS]
            lines.append(columns.format(library, *cells))
        else:
            lines.append(f"{library}: not installed")
    return lines


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    with jax.enable_x64(True):
        print("\n".join(tables()))
