"""One compilation cache for the suite, and programs that compile fast: many run for a few steps.

And a disk that can be filled.
"""

import gc
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

gc.set_threshold(100_000, 50, 100)  # or it walks over all that jax has traced, time and again
if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers inherit what their parent sets here
    _cache = tempfile.TemporaryDirectory(prefix="jaxft-tests-", ignore_cleanup_errors=True)
    if version("jaxlib") < "0.12":  # which aborts at a flag that it does not know
        os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"
    os.environ["OMP_NUM_THREADS"] = "1"  # torch's threads would wait for each other's cores
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def pytest_xdist_auto_num_workers():
    """One more than there are cores: tests wait for disks, processes and each other's threads."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else None


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Compiled programs of a whole suite would fill gigabytes; few are of use to two modules."""
    yield
    import jax

    jax.clear_caches()


@dataclass(frozen=True)
class Disk:
    """A small disk of its own, mounted at `folder`."""

    folder: Path

    def fill(self, but: int = 2**20) -> None:
        """Takes all room on it `but` so many bytes."""
        with (self.folder / "ballast").open("wb", buffering=0) as file:
            file.write(bytes(shutil.disk_usage(self.folder).free - but))

    def free(self) -> None:
        """Gives it back."""
        (self.folder / "ballast").unlink()


@pytest.fixture
def disk(tmp_path):
    """A disk of 12 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount here")
    if done.returncode:
        pytest.skip(f"not permitted to mount: {done.stderr}")
    yield Disk(folder)
    subprocess.run(["umount", folder], check=True)
