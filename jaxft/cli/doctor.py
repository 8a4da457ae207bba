"""Reports versions, devices, caches and missing extras of this installation.

    jaxft doctor [--help]

Exits with 1 if JAX cannot start on its devices.
"""

import os
import platform
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import jax

from jaxft.cli.command_setup import command_parser, run_until_signal
from jaxft.cli.commands import version
from jaxft.errors import ParallelError
from jaxft.report.console import Console
from jaxft.report.environment import idle_accelerator, versions
from jaxft.weights.download import cache_folder

_EXTRAS = {  # a module of each extra, and its purpose
    "cuda": ("jax_cuda13_plugin", "NVIDIA GPUs"),
    "tpu": ("libtpu", "TPUs, and jaxft plan for them"),
    "gcs": ("gcsfs", "gs:// folders"),
    "hf-datasets": ("datasets", "hf_dataset: folders"),
    "onnx": ("onnxruntime", "export as ONNX"),
    "torch": ("torch", "comparison with PyTorch"),
}


def run(arguments: Sequence[str], program: str = "jaxft doctor") -> int:
    """Runs the command; returns its exit code."""
    return run_until_signal(partial(_doctor, arguments, program))


def _doctor(arguments: Sequence[str], program: str) -> None:
    command_parser(__doc__, "jaxft doctor", program).parse_args(arguments)
    console = Console()
    console.row(f"jaxft {version()} in {Path(__file__).parents[1]}")
    console.row(f"Python {platform.python_version()} in {sys.executable}, {platform.platform()}")
    console.say(", ".join(f"{name} {number}" for name, number in versions().items()))
    console.row("")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    console.row(f"{'cores':12}{cores}")
    for name, folder in {"cache": cache_folder(), "here": Path.cwd()}.items():
        console.row(f"{name:12}{folder}: {_size(folder)}{_free(folder)}")
    for name, (module, purpose) in _EXTRAS.items():
        state = "installed" if find_spec(module) else f"missing: pip install 'jaxft[{name}]'"
        console.row(f"{name:12}{state} ({purpose})")
    console.row("")
    try:
        devices = jax.devices()
    except RuntimeError as error:  # such as a TPU that another process holds
        raise ParallelError(f"JAX finds no device: {error}") from error
    kind = devices[0].device_kind
    console.row(f"{'devices':12}{len(devices)} {devices[0].platform} ({kind}){_memory(devices[0])}")
    for remark in idle_accelerator():
        console.say(remark)


def _memory(device: jax.Device) -> str:
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    return f", {limit / 2**30:.1f} GiB each" if limit else ""


def _size(folder: Path) -> str:
    """Returns the size of the cache's files; nothing for another folder."""
    if folder != cache_folder():
        return ""
    if not folder.is_dir():
        return "empty, "
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{size / 2**20:,.0f} MiB, "


def _free(folder: Path) -> str:
    """Returns the room on the disk, and whether the folder can be written."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    writable = "" if os.access(existing, os.W_OK) else ", cannot be written"
    return f"{shutil.disk_usage(existing).free / 2**30:,.1f} GiB free{writable}"
