"""Checkpoints that several processes write to one folder."""

import os
import socket
import subprocess
import sys
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.checkpoint.checkpoints import Checkpoints

PROCESS = """
import sys
from contextlib import closing
from pathlib import Path
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxft.checkpoint.checkpoints import Checkpoints
from jaxft.distributed import ask_main_process

address, index, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, num_processes=2, process_id=index)
mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
divided, replicated = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ("x", None))
array = np.arange(8.0, dtype=np.float32)

def sharded(factor):
    return jax.make_array_from_callback(
        array.shape, divided, lambda index: factor * array[index]
    )

def restored(sharding):
    like = {"params": {"x": jax.ShapeDtypeStruct((8,), "float32", sharding=sharding)}}
    return checkpoints.newest(lambda progress: like)

with closing(Checkpoints(folder)) as checkpoints:
    assert restored(divided) is None
    for step in (1, 2, 2, 3):
        checkpoints.save(step, {}, {"params": {"x": sharded(step)}})
if index == 0:
    (folder / "3" / "params" / "manifest.ocdbt").write_bytes(b"")
assert ask_main_process(lambda: f"process {index}") == "process 0"
with closing(Checkpoints(folder)) as checkpoints:
    for sharding, remarks in ((divided, 1), (replicated, 0)):
        checkpoint = restored(sharding)
        assert (checkpoint.step, len(checkpoint.remarks)) == (2, remarks), checkpoint
        assert checkpoint.arrays["params"]["x"].sharding == sharding
        for shard in checkpoint.arrays["params"]["x"].addressable_shards:
            np.testing.assert_array_equal(shard.data, 2 * array[shard.index])
    checkpoints.save(3, {}, {"params": {"x": sharded(3)}})
"""


@pytest.mark.slow
def test_checkpoints_of_two_processes(tmp_path):
    """Two processes have two devices each, and this process restores to its single device."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(index), tmp_path],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert {path.name for path in tmp_path.iterdir()} == {"2", "3", "corrupt-3"}
    for like in (jnp.zeros(8), jax.ShapeDtypeStruct((8,), "float32")):
        with closing(Checkpoints(tmp_path)) as checkpoints:
            checkpoint = checkpoints.newest(lambda progress: {"params": {"x": like}})  # noqa: B023
        assert checkpoint.step == 3
        np.testing.assert_array_equal(checkpoint.arrays["params"]["x"], 3 * jnp.arange(8.0))
