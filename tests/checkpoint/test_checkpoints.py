"""Checkpoints are complete or absent, survive kills and full disks, and report damage."""

import os
import shutil
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from faults import replaced

from jaxft import Adam, CheckpointError, Stage, plan
from jaxft.checkpoint.checkpoints import Checkpoints
from jaxft.checkpoint.layout import newest_header

PARAMS = {"body": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "head": {"kernel": jnp.arange(2.0)}}
LARGE = {"noise": jax.random.normal(jax.random.key(0), (1000, 1000))}  # 4 MB, hardly compressible


def newest(folder, like=PARAMS):
    """Restores the newest checkpoint, as a resumed run does."""
    with closing(Checkpoints(folder)) as checkpoints:
        return checkpoints.newest(lambda progress: {"params": like})


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_restore_is_bit_for_bit(tmp_path):
    transform = plan([Stage("head", {"head": 0.1}, 1)], PARAMS)[0].transform(Adam())
    arrays = {"params": PARAMS, "stats": {}, "opt_state": transform.init(PARAMS)}
    progress = {"stage": 1, "best": {"loss": float("nan"), "accuracy": 0.1 + 0.2}}
    with closing(Checkpoints(tmp_path)) as checkpoints:
        assert checkpoints.latest_step() is None
        checkpoints.save(7, progress, arrays)
    with closing(Checkpoints(tmp_path)) as checkpoints:
        assert checkpoints.latest_step() == 7
        assert checkpoints.path(7).is_dir()
        best = checkpoints.header(7)["best"]
        assert best["accuracy"] == 0.1 + 0.2
        assert np.isnan(best["loss"])
        restored = checkpoints.restore(7, jax.eval_shape(lambda: arrays))
    assert jax.tree.structure(restored) == jax.tree.structure(arrays)
    jax.tree.map(np.testing.assert_array_equal, restored, arrays)


def test_save_of_donated_buffers(tmp_path):
    """The next step may reuse the buffers while they are being written."""
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = step({"x": jnp.zeros(4_000_000)})
    with closing(Checkpoints(tmp_path)) as checkpoints:
        for number in (1, 2, 3):
            expected = float(state["x"][0])
            checkpoints.save(number, {}, {"state": state})
            for _ in range(20):
                state = step(state)
            jax.block_until_ready(state)
            like = {"state": jax.eval_shape(lambda: state)}  # noqa: B023
            written = np.asarray(checkpoints.restore(number, like)["state"]["x"])
            np.testing.assert_array_equal(written, expected)


def test_save_of_donated_buffers_several_times_without_waiting(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = step({"x": jnp.zeros(1_000_000)})
    with closing(Checkpoints(tmp_path)) as checkpoints:
        for number in range(4):
            checkpoints.save(number, {"x": float(state["x"][0])}, {"state": state}, keep=True)
            for _ in range(5):
                state = step(state)
        like = {"state": jax.eval_shape(lambda: state)}
        checkpoints.save(4, {}, {"state": {}})
    with closing(Checkpoints(tmp_path)) as checkpoints:
        for number in range(4):
            written = np.asarray(checkpoints.restore(number, like)["state"]["x"])
            np.testing.assert_array_equal(written, checkpoints.header(number)["x"])
            assert checkpoints.header(number)["x"] == 1 + 5 * number


@pytest.mark.parametrize(
    ("marked", "expected"),
    [((), {"4", "5"}), ((2,), {"2", "4", "5"}), ((1, 4), {"1", "3", "4", "5"})],
)
@pytest.mark.parametrize("restarted", [False, True])
def test_keep_preserves_marked_and_the_newest_two_others(marked, expected, restarted, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for number in (1, 2, 3, 4, 5):
        if restarted:
            checkpoints.close()
            checkpoints = Checkpoints(tmp_path)
        checkpoints.save(number, {}, {"params": PARAMS}, keep=number in marked)
    checkpoints.close()
    assert names(tmp_path) == expected


def test_keep_can_change_with_a_replacement(tmp_path):
    with closing(Checkpoints(tmp_path)) as checkpoints:
        for number, keep in ((1, False), (1, True), (2, True), (2, False), (3, False), (4, False)):
            checkpoints.save(number, {}, {"params": PARAMS}, keep=keep)
    assert names(tmp_path) == {"1", "3", "4"}


def test_reader_does_not_change_the_folder_of_a_run(tmp_path):
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, {"x": 1}, {"params": PARAMS})
    shutil.copytree(tmp_path / "1", tmp_path / "replaced-2")
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    before = sorted(tmp_path.rglob("*"))
    with closing(Checkpoints(tmp_path)) as checkpoints:
        assert checkpoints.header(checkpoints.latest_step()) == {"x": 1}
    assert sorted(tmp_path.rglob("*")) == before


def test_save_refuses_an_earlier_step(tmp_path):
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(3, {}, {"params": PARAMS})
        with pytest.raises(RuntimeError, match="step 2 is before 3"):
            checkpoints.save(2, {}, {"params": PARAMS})


def test_killed_replacement_leaves_the_old_or_the_new_checkpoint(tmp_path, monkeypatch):
    """Copies the folder, as a kill would leave it, before and after every change."""
    run, copies = tmp_path / "run", []

    def copy_folder(name):
        copies.append(tmp_path / f"{len(copies)}-{name}")
        shutil.copytree(run, copies[-1])

    def with_copies(change, *args, **kwargs):
        copy_folder(f"before-{change.__name__}")
        result = change(*args, **kwargs)
        copy_folder(f"after-{change.__name__}")
        return result

    with closing(Checkpoints(run)) as checkpoints:
        checkpoints.save(7, {"score": None}, {"params": PARAMS})
    monkeypatch.setattr(os, "rename", partial(with_copies, os.rename))
    monkeypatch.setattr(shutil, "rmtree", partial(with_copies, shutil.rmtree))
    with replaced("seal", with_copies), closing(Checkpoints(run)) as checkpoints:
        checkpoints.save(7, {"score": 0.5}, {"params": {}})
    monkeypatch.undo()
    assert names(run) == {"7"}

    scores = []
    for copy in copies:
        assert newest_header(copy) is not None
        with closing(Checkpoints(copy)) as checkpoints:
            restored = checkpoints.newest(
                lambda progress: {"params": {} if progress["score"] else PARAMS}
            )
        assert (restored.step, restored.remarks) == (7, ())
        assert names(copy) == {"7"}
        scores.append(restored.header["score"])
    assert scores[0] is None
    assert scores[-1] == 0.5
    assert all(after or not before for before, after in pairwise(scores))  # never the old again
    assert len(scores) >= 8


DAMAGES = {
    "bit": lambda file: file.write_bytes(
        (content := file.read_bytes())[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    ),
    "empty": lambda file: file.write_bytes(b""),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["header/metadata", "params/manifest.ocdbt", "the largest"])
def test_newest_renames_damaged_checkpoints_and_restores_the_previous_one(file, damage, tmp_path):
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, {}, {"params": PARAMS}, keep=True)
        checkpoints.save(2, {}, {"params": {**PARAMS, **LARGE}})
    files = [path for path in (tmp_path / "2").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    DAMAGES[damage](largest if file == "the largest" else tmp_path / "2" / file)
    with closing(Checkpoints(tmp_path)) as checkpoints:
        restored = checkpoints.newest(lambda progress: {"params": PARAMS})
        assert restored.step == 1
        jax.tree.map(np.testing.assert_array_equal, restored.arrays["params"], PARAMS)
        (remark,) = restored.remarks
        assert str(tmp_path / "2") in remark
        assert "corrupt-2, and the one before it is used" in remark
        checkpoints.save(2, {}, {"params": PARAMS})
    assert names(tmp_path) == {"1", "2", "corrupt-2"}
    assert newest(tmp_path).step == 2


@pytest.mark.parametrize("missing", ["header", "params", "checksums.json", "_CHECKPOINT_METADATA"])
def test_newest_requires_header_and_arrays(missing, tmp_path):
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, {}, {"params": PARAMS})
        checkpoints.save(2, {}, {"params": PARAMS})
    path = tmp_path / "2" / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert newest(tmp_path).step == (1 if missing in ("header", "params") else 2)


def test_newest_without_a_readable_checkpoint(tmp_path):
    assert newest(tmp_path) is None
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, {}, {"params": PARAMS})
    (tmp_path / "1" / "header" / "metadata").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* starts the run over.\n.*/1 is"):
        newest(tmp_path)
    assert names(tmp_path) == {"corrupt-1"}
    assert newest_header(tmp_path) is None
    assert newest(tmp_path) is None


def test_newest_does_not_rename_checkpoints_of_another_structure(tmp_path):
    with closing(Checkpoints(tmp_path)) as checkpoints:
        for number in (1, 2):
            checkpoints.save(number, {}, {"params": PARAMS})
    with pytest.raises(CheckpointError, match="2 does not fit this run"):
        newest(tmp_path, like={"body": PARAMS["body"]})
    assert names(tmp_path) == {"1", "2"}


def test_check_room_refuses_a_full_disk(disk):
    with closing(Checkpoints(disk.folder / "run")) as checkpoints:
        checkpoints.save(1, {}, {"params": PARAMS})
        disk.fill()
        with pytest.raises(CheckpointError, match=r"needs 4 MiB, and \d MiB are free. All up to"):
            checkpoints.save(2, {}, {"params": LARGE})
        disk.free()
        checkpoints.save(2, {}, {"params": LARGE})
    assert newest(disk.folder / "run", like=LARGE).step == 2


@pytest.mark.parametrize("step", [1, 2], ids=["replacing", "after it"])
@pytest.mark.parametrize("reported_by", ["close", "save"])
def test_full_disk_during_a_write_keeps_older_checkpoints(
    step, reported_by, disk, monkeypatch, caplog
):
    with closing(Checkpoints(disk.folder / "run")) as checkpoints:
        for _ in range(2):
            checkpoints.save(1, {"score": 0.5}, {"params": PARAMS}, keep=True)
    checkpoints = Checkpoints(disk.folder / "run")
    disk.fill()
    # Other processes take the space after the check.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**40))
    checkpoints.save(step, {}, {"params": LARGE})
    message = "No space left on device. All up to step 1 is safe; the same command continues"
    with pytest.raises(CheckpointError, match=message):
        checkpoints.close() if reported_by == "close" else checkpoints.save(
            3, {}, {"params": PARAMS}
        )
    checkpoints.close()  # does not raise again
    assert not caplog.records
    assert newest_header(disk.folder / "run") is not None
    disk.free()
    assert newest(disk.folder / "run").header == {"score": 0.5}
    with closing(Checkpoints(disk.folder / "run")) as checkpoints:
        checkpoints.save(2, {}, {"params": LARGE})
    assert names(disk.folder / "run") == {"1", "2"}


def test_save_that_fails_without_older_checkpoints(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
    refused = pytest.raises(CheckpointError, match=r"on device. The same command starts once there")
    with closing(Checkpoints(tmp_path)) as checkpoints, refused:
        checkpoints.save(2, {}, {"params": PARAMS})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"body": PARAMS["body"]}, r"'head'.*float32\[2\], not in the run"),
        ({**PARAMS, "more": jnp.ones(1)}, r"'more'.*missing, not float32\[1\]"),
        ({**PARAMS, "head": {"kernel": jnp.ones(3)}}, r"float32\[2\], not float32\[3\]"),
    ],
    ids=["extra", "missing", "shape"],
)
def test_restore_refuses_another_structure(other, message, tmp_path):
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, {}, {"params": PARAMS})
        with pytest.raises(CheckpointError, match=message):
            checkpoints.restore(1, {"params": other})
