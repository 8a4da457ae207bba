"""Training on images with several labels: loss, accuracy, gradients, resume, cached features."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mortal import QUIET, assert_close, assert_same_end, killed, rows, saving_stage_ends_only, steps
from safetensors.numpy import load_file

from jaxft import SGD, Recipe, Stage, data, finetune, models
from jaxft.data import Preprocessing, Splits
from jaxft.export import export
from jaxft.report.console import Console
from jaxft.train.loss import Loss
from jaxft.train.metrics import EpochMetrics, Metrics, StepRecord

LOGITS = np.array([[2, -1, 0.5], [0.1, 0.2, -0.3], [-3, 4, 0], [9, 9, 9]], np.float32)
TARGETS = np.array([[1, 0, 0], [1, 1, 1], [0, 0, 0], [0, 0, 0]], np.int32)
MASK = np.array([True, True, True, False])  # the last row is padding
CORRECT = 2 / 3 + 2 / 3 + 2 / 3  # by hand; a logit of 0 predicts that the class is absent
BCE = Loss(function="bce", multi_label=True)

MODEL = models.create("cifar_resnet8", num_classes=3)
SIZE = Preprocessing(image_size=8, resize_size=8)


def colours(count, seed):
    """Returns a source whose labels are which of the three channels are bright."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (count, 3))
    noise = rng.integers(0, 100, (count, 8, 8, 3))
    images = (noise + 150 * labels[:, None, None]).astype(np.uint8)
    return data.arrays(images, labels, ["red", "green", "blue"])


TRAIN, VAL = colours(22, 1), colours(21, 2)


def sigmoid(logits):
    return 1 / (1 + np.exp(-np.asarray(logits, np.float64)))


def bce(logits, targets):
    """Returns the loss of torch's BCEWithLogitsLoss, in float64."""
    p = sigmoid(logits)
    return -np.mean(targets * np.log(p) + (1 - targets) * np.log(1 - p))


@jax.jit
def minimised(logits):
    _, targets = BCE.erase_and_mix(jnp.zeros((4, 1)), TARGETS, MASK, 3, jax.random.key(0))
    total = jnp.sum(BCE.weights(targets), where=MASK)
    return jnp.sum(BCE.losses(logits, targets), where=MASK) / total


def test_multi_label_loss_and_gradient_are_the_closed_form():
    loss, gradient = jax.value_and_grad(minimised)(LOGITS)
    assert float(loss) == pytest.approx(bce(LOGITS[:3], TARGETS[:3]), rel=1e-6)
    expected = (sigmoid(LOGITS) - TARGETS) * MASK[:, None] / 9
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


def test_multi_label_loss_and_gradient_are_torchs():
    torch = pytest.importorskip("torch")
    logits = torch.tensor(LOGITS[:3], requires_grad=True)
    expected = torch.nn.BCEWithLogitsLoss()(logits, torch.tensor(TARGETS[:3]).float())
    expected.backward()
    loss, gradient = jax.value_and_grad(minimised)(LOGITS)
    assert float(loss) == pytest.approx(expected.item(), rel=1e-6)
    np.testing.assert_allclose(gradient[:3], logits.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_multi_label_targets_are_mixed(kind):
    mixing = Loss(function="bce", multi_label=True, **{kind: 1.0})
    images = jnp.broadcast_to(jnp.arange(4.0)[:, None, None, None], (4, 8, 8, 3))
    mixed, targets = mixing.erase_and_mix(images, TARGETS, MASK, 3, jax.random.key(5))
    share = float(mixed[1].mean())  # of row 1; the rest is row 0, whose pixels are 0
    assert 0 < share < 1
    np.testing.assert_allclose(targets[1], share * TARGETS[1] + (1 - share) * TARGETS[0], rtol=1e-5)
    np.testing.assert_array_equal(mixing.weights(targets), np.ones(4))


def hits(logits, targets):
    """A metric of a user."""
    return jnp.sum((logits > 0) & (targets == 1), axis=-1)


def test_multi_label_metrics_by_hand():
    of_batch = partial(Metrics.of_batch, loss="bce", metrics=("test_multi_label_runs:hits",))
    batch = of_batch(jnp.asarray(LOGITS), TARGETS, MASK)
    assert float(batch.correct) == pytest.approx(CORRECT)
    assert float(batch.custom["hits"]) == 3
    assert batch.top5 is None
    score = Metrics.total([batch, batch]).score
    assert score.values.keys() == {"loss", "accuracy", "hits"}
    assert score.accuracy == pytest.approx(CORRECT / 3)
    assert score.loss == pytest.approx(bce(LOGITS[:3], TARGETS[:3]), rel=1e-6)
    diverged = of_batch(jnp.full((4, 3), jnp.nan), TARGETS, MASK)
    assert float(diverged.correct) == 0


def test_multi_label_epoch_metrics_have_no_top5_and_survive_json():
    batch = Metrics.of_batch(jnp.asarray(LOGITS), TARGETS, MASK, "bce")
    record = StepRecord(batch, {}, {}, jnp.array(True))
    epoch = EpochMetrics().plus([record, record], seconds=1.0, idle=0.0)
    assert epoch.metrics.top5 is None
    fields = json.loads(json.dumps(epoch.__dict__))
    assert EpochMetrics.from_fields(fields) == epoch
    row = epoch.row("a", epoch=1, step=2, validated=epoch.metrics.score, seconds=1.0)
    assert {name for name in row if name.startswith(("train_", "val_"))} == {
        "train_loss", "train_accuracy", "val_loss", "val_accuracy",
    }  # fmt: skip


def run(workdir, *stages, console=QUIET, source=(TRAIN, VAL), **fields):
    """Trains from `MODEL.init`; returns the rows and the result."""
    defaults = {"augment": "none", "optimizer": SGD(), "batch_size": 6, "loss": "bce"}
    recipe = Recipe(
        model=MODEL.name, data="colours", stages=stages, image_size=8, resize_size=8,
        **{**defaults, **fields},
    )  # fmt: skip
    given = {"data": Splits(*source), "start": MODEL.init(jax.random.key(1))}
    result = finetune(recipe, workdir, console=console, **given)
    return rows(workdir), result


def logits_at_start(source):
    params, stats = MODEL.init(jax.random.key(1))
    return MODEL.apply(params, stats, SIZE.normalize(source.images), norms="running")[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"cache_mib": 0, "steps_per_execution": 3}],
    ids=["cached", "several steps"],
)
def test_multi_label_rows_are_the_closed_form(settings, tmp_path):
    """The weights stay those of the start; 22 images fill three batches of 6 and a part."""
    still = Stage("still", {"fc": 1e-30}, 1, accumulate=2, restore="last")
    (row,), result = run(tmp_path / "run", still, **settings)
    for split, source in {"train": TRAIN, "val": VAL}.items():
        logits = logits_at_start(source)
        accuracy = np.mean((logits > 0) == source.targets)
        assert row[f"{split}_loss"] == pytest.approx(bce(logits, source.targets), rel=1e-5)
        assert row[f"{split}_accuracy"] == pytest.approx(accuracy)
        assert f"{split}_top5" not in row
    assert result.score.top5 is None
    export(tmp_path / "run", tmp_path / "export", platforms=("cpu",))
    for folder in ("run", "export"):
        description = json.loads((tmp_path / folder / "model.json").read_text())
        assert description["multi_label"] is True
        assert description["score"] == {name: row[f"val_{name}"] for name in ("loss", "accuracy")}


@pytest.mark.slow
def test_multi_label_step_follows_the_gradient(tmp_path):
    few = TRAIN.take(np.arange(6))
    stage = Stage("head", {"fc": 0.5}, steps=1, restore="last")
    _, result = run(tmp_path / "run", stage, source=(few, VAL), optimizer=SGD())
    moved = load_file(result.weights)["fc.bias"]
    before = MODEL.init(jax.random.key(1))[0]["fc"]["bias"]
    gradient = np.mean(sigmoid(logits_at_start(few)) - few.targets, axis=0) / 3
    np.testing.assert_allclose(moved, before - 0.5 * gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_multi_label_run_learns(tmp_path, capsys):
    stage = Stage("all", {"*": 0.2}, 6, norms="batch", restore="last")
    source = colours(96, 3), colours(40, 4)
    found, result = run(
        tmp_path / "run", stage, source=source, optimizer=SGD(momentum=0.9), console=Console()
    )
    assert result.score.accuracy > 0.95
    assert found[-1]["train_loss"] < found[0]["train_loss"] / 2
    assert "top5" not in capsys.readouterr().out


SHORT = (
    Stage("head", {"fc": 0.1}, 2),
    Stage("late", {"fc": 0.1, "layer3": 0.01}, 2, mixup=0.3, cutmix=1.0, ema=0.9),
)


@pytest.mark.slow
def test_multi_label_run_survives_a_kill_within_an_epoch(tmp_path):
    """Stages of 8 steps; checkpoints follow each third step."""
    settings = {"checkpoint_steps": 3, "metrics": ("test_multi_label_runs:hits",)}
    with saving_stage_ends_only():
        run(tmp_path / "unbroken", *SHORT, **settings)
    for step in (4, 12):
        with killed("step", step):
            run(tmp_path / "killed", *SHORT, **settings)
        assert steps(tmp_path / "killed")[-1] < step
    run(tmp_path / "killed", *SHORT, **settings)
    assert_same_end(tmp_path / "killed", tmp_path / "unbroken")


@pytest.mark.slow
def test_multi_label_run_refuses_another_label_on_resume(tmp_path):
    with killed("step", 10):
        run(tmp_path / "run", *SHORT, checkpoint_steps=3)
    labels = TRAIN.targets.copy()
    labels[0, 1] ^= 1
    changed = data.arrays(TRAIN.images, labels, TRAIN.classes)
    with pytest.raises(Exception, match=r"train: green \d+ then, \d+ now"):
        run(tmp_path / "run", *SHORT, checkpoint_steps=3, source=(changed, VAL))


@pytest.mark.slow
def test_multi_label_features_are_cached(tmp_path):
    run(tmp_path / "cached", *SHORT)
    run(tmp_path / "computed", *SHORT, cache_mib=0)
    assert_close(tmp_path / "cached", tmp_path / "computed")
