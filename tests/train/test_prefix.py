"""What is kept of a stage's prefix changes nothing of a run but its cost."""

import dataclasses
import itertools
import shutil

import jax
import numpy as np
import pytest
from mortal import RECIPE, KilledError, assert_close, assert_same_end, die, go_on, rows

from jaxft import SGD, LogisticRegression, RecipeError, Stage, data
from jaxft.checkpoint.contents import Snapshot
from jaxft.data import Splits
from jaxft.distributed import Devices
from jaxft.train import opening
from jaxft.train.feature_cache import FeatureCache
from jaxft.train.interruption import InterruptedRunError
from jaxft.train.state import Progress
from jaxft.train.trainer import Trainer

HEAD = Stage("head", {"fc": 1e-2}, epochs=3)
LATE = Stage("late", {"fc": 1e-3, "layer3": 1e-3}, epochs=3, carry="keep")
ALL = Stage("all", {"*": 1e-3}, epochs=2, hand_on="last")
AGAIN = Stage("again", {"fc": 1e-3}, epochs=2, batch_size=12)
PLAIN = dataclasses.replace(
    RECIPE,
    optimizer=SGD(momentum=0.9),  # Adam makes much of a last bit where a gradient is about 0
    augment="none",
    checkpoint_steps=5,
    stages=(HEAD, LATE, ALL, AGAIN),
)
# Of the same width as PLAIN, and of each option that a prefix meets.
VIEWS = dataclasses.replace(PLAIN, augment="shift", views=2, tta="flip", stages=(HEAD, LATE))


def without(recipe):
    return dataclasses.replace(recipe, cache_mib=0)


def programs(recipe, images=(30, 100)):
    train, val = (
        data.arrays(np.zeros((n, 8, 8, 3), np.uint8), np.arange(n) % 5, "56789") for n in images
    )
    recipe = recipe.expecting(data.Preprocessing())
    model = recipe.network(5)
    like = jax.eval_shape(model.init, jax.random.key(0))
    return opening.open_programs(recipe, model, Splits(train, val), Devices(), like), like


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The run of PLAIN."""
    workdir = tmp_path_factory.mktemp("kept")
    go_on(workdir, PLAIN)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [PLAIN, VIEWS], ids=["plain", "views"])
def test_a_run_is_the_same_with_and_without(recipe, kept, tmp_path):
    """Also the last stage, whose prefix ends where the first one's did, with other weights."""
    workdir = kept
    if recipe is not PLAIN:
        workdir = tmp_path / "kept"
        go_on(workdir, recipe)
    found, _ = programs(recipe)
    assert [p.prefix.train for p in found] == [p.plan.stage.name != "all" for p in found]
    go_on(tmp_path / "run", without(recipe))
    assert_close(tmp_path / "run", workdir)


@pytest.mark.slow
def test_on_disk_it_is_the_same_and_leaves_nothing(kept, disk, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(disk.folder))
    recipe = dataclasses.replace(PLAIN, cache_mib=0, disk_cache_mib=4)
    real, used = FeatureCache.add, []

    def add(self, key, tree):
        real(self, key, tree)
        usage = shutil.disk_usage(disk.folder)
        used.append((usage.used, list(disk.folder.iterdir())))

    with monkeypatch.context() as patch:
        patch.setattr(FeatureCache, "add", add)
        go_on(tmp_path / "run", recipe)
    assert_same_end(tmp_path / "run", kept)
    assert max(used)[0] > 2**17  # 230 images of a KiB, by two prefixes
    assert not any(names for _, names in used)
    disk.fill(but=2**14)
    with pytest.raises(RecipeError, match=f"MiB more in {disk.folder}: No space left on device"):
        go_on(tmp_path / "full", recipe)


@pytest.mark.slow
def test_killed_anywhere_it_ends_the_same(kept, tmp_path, monkeypatch):
    """Within a stage, at its end, and while a prefix is at work."""
    for step in (6, 12, 23):
        with monkeypatch.context() as patch:
            die(patch, Progress, "after_step", lambda p, step=step: p.step + 1 == step)
            with pytest.raises(KilledError):
                go_on(tmp_path / "run", PLAIN)
        if step == 12:
            with monkeypatch.context() as patch:
                die(
                    patch,
                    Trainer,
                    "of_each_batch",
                    lambda run, source, _: source is run.splits.train,
                )
                with pytest.raises(KilledError):
                    go_on(tmp_path / "run", PLAIN)
    go_on(tmp_path / "run", PLAIN)
    assert_same_end(tmp_path / "run", kept)


@pytest.mark.slow
def test_asked_to_stop_while_a_prefix_is_at_work(tmp_path, monkeypatch):
    recipe = dataclasses.replace(PLAIN, stages=(HEAD,), sync_steps=1)
    # Of 13 batches to validate, twice: by all blocks, and then by the head; and of 4 to train on.
    asked = iter([False] * (2 * 13 + 2) + [True])
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "stop_asked", lambda _: next(asked))
        with pytest.raises(InterruptedRunError, match="nothing has been trained yet"):
            go_on(tmp_path / "run", recipe)
    for workdir in ("run", "unbroken"):
        go_on(tmp_path / workdir, recipe)
    assert_same_end(tmp_path / "run", tmp_path / "unbroken")


@pytest.mark.slow
def test_as_many_views_as_epochs_are_as_without_end(tmp_path):
    stages = (dataclasses.replace(HEAD, views=3), LATE)
    for name, chosen in (("some", stages), ("any", (HEAD, LATE)), ("two", VIEWS.stages)):
        views = 2 * (name == "two")
        recipe = dataclasses.replace(PLAIN, augment="shift", views=views, stages=chosen)
        go_on(tmp_path / name, recipe)
    assert_same_end(tmp_path / "some", tmp_path / "any")
    losses = [[row["train_loss"] for row in rows(tmp_path / name)] for name in ("any", "two")]
    assert losses[1][:2] == pytest.approx(losses[0][:2], rel=1e-6)  # of the first two epochs
    assert losses[1][2] != pytest.approx(losses[0][2], rel=1e-3)


def passes(recipe, workdir, monkeypatch):
    """Which half each pass over images was of, in order."""
    real, found = Trainer.of_each_batch, []

    def counted(run, source, step, **options):
        if options.get("kept") is None:
            found.append("train" if source is run.splits.train else "val")
        return real(run, source, step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "of_each_batch", counted)
        go_on(workdir, recipe)
    return found


@pytest.mark.slow
def test_one_pass_serves_the_stages_to_come(tmp_path, monkeypatch):
    """Its way leads by the ends of their shorter prefixes. What a stage has changed is not used."""
    recipe = dataclasses.replace(PLAIN, stages=(HEAD, LATE, dataclasses.replace(HEAD, name="x")))
    assert passes(recipe, tmp_path / "run", monkeypatch) == ["val", "train", "train", "val"]


@pytest.mark.slow
def test_a_probe_and_the_steps_after_it_share_theirs(tmp_path, monkeypatch):
    probe = Stage("probe", {"fc": LogisticRegression((0.1,))})
    recipe = dataclasses.replace(PLAIN, stages=(probe, HEAD, LATE))
    assert passes(recipe, tmp_path / "run", monkeypatch) == ["val", "train"]


@pytest.mark.parametrize(
    ("fields", "stage", "train", "val", "reason"),
    [
        ({}, LATE, True, True, ""),
        ({"augment": "flip"}, LATE, False, True, "augment='flip' draws a new view each epoch"),
        ({"augment": "flip", "views": 2}, LATE, True, True, ""),
        ({"augment": "flip", "views": 3}, LATE, False, True, "each view is seen once"),
        ({"mixup": 0.2}, LATE, False, True, "erasing, mixup and cutmix change the images"),
        ({"drop_path": 0.2}, LATE, False, True, "drop_path leaves out other blocks"),
        ({"balance": "sampling"}, LATE, True, True, ""),
        (
            {"balance": "sampling", "augment": "flip", "views": 2},
            *(LATE, False, True, "balance='sampling' draws views of their own"),
        ),
        # 4x4x32 float32 are 2 KiB an image
        ({"cache_mib": 3}, LATE, True, True, ""),
        ({"cache_mib": 2}, LATE, False, True, "what comes out is 3 MiB, and cache_mib 2"),
        ({"cache_mib": 2, "disk_cache_mib": 3}, LATE, True, True, ""),
        ({"disk_cache_mib": 2}, LATE, False, True, "what comes out is 3 MiB, and disk_cache_mib 2"),
        ({"cache_mib": 2, "tta": "flip"}, LATE, False, False, "what comes out is 5 MiB"),
        ({}, dataclasses.replace(LATE, epochs=1), False, True, "each view is seen once"),
        ({}, ALL, False, False, "stem trains"),
        (
            *({}, dataclasses.replace(LATE, norms="A"), False, False),
            "norm layers of stem use the batch's statistics",
        ),
        ({}, dataclasses.replace(LATE, norms={"layer2": "A", "*": "B"}), True, True, ""),
    ],
    ids=str,
)
def test_what_is_kept_and_why_not(fields, stage, train, val, reason):
    (program,), _ = programs(dataclasses.replace(PLAIN, stages=(stage,), **fields), (600, 900))
    prefix = program.prefix
    assert (prefix.train, prefix.val) == (train, val)
    assert reason in prefix.reason
    assert bool(prefix.reason) == (not train)
    ends = {"late": "layer2", "all": None}[stage.name] if stage.norms in ("B",) else None
    if isinstance(stage.norms, dict):
        ends = "layer1"
    assert prefix.blocks[-1:] == ((ends,) if ends else ())


def test_views_are_not_fewer_than_none():
    with pytest.raises(RecipeError, match="views must be at least 0"):
        dataclasses.replace(PLAIN, views=-1)


def test_the_longest_unused_make_room():
    kept, array = FeatureCache(4 * 40), np.zeros(10, np.float32)
    for key in "abbcd":  # one of them again
        kept.add(key, array)
    assert kept.get("a") is array
    kept.add("e", array)
    assert [kept.get(key) is not None for key in "abcde"] == [True, False, True, True, True]
    kept.add("f", np.zeros(41, np.float32))  # more than there may be
    assert [kept.get(key) is not None for key in "abcdef"] == [True, False, True, True, True, False]


@pytest.mark.parametrize(("room", "again"), [(10 + 3 * 9, "xyz"), (10 + 3 * 9 - 1, "pqr")])
def test_batches_are_replayed_if_all_have_been_seen_and_fit(room, again):
    kept = FeatureCache(room)
    kept.add("rows of a prefix", np.zeros(10, np.int8))  # which must not go for it

    def batches(names):
        return ((np.zeros(5, np.int8), np.full(4, ord(name), np.int8)) for name in names)

    def seen(names, count=3):
        found = itertools.islice(kept.replayed("images", batches(names), 3), count)
        return "".join(chr(targets[0]) for _, targets in found)

    assert [seen("abc", 2), seen("xyz", 4), seen("pqr")] == ["ab", "xyz", again]


def compiled(recipe, index):
    found, (params, stats) = programs(recipe)
    state = jax.eval_shape(found[index].transform.init, params)
    return found[index].compile(Snapshot(params, stats, state))


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_a_step_costs_what_its_stage_needs(index):
    """Forward of the prefix and forward and backward of the rest, together and apart."""
    apart, together = (compiled(recipe, index) for recipe in (PLAIN, without(PLAIN)))
    assert apart.prefix_flops > 0
    assert together.prefix_flops == 0
    assert apart.flops + apart.prefix_flops == pytest.approx(together.flops, rel=0.02)


@pytest.mark.slow
def test_the_memory_of_a_step_falls_with_what_is_frozen():
    """Of one that begins with images; what begins with less needs less still."""
    needs = [
        [compiled(recipe, i).step.memory_analysis().temp_size_in_bytes for i in (2, 1, 0)]
        for recipe in (without(PLAIN), PLAIN)
    ]
    for more, less in itertools.pairwise(needs[0]):
        assert less < more
    assert needs[1][0] == needs[0][0]
    assert needs[1][1] <= needs[0][1]
    assert needs[1][2] < needs[0][2]
