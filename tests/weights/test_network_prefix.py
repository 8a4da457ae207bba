"""A network is found among the tensors of a file that holds more than it."""

import warnings

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxft import WeightsError
from jaxft.models import create
from jaxft.weights import from_state_dict, load

MODEL = create("cifar_resnet8", num_classes=5)
ONE = np.ones((7, 7), "f4")


def under(prefix, state):
    return {prefix + name: x for name, x in state.items()}


def without_head(state):
    return {name: x for name, x in state.items() if not name.startswith("fc.")}


def head_as(prefix, state):
    return {f"{prefix}{n.removeprefix('fc.')}": x for n, x in state.items() if n.startswith("fc.")}


def found(state, head):
    """The trees, and the remarks."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trees = from_state_dict(state, MODEL, head=head, key=jax.random.key(1))
    assert len(said) <= 1
    return trees, " ".join(str(warning.message) for warning in said)


# (state dict, heads that load, what is said)
WRAPPED = {
    "loss weight": (
        lambda s: under("model.", s) | {"criterion.weight": ONE},
        ("keep", "fresh"),
        "below 'model.' in the state dict, and left 1 beside them: criterion.* (1).",
    ),
    "metric": (
        lambda s: under("net.", s) | {"val_acc.confmat": ONE},
        ("keep", "fresh"),
        "left 1 beside them: val_acc.* (1).",
    ),
    "buffers beside": (
        lambda s: under("backbone.", s) | {"mean": ONE, "std": ONE},
        ("keep", "fresh"),
        "left 2 beside them: mean (1), std (1).",
    ),
    "buffers within": (
        lambda s: s | {"mean": ONE, "std": ONE},
        ("keep", "fresh"),
        "and left 2 beside them: mean (1), std (1).",
    ),
    "normalisation in front": (
        lambda s: under("1.", s) | {"0.mean": ONE},
        ("keep", "fresh"),
        "below '1.' in the state dict, and left 1 beside them: 0.* (1).",
    ),
    "head elsewhere": (
        lambda s: under("backbone.", without_head(s)) | head_as("head.fc.", s),
        ("keep",),
        "Took the head from head.fc.bias, head.fc.weight in the state dict.",
    ),
    "head by another name": (
        lambda s: under("encoder.", without_head(s)) | head_as("classifier.", s),
        ("keep",),
        "Took the head from",
    ),
    "head at the root": (
        lambda s: under("features.", without_head(s)) | head_as("fc.", s),
        ("keep",),
        "Took the head from fc.bias, fc.weight in the state dict.",
    ),
    "projector": (
        lambda s: under("module.", without_head(s) | {"projection_head.0.weight": ONE, "p.w": ONE}),
        ("fresh",),
        "left 2 beside them: projection_head.* (1), p.* (1).",
    ),
    "predictor": (
        lambda s: under("online.", without_head(s)) | {"predictor.0.weight": ONE},
        ("fresh",),
        "left 1 beside them: predictor.* (1).",
    ),
    "copy beside the root": (
        lambda s: s | under("ema.", s),
        ("fresh",),
        "left 37 beside them: ema.* (37).",
    ),
    "counters": (
        lambda s: under("model.", s | {"bn1.num_batches_tracked": np.array(3)}) | {"x.y": ONE},
        ("keep", "fresh"),
        "left 1 beside them: x.* (1).",
    ),
}
CASES = [(name, head) for name, (_, heads, _) in WRAPPED.items() for head in heads]


@pytest.mark.parametrize(("name", "head"), CASES)
def test_prefix_of_a_wrapped_network(name, head, tensors, trees):
    wrap, _, expected = WRAPPED[name]
    (params, stats), said = found(wrap(tensors), head)
    if head == "fresh":
        fresh = MODEL.init(jax.random.key(1))[0]["fc"]
        jax.tree.map(np.testing.assert_array_equal, params, trees[0] | {"fc": fresh})
    else:
        jax.tree.map(np.testing.assert_array_equal, params, trees[0])
    jax.tree.map(np.testing.assert_array_equal, stats, trees[1])
    assert expected in said


# (state dict, head, words of the error, words that are not)
REFUSED = {
    "two encoders": (
        lambda s: under("module.", under("encoder_q.", s) | under("encoder_k.", without_head(s))),
        "fresh",
        ["below 2 prefixes: 'encoder_q.' (37 tensors), 'encoder_k.' (35", "one of them alone"],
        [],
    ),
    "no head": (
        lambda s: under("online.", without_head(s)) | {"predictor.0.weight": ONE},
        "keep",
        ["35 of the network's 37 tensors fit by name and shape below 'online.'", 'head="fresh"'],
        ["architecture"],
    ),
    "projector for a head": (
        lambda s: without_head(s) | {"projection.0.weight": ONE},
        "keep",
        ["35 of the network's 37", "projection.0.weight", 'head="fresh"'],
        ["architecture"],
    ),
    "a module between body and head": (
        lambda s: s | {"neck.weight": ONE},
        "keep",
        ["37 of the network's 37", "neck.weight [7, 7]", "from_state_dict"],
        ["architecture"],
    ),
    "a part of the body more": (
        lambda s: under("model.", s | {"layer1.0.se.weight": ONE}),
        "fresh",
        ["35 of the network's 35", "layer1.0.se.weight"],
        ["architecture"],
    ),
    "a part of the body less": (
        lambda s: under("model.", {n: x for n, x in s.items() if n != "bn1.bias"}) | {"x": ONE},
        "fresh",
        ["34 of the network's 35 tensors fit by name and shape below 'model.'", "bn1.bias [16]"],
        ["architecture"],
    ),
    "another network": (
        lambda s: under("model.", {f"{n}.x": x for n, x in s.items()}),
        "fresh",
        ["0 of the network's 35", "may hold another architecture, or this one by other names"],
        ["plainly"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_prefix_that_cannot_be_known(name, tensors):
    wrap, head, words, absent = REFUSED[name]
    with pytest.raises(WeightsError) as raised:
        found(wrap(tensors), head)
    for word in words:
        assert word in str(raised.value)
    for word in absent:
        assert word not in str(raised.value)


@pytest.mark.parametrize("prefix", ["encoder_q", "encoder_q.", "module.encoder_q."])
def test_prefix_that_the_source_names(prefix, tensors, trees, tmp_path):
    both = under("encoder_k.", {n: x * 0 for n, x in tensors.items()}) | under(
        "encoder_q.", tensors
    )
    save_file(under("module.", both | {"queue": ONE}), tmp_path / "w")
    with pytest.warns(UserWarning, match=r"below 'module.encoder_q.'.*left 38 .*module") as said:
        params, _ = load(f"{tmp_path / 'w'}#prefix={prefix}", MODEL)
    assert len(said) == 1
    jax.tree.map(np.testing.assert_array_equal, params, trees[0])
    with pytest.raises(WeightsError, match=r"begins with 'encoder\.'\. There are module"):
        load(f"{tmp_path / 'w'}#prefix=encoder", MODEL)
