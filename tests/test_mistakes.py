"""Error messages for mistakes with labels, stages and transforms."""

import math

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxft
from jaxft import LabelError, PatternError, RecipeError, Stage, Update

PARAMS = {name: {"kernel": jnp.ones((9, 9))} for name in ("stem", "layer4", "fc")}
LABELS = jaxft.label(PARAMS, {"fc": "head"})


def plan(*stages):
    return jaxft.plan(stages, PARAMS)


def stage(train, name="late", **fields):
    return Stage(name, train, **{"epochs": 1, **fields})


MISTAKES = {
    "typo": (
        lambda: plan(stage({"layer5": 0.1})),
        PatternError,
        r"stage 'late': pattern 'layer5' matches no parameter.\n  Did you mean 'layer4'\?  "
        r"Parameters: fc.\* \(1\)  layer4.\* \(1\)  stem.\* \(1\)",
    ),
    "shadowed pattern": (
        lambda: plan(stage({"*": 0.1, "fc": 0.2})),
        PatternError,
        r"stage 'late': pattern 'fc' is never reached: '\*' before it takes all that it matches. "
        "Put the more specific pattern first.",
    ),
    "label without a transform": (
        lambda: jaxft.multi_transform({}, LABELS),
        LabelError,
        r"labels without a transform \['head'\]",
    ),
    "transform without a label": (
        lambda: jaxft.multi_transform({"head": optax.sgd(1.0), "haed": optax.sgd(1.0)}, LABELS),
        LabelError,
        r"transforms without a label \['haed'\]",
    ),
    "reserved label": (
        lambda: jaxft.multi_transform({"head": optax.sgd(1.0), "frozen": optax.sgd(1.0)}, LABELS),
        LabelError,
        "'frozen' is reserved for parameters that do not train. Rename the label.",
    ),
    "None among the labels": (
        lambda: jaxft.multi_transform({"head": optax.sgd(1.0)}, {**LABELS, "stem": None}).init(
            PARAMS
        ),
        LabelError,
        "another structure than the parameters; without a label: stem.kernel",
    ),
    "None as a label": (
        lambda: jaxft.label(PARAMS, {"fc": None}),
        LabelError,
        "labels must be strings, not None for 'fc'",
    ),
    "None as the default label": (
        lambda: jaxft.label(PARAMS, {"fc": "head"}, default=None),
        LabelError,
        "labels must be strings, not None for the default",
    ),
    "parameters in place of labels": (
        lambda: jaxft.partition(PARAMS, PARAMS),
        LabelError,
        r"labels must be strings, not Array\(.{,30}\) for fc.kernel, Array",
    ),
    "tree of another structure": (
        lambda: jaxft.partition(PARAMS, {"stem": LABELS["stem"], "fc": LABELS["fc"]}),
        LabelError,
        r"another structure than the parameters; without a label: layer4.kernel. "
        r"Build it with jaxft.label\(params, ...\)",
    ),
    "no stages": (lambda: plan(), RecipeError, "there must be at least one stage"),
    "duplicate stage name": (
        lambda: plan(stage({"fc": 0.1}), stage({"layer4": 0.1})),
        RecipeError,
        r"stage names must be unique; \['late'\] occur more than once",
    ),
    "stage that trains nothing": (
        lambda: plan(stage({})),
        RecipeError,
        "stage 'late': it trains nothing; name a pattern and a learning rate",
    ),
    "negative rate": (
        lambda: plan(stage({"fc": -0.1})),
        RecipeError,
        "stage 'late': the learning rate of 'fc' is -0.1; it must be a positive, finite number",
    ),
    "rate of zero": (
        lambda: plan(stage({"fc": 0.0})),
        RecipeError,
        "stage 'late': the learning rate of 'fc' is 0.0; it must be a positive, finite number",
    ),
    "NaN for a rate": (
        lambda: plan(stage({"fc": Update(math.nan)})),
        RecipeError,
        "stage 'late': the learning rate of 'fc' is nan; it must be a positive, finite number",
    ),
    "rate that is no number": (
        lambda: plan(stage({"fc": "fast"})),
        RecipeError,
        "stage 'late': the learning rate of 'fc' is 'fast'",
    ),
    "rate that is a flag": (
        lambda: plan(stage({"fc": True})),
        RecipeError,
        "stage 'late': the learning rate of 'fc' is True",
    ),
    "negative decay": (
        lambda: plan(stage({"fc": Update(0.1, weight_decay=-0.1)})),
        RecipeError,
        "stage 'late': the weight_decay of 'fc' is -0.1; it must not be negative",
    ),
    "optimizer that was not called": (
        lambda: plan(stage({"fc": Update(0.1, optimizer=optax.adam)}, optimizer=optax.sgd)),
        RecipeError,
        "its optimizer is <function sgd.*>; it must be one of .*the optimizer of 'fc' is <function",
    ),
    "stage that is a string": (
        lambda: plan("late"),
        RecipeError,
        "stages must be Stage.*, not 'late'",
    ),
    "rules that are a list": (
        lambda: jaxft.label(PARAMS, ["fc"]),
        LabelError,
        r"label: the rules are \['fc'\]; they must be a mapping of patterns to labels, such as",
    ),
    "rules that are a string": (
        lambda: jaxft.label(PARAMS, "fc"),
        LabelError,
        "the rules are 'fc'",
    ),
    "rates for labels": (
        lambda: jaxft.label(PARAMS, {"fc": 1e-3}),
        LabelError,
        "labels must be strings, not 0.001 for 'fc'",
    ),
    "schedule of optax": (
        lambda: stage({"fc": 0.1}, schedule=optax.constant_schedule(1.0)),
        RecipeError,
        "its schedule is <function.*; it must be one of jaxft.schedules",
    ),
    "parameters for labels": (
        lambda: jaxft.multi_transform({"head": optax.sgd(1.0)}, PARAMS),
        LabelError,
        "labels must be strings, not ",
    ),
    "weight decay for an optax transform": (
        lambda: plan(stage({"fc": Update(0.1, weight_decay=0.1)}, optimizer=optax.identity())),
        RecipeError,
        "stage 'late': 'fc' has a weight_decay, but its optimizer is an optax transform: put the "
        "decay into that.",
    ),
    "weight decay for a default optimizer of optax": (
        lambda: plan(stage({"fc": Update(0.1, weight_decay=0.1)}))[0].transform(optax.identity()),
        RecipeError,
        "stage 'late': 'fc' has a weight_decay, but its optimizer is an optax transform: put the "
        "decay into that.",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_error_message(mistake):
    provoke, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        provoke()


def test_plan_reports_all_pattern_errors_at_once():
    with pytest.raises(PatternError) as caught:
        plan(
            stage({"fd": 0.1, "layer5": 0.1}, name="first"),
            stage({"*": 0.1, "stem": 0.1}, name="second"),
            stage({"fc": 0.1}, name="faultless"),
        )
    assert [line.split(".")[0] for line in str(caught.value).splitlines() if "stage" in line] == [
        "stage 'first': pattern 'fd' matches no parameter",
        "stage 'first': pattern 'layer5' matches no parameter",
        "stage 'second': pattern 'stem' is never reached: '*' before it takes all that it matches",
    ]


TORCH_LIKE = {
    "conv1": {"kernel": jnp.ones(2)},
    "bn1": {"scale": jnp.ones(2), "bias": jnp.ones(2)},
    "layers": [{"kernel": jnp.ones(2)}],
    "fc": {"kernel": jnp.ones(2), "bias": jnp.ones(2)},
}
LITERAL = {"layers[0]": {"kernel": jnp.ones(2)}, "what?": jnp.ones(2)}


@pytest.mark.parametrize(
    ("params", "pattern", "hints"),
    [
        (TORCH_LIKE, "fc.weight", ["fc.kernel"]),
        (TORCH_LIKE, "bn1.weight", ["bn1.scale"]),
        (TORCH_LIKE, "bn1.gamma", ["bn1.scale"]),
        (TORCH_LIKE, "**.weight", ["**.kernel", "**.scale"]),
        (TORCH_LIKE, "model.fc.weight", ["fc.kernel"]),
        (TORCH_LIKE, "params/fc/kernel", ["fc.kernel"]),
        (TORCH_LIKE, "layers[0]", ["layers.0"]),
        (TORCH_LIKE, "fc1", ["fc"]),
        (LITERAL, "layers[0]", ["layers[[]0]"]),
        (LITERAL, "layers[0].kernel", ["layers[[]0].kernel"]),
        (LITERAL, "layer[0]", ["layers[[]0]"]),
    ],
)
def test_pattern_hint_matches(params, pattern, hints):
    with pytest.raises(PatternError) as caught:
        jaxft.label(params, {pattern: "x"})
    assert f"Did you mean {' or '.join(map(repr, hints))}?" in str(caught.value)
    for hint in hints:
        assert "x" in jax.tree.leaves(jaxft.label(params, {hint: "x"}))


def test_pattern_hint_for_running_statistics():
    with pytest.raises(PatternError, match=r"Running statistics are no parameters; .*`norms`"):
        jaxft.label(TORCH_LIKE, {"bn1.running_mean": "x"})


NESTED = {"fc": {"bias": jnp.ones(2)}, "layer1": [{"bias": jnp.ones(2), "kernel": jnp.ones(2)}]}


def test_pattern_with_one_star_warns_about_deeper_parameters():
    message = r"pattern '\*.bias' selects 1 of the 2 parameters that '\*\*.bias' selects"
    with pytest.warns(UserWarning, match=message):
        jaxft.label(NESTED, {"*.bias": "x"})
    with pytest.warns(UserWarning, match=f"stage 'late': {message}"):
        (late,) = jaxft.plan([stage({"*.bias": 0.1})], NESTED)
    assert len(late.remarks) == 1


@pytest.mark.parametrize(
    "patterns",
    [("layer1.*",), ("*.0",), ("**.bias",), ("*",), ("fc.*", "*.0.*"), ("*.bias", "**.bias")],
)
def test_pattern_without_deeper_parameters_does_not_warn(patterns):
    jaxft.label(NESTED, dict.fromkeys(patterns, "x"))  # warnings are errors


def test_plan_of_a_single_stage():
    (alone,) = jaxft.plan(stage({"fc": 0.1}), PARAMS)
    assert alone.stage.name == "late"
