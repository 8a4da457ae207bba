"""What a run ran on, a record for each time that it was started."""

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any

import jax
from etils import epath

from jaxft.checkpoint import atomic

_DEV = Path("/dev")
_PACKAGES = ("jaxft", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def append(workdir: str | PathLike[str]) -> None:
    """Adds `current()` to the list in the run's `environment.json`: a resume may run elsewhere.

    For one process of a run. Raises OSError where the folder cannot be written.
    """
    file = epath.Path(workdir) / "environment.json"
    try:
        starts = list(json.loads(file.read_text()))
    except (FileNotFoundError, ValueError, TypeError):  # none yet, or none that counts
        starts = []
    atomic.write(file, json.dumps([*starts, current()], indent=2) + "\n")


def current() -> dict[str, Any]:
    """Versions, devices, processes, the time (UTC), the command, and the git commit, if any."""
    devices = jax.devices()
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in _PACKAGES},
        },
        "git": _commit(Path(__file__).parent) or _commit(Path.cwd()),
        "platform": devices[0].platform,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "processes": jax.process_count(),
        "host": platform.node(),
    }


def idle_accelerator() -> list[str]:
    """Returns a remark where JAX runs on the CPU of a machine that has a GPU or TPU.

    None where the CPU was asked for: by JAX_PLATFORMS, or by a CUDA_VISIBLE_DEVICES without any.
    """
    asked = jax.config.jax_platforms  # type: ignore[attr-defined]
    if asked or jax.default_backend() != "cpu":
        return []
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles")
    if any(_DEV.glob("nvidia[0-9]*")) and not hidden:
        kind, extra = "an NVIDIA GPU", "cuda"
    elif any(_DEV.glob("accel[0-9]*")):
        kind, extra = "a TPU", "tpu"
    else:
        return []
    return [
        f"JAX runs on the CPU, and this machine has {kind}: pip install '.[{extra}]' lets JAX use "
        "it. JAX_PLATFORMS=cpu says that the CPU is meant."
    ]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # a folder on the path, not installed
        return None


def _commit(folder: Path) -> dict[str, Any] | None:
    """The commit that the folder's files are of; none where git is not, or does not know them."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        # Tracked there: a virtual environment within someone's repository is not of its commit.
        if not git("ls-files", "--", "."):
            return None
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None
