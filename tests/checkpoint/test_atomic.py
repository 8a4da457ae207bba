"""Atomic file writes and checksums, which need no other package."""

import subprocess
import sys


def test_atomic_and_checksums_import_neither_orbax_nor_flax():
    code = "import sys, jaxft.checkpoint.atomic, jaxft.checkpoint.checksums; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    packages = {name.partition(".")[0] for name in done.stdout.split()}
    assert "jaxft" in packages
    assert not packages & {"orbax", "flax"}
