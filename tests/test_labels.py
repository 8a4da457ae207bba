"""Patterns, label trees, partition and combine."""

import operator
import re
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxft
from jaxft import LabelError, PatternError
from jaxft.labels import leaf_labels, match


def tree(*names):
    """Returns nested dicts with a one-element array at each dotted name."""
    root = {}
    for name in names:
        *parents, leaf = name.split(".")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = np.zeros(1)
    return root


RESNET = tree(
    "conv1.kernel",
    "bn1.scale",
    "layer1.0.bn1.scale",
    "layer1.0.conv1.kernel",
    "layer2.0.downsample.1.scale",
    "layer2.1.bn1.scale",
    "fc.bias",
    "fc.kernel",
)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("fc", {"fc.bias", "fc.kernel"}),
        ("fc.bias", {"fc.bias"}),
        ("*", set(jaxft.paths(RESNET))),
        ("**", set(jaxft.paths(RESNET))),
        ("conv1", {"conv1.kernel"}),  # a segment from the root, not any part of the path
        ("**.conv1", {"conv1.kernel", "layer1.0.conv1.kernel"}),
        ("**.bn*", {"bn1.scale", "layer1.0.bn1.scale", "layer2.1.bn1.scale"}),
        ("layer*.0", {p for p in jaxft.paths(RESNET) if re.match(r"layer\d\.0\.", p)}),
        ("layer[2-4].1", {"layer2.1.bn1.scale"}),
        ("**.scale", {p for p in jaxft.paths(RESNET) if p.endswith("scale")}),
        (re.compile(r".*\.bias"), {"fc.bias"}),
        (lambda path, leaf: path.startswith("layer2") and leaf.ndim == 1,
         {"layer2.0.downsample.1.scale", "layer2.1.bn1.scale"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_label_selects_by_pattern(pattern, expected):
    labels = jaxft.label(RESNET, {pattern: "x"})
    chosen = zip(jaxft.paths(RESNET), jax.tree.leaves(labels), strict=True)
    assert {path for path, label in chosen if label == "x"} == expected


LAYERS = [f"layer.{i}.w" for i in range(12)]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("layer.1", [1]),  # neither layer.10 nor layer.11
        ("layer.1*", [1, 10, 11]),
        ("layer[10:]", [10, 11]),
        ("layer[:2]", [0, 1]),
        ("layer[8:11]", [8, 9, 10]),
        ("**.layer[3:4].w", [3]),
        ("laye?[3:5]", [3, 4]),
        ("layer[:]", [*range(12)]),
    ],
)
@pytest.mark.parametrize("container", ["dict", "list", "flat"])
def test_label_selects_layers_by_index(pattern, expected, container):
    items = [{"w": np.zeros(1)} for _ in range(12)]
    layers = {
        "dict": {"layer": {str(i): item for i, item in enumerate(items)}},
        "list": {"layer": items},
        "flat": {("layer", str(i), "w"): item["w"] for i, item in enumerate(items)},
    }
    params = layers[container] | (
        {("layers",): np.zeros(1), ("layer_norm", "3"): np.zeros(1)}
        if container == "flat"
        else {"layers": np.zeros(1), "layer_norm": {"3": np.zeros(1)}}
    )
    labels = jaxft.label(params, {pattern: "x"})
    named = zip(jaxft.paths(params), jax.tree.leaves(labels), strict=True)
    assert {path for path, name in named if name == "x"} == {LAYERS[i] for i in expected}


def test_label_accepts_pairs_and_keeps_their_order():
    rules = [("fc.bias", "bias"), ("fc", "head")]
    assert jaxft.label(RESNET, rules) == jaxft.label(RESNET, dict(rules))
    assert jaxft.label(RESNET, iter(rules)) == jaxft.label(RESNET, dict(rules))
    with pytest.raises(PatternError, match="'fc' is never reached: 'fc' before it"):
        jaxft.label(RESNET, [("fc", "a"), ("fc", "b")])


@pytest.mark.parametrize("rules", [["fc"], "fc", 3, None, [("fc", "a", "b")]], ids=str)
def test_label_rejects_rules_that_are_no_mapping(rules):
    with pytest.raises(LabelError, match="must be a mapping of patterns to labels"):
        jaxft.label(RESNET, rules)


def test_paths_of_keys_of_flatten_dict():
    from flax.traverse_util import flatten_dict

    nested = tree("encoder.0.kernel", "head.kernel")
    for flat in (flatten_dict(nested), flatten_dict(nested, sep="/")):
        assert jaxft.paths(flat) == jaxft.paths(nested)
        labels = jaxft.label(flat, {"head": "x"})
        assert jax.tree.leaves(labels) == ["frozen", "x"]
        assert [*labels] == [*flat]


def test_array_at_two_paths_with_different_labels_is_a_warning():
    shared = np.zeros((4, 3))
    params = {"embed": {"w": shared}, "head": {"w": shared}, "other": np.zeros(1)}
    message = "'embed.w' and 'head.w' hold the same array with different labels, 'frozen' and 'x'"
    with pytest.warns(UserWarning, match=message):
        jaxft.label(params, {"head": "x"})
    with pytest.warns(UserWarning, match=message.replace("'x'", "'head'")):
        jaxft.plan(jaxft.Stage("a", {"head": 0.1}, 1), params)
    assert jaxft.label(params, {"*": "x"})["head"] == {"w": "x"}  # no warning
    jaxft.plan(jaxft.Stage("a", {"*": 0.1}, 1), params)
    shape = jax.ShapeDtypeStruct((4, 3), np.float32)
    jaxft.label({"embed": shape, "head": shape}, {"head": "x"})


def test_label_uses_the_first_match_and_freezes_the_rest():
    labels = jaxft.label(RESNET, {"fc.bias": "bias", "fc": "head"})
    assert labels["fc"] == {"bias": "bias", "kernel": "head"}
    assert labels["conv1"] == {"kernel": "frozen"}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"layer5": "x"}, "'layer5' matches no parameter.*Did you mean 'layer"),
        ({"*": "a", "fc": "b"}, "'fc' is never reached: '\\*' before it"),
        ({"nope": "a", "*": "b", "fc": "c"}, "(?s)'nope' matches no.*'fc' is never"),
        ({"fc..bias": "x"}, "empty segment"),
        ({"": "x"}, "empty segment"),
        ({3: "x"}, "3 is no pattern"),
        ({partial(operator.is_): "x"}, "partial.* matches no parameter"),  # it has no name
    ],
    ids=str,
)
def test_label_rejects_wrong_rules(rules, message):
    with pytest.raises(PatternError, match=f"(?s){message}"):
        jaxft.label(RESNET, rules)


VIT = tree(
    "cls_token",
    *(f"blocks_{i}.{name}.kernel" for i in range(4) for name in ("attn", "fc1")),
    "head.kernel",
)
DEEP = tree("layer1.0.conv1.kernel", "layer3.5.conv1.kernel", "layer4.0.conv1.kernel", "fc.bias")


@pytest.mark.parametrize(
    ("params", "pattern", "hint"),
    [
        (DEEP, "layer5", "'layer4'?"),  # not layer3.5
        (DEEP, "layer2", "'layer1'?"),
        (DEEP, "layer3.6.conv1", "'layer3.5.conv1'?"),
        (DEEP, "layer4.0.conv2", "'layer4.0.conv1'?"),
        (DEEP, "fcc", "'fc'?"),
        (VIT, "blocks_12.attn", "'blocks_3.attn'?"),
        (VIT, "attn", "'**.attn'?"),
        (VIT, "attn.weight", "'**.attn.kernel'?"),
        (VIT, "model.head.weight", "'head.kernel'?"),
        (VIT, "blocks_3/attn", "'blocks_3.attn'?"),
        (VIT, "blocks_(2|3)", r"re.compile('blocks_(2|3)\\..*')?"),
        (VIT, r"blocks_\d+\.attn\.kernel", r"re.compile('blocks_\\d+\\.attn\\.kernel')?"),
        (VIT, "blocks_(2", "'blocks_2'?"),  # no regular expression
        ({"params": VIT}, "head", "'params.head' or to pass params['params']?"),
        ({"params": VIT, "batch_stats": tree("head.mean")}, "head", "'params.head' or to pass"),
        ({"params": VIT}, "hed", "'params.head'?"),
        ({"params": VIT}, "blocks_5", "'params.blocks_3'?"),
        ({"params": VIT}, "blocks_(2|3)", r"re.compile('.*\\.blocks_(2|3)\\..*')?"),
        ({"net": DEEP}, "fc", "'net.fc'?"),
        (tree("layer.0.w", "layer.10.w"), "layer.11", "'layer.10'?"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unmatched_pattern_error_suggests_a_pattern(params, pattern, hint):
    with pytest.raises(PatternError) as caught:
        jaxft.label(params, {pattern: "x"})
    assert str(caught.value).splitlines()[1].startswith(f"  Did you mean {hint}")


@pytest.mark.parametrize("pattern", ["blocks.2", "blocks[2]", "blocks[2:]", "blocks.2.norm"])
def test_pattern_of_a_stacked_layer_points_to_unstack(pattern):
    params = {"blocks": {"norm": np.ones((3, 4)), "fc": np.ones((3, 4, 4))}, "head": np.ones(4)}
    hint = "stack 3 layers on their first axis, pass jaxft.unstack(params, 'blocks')"
    with pytest.raises(PatternError, match=re.escape(hint)):
        jaxft.label(params, {pattern: "x"})
    with pytest.raises(PatternError, match=re.escape(hint)):
        jaxft.plan(jaxft.Stage("a", {pattern: 1.0}, 1), params)
    jaxft.label(jaxft.unstack(params, "blocks"), {pattern.replace("[2]", ".2"): "x"})


@pytest.mark.parametrize(
    ("params", "pattern"),
    [
        ({"blocks": {"a": np.ones((3, 4)), "b": np.ones((2, 4))}}, "blocks.1"),
        ({"blocks": {"a": np.ones((3, 4)), "b": np.ones(())}}, "blocks.1"),
        ({"blocks": {"a": np.ones((3, 4))}}, "blocks.3"),
        ({"blocks": {"a": np.ones((3, 4))}}, "body.1"),
    ],
    ids=["lengths differ", "scalar", "index too large", "other name"],
)
def test_pattern_of_no_stacked_layer_does_not_point_to_unstack(params, pattern):
    with pytest.raises(PatternError) as caught:
        jaxft.label(params, {pattern: "x"})
    assert "unstack" not in str(caught.value)


def test_string_with_empty_segment_may_be_a_regular_expression():
    with pytest.raises(PatternError, match=r"regular expression, pass re.compile\('\.\*head"):
        jaxft.label(VIT, {".*head.*": "x"})


def test_parameters_are_listed_below_the_common_root():
    with pytest.raises(PatternError) as caught:
        jaxft.label({"params": VIT}, {"neck": "x"})
    entries = [f"params.blocks_{i}.* (2)" for i in range(4)]
    expected = "  ".join([*entries, "params.cls_token", "params.head.* (1)"])
    assert str(caught.value).endswith(f"\n  Parameters: {expected}")
    table = jaxft.summary({"params": VIT}, jaxft.label({"params": VIT}, {"params.head": "x"}))
    where = [line.split("  ")[-1] for line in table.splitlines()[1:3]]
    others = " ".join(["params.blocks_0", *(f"params.blocks_{i}" for i in (1, 2, 3))])
    assert where == ["params.head", f"{others} params.cls_token"]


def test_summary_of_a_single_array():
    assert jaxft.summary(np.zeros(2), "x").splitlines()[1].split() == ["x", "1", "2", "100.0%"]
    assert jaxft.summary(tree("a.b"), {"a": {"b": "x"}}).splitlines()[1].endswith("a.b")


def test_unmatched_pattern_error_lists_the_parameters():
    with pytest.raises(
        PatternError, match=r"Parameters: bn1\.\* \(1\)  conv1\.\* \(1\)  fc\.\* \(2\)"
    ):
        jaxft.label(RESNET, {"head": "x"})


class Layer(NamedTuple):
    kernel: np.ndarray
    bias: np.ndarray


def test_paths_of_dicts_lists_tuples_and_haiku_names_are_equal():
    leaf = np.zeros(1)
    expected = ["block.0.bias", "block.0.kernel"]
    assert jaxft.paths({"block": {"0": {"bias": leaf, "kernel": leaf}}}) == expected
    assert jaxft.paths({"block": [{"bias": leaf, "kernel": leaf}]}) == expected
    assert jaxft.paths({"block/~/0": {"bias": leaf, "kernel": leaf}}) == expected
    assert jaxft.paths({"block": [Layer(leaf, leaf)]}) == expected[::-1]


def test_paths_of_flax_boxes_have_no_extra_segment():
    nnx = pytest.importorskip("flax.nnx")
    layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    state = nnx.state({"fc": layer}, nnx.Param)
    assert set(jaxft.paths(state)) == {"fc.kernel", "fc.bias"}
    labels = jaxft.label(state, {"fc.bias": "bias"})
    assert jax.tree.structure(labels) == jax.tree.structure(state)
    trainable, frozen = jaxft.partition(state, labels)
    assert len(jax.tree.leaves(trainable)) == len(jax.tree.leaves(frozen)) == 1


def test_partition_leaves_none_in_place_of_the_other_half():
    params = {"a": np.ones(2), "b": [np.ones(3), np.ones(4)]}
    trainable, frozen = jaxft.partition(params, {"a": "x", "b": ["frozen", "y"]})
    assert trainable["a"] is params["a"]
    assert trainable["b"] == [None, params["b"][1]]
    assert frozen["a"] is None
    assert frozen["b"] == [params["b"][0], None]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"a": "x"}, "without a label: b.0, b.1"),
        ({"a": "x", "b": ["x", "x"], "c": "x"}, "labels of no parameter: c"),
        ({"a": "x", "b": ["x", "x"], "c": None, "d": "y"}, "labels of no parameter: d"),
        ({"a": None, "b": ["x", "x"]}, "without a label: a"),
        ({"a": 1, "b": ["x", "x"]}, "must be strings, not 1 for a"),
    ],
    ids=str,
)
def test_partition_rejects_other_structures(labels, message):
    with pytest.raises(LabelError, match=message):
        jaxft.partition({"a": np.ones(2), "b": [np.ones(3), np.ones(4)]}, labels)


def test_combine_rejects_overlap():
    with pytest.raises(LabelError, match=r"b\.0 is held by 2 parts"):
        jaxft.combine({"b": [1, None]}, {"b": [2, 3]})


trees = st.recursive(
    st.integers().map(lambda i: np.array([i])),
    lambda children: (
        st.lists(children, min_size=1, max_size=3)
        | st.dictionaries(st.sampled_from("abcd"), children, min_size=1, max_size=3)
        | st.tuples(children, children)
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(trees, st.data())
def test_combine_inverts_partition(params, data):
    names = data.draw(st.lists(st.sampled_from(["frozen", "x", "y"]), min_size=8, max_size=8))
    count = len(jax.tree.leaves(params))
    labels = jax.tree.unflatten(jax.tree.structure(params), names[:count])
    assert leaf_labels(params, labels) == names[:count]
    halves = jaxft.partition(params, labels)
    whole = jaxft.combine(*halves)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (whole, params)), strict=True))


segments = st.sampled_from(["a", "b", "ab", "0", "1"])


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(["a", "b", "a*", "?", "*", "**", "[ab]", "[01]"]), min_size=1, max_size=4
    ),
    st.sets(st.lists(segments, min_size=4, max_size=4).map(".".join), min_size=1, max_size=6),
)
def test_match_agrees_with_a_regular_expression(pattern, names):
    glob = {"*": "[^.]*", "**": None, "?": "[^.]", "a*": "a[^.]*"}
    regex = "".join(r"(?:[^.]+\.)*" if s == "**" else glob.get(s, s) + r"\." for s in pattern)
    params = tree(*names)
    chosen, _ = match(params, [".".join(pattern)])
    for path, index in zip(jaxft.paths(params), chosen, strict=True):
        expected = re.match(regex, path + ".") is not None
        assert (index == 0) == expected, path


def test_summary_is_a_table():
    params = {"conv": {"kernel": np.zeros((3, 3))}, "fc": {"bias": np.zeros(3)}}
    text = jaxft.summary(params, jaxft.label(params, {"fc": "head"}))
    assert text.splitlines()[1].split() == ["head", "1", "3", "25.0%", "fc"]
    assert text.splitlines()[-1].split() == ["total", "2", "12", "100.0%"]
