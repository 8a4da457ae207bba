"""Training on one, eight and two times four devices; joining processes; shardings."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxft import distributed
from jaxft.devices import Devices
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
    """Returns the results of each process of tests/parallel_child.py, by the process's name."""
    folder, port = tmp_path_factory.mktemp("runs"), free_port()
    known = os.environ.get("XLA_FLAGS", "")
    devices = f"{known} --xla_force_host_platform_device_count="
    # These two find each other through Slurm's variables.
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
def test_result_does_not_depend_on_the_devices(process, sharding, runs):
    one = runs["eight"][1]["one"]
    assert np.isfinite(one).all()
    np.testing.assert_allclose(runs[process][1][sharding], one, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("process", ["eight", "first", "second"])
def test_step_on_devices_compiles_once_and_donates_its_state(process, sharding, runs):
    observed = runs[process][0][sharding]
    assert (observed["rows"], observed["batch"]) == (16, "P('batch',)")  # for 10 images
    assert (observed["programs"], observed["stable"], observed["donated"]) == (1, True, True)
    assert (observed["divided"] > 0) == (sharding == "fsdp")


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("process", ["eight", "first", "second"])
def test_shardings_divide_large_arrays_along_the_largest_divisible_axis(process, sharding, runs):
    layout = runs[process][0]["layout"][sharding]
    divided = {"tall": "P('batch',)", "square": "P(None, None, None, 'batch')"}
    names = ("tall", "square", "odd", "small", "scalar", "key")
    expected = dict.fromkeys(names, "P()") | (divided if sharding == "fsdp" else {})
    assert layout.pop("specs") == expected
    assert layout == dict.fromkeys(("structure", "put", "stays", "back"), True)


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [2, 8, 16])
def test_replicas_on_devices_equal_those_on_one(replicas, runs):
    """Two groups of four devices, as with two slices; a replica on each device; and more."""
    trained = runs["eight"][1]
    one, several = (trained[f"{case}, {replicas} replicas"] for case in ("one", "replicated"))
    np.testing.assert_allclose(several, one, rtol=1e-5, atol=1e-5)
    assert np.abs(one - trained["one, 1 replicas"]).max() > 1e-3


@pytest.mark.slow
def test_replicas_exchange_statistics_within_their_group_only(runs):
    observed, _ = runs["eight"]
    norm_layers = 7
    kinds, groups = observed["replicated, 2 replicas"]
    assert kinds["all-gather"] == len(groups) == norm_layers
    assert set(groups) <= {"{{0,1,2,3},{4,5,6,7}},", "[2,4]<=[8],"}
    kinds, groups = observed["replicated, 8 replicas"]
    assert groups == []
    assert kinds["all-reduce"] < observed["replicated, 1 replicas"][0]["all-reduce"]


@pytest.mark.slow
def test_devices_stack_parts(runs):
    """A batch of parts that fill the devices is exchanged once; others are copied."""
    even, whole, odd, padded = runs["eight"][0]["parts"]
    assert even[:3] == [True, [4, 16, 2], "P(None, 'batch')"]
    assert "all-gather" not in even[3]
    assert whole[:3] == [True, [16, 8, 2], "P(None, 'batch')"]
    assert "all-gather" not in whole[3]
    assert odd[:3] == [True, [3, 8, 2], "P(None, 'batch')"]
    assert padded[:3] == [True, [4, 8, 2], "P(None, 'batch')"]


@pytest.mark.slow
def test_collectives_of_processes(runs):
    for process, first, shard in (
        ("eight", True, [0, 1]),
        ("first", True, [0, 2]),
        ("second", False, [1, 2]),
    ):
        observed, _ = runs[process]
        assert (observed["first"], observed["shard"]) == (first, shard)
        assert observed["any"] == [False, True]  # process 0's flag is True
        assert observed["signals"] == [15]  # the program's handler, set before it joined


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
        (("host:1", 2, 2), "process is 2; with 2 processes it must be from 0 to 1"),
        (("host:1", 2, -1), "process is -1; with 2"),
    ],
)
def test_start_rejects_wrong_arguments(arguments, expected):
    with pytest.raises(ParallelError, match=expected):
        distributed.start(*arguments)


def test_start_after_other_calls_of_jax_is_an_error():
    jax.devices()
    with pytest.raises(ParallelError, match="must be called before any JAX calls"):
        distributed.start()


FIND_COORDINATOR = """
import jax
from jax._src import distributed as service
from jax._src.clusters import cloud_tpu_cluster
from jaxft import distributed

cloud_tpu_cluster.running_in_cloud_tpu_vm = True
distributed.start()
print(service.global_state.coordinator_address, jax.process_count())
jax.distributed.shutdown()
"""


@pytest.mark.slow
def test_start_on_tpus_waits_at_the_port_of_the_environment():
    """The variables are those of a pod of Google Kubernetes Engine."""
    port = free_port()
    pod = {"TPU_WORKER_HOSTNAMES": "127.0.0.1", "TPU_WORKER_ID": "0", "TPU_SKIP_MDS_QUERY": "1"}
    pod |= {"MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1", "MEGASCALE_NUM_SLICES": "1"}
    pod |= {"MEGASCALE_SLICE_ID": "0", "JAX_COORDINATOR_PORT": str(port)}
    process = python("-c", FIND_COORDINATOR, **pod)
    out, errors = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, f"127.0.0.1:{port} 1\n"), errors


def test_start_of_one_process_joins_nothing():
    distributed.start(processes=1)
    assert not jax.distributed.is_initialized()


def test_devices_rejects_unequal_processes():
    owners = [SimpleNamespace(process_index=index) for index in (0, 0, 0, 1, 1)]
    with pytest.raises(ParallelError, match="the same number of devices, but they have 3, 2"):
        Devices(mesh=SimpleNamespace(devices=np.array(owners)))


def test_devices_cache_features_in_a_quarter_of_their_memory(monkeypatch):
    tpu = SimpleNamespace(
        platform="tpu", process_index=0, memory_stats=lambda: {"bytes_limit": 16 * 2**30}
    )
    devices = Devices(mesh=SimpleNamespace(devices=np.array([tpu])))
    monkeypatch.setattr(jax, "local_devices", lambda: [tpu])
    assert devices.with_cache(None).cache_mib == 4096
    assert devices.with_cache(7).cache_mib == 7
    assert Devices().with_cache(None).cache_mib == 0  # on CPU


def test_devices_group_by_slice():
    """As `2xv5e-4` and its eight chips."""

    @dataclass(frozen=True)
    class Chip:
        id: int
        process_index: int
        slice_index: int

    chips = np.array([Chip(i, i // 4, i // 4) for i in range(8)])
    devices = Devices(mesh=SimpleNamespace(devices=chips, size=8))
    assert devices.slices == 2
    assert (devices.replicas(1), devices.replicas(3), devices.replicas(16)) == (1, 3, 16)
    groups = devices.replicas(devices.slices)
    assert [[x.slice_index for x in group] for group in groups.devices] == [[0] * 4, [1] * 4]


def test_devices_rejects_unequal_slices():
    owners = [SimpleNamespace(process_index=i, slice_index=i // 2) for i in range(5)]
    with pytest.raises(ParallelError, match="all slices must have the same number of devices"):
        Devices(mesh=SimpleNamespace(devices=np.array(owners)))


def test_devices_without_slices_are_one_slice():
    assert Devices().slices == 1


def test_devices_are_hashable():
    assert Devices("fsdp") == Devices("fsdp") != Devices()
    assert hash(Devices("fsdp")) == hash(Devices("fsdp"))


@pytest.mark.parametrize(("batch_size", "count", "rows"), [(1, 8, 8), (8, 8, 8), (9, 8, 16)])
def test_devices_rows(batch_size, count, rows):
    mesh = SimpleNamespace(size=count, devices=np.array([SimpleNamespace(process_index=0)]))
    assert Devices(mesh=mesh).rows(batch_size) == rows


def test_devices_lower_as_jit_does():
    devices = Devices()
    x = devices.abstract_batch(jax.ShapeDtypeStruct((8, 2), np.float32))
    product = jax.jit(lambda x: x @ x.T)
    assert devices.lower(product, x).as_text() == product.lower(x).as_text()
