"""Options and fixtures of all tests.

- Programs compile fast, because many run for a few steps only, and are cached between sessions.
- `--check-cpu` measures the CPU time of each test.
- `golden` reads the recorded values of a test module.
- `disk` is a small disk that a test can fill.
"""

import gc
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import zlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import hypothesis
import pytest
from _pytest.doctest import DoctestModule

# A shell's background job ignores Ctrl-C, and so would the runs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
gc.set_threshold(100_000, 50, 100)  # collections walk over everything that jax has traced
CACHE_BYTES = 2**30  # of compiled programs, before they are deleted

# Seconds that a test may take without the mark `slow`, on two cores of a current server. The check
# allows three times as much: where other work shared the cores, the same test has taken twice its
# CPU time here, and a check must not fail by chance.
CPU_LIMIT = 2.0
CPU_NOISE = 3.0

# Start first, because each runs in one worker and would else be the last to end.
LONG = (
    "tests/train/test_devices.py",
    "tests/parity/test_recipes.py",
    "tests/models/test_resnet.py",
    "tests/train/test_frozen_prefix.py",
    "tests/train/test_kills.py",
    "tests/train/test_mishaps.py",
    "tests/train/test_signals.py",
    "tests/train/test_fork.py",
    "tests/train/test_data_options.py",
    "tests/train/test_linear_probe_stage.py",
    "tests/test_configs.py",
)


def pytest_addoption(parser):
    parser.addoption(
        "--check-cpu",
        action="store_true",
        help=f"list the CPU time of the tests; fail if one that is not slow takes {CPU_LIMIT} s",
    )


def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers inherit what their parent sets
        if version("jaxlib") < "0.12":  # which aborts at a flag that it does not know
            os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"
        os.environ["OMP_NUM_THREADS"] = "1"  # torch's threads would wait for each other's cores
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(compilation_cache(config))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.02"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    config.pluginmanager.register(Doctests())
    # No limits on wall-clock time, which depends on what else runs.
    hypothesis.settings.register_profile(
        "jaxft", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("jaxft")
    if config.getoption("check_cpu"):
        config.pluginmanager.register(CpuTimes(config))


def compilation_cache(config):
    """Returns the folder, kept between sessions, of the programs that jax compiles.

    It depends on jaxlib and on the processor, whose instructions the programs use. Folders that
    have grown too large together are deleted. Jax compiles again where an entry is damaged.
    """
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"^(flags|Features).*", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    key = zlib.crc32((cpu[0] if cpu else platform.processor()).encode())
    parent = config.cache.mkdir("jaxft_programs")
    if sum(file.stat().st_size for file in parent.rglob("*")) > CACHE_BYTES:
        shutil.rmtree(parent)
    return parent / f"jaxlib-{version('jaxlib')}-{key:08x}"


class Doctests:
    """Leaves modules of the package without examples alone: doctest would import each of them."""

    def pytest_ignore_collect(self, collection_path, config):
        if collection_path.suffix == ".py" and config.rootpath / "jaxft" in collection_path.parents:
            return ">>>" not in collection_path.read_text() or None
        return None


@pytest.hookimpl(wrapper=True)
def pytest_collect_file():
    """Looks for no examples in the tests; among their files are some that import torch."""
    return [item for item in (yield) if not isinstance(item, DoctestModule)]


def pytest_collection_modifyitems(items):
    """Sorts the files of LONG first."""
    places = {file: place for place, file in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(LONG)))


def cpu_seconds():
    """Returns the CPU time of this process, its threads and its ended children."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class CpuTimes:
    """Measures the CPU time of each test with its fixtures.

    A fixture that several tests share counts by itself. The session fails if a test that is not
    slow, or a fixture that such a test is the first to use, takes too long. The numbers also go to
    `.pytest_cache/v/jaxft/cpu_seconds`.
    """

    def __init__(self, config):
        self.config = config
        self.mark = 0.0  # CPU time at the end of the last measurement
        self.free = True  # whether the current test may take longer
        self.tests, self.shared, self.processes = {}, {}, {}
        self.limited = set()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item):
        self.mark = cpu_seconds()
        self.free = bool({"slow", "smoke"} & set(item.keywords))

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        if fixturedef.scope == "function":
            return (yield)
        start, name = cpu_seconds(), f"{fixturedef.baseid}::{fixturedef.argname} (fixture)"
        try:
            return (yield)
        finally:
            spent = cpu_seconds() - start
            self.mark += spent
            self.shared[name] = self.shared.get(name, 0) + spent
            if not self.free:
                self.limited.add(name)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        report = yield
        now = cpu_seconds()
        report.cpu_seconds, self.mark = now - self.mark, now  # xdist sends it with the report
        return report

    def pytest_runtest_logreport(self, report):
        self.tests[report.nodeid] = self.tests.get(report.nodeid, 0) + report.cpu_seconds
        if not {"slow", "smoke"} & set(report.keywords):
            self.limited.add(report.nodeid)

    def pytest_collection_finish(self):
        self.processes["collection"] = cpu_seconds()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        """Adds the numbers that a worker of xdist sends when it ends."""
        output = getattr(node, "workeroutput", {}).get("cpu_seconds")
        if output is None:  # it has crashed
            return
        for name, seconds in output["shared"].items():
            self.shared[name] = self.shared.get(name, 0) + seconds
        for name, seconds in output["processes"].items():
            self.processes[f"{name} ({node.gateway.id})"] = seconds
        self.limited.update(output["limited"])

    def too_long(self):
        """Returns the tests and fixtures that exceed the limit."""
        seconds = self.tests | self.shared
        return {name for name in self.limited if seconds.get(name, 0) > CPU_LIMIT * CPU_NOISE}

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session):
        self.processes["whole process"] = cpu_seconds()
        if hasattr(self.config, "workeroutput"):
            fields = {"shared": self.shared, "processes": self.processes}
            self.config.workeroutput["cpu_seconds"] = {**fields, "limited": [*self.limited]}
        elif session.exitstatus == pytest.ExitCode.OK and self.too_long():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        seconds, too_long = self.tests | self.shared | self.processes, self.too_long()
        self.config.cache.set("jaxft/cpu_seconds", seconds)
        total = sum(self.tests.values()) + sum(self.shared.values())
        terminalreporter.section(f"CPU time: {total:.0f} s in tests and fixtures")
        names = sorted(seconds, key=seconds.get, reverse=True)
        for name in [*names[:40], *(too_long - {*names[:40]})]:
            note = "  TOO LONG: make it cheaper, or mark its tests slow" if name in too_long else ""
            terminalreporter.line(f"{seconds[name]:7.2f} s  {name}{note}")


def pytest_xdist_auto_num_workers():
    """One more than the cores, because tests wait for disks and processes."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else None


@pytest.fixture(scope="module")
def golden(request):
    """Recorded arrays by name, from the file `GOLDEN` of the test module."""
    import numpy as np

    with np.load(request.module.GOLDEN) as arrays:
        return dict(arrays)


@pytest.fixture(autouse=True, scope="module")
def no_end_reports(request):
    """Leaves out the report at the end of runs, which takes longer than a short run.

    Modules with `END_REPORTS = True` write it.
    """
    if "jaxft.train.finetune" not in sys.modules or getattr(request.module, "END_REPORTS", False):
        yield
        return
    with mock.patch("jaxft.train.finetune.write_end_report", return_value=None):
        yield


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Clears jax's caches after each module: programs of the whole suite would fill gigabytes."""
    yield
    import jax

    jax.clear_caches()


@dataclass(frozen=True)
class Disk:
    """A small disk, mounted at `folder`."""

    folder: Path

    def fill(self, but: int = 2**20) -> None:
        """Fills the disk except for `but` bytes."""
        with (self.folder / "ballast").open("wb", buffering=0) as file:
            file.write(bytes(shutil.disk_usage(self.folder).free - but))

    def free(self) -> None:
        """Frees the space again."""
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
        pytest.skip("needs mount")
    if done.returncode:
        pytest.skip(f"not permitted to mount: {done.stderr}")
    yield Disk(folder)
    subprocess.run(["umount", folder], check=True)
