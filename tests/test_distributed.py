"""Many devices: the same training on one, eight and two times four; and who is not there."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxft import distributed
from jaxft.distributed import Devices
from jaxft.errors import ParallelError

TESTS = Path(__file__).parent
SHARDINGS = ("replicated", "fsdp")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def python(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-W", "error", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What each process of tests/parallel_child.py saw and trained, by its name."""
    folder, port = tmp_path_factory.mktemp("runs"), free_port()
    known = os.environ.get("XLA_FLAGS", "")
    devices = f"{known} --xla_force_host_platform_device_count="
    # These two find each other; those of test_rendezvous.py are told whom to join.
    slurm = {f"SLURM_{name}": "1" for name in ("JOB_ID", "LOCALID")}
    slurm |= {"SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2"}
    slurm |= {"JAX_COORDINATOR_PORT": str(port), "XLA_FLAGS": f"{devices}4"}
    child = TESTS / "parallel_child.py"
    processes = {
        "first": python(child, folder / "first", SLURM_PROCID="0", **slurm),
        "second": python(child, folder / "second", SLURM_PROCID="1", **slurm),
        "eight": python(child, folder / "eight", XLA_FLAGS=f"{devices}8"),
    }
    ended = [(process.communicate(timeout=300)[1], process) for process in processes.values()]
    for errors, process in ended:
        assert process.returncode == 0, errors
    read = {}
    for name in processes:
        with np.load(folder / f"{name}.npz") as trained:
            read[name] = json.loads((folder / f"{name}.json").read_text()), dict(trained)
    return read


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("process", ["eight", "first", "second"])
def test_any_devices_train_the_same(process, sharding, runs):
    one = runs["eight"][1]["one"]
    assert np.isfinite(one).all()
    np.testing.assert_allclose(runs[process][1][sharding], one, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("process", ["eight", "first", "second"])
def test_a_donated_state_stays_where_it_is_in_one_program(process, sharding, runs):
    seen = runs[process][0][sharding]
    assert (seen["rows"], seen["batch"]) == (16, "P('batch',)")  # of 10 images
    assert (seen["programs"], seen["stable"], seen["donated"]) == (1, True, True)
    assert (seen["divided"] > 0) == (sharding == "fsdp")


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("process", ["eight", "first", "second"])
def test_large_arrays_are_divided_along_their_largest_fitting_dimension(process, sharding, runs):
    layout = runs[process][0]["layout"][sharding]
    divided = {"tall": "P('batch',)", "square": "P(None, None, None, 'batch')"}
    names = ("tall", "square", "odd", "small", "scalar", "key")
    where = dict.fromkeys(names, "P()") | (divided if sharding == "fsdp" else {})
    assert layout.pop("specs") == where
    assert layout == dict.fromkeys(("structure", "put", "stays", "back"), True)


@pytest.mark.slow
def test_processes_know_of_each_other(runs):
    for process, first, shard in (
        ("eight", True, [0, 1]),
        ("first", True, [0, 2]),
        ("second", False, [1, 2]),
    ):
        seen, _ = runs[process]
        assert (seen["first"], seen["shard"]) == (first, shard)
        assert seen["agree"] == [False, True]  # the first's flag is True
        assert seen["signals"] == [15]  # the program's own handler, set before it joined


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("host:1", 2, None), "several processes need all three"),
        (("host:1", None, 1), "several processes need all three"),
        ((None, 2, 1), "several processes need all three"),
        (("host", 2, 0), "coordinator is 'host'; it must be HOST:PORT"),
        ((":80", 2, 0), "coordinator is ':80'; it must be HOST:PORT"),
        (("host:port", 2, 0), "it must be HOST:PORT"),
        (("host:65536", 2, 0), "it must be HOST:PORT"),
        (("host:1", 2, 2), "process is 2; of 2 the first is 0 and the last 1"),
        (("host:1", 2, -1), "process is -1; of 2"),
    ],
)
def test_arguments_that_do_not_fit(arguments, expected):
    with pytest.raises(ParallelError, match=expected):
        distributed.start(*arguments)


def test_too_late_to_join():
    jax.devices()
    with pytest.raises(ParallelError, match="must be called before any JAX calls"):
        distributed.start()


def test_one_process_has_nothing_to_join():
    distributed.start(processes=1)
    assert not jax.distributed.is_initialized()


def test_processes_must_have_equally_many_devices():
    owners = [SimpleNamespace(process_index=index) for index in (0, 0, 0, 1, 1)]
    with pytest.raises(ParallelError, match="as many devices as any other, and they have 3, 2"):
        Devices(mesh=SimpleNamespace(devices=np.array(owners)))


def test_equal_devices_are_one_static_argument():
    assert Devices("fsdp") == Devices("fsdp") != Devices()
    assert hash(Devices("fsdp")) == hash(Devices("fsdp"))


@pytest.mark.parametrize(("batch_size", "count", "rows"), [(1, 8, 8), (8, 8, 8), (9, 8, 16)])
def test_rows_divide_among_the_devices(batch_size, count, rows):
    mesh = SimpleNamespace(size=count, devices=np.array([SimpleNamespace(process_index=0)]))
    assert Devices(mesh=mesh).rows(batch_size) == rows
