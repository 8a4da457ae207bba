"""Checkpoints: whole or absent, and safe from the step that overwrites its own buffers."""

import os
import shutil
import socket
import subprocess
import sys
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import Adam, CheckpointError, Stage, plan
from jaxft.checkpoint import checksums
from jaxft.checkpoint.checkpoints import Checkpoints, exist

PARAMS = {"body": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "head": {"kernel": jnp.arange(2.0)}}
LARGE = {"noise": jax.random.normal(jax.random.key(0), (1000, 1000))}  # 4 MB, hardly compressible


def newest(folder, like=PARAMS):
    """What a run that goes on in the folder finds."""
    with closing(Checkpoints(folder)) as checkpoints:
        return checkpoints.newest(lambda progress: {"params": like})


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_arrays_and_progress_come_back_bit_for_bit(tmp_path):
    transform = plan([Stage("head", {"head": 0.1}, 1)], PARAMS)[0].transform(Adam())
    arrays = {"params": PARAMS, "stats": {}, "opt_state": transform.init(PARAMS)}
    progress = {"stage": 1, "best": {"loss": float("nan"), "accuracy": 0.1 + 0.2}}
    with closing(Checkpoints(tmp_path)) as checkpoints:
        assert checkpoints.latest_step() is None
        checkpoints.save(7, progress, arrays)
    with closing(Checkpoints(tmp_path)) as checkpoints:
        assert checkpoints.latest_step() == 7
        assert checkpoints.path(7).is_dir()
        found = checkpoints.progress(7)
        assert found["best"]["accuracy"] == 0.1 + 0.2
        assert np.isnan(found["best"]["loss"])
        restored = checkpoints.restore(7, jax.eval_shape(lambda: arrays))
    assert jax.tree.structure(restored) == jax.tree.structure(arrays)
    jax.tree.map(np.testing.assert_array_equal, restored, arrays)


def test_donated_buffers_are_saved_as_they_were(tmp_path):
    """The next step may reuse the buffers of what is still being written."""
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


def test_donated_buffers_of_several_saves_in_a_row(tmp_path):
    """Nobody waits in between, and all of them stay."""
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
            np.testing.assert_array_equal(written, checkpoints.progress(number)["x"])
            assert checkpoints.progress(number)["x"] == 1 + 5 * number


@pytest.mark.parametrize(
    ("marked", "left"),
    [((), {"4", "5"}), ((2,), {"2", "4", "5"}), ((1, 4), {"1", "3", "4", "5"})],
)
@pytest.mark.parametrize("restarted", [False, True])
def test_what_is_marked_stays_and_of_the_others_the_newest_two(marked, left, restarted, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for number in (1, 2, 3, 4, 5):
        if restarted:
            checkpoints.close()
            checkpoints = Checkpoints(tmp_path)
        checkpoints.save(number, {}, {"params": PARAMS}, keep=number in marked)
    checkpoints.close()
    assert names(tmp_path) == left


def test_a_mark_can_come_with_a_replacement_and_go(tmp_path):
    with closing(Checkpoints(tmp_path)) as checkpoints:
        for number, keep in ((1, False), (1, True), (2, True), (2, False), (3, False), (4, False)):
            checkpoints.save(number, {}, {"params": PARAMS}, keep=keep)
    assert names(tmp_path) == {"1", "3", "4"}


def test_an_onlooker_leaves_alone_what_a_run_is_writing(tmp_path):
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, {"x": 1}, {"params": PARAMS})
    shutil.copytree(tmp_path / "1", tmp_path / "replaced-2")
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    before = sorted(tmp_path.rglob("*"))
    with closing(Checkpoints(tmp_path)) as checkpoints:
        assert checkpoints.progress(checkpoints.latest_step()) == {"x": 1}
    assert sorted(tmp_path.rglob("*")) == before


def test_an_earlier_step_is_refused(tmp_path):
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(3, {}, {"params": PARAMS})
        with pytest.raises(RuntimeError, match="step 2 is before 3"):
            checkpoints.save(2, {}, {"params": PARAMS})


def test_a_replacement_that_is_killed_leaves_the_old_or_the_new(tmp_path, monkeypatch):
    """The folder, as a kill would leave it, before and after all that changes it."""
    run, moments = tmp_path / "run", []

    def photographed(change):
        def changing(*args, **kwargs):
            for when in ("before", "after"):
                moments.append(tmp_path / f"{len(moments)}-{when}-{change.__name__}")
                shutil.copytree(run, moments[-1])
                done = change(*args, **kwargs) if when == "before" else done  # noqa: F821
            return done

        return changing

    with closing(Checkpoints(run)) as checkpoints:
        checkpoints.save(7, {"score": None}, {"params": PARAMS})
    monkeypatch.setattr(checksums, "seal", photographed(checksums.seal))
    monkeypatch.setattr(os, "rename", photographed(os.rename))
    monkeypatch.setattr(shutil, "rmtree", photographed(shutil.rmtree))
    with closing(Checkpoints(run)) as checkpoints:
        checkpoints.save(7, {"score": 0.5}, {"params": {}})
    monkeypatch.undo()
    assert names(run) == {"7"}

    found = []
    for moment in moments:
        assert exist(moment)
        with closing(Checkpoints(moment)) as checkpoints:
            restored = checkpoints.newest(
                lambda progress: {"params": {} if progress["score"] else PARAMS}
            )
        assert (restored.step, restored.remarks) == (7, ())
        assert names(moment) == {"7"}
        found.append(restored.progress["score"])
    assert found[0] is None
    assert found[-1] == 0.5
    assert all(after or not before for before, after in pairwise(found))  # and no way back
    assert len(found) >= 8


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
def test_what_is_damaged_is_moved_aside_and_the_one_before_counts(file, damage, tmp_path):
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
        assert "corrupt-2, and the one before it counts" in remark
        checkpoints.save(2, {}, {"params": PARAMS})
    assert names(tmp_path) == {"1", "2", "corrupt-2"}
    assert newest(tmp_path).step == 2


@pytest.mark.parametrize("missing", ["header", "params", "checksums.json", "_CHECKPOINT_METADATA"])
def test_what_is_needed_of_a_checkpoint(missing, tmp_path):
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, {}, {"params": PARAMS})
        checkpoints.save(2, {}, {"params": PARAMS})
    path = tmp_path / "2" / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert newest(tmp_path).step == (1 if missing in ("header", "params") else 2)


def test_without_one_that_can_be_read_the_same_command_starts_over(tmp_path):
    assert newest(tmp_path) is None
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, {}, {"params": PARAMS})
    (tmp_path / "1" / "header" / "metadata").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* starts the run over.\n.*/1 is"):
        newest(tmp_path)
    assert names(tmp_path) == {"corrupt-1"}
    assert not exist(tmp_path)
    assert newest(tmp_path) is None


def test_another_structure_is_not_damage(tmp_path):
    with closing(Checkpoints(tmp_path)) as checkpoints:
        for number in (1, 2):
            checkpoints.save(number, {}, {"params": PARAMS})
    with pytest.raises(CheckpointError, match="2 does not fit this run"):
        newest(tmp_path, like={"body": PARAMS["body"]})
    assert names(tmp_path) == {"1", "2"}


def test_a_full_disk_is_known_before_writing(disk):
    with closing(Checkpoints(disk.folder / "run")) as checkpoints:
        checkpoints.save(1, {}, {"params": PARAMS})
        disk.fill()
        with pytest.raises(CheckpointError, match=r"needs 4 MiB, and \d MiB are free. All up to"):
            checkpoints.save(2, {}, {"params": LARGE})
        disk.free()
        checkpoints.save(2, {}, {"params": LARGE})
    assert newest(disk.folder / "run", like=LARGE).step == 2


@pytest.mark.parametrize("step", [1, 2], ids=["replacing", "after it"])
@pytest.mark.parametrize("met", ["closing", "saving"])
def test_a_disk_that_fills_up_meanwhile_costs_nothing_older(step, met, disk, monkeypatch, caplog):
    monkeypatch.setattr(Checkpoints, "_lack", lambda *_: "")
    checkpoints = Checkpoints(disk.folder / "run")
    checkpoints.save(1, {"score": 0.5}, {"params": PARAMS}, keep=True)
    checkpoints.save(1, {"score": 0.5}, {"params": PARAMS}, keep=True)  # has waited for the first
    checkpoints._manager.wait_until_finished()
    disk.fill()
    checkpoints.save(step, {}, {"params": LARGE})
    sentence = "No space left on device. All up to step 1 is safe; the same command goes on"
    with pytest.raises(CheckpointError, match=sentence):
        checkpoints.close() if met == "closing" else checkpoints.save(3, {}, {"params": PARAMS})
    checkpoints.close()  # has nothing to add
    assert not caplog.records
    assert exist(disk.folder / "run")
    disk.free()
    assert newest(disk.folder / "run").progress == {"score": 0.5}
    with closing(Checkpoints(disk.folder / "run")) as checkpoints:
        checkpoints.save(2, {}, {"params": LARGE})
    assert names(disk.folder / "run") == {"1", "2"}


def test_a_first_write_that_fails(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("No space left on device")

    with closing(Checkpoints(tmp_path)) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", fail)
        with pytest.raises(CheckpointError, match=r"on device. The same command starts once there"):
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
def test_another_structure_is_refused(other, message, tmp_path):
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, {}, {"params": PARAMS})
        with pytest.raises(CheckpointError, match=message):
            checkpoints.restore(1, {"params": other})


PROCESS = """
import sys
from contextlib import closing
from pathlib import Path
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxft.checkpoint import Checkpoints
from jaxft.distributed import ask_main_process

address, index, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, num_processes=2, process_id=index)
mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
apart, everywhere = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ("x", None))
whole = np.arange(8.0, dtype=np.float32)

def part(factor):
    return jax.make_array_from_callback(whole.shape, apart, lambda at: factor * whole[at])

def restored(sharding):
    like = {"params": {"x": jax.ShapeDtypeStruct((8,), "float32", sharding=sharding)}}
    return checkpoints.newest(lambda progress: like)

with closing(Checkpoints(folder)) as checkpoints:
    assert restored(apart) is None
    for step in (1, 2, 2, 3):
        checkpoints.save(step, {}, {"params": {"x": part(step)}})
if index == 0:
    (folder / "3" / "params" / "manifest.ocdbt").write_bytes(b"")
assert ask_main_process(lambda: f"the first is {index}") == "the first is 0"
with closing(Checkpoints(folder)) as checkpoints:
    for sharding, remarks in ((apart, 1), (everywhere, 0)):
        found = restored(sharding)
        assert (found.step, len(found.remarks)) == (2, remarks), found
        assert found.arrays["params"]["x"].sharding == sharding
        for shard in found.arrays["params"]["x"].addressable_shards:
            np.testing.assert_array_equal(shard.data, 2 * whole[shard.index])
    checkpoints.save(3, {}, {"params": {"x": part(3)}})
"""


@pytest.mark.slow
def test_several_processes_share_a_folder(tmp_path):
    """Two processes hold a part on each of their two devices; this one restores it to its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    known = os.environ.get("XLA_FLAGS", "")
    flags = f"{known} --xla_force_host_platform_device_count=2"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(index), tmp_path],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": flags,
            },
        )
        for index in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    assert names(tmp_path) == {"2", "3", "corrupt-3"}
    here = newest(tmp_path, like={"x": jnp.zeros(8)}).arrays["params"]["x"]
    np.testing.assert_array_equal(here, 3 * jnp.arange(8.0))
    assert newest(tmp_path, like={"x": jax.ShapeDtypeStruct((8,), "float32")}).step == 3
