"""Records versions, devices and the git commit at each start of a run."""

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
    """Adds `current()` to the list in the run's `environment.json`.

    The list has one entry per start, because a run may be resumed on another machine. Only one
    process of a run should call this.

    Raises:
      OSError: if the folder cannot be written.
    """
    file = epath.Path(workdir) / "environment.json"
    try:
        starts = list(json.loads(file.read_text()))
    except (FileNotFoundError, ValueError, TypeError):  # no file, or no list
        starts = []
    atomic.write(file, json.dumps([*starts, current()], indent=2) + "\n")


def current() -> dict[str, Any]:
    """Returns versions, devices, processes, time (UTC), command and git commit, None if unknown."""
    devices = jax.devices()
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "command": sys.argv,
        "versions": {"python": platform.python_version(), **versions()},
        "git": _commit(Path(__file__).parent) or _commit(Path.cwd()),
        "platform": devices[0].platform,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "processes": jax.process_count(),
        "host": platform.node(),
    }


def versions() -> dict[str, str | None]:
    """Returns the version of each package that matters; None if it is not installed."""
    return {package: _version(package) for package in _PACKAGES}


def idle_accelerator() -> list[str]:
    """Returns a remark if JAX runs on the CPU although the machine has a GPU or TPU.

    Returns no remark if the user selected the CPU by JAX_PLATFORMS or hid all GPUs by
    CUDA_VISIBLE_DEVICES.
    """
    selected = jax.config.jax_platforms  # type: ignore[attr-defined]
    if selected or jax.default_backend() != "cpu":
        return []
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles")
    if any(_DEV.glob("nvidia[0-9]*")) and not hidden:
        kind, extra = "an NVIDIA GPU", "cuda"
    elif any(_DEV.glob("accel[0-9]*")):
        kind, extra = "a TPU", "tpu"
    else:
        return []
    return [
        f"JAX runs on the CPU, but this machine has {kind}: pip install '.[{extra}]' lets JAX use "
        "it. To use the CPU, set JAX_PLATFORMS=cpu."
    ]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # not installed: imported from a folder on the path
        return None


def _commit(folder: Path) -> dict[str, Any] | None:
    """Returns the commit of the folder's files; None without git, or if git does not track them."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        process = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return process.stdout.strip()

    try:
        # A virtual environment within a repository does not belong to the repository's commit.
        if not git("ls-files", "--", "."):
            return None
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None
