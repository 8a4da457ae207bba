"""The frozen prefix: cached features change the cost of a run and nothing else."""

import dataclasses
import itertools
import shutil

import jax
import numpy as np
import pytest
from faults import before
from mortal import (
    RECIPE,
    assert_close,
    assert_same_end,
    killed,
    rows,
    terminated,
    train,
    train_to_end,
)

from jaxft import SGD, InterruptedRunError, LinearProbe, RecipeError, Stage, data
from jaxft.checkpoint.contents import Snapshot
from jaxft.data import Splits
from jaxft.devices import Devices
from jaxft.errors import ModelError
from jaxft.train.compiled_stage import compile_stage
from jaxft.train.frozen_prefix import block_labels, inert_blocks
from jaxft.train.stage_program import build_programs

pytestmark = pytest.mark.usefixtures("shared_programs")

HEAD = Stage("head", {"fc": 1e-2}, epochs=3)
LATE = Stage("late", {"fc": 1e-3, "layer3": 1e-3}, epochs=3, carry="keep")
ALL = Stage("all", {"*": 1e-3}, epochs=1, restore="last")
AGAIN = Stage("again", {"fc": 1e-3}, epochs=2, batch_size=12)
PLAIN = dataclasses.replace(
    RECIPE,
    optimizer=SGD(momentum=0.9),  # Adam makes much of a last bit where a gradient is about 0
    augment="none",
    stages=(HEAD, LATE, ALL, AGAIN),
)
# The options that change the inputs of a prefix.
VIEWS = dataclasses.replace(PLAIN, augment="shift", num_views=2, tta="flip", stages=(HEAD, LATE))


def without(recipe):
    return dataclasses.replace(recipe, cache_mib=0)


def on_devices(recipe, **fields):
    return dataclasses.replace(recipe, cache_mib=0, device_cache_mib=1, **fields)


def programs(recipe, images=(30, 100)):
    train, val = (
        data.arrays(np.zeros((n, 8, 8, 3), np.uint8), np.arange(n) % 5, "56789") for n in images
    )
    recipe = recipe.expecting(data.Preprocessing())
    model = recipe.network(5)
    like = jax.eval_shape(model.init, jax.random.key(0))
    return build_programs(recipe, model, Splits(train, val), devices(recipe), like), like


def devices(recipe):
    return Devices().with_cache(recipe.device_cache_mib)


def run(workdir, recipe):
    train_to_end(workdir, recipe)
    return workdir


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """Folder of the run of PLAIN, whose stages but one cache features."""
    return run(tmp_path_factory.mktemp("cached"), PLAIN)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [pytest.param(PLAIN, id="plain", marks=pytest.mark.smoke), pytest.param(VIEWS, id="views")],
)
def test_run_with_prefix_ends_as_without(recipe, cached, tmp_path):
    """In its last stage, the prefix ends at the same block as in the first, with other weights."""
    workdir = cached if recipe is PLAIN else run(tmp_path / "cached", recipe)
    found, _ = programs(recipe)
    assert [p.prefix.train for p in found] == [p.plan.stage.name != "all" for p in found]
    assert_close(run(tmp_path / "run", without(recipe)), workdir)


@pytest.mark.slow
def test_prefix_features_on_disk(cached, disk, tmp_path, monkeypatch):
    """The run ends as with features in memory, leaves no file, and reports a full disk."""
    monkeypatch.setattr("tempfile.tempdir", str(disk.folder))
    recipe = dataclasses.replace(PLAIN, cache_mib=0, disk_cache_mib=4)
    used = []

    def measure(*_):
        used.append((shutil.disk_usage(disk.folder).used, list(disk.folder.iterdir())))

    with before("features", measure):
        run(tmp_path / "run", recipe)
    assert_same_end(tmp_path / "run", cached)
    assert max(used)[0] > 2**17  # 230 images, 1 KiB each, by two prefixes
    assert not any(names for _, names in used)
    disk.fill(but=2**14)
    with pytest.raises(RecipeError, match=f"MiB more in {disk.folder}: No space left on device"):
        run(tmp_path / "full", recipe)


@pytest.mark.slow
def test_run_with_features_in_device_memory(cached, tmp_path):
    """It ends as with features on the host; killed, or with stacked indices, as unbroken."""
    recipe = on_devices(PLAIN)
    found, _ = programs(recipe)
    assert [each.prefix.on_devices for each in found] == [True, True, False, True]
    assert_close(run(tmp_path / "unbroken", recipe), cached)
    with killed("step", 12):
        train(tmp_path / "killed", recipe)
    assert_same_end(run(tmp_path / "killed", recipe), tmp_path / "unbroken")
    assert_close(run(tmp_path / "threes", on_devices(PLAIN, steps_per_execution=3)), cached)


@pytest.mark.slow
def test_run_with_views_in_device_memory(tmp_path):
    recipe = dataclasses.replace(VIEWS, stages=(dataclasses.replace(LATE, auto_rgn=True),))
    run(tmp_path / "host", recipe)
    assert_close(run(tmp_path / "devices", on_devices(recipe)), tmp_path / "host")


@pytest.mark.slow
def test_host_sends_indices_of_features_in_device_memory(tmp_path):
    """Device memory is free again when a stage trains everything."""
    seen = []

    def record(_, batches, *__):
        # 13 batches of 8 images to validate, with 4x4x32 features before layer3.
        held = any(x.shape == (13, 8, 4, 128) for x in jax.live_arrays())
        seen.append((batches[0].image.dtype, batches[0].image.ndim, held))

    with before("send", record):
        run(tmp_path, on_devices(PLAIN, stages=(LATE, ALL)))
    assert list(dict.fromkeys(seen)) == [(np.int32, 1, True), (np.uint8, 4, False)]


@pytest.mark.slow
def test_run_with_prefix_killed_ends_as_unbroken(cached, tmp_path):
    """Killed in the second epoch of a stage, in its last step, and while features are computed."""
    for point, at in (("step", 6), ("step", 12), ("pass", "train"), ("step", 23)):
        with killed(point, at):
            train(tmp_path / "run", PLAIN)
    train_to_end(tmp_path / "run", PLAIN)
    assert_same_end(tmp_path / "run", cached)


@pytest.mark.slow
def test_signal_while_prefix_computes_features(tmp_path):
    recipe = dataclasses.replace(PLAIN, stages=(HEAD,), sync_steps=1)
    # 13 batches to validate, by all blocks and then by the prefix; and 2 of 4 to train on.
    stopped = pytest.raises(InterruptedRunError, match="nothing has been trained yet")
    with terminated("stop asked", 2 * 13 + 3), stopped:
        train_to_end(tmp_path / "run", recipe)
    assert_same_end(run(tmp_path / "run", recipe), run(tmp_path / "unbroken", recipe))


@pytest.mark.slow
def test_views_as_many_as_epochs_change_nothing(tmp_path):
    """Fewer views repeat in a later epoch."""
    for name, views in (("three", 3), ("unlimited", 0), ("two", 2)):
        stages = (dataclasses.replace(HEAD, num_views=views),)
        run(tmp_path / name, dataclasses.replace(PLAIN, augment="shift", stages=stages))
    assert_same_end(tmp_path / "three", tmp_path / "unlimited")
    losses = [[row["train_loss"] for row in rows(tmp_path / name)] for name in ("three", "two")]
    assert losses[1][:2] == pytest.approx(losses[0][:2], rel=1e-6)
    assert losses[1][2] != pytest.approx(losses[0][2], rel=1e-3)


def passes(recipe, workdir):
    """Returns the split of each pass over images in a run."""
    splits = []

    def count(trainer, source, _, **options):
        if options.get("features") is None:
            splits.append("train" if source is trainer.splits.train else "val")

    with before("pass", count):
        run(workdir, recipe)
    return splits


@pytest.mark.slow
@pytest.mark.parametrize("place", [dataclasses.replace, on_devices], ids=["host", "devices"])
def test_prefix_computes_features_of_later_stages_in_one_pass(place, tmp_path):
    """Features of later, shorter prefixes are stored on the way, unless a stage changes them."""
    recipe = place(PLAIN, stages=(HEAD, LATE, dataclasses.replace(HEAD, name="x")))
    assert passes(recipe, tmp_path / "run") == ["val", "train", "train", "val"]


@pytest.mark.slow
@pytest.mark.parametrize("place", [dataclasses.replace, on_devices], ids=["host", "devices"])
def test_linear_probe_and_next_stages_share_features(place, tmp_path):
    probe = Stage("probe", {"fc": LinearProbe((0.1,))})
    recipe = place(PLAIN, stages=(probe, HEAD, LATE))
    assert passes(recipe, tmp_path / "run") == ["val", "train"]


@pytest.mark.parametrize(
    ("fields", "stage", "train", "val", "reason"),
    [
        ({}, LATE, True, True, ""),
        ({"augment": "flip"}, LATE, False, True, "augment='flip' draws a new view each epoch"),
        ({"augment": "flip", "num_views": 2}, LATE, True, True, ""),
        ({"augment": "flip", "num_views": 3}, LATE, False, True, "each view is seen once"),
        ({"mixup": 0.2}, LATE, False, True, "random_erasing, mixup and cutmix change the images"),
        ({"drop_path": 0.2}, LATE, False, True, "drop_path leaves out other blocks"),
        ({"balance": "sampling"}, LATE, True, True, ""),
        (
            {"balance": "sampling", "augment": "flip", "num_views": 2},
            *(LATE, False, True, "balance='sampling' draws views of their own"),
        ),
        # 4x4x32 float32 are 2 KiB an image
        ({"cache_mib": 3}, LATE, True, True, ""),
        ({"cache_mib": 2}, LATE, False, True, "the features take 3 MiB, and cache_mib is 2"),
        ({"cache_mib": 2, "disk_cache_mib": 3}, LATE, True, True, ""),
        (
            {"disk_cache_mib": 2},
            LATE,
            False,
            True,
            "the features take 3 MiB, and disk_cache_mib is 2",
        ),
        ({"cache_mib": 2, "tta": "flip"}, LATE, False, False, "the features take 5 MiB"),
        ({}, dataclasses.replace(LATE, epochs=1), False, True, "each view is seen once"),
        ({}, ALL, False, False, "stem trains"),
        (
            *({}, dataclasses.replace(LATE, norms="batch"), False, False),
            "norm layers of stem use the batch's statistics",
        ),
        (
            {},
            dataclasses.replace(LATE, norms={"layer2": "batch", "*": "frozen_eval"}),
            True,
            True,
            "",
        ),
    ],
    ids=str,
)
def test_prefix_reason(fields, stage, train, val, reason):
    (program,), _ = programs(dataclasses.replace(PLAIN, stages=(stage,), **fields), (600, 900))
    prefix = program.prefix
    assert (prefix.train, prefix.val) == (train, val)
    assert reason in prefix.reason
    assert bool(prefix.reason) == (not train)
    ends = {"late": "layer2", "all": None}[stage.name] if stage.norms in ("frozen_eval",) else None
    if isinstance(stage.norms, dict):
        ends = "layer1"
    assert prefix.blocks[-1:] == ((ends,) if ends else ())


def test_views_must_not_be_negative():
    with pytest.raises(RecipeError, match="num_views must be at least 0"):
        dataclasses.replace(PLAIN, num_views=-1)


class TwoBlocks:
    """A network whose norm layers have no parameters."""

    blocks = ("stem", "head")
    block_patterns = (("stem",), ("fc",))


SHAPES = (
    {"stem": {"kernel": np.ones(2)}, "fc": {"kernel": np.ones(2)}},
    {"stem": {"norm": {"mean": np.zeros(2)}}, "other": {"mean": np.zeros(2)}},
)


@pytest.mark.parametrize(
    ("modes", "blocks", "reason"),
    [
        ({"stem.norm": "running", "other": "running"}, ("stem",), "head trains"),
        ({"stem.norm": "batch", "other": "running"}, (), "norm layers of stem use the batch's"),
        ({"stem.norm": "running", "other": "batch"}, (), "norm layers of stem use the batch's"),
    ],
    ids=["running", "batch", "of no block"],
)
def test_prefix_depends_on_norm_layers_without_parameters(modes, blocks, reason):
    labels = {"stem": {"kernel": "frozen"}, "fc": {"kernel": "head"}}
    inert, why = inert_blocks(TwoBlocks(), SHAPES, labels, modes)
    assert inert == blocks
    assert why.startswith(reason)


def test_block_patterns_must_cover_each_parameter():
    class Uncovered(TwoBlocks):
        name, block_patterns = "mine", (("stem.conv",), ("fc",))

    params = {"stem": {"conv": np.ones(2), "norm": np.ones(2)}, "fc": np.ones(2)}
    with pytest.raises(ModelError, match=r"block_patterns of mine select no block for stem\.norm"):
        block_labels(Uncovered(), params)


def compiled(recipe, index):
    found, (params, stats) = programs(recipe)
    state = jax.eval_shape(found[index].transform().init, params)
    return compile_stage(found[index], Snapshot(params, stats, state))


@pytest.mark.parametrize(
    ("fields", "place", "rows", "reason"),
    [
        # 600 images to train on and 900 to validate, in batches of 8; a row has 2 KiB.
        ({"device_cache_mib": 3}, "device", 1504, ""),
        ({"device_cache_mib": 2}, "host", 1500, ""),
        ({"device_cache_mib": 2, "cache_mib": 2}, "device", 904, "is 2 (device_cache_mib: 2 a "),
        ({"device_cache_mib": 1, "cache_mib": 2}, "host", 900, "is 2 (device_cache_mib: 1 a "),
        ({"device_cache_mib": 0}, "host", 1500, ""),
        ({"device_cache_mib": None}, "host", 1500, ""),  # on CPU
    ],
    ids=str,
)
def test_features_are_in_device_memory_if_they_fit(fields, place, rows, reason):
    recipe = dataclasses.replace(PLAIN, batch_size=8, stages=(LATE,), **fields)
    (program,), _ = programs(recipe, (600, 900))
    prefix = program.prefix
    assert (prefix.on_devices, prefix.mib * 512) == (place == "device", rows)
    assert reason in prefix.reason
    assert prefix.train == (not reason)


@pytest.mark.slow
@pytest.mark.parametrize("place", [dataclasses.replace, on_devices], ids=["host", "devices"])
@pytest.mark.parametrize("index", [0, 1])
def test_prefix_and_step_have_flops_of_undivided_step(index, place):
    apart, together = (compiled(recipe, index) for recipe in (place(PLAIN), without(PLAIN)))
    assert apart.prefix_flops > 0
    assert together.prefix_flops == 0
    assert apart.flops + apart.prefix_flops == pytest.approx(together.flops, rel=0.02)


@pytest.mark.slow
def test_step_memory_falls_with_frozen_blocks():
    """A step that starts from images needs more than one that starts from features."""
    needs = [
        [compiled(recipe, i).step.memory_analysis().temp_size_in_bytes for i in (2, 1, 0)]
        for recipe in (without(PLAIN), PLAIN)
    ]
    for more, less in itertools.pairwise(needs[0]):
        assert less < more
    assert needs[1][0] == needs[0][0]
    assert needs[1][1] <= needs[0][1]
    assert needs[1][2] < needs[0][2]
