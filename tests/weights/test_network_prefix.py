"""Networks below a prefix, in files that hold more than the network."""

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


def add_prefix(prefix, state):
    return {prefix + name: x for name, x in state.items()}


def without_head(state):
    return {name: x for name, x in state.items() if not name.startswith("fc.")}


def rename_head(prefix, state):
    return {f"{prefix}{n.removeprefix('fc.')}": x for n, x in state.items() if n.startswith("fc.")}


def load_with_remarks(state, head):
    """Returns the trees and the remarks."""
    with warnings.catch_warnings(record=True) as issued:
        warnings.simplefilter("always")
        trees = from_state_dict(state, MODEL, head=head, key=jax.random.key(1))
    assert len(issued) <= 1
    return trees, " ".join(str(warning.message) for warning in issued)


# (state dict, heads that load, text in the remarks)
WRAPPED = {
    "loss weight": (
        lambda s: add_prefix("model.", s) | {"criterion.weight": ONE},
        ("keep", "fresh"),
        "below 'model.' in the state dict, and ignored the rest (1): criterion.* (1).",
    ),
    "metric": (
        lambda s: add_prefix("net.", s) | {"val_acc.confmat": ONE},
        ("keep", "fresh"),
        "ignored the rest (1): val_acc.* (1).",
    ),
    "buffers outside": (
        lambda s: add_prefix("backbone.", s) | {"mean": ONE, "std": ONE},
        ("keep", "fresh"),
        "ignored the rest (2): mean (1), std (1).",
    ),
    "buffers inside": (
        lambda s: s | {"mean": ONE, "std": ONE},
        ("keep", "fresh"),
        "and ignored the rest (2): mean (1), std (1).",
    ),
    "normalisation in front": (
        lambda s: add_prefix("1.", s) | {"0.mean": ONE},
        ("keep", "fresh"),
        "below '1.' in the state dict, and ignored the rest (1): 0.* (1).",
    ),
    "head elsewhere": (
        lambda s: add_prefix("backbone.", without_head(s)) | rename_head("head.fc.", s),
        ("keep",),
        "Loaded the head from head.fc.bias, head.fc.weight in the state dict.",
    ),
    "head by another name": (
        lambda s: add_prefix("encoder.", without_head(s)) | rename_head("classifier.", s),
        ("keep",),
        "Loaded the head from",
    ),
    "head at the root": (
        lambda s: add_prefix("features.", without_head(s)) | rename_head("fc.", s),
        ("keep",),
        "Loaded the head from fc.bias, fc.weight in the state dict.",
    ),
    "projector": (
        lambda s: add_prefix(
            "module.", without_head(s) | {"projection_head.0.weight": ONE, "p.w": ONE}
        ),
        ("fresh",),
        "ignored the rest (2): projection_head.* (1), p.* (1).",
    ),
    "predictor": (
        lambda s: add_prefix("online.", without_head(s)) | {"predictor.0.weight": ONE},
        ("fresh",),
        "ignored the rest (1): predictor.* (1).",
    ),
    "copy next to the root": (
        lambda s: s | add_prefix("ema.", s),
        ("fresh",),
        "ignored the rest (37): ema.* (37).",
    ),
    "counters": (
        lambda s: add_prefix("model.", s | {"bn1.num_batches_tracked": np.array(3)}) | {"x.y": ONE},
        ("keep", "fresh"),
        "ignored the rest (1): x.* (1).",
    ),
}
CASES = [(name, head) for name, (_, heads, _) in WRAPPED.items() for head in heads]


@pytest.mark.parametrize(("name", "head"), CASES)
def test_find_prefix_of_a_wrapped_network(name, head, tensors, trees):
    wrap, _, expected = WRAPPED[name]
    (params, stats), remarks = load_with_remarks(wrap(tensors), head)
    if head == "fresh":
        fresh = MODEL.init(jax.random.key(1))[0]["fc"]
        jax.tree.map(np.testing.assert_array_equal, params, trees[0] | {"fc": fresh})
    else:
        jax.tree.map(np.testing.assert_array_equal, params, trees[0])
    jax.tree.map(np.testing.assert_array_equal, stats, trees[1])
    assert expected in remarks


# (state dict, head, texts in the error, texts that are not)
REFUSED = {
    "two encoders": (
        lambda s: add_prefix(
            "module.", add_prefix("encoder_q.", s) | add_prefix("encoder_k.", without_head(s))
        ),
        "fresh",
        ["below 2 prefixes: 'encoder_q.' (37 tensors), 'encoder_k.' (35", "one of them alone"],
        [],
    ),
    "no head": (
        lambda s: add_prefix("online.", without_head(s)) | {"predictor.0.weight": ONE},
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
        lambda s: add_prefix("model.", s | {"layer1.0.se.weight": ONE}),
        "fresh",
        ["35 of the network's 35", "layer1.0.se.weight"],
        ["architecture"],
    ),
    "a part of the body less": (
        lambda s: (
            add_prefix("model.", {n: x for n, x in s.items() if n != "bn1.bias"}) | {"x": ONE}
        ),
        "fresh",
        ["34 of the network's 35 tensors fit by name and shape below 'model.'", "bn1.bias [16]"],
        ["architecture"],
    ),
    "another network": (
        lambda s: add_prefix("model.", {f"{n}.x": x for n, x in s.items()}),
        "fresh",
        ["0 of the network's 35", "may hold another architecture, or this one by other names"],
        ["plainly"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_find_prefix_errors(name, tensors):
    wrap, head, texts, absent = REFUSED[name]
    with pytest.raises(WeightsError) as raised:
        load_with_remarks(wrap(tensors), head)
    for text in texts:
        assert text in str(raised.value)
    for text in absent:
        assert text not in str(raised.value)


@pytest.mark.parametrize("prefix", ["encoder_q", "encoder_q.", "module.encoder_q."])
def test_select_prefix_that_the_source_names(prefix, tensors, trees, tmp_path):
    both = add_prefix("encoder_k.", {n: x * 0 for n, x in tensors.items()}) | add_prefix(
        "encoder_q.", tensors
    )
    save_file(add_prefix("module.", both | {"queue": ONE}), tmp_path / "w")
    with pytest.warns(
        UserWarning, match=r"below 'module.encoder_q.'.*ignored the rest \(38\): module"
    ) as issued:
        params, _ = load(f"{tmp_path / 'w'}#prefix={prefix}", MODEL)
    assert len(issued) == 1
    jax.tree.map(np.testing.assert_array_equal, params, trees[0])
    with pytest.raises(WeightsError, match=r"begins with 'encoder\.'\. There are module"):
        load(f"{tmp_path / 'w'}#prefix=encoder", MODEL)
