"""Published strategies against stages written by hand."""

import dataclasses
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxft
from jaxft import SGD, Adam, AdamW, LinearProbe, RecipeError, Stage
from jaxft.labels import FROZEN, leaf_labels, paths
from jaxft.models import create, names
from jaxft.optim.schedules import (
    Constant,
    CosineAnnealingLR,
    FastaiOneCycle,
    MultiStepLR,
    SlantedTriangular,
    Warmup,
)
from jaxft.strategies import (
    Fields,
    auto_rgn,
    bit,
    discriminative,
    full,
    gradual_unfreeze,
    layer_decay,
    linear_probe_then_finetune,
    surgical,
    ulmfit,
)

sys.path.insert(0, str(Path(__file__).parent / "models"))
import record_golden

BLOCKS = [("stem", "norm"), "body", "fc"]
MOMENTUM = SGD(momentum=0.9)
ULMFIT = {
    "schedule": SlantedTriangular(cut_frac=0.1, ratio=32.0),
    "optimizer": Adam(b1=0.7, b2=0.99),
    "restore": "last",
    "carry": "keep",
}
FASTAI = {
    "optimizer": AdamW(b1=0.9, b2=0.99, eps=1e-5, weight_decay=0.01, decay_vectors=False),
    "restore": "last",
}
RISE = FastaiOneCycle(pct_start=0.99, div=25.0, div_final=1e5, moms=(0.95, 0.85, 0.95))
CYCLE = FastaiOneCycle(pct_start=0.3, div=5.0, div_final=1e5, moms=(0.95, 0.85, 0.95))

BY_HAND = {
    "full": (
        full(0.1, epochs=3),
        [Stage("all", {"*": 0.1}, 3)],
    ),
    "layer decay": (
        layer_decay(BLOCKS, 0.8, 0.5, epochs=3),
        [Stage("all", {"fc": 0.8, "body": 0.4, "stem": 0.2, "norm": 0.2}, 3)],
    ),
    "layer decay of 1 is one rate": (
        layer_decay(BLOCKS, 0.8, 1, epochs=3),
        [Stage("all", {"fc": 0.8, "body": 0.8, "stem": 0.8, "norm": 0.8}, 3)],
    ),
    "surgical": (
        surgical(BLOCKS, "norm", 1e-3, epochs=15),
        [
            Stage(
                "norm",
                {"stem": 1e-3, "norm": 1e-3},
                15,
                optimizer=Adam(weight_decay=1e-4),
                norms="eval",
            )
        ],
    ),
    "Auto-RGN": (
        auto_rgn(["**.kernel", "fc"], 1e-3, epochs=15, clip_norm=1.0),
        [
            Stage(
                "all", {"**.kernel": 1e-3, "fc": 1e-3}, 15, optimizer=Adam(weight_decay=1e-4),
                norms="eval", auto_rgn=True, clip_norm=1.0,
            )
        ],
    ),
    "linear probe": (
        linear_probe_then_finetune(BLOCKS, 1e-4, c=(0.1, 1.0), carry="keep"),
        [
            Stage("probe", {"fc": LinearProbe((0.1, 1.0))}, carry="keep"),
            Stage(
                "all", {"*": 1e-4}, 20, CosineAnnealingLR(), MOMENTUM, norms="eval", carry="keep"
            ),
        ],
    ),
    "gradual": (
        gradual_unfreeze(BLOCKS, 1.0, epochs=2, factor=10),
        [
            Stage("fc", {"fc": 1.0}, 2, carry="keep"),
            Stage("body", {"fc": 1.0, "body": 0.1}, 2, carry="keep"),
            Stage(
                "stem+norm", {"fc": 1.0, "body": 0.1, "stem": 0.01, "norm": 0.01}, 2, carry="keep"
            ),
        ],
    ),
    "gradual, two at once": (
        gradual_unfreeze(["a", "b", "c"], 2.6, epochs=1, at_once=2),
        [
            Stage("b+c", {"c": 2.6, "b": 1.0}, 1, carry="keep"),
            Stage("a", {"c": 2.6, "b": 1.0, "a": 1 / 2.6}, 1, carry="keep"),
        ],
    ),
    "ulmfit": (
        ulmfit(["a", "b", "c"], epochs=50),
        [
            Stage("c", {"c": 0.01}, 1, **ULMFIT),
            Stage("b", {"c": 0.01, "b": 0.01 / 2.6}, 1, **ULMFIT),
            Stage("a", {"c": 0.01, "b": 0.01 / 2.6, "a": 0.01 / 6.76}, 50, **ULMFIT),
        ],
    ),
    "discriminative": (
        discriminative(BLOCKS, epochs=5, train_norms=["**.bn"]),
        [
            Stage("head", {"fc": 2e-3, "**.bn": 2e-4}, 1, RISE, **FASTAI),
            Stage(
                "all", {"fc": 1e-3, "body": 1e-4, "stem": 1e-5, "norm": 1e-5}, 5, CYCLE, **FASTAI
            ),
        ],
    ),
    "bit": (
        bit(images=20_000, augment="flip"),
        [
            Stage(
                "all", {"*": 0.003}, None,
                Warmup(500, MultiStepLR((2501, 5501, 8501), by="step"), start_factor=0.0),
                MOMENTUM, restore="last", steps=10_000, batch_size=512, mixup=0.1, augment="flip",
            )
        ],
    ),
    "fields override those of the method": (
        ulmfit(["b", "c"], epochs=2, schedule=Constant(), carry="reset"),
        [
            Stage("c", {"c": 0.01}, 1, Constant(), Adam(b1=0.7, b2=0.99), restore="last"),
            Stage(
                "b", {"c": 0.01, "b": 0.01 / 2.6}, 2, Constant(), Adam(b1=0.7, b2=0.99),
                restore="last",
            ),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("stages", "by_hand"), BY_HAND.values(), ids=BY_HAND)
def test_strategies_return_the_published_stages(stages, by_hand):
    assert type(stages) is tuple
    for stage, expected in zip(stages, by_hand, strict=True):
        assert list(stage.train) == list(expected.train)
        assert stage.train == (
            expected.train if expected.linear_probe else pytest.approx(expected.train, rel=1e-12)
        )
        assert vars(stage) | {"train": None} == vars(expected) | {"train": None}


@pytest.mark.parametrize(
    ("images", "warm", "milestones", "steps", "mixup"),
    [
        (1, 100, (150, 300, 450), 500, 0.0),
        (19_999, 100, (150, 300, 450), 500, 0.0),
        (20_000, 500, (3000, 6000, 9000), 10_000, 0.1),
        (499_999, 500, (3000, 6000, 9000), 10_000, 0.1),
        (500_000, 500, (6000, 12_000, 18_000), 20_000, 0.1),
    ],
)
def test_bit_schedule(images, warm, milestones, steps, mixup):
    """The authors' `get_lr`, except for the milestones of 500 steps."""
    (stage,) = bit(images=images)
    assert (stage.steps, stage.mixup) == (steps, mixup)
    t = np.arange(steps)
    drops = sum(milestone < t for milestone in milestones)
    expected = np.where(t < warm, 0.003 * t / warm, 0.003 / 10.0**drops)
    np.testing.assert_allclose(stage.schedule.lr_at(0.003, t, steps), expected, rtol=1e-5)


RESNET = create("resnet18")
ORDER = RESNET.block_patterns
PARAMS, _ = jax.eval_shape(RESNET.init, jax.random.key(0))
PATHS = jaxft.paths(PARAMS)
NORMS = ("**.bn*", "**.downsample.1")

# Indices of the first and last block that train in each stage: stem, layer1 to layer4, head.
ON_A_RESNET = {
    "full": (full(1.0, epochs=1), [(0, 5)]),
    "layer decay": (layer_decay(ORDER, 1.0, 0.75, epochs=1), [(0, 5)]),
    "surgical": (surgical(ORDER, "layer2", 1.0, epochs=1), [(2, 2)]),
    "linear probe": (linear_probe_then_finetune(ORDER, 1.0), [(5, 5), (0, 5)]),
    "gradual": (gradual_unfreeze(ORDER, 1.0, epochs=1), [(i, 5) for i in (5, 4, 3, 2, 1, 0)]),
    "ulmfit": (ulmfit(ORDER, epochs=1), [(i, 5) for i in (5, 4, 3, 2, 1, 0)]),
    "discriminative": (
        discriminative(["*", ("layer3", "layer4"), "fc"], epochs=1), [(5, 5), (0, 5)]
    ),
}  # fmt: skip


@pytest.mark.parametrize(("stages", "trains"), ON_A_RESNET.values(), ids=ON_A_RESNET)
def test_strategies_train_the_right_blocks_of_a_resnet(stages, trains):
    for plan, (first, last) in zip(jaxft.plan(stages, PARAMS), trains, strict=True):
        roots = {pattern for block in ORDER[first : last + 1] for pattern in block}
        expected = [path.split(".")[0] in roots for path in PATHS]
        assert [name != FROZEN for name in leaf_labels(PARAMS, plan.labels)] == expected


def test_discriminative_trains_the_norms_with_the_head():
    head, full_stage = jaxft.plan(discriminative(ORDER, epochs=1, train_norms=NORMS), PARAMS)
    trained = zip(PATHS, leaf_labels(PARAMS, head.labels), strict=True)
    vectors = [path for path in PATHS if path.endswith(("scale", "bias"))]
    assert [path for path, name in trained if name != FROZEN] == sorted(["fc.kernel", *vectors])
    assert FROZEN not in leaf_labels(PARAMS, full_stage.labels)


# A network for each kind of patterns.
_KINDS = {
    frozenset(re.sub(r"\d", "", str(patterns)) for patterns in create(name).block_patterns): name
    for name in reversed(names())
}


@pytest.mark.parametrize("name", _KINDS.values())
def test_block_patterns_cover_each_parameter_once(name):
    model = create(name)
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    assert len(model.block_patterns) == len(model.blocks)
    assert model.block_patterns[-1] == (model.head,)
    patterns = [pattern for block in model.block_patterns for pattern in block]
    covered = jax.tree.map(
        lambda *hits: len(hits) - hits.count(FROZEN),
        *(jaxft.label(params, {pattern: "hit"}) for pattern in patterns),
    )
    assert set(jax.tree.leaves(covered)) == {1}


TIMM_BLOCKS = [("conv1", "bn1"), *(f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)), "fc"]
# Scales of timm 1.0.31, from the head to the stem, at layer_decay=0.5; it leaves out the others.
TIMM_SCALES = {
    "decay": ({}, [0.5**i for i in range(10)]),
    "min_scale": ({"min_scale": 0.1}, [1.0, 0.5, 0.25, 0.125, *[0.1] * 6]),
    "no_opt_scale": ({"no_opt_scale": 0.1}, [1.0, 0.5, 0.25, 0.125]),
    "equal to no_opt_scale": ({"no_opt_scale": 0.125}, [1.0, 0.5, 0.25, 0.125]),
    "raised to no_opt_scale": (
        {"min_scale": 0.1, "no_opt_scale": 0.1},
        [1.0, 0.5, 0.25, 0.125, *[0.1] * 6],
    ),
    "raised, but below": ({"min_scale": 0.05, "no_opt_scale": 0.1}, [1.0, 0.5, 0.25, 0.125]),
}
each_timm_case = pytest.mark.parametrize(
    ("options", "scales"), TIMM_SCALES.values(), ids=TIMM_SCALES
)


@each_timm_case
def test_layer_decay_has_timm_scales(options, scales):
    (stage,) = layer_decay(TIMM_BLOCKS, 2.0, 0.5, epochs=1, **options)
    blocks = [b if isinstance(b, tuple) else (b,) for b in reversed(TIMM_BLOCKS)]
    lrs = zip(blocks, scales, strict=False)
    assert stage.train == {pattern: 2 * scale for block, scale in lrs for pattern in block}


@each_timm_case
def test_recorded_scales_are_those_of_timm(options, scales):
    if not record_golden.originals_are_here():
        pytest.skip("needs the torch extra")
    record_golden.import_torchvision()  # timm needs it
    from timm import create_model, optim

    module = create_model("resnet18")
    groups = optim.param_groups_layer_decay(module, layer_decay=0.5, **options)
    found = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    named = {name: found.get(id(p)) for name, p in module.named_parameters()}
    padded = [*scales, *[None] * (10 - len(scales))]
    for block, scale in zip(reversed(TIMM_BLOCKS), padded, strict=True):
        for pattern in block if isinstance(block, tuple) else (block,):
            assert {x for name, x in named.items() if name.startswith(f"{pattern}.")} == {scale}


ERRORS = {
    "no blocks": (lambda: surgical([], "fc", 1.0, epochs=1), "surgical: blocks is []"),
    "one string": (lambda: layer_decay("fc", 1.0, 0.5, epochs=1), "blocks is 'fc'; it must be 2"),
    "empty block": (lambda: ulmfit(["a", ()], epochs=1), "blocks is ['a', ()]; it must be 2 or"),
    "twice": (lambda: ulmfit(["fc", ("a", "fc")], epochs=1), "blocks has 'fc' more than once"),
    "no such block": (
        lambda: surgical(["a", "fc"], "b", 1.0, epochs=1),
        "surgical: block 'b' is none of blocks ['a', 'fc']",
    ),
    "one block to decay": (lambda: layer_decay(["a"], 1.0, 0.5, epochs=1), "layer_decay: blocks"),
    "one block to probe": (
        lambda: linear_probe_then_finetune(["a"], 1.0),
        "linear_probe_then_finetune: blocks is ['a']; it must be 2 or more",
    ),
    "one block to unfreeze": (
        lambda: gradual_unfreeze(["a"], 1.0, epochs=1),
        "gradual_unfreeze: blo",
    ),
    "one slice": (lambda: discriminative(["a"], epochs=1), "discriminative: blocks is ['a']"),
    "decay 0": (lambda: layer_decay(BLOCKS, 1.0, 0, epochs=1), "decay is 0; it must be above 0"),
    "decay 1.1": (lambda: layer_decay(BLOCKS, 1.0, 1.1, epochs=1), "decay is 1.1; it must be abo"),
    "scales": (
        lambda: layer_decay(BLOCKS, 1.0, 0.5, epochs=1, min_scale=-0.1, no_opt_scale=0.0),
        "min_scale is -0.1; it must be from 0 to 1; no_opt_scale is 0.0; it must be above 0 and",
    ),
    "factor": (lambda: ulmfit(BLOCKS, epochs=1, factor=0.4), "factor is 0.4; it must be at least"),
    "at once": (
        lambda: gradual_unfreeze(BLOCKS, 1.0, epochs=1, at_once=0),
        "at_once is 0; it must be at least 1",
    ),
    "slice": (
        lambda: discriminative(BLOCKS, float("nan"), -1.0, epochs=1),
        "low is nan; it must be positive and finite; high is -1.0; it must be positive and finite",
    ),
    "no images": (lambda: bit(images=0), "bit: images is 0; it must be at least 1."),
    "epochs": (lambda: full(1.0, epochs=0), "stage 'all': it has 0 epochs"),
    "epochs of the last stage": (lambda: ulmfit(BLOCKS, epochs=0), "'stem+norm': it has 0 epochs"),
    "head epochs": (
        lambda: discriminative(BLOCKS, epochs=1, head_epochs=0),
        "stage 'head': it has 0 epochs",
    ),
    "rate": (lambda: gradual_unfreeze(BLOCKS, -1.0, epochs=1), "the learning rate of 'fc' is -1.0"),
    "all at once": (
        lambda: layer_decay(["a", "a"], 1.0, 2, epochs=1),
        "layer_decay: decay is 2; it must be above 0 and at most 1; blocks has 'a' more than once.",
    ),
}


@pytest.mark.parametrize(("build", "message"), ERRORS.values(), ids=ERRORS)
def test_strategies_reject_wrong_arguments(build, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        build()


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "wide_resnet50_2"])
def test_auto_rgn_trains_the_tensors_of_its_authors(name):
    """All tensors without "bn" in their torch names, among them `downsample.1`."""
    params, _ = jax.eval_shape(create(name).init, jax.random.key(0))
    (stage,) = jaxft.plan(auto_rgn(["**.kernel", "**.downsample", "fc"], 1e-3, epochs=1), params)
    labelled = zip(paths(params), leaf_labels(params, stage.labels), strict=True)
    trained = {path for path, label in labelled if label != FROZEN}
    assert trained == {path for path in paths(params) if "bn" not in path}
    assert {"fc.bias", "conv1.kernel", "layer2.0.downsample.1.scale"} <= trained


def test_fields_are_those_of_a_stage():
    """A static type cannot be derived from `Stage`, so the two lists are compared here."""
    names = [field.name for field in dataclasses.fields(Stage)]
    assert sorted(Fields.__annotations__) == sorted({*names} - {"name", "train", "epochs"})
