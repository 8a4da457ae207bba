"""The training step: frozen leaves stay bit-identical, and FLOPs fall with them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import SGD, Adam, Stage, models, partition, plan
from jaxft.data import Batch, Preprocessing
from jaxft.labels import combine, leaf_labels
from jaxft.models.norm_modes import norm_modes
from jaxft.train.eval_step import eval_step
from jaxft.train.metrics import EpochMetrics, Metrics, Score
from jaxft.train.train_step import StepConfig, TrainState, train_step

MODEL = models.create("cifar_resnet8", num_classes=5)
PREPROCESSING = Preprocessing(image_size=8, resize_size=None)
KEY = jax.random.key(0)
STAGES = [
    Stage("head", {"fc": 0.1}, 1),
    Stage("late", {"fc": 0.1, "layer3": 0.01}, 1),
    Stage("all", {"fc": 0.1, "layer3": 0.01, "*": 0.001}, 1),
]


def batch(size=8, real=None, seed=0, side=8):
    rng = np.random.default_rng(seed)
    real = size if real is None else real
    image = rng.integers(0, 256, (size, side, side, 3), np.uint8)
    target = rng.integers(0, 5, size).astype(np.int32)
    mask = np.arange(size) < real
    image[~mask], target[~mask] = 0, 0
    return Batch(image, target, mask)


@pytest.fixture(scope="module")
def start():
    return MODEL.init(jax.random.key(0))


def prepare(start, stage, optimizer):
    params, stats = start
    stage_plan = plan(STAGES, params)[stage]
    norms = norm_modes(params, stats, stage_plan.labels)
    transform = stage_plan.transform(optimizer)
    trainable, frozen = partition(params, stage_plan.labels)
    state = jax.tree.map(jnp.copy, TrainState(trainable, stats, transform.init(params)))
    return (
        train_step(
            StepConfig(model=MODEL, transform=transform, preprocessing=PREPROCESSING, norms=norms)
        ),
        state,
        frozen,
        stage_plan,
    )


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [SGD(momentum=0.9, weight_decay=0.1), Adam()], ids=repr)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_step_keeps_frozen_leaves_bit_identical(stage, optimizer, start):
    params, stats = start
    step, state, frozen, stage_plan = prepare(start, stage, optimizer)
    for seed in range(3):
        state, _ = step(state, frozen, batch(seed=seed), KEY)
    after = combine(state.trainable, frozen)
    named = zip(
        leaf_labels(params, stage_plan.labels),
        jax.tree.leaves(params),
        jax.tree.leaves(after),
        strict=True,
    )
    for label, old, new in named:
        assert np.array_equal(old, new) == (label == "frozen")
    trained_norms = {
        layer
        for layer, mode in norm_modes(params, stats, stage_plan.labels).items()
        if mode == "batch"
    }
    assert {0: 0, 1: 2, 2: 7}[stage] == len(trained_norms)
    for path, old in jax.tree_util.tree_leaves_with_path(stats):
        layer = ".".join(key.key for key in path[:-1])
        new = state.stats
        for key in path:
            new = new[key.key]
        assert np.array_equal(old, new) == (layer not in trained_norms), layer


def flops(compiled):
    return compiled.compile().cost_analysis()["flops"]


def test_head_step_has_flops_of_a_forward_pass(start):
    params, stats = start
    images = batch(side=32)
    step, state, frozen, _ = prepare(start, 0, SGD(momentum=0.9))
    forward = flops(eval_step(MODEL, PREPROCESSING).lower(params, stats, images))
    head = flops(step.lower(state, frozen, images, KEY))
    assert forward < head < 1.03 * forward


@pytest.mark.slow
def test_step_flops_rise_from_stage_to_stage(start):
    costs = []
    for stage in range(3):
        step, state, frozen, _ = prepare(start, stage, SGD(momentum=0.9))
        costs.append(flops(step.lower(state, frozen, batch(side=32), KEY)))
    assert costs[0] < 0.75 * costs[1] < 0.75 * costs[2]


@pytest.mark.slow
def test_step_draws_dropout_from_its_key(start):
    """Without dropout, the key has no effect."""

    def trained(model, seed):
        params, stats = start
        stage_plan = plan(STAGES, params)[0]
        transform = stage_plan.transform(SGD())
        norms = norm_modes(params, stats, stage_plan.labels)
        trainable, frozen = partition(params, stage_plan.labels)
        state = jax.tree.map(jnp.copy, TrainState(trainable, stats, transform.init(params)))
        step = train_step(
            StepConfig(model=model, transform=transform, preprocessing=PREPROCESSING, norms=norms)
        )
        state, _ = step(state, frozen, batch(), jax.random.key(seed))
        return np.asarray(state.trainable["fc"]["kernel"])

    dropping = models.create("cifar_resnet8", num_classes=5, dropout=0.5)
    assert np.array_equal(trained(dropping, 0), trained(dropping, 0))
    assert not np.array_equal(trained(dropping, 0), trained(dropping, 1))
    assert np.array_equal(trained(MODEL, 0), trained(MODEL, 1))


@pytest.mark.slow
def test_step_ignores_padding(start):
    """A padded batch updates parameters and statistics as the batch without padding."""
    step, state, frozen, _ = prepare(start, 2, SGD())
    padded, sums = step(state, frozen, batch(size=8, real=5), KEY)
    step, state, frozen, _ = prepare(start, 2, SGD())
    short = Batch(*(rows[:5] for rows in batch(size=8, real=5)))
    exact, exact_sums = step(state, frozen, short, KEY)
    assert int(sums.metrics.examples) == int(exact_sums.metrics.examples) == 5
    for a, b in zip(*map(jax.tree.leaves, (padded, exact)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_score_counts_each_example_once():
    batches = [
        Metrics(np.float32(8), np.int32(3), np.int32(4), np.int32(4)),
        Metrics(np.float32(2), np.int32(1), np.int32(1), np.int32(1)),
    ]
    assert Metrics.total(batches).score == Score(loss=2.0, accuracy=0.8, top5=1.0)


NAN = np.nan
HITS = [  # logits of six classes, the target, whether it is a hit, whether among the top five
    ([0, 5, 4, 3, 2, 1], 1, True, True),
    ([0, 5, 4, 3, 2, 1], 5, False, True),
    ([0, 5, 4, 3, 2, 1], 0, False, False),
    # ties: the first of the largest is the prediction
    ([1, 1, 1, 1, 1, 1], 0, True, True),
    ([1, 1, 1, 1, 1, 1], 5, False, True),
    ([2, 2, 2, 2, 2, 1], 5, False, False),
    ([3, 2, 2, 2, 1, 1], 4, False, True),
    ([3, 3, 2, 2, 2, 1], 4, False, True),
    ([np.inf, 1, 1, 1, 1, 1], 0, True, True),
    ([-np.inf, 1, 1, 1, 1, 1], 0, False, False),
    # NaN ranks before all numbers and is never a hit
    ([NAN, 5, 4, 3, 2, 1], 1, False, True),
    ([NAN, 5, 4, 3, 2, 1], 4, False, True),
    ([NAN, 5, 4, 3, 2, 1], 5, False, False),
    ([NAN, 5, 4, 3, 2, 1], 0, False, False),
    ([NAN] * 6, 0, False, False),
]


def test_tally_of_hits_by_hand():
    logits, target, hit, among = map(np.array, zip(*HITS, strict=True))
    each = jax.vmap(Metrics.of_batch)(
        logits[:, None].astype(np.float32), target[:, None], np.ones((15, 1), bool)
    )
    np.testing.assert_array_equal(each.correct, hit)
    np.testing.assert_array_equal(each.top5, among)
    whole = Metrics.of_batch(jnp.asarray(logits, jnp.float32), target, np.arange(15) < 9)
    assert (int(whole.correct), int(whole.top5), int(whole.examples)) == (3, 7, 9)


@pytest.mark.parametrize("classes", [2, 5])
def test_tally_of_top5_with_few_classes(classes):
    logits = jnp.arange(classes * 1.0)[None].repeat(classes, 0)
    sums = Metrics.of_batch(logits.at[0, 0].set(NAN), np.arange(classes), np.ones(classes, bool))
    assert (int(sums.correct), int(sums.top5)) == (1, classes - 1)


def true_probability(logits, targets):
    """A metric of a user that hides NaN."""
    return jnp.nan_to_num(jnp.sum(jax.nn.softmax(logits) * targets, -1))


def is_second(logits, targets):
    return targets[:, 1] == 1


def test_metrics_of_a_user_are_sums_over_the_mask():
    logits = np.array([[0, 1, 2], [3, 0, 0], [1, 1, 1]], np.float32)
    metrics, mask = ("test_step:true_probability", "test_step:is_second"), np.array([1, 1, 0], bool)
    found = Metrics.of_batch(jnp.asarray(logits), np.array([1, 0, 1]), mask, metrics=metrics)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert float(found.custom["true_probability"]) == pytest.approx(p[0, 1] + p[1, 0], rel=1e-6)
    assert float(found.custom["is_second"]) == 1
    twice = Metrics.total([found, found]).plus(found)
    assert twice.score.custom["is_second"] == 0.5
    assert twice.score.values.keys() == {
        "loss", "accuracy", "top5", "true_probability", "is_second",
    }  # fmt: skip
    diverged = jnp.asarray(logits).at[0, 2].set(NAN)
    found = Metrics.of_batch(diverged, np.array([1, 0, 1]), mask, metrics=metrics)
    assert [bool(jnp.isnan(x)) for x in found.custom.values()] == [True, True]


def test_epoch_metrics_survive_json():
    metrics = Metrics(1.5, 3.0, 4.0, 8.0, {"f1": 0.1 + 0.2})
    epoch = EpochMetrics(lr={"fc": 0.1}, metrics=metrics, steps=2)
    fields = json.loads(json.dumps(dataclasses.asdict(epoch)))
    assert EpochMetrics.from_fields(fields) == epoch
    before_custom = {**fields, "metrics": fields["metrics"][:4]}
    assert EpochMetrics.from_fields(before_custom).metrics == metrics._replace(custom={})


def test_eval_step_ignores_padding(start):
    evaluate = eval_step(MODEL, PREPROCESSING)
    padded = evaluate(*start, batch(size=8, real=5))
    short = evaluate(*start, Batch(*(rows[:5] for rows in batch(size=8, real=5))))
    assert int(padded.examples) == 5
    assert int(padded.correct) == int(short.correct)
    np.testing.assert_allclose(padded.loss, short.loss, rtol=1e-5)
