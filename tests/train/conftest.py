"""Fixtures that several modules of whole runs share."""

import fcntl
import os
import shutil

import pytest


@pytest.fixture(scope="module")
def stage_ends_only():
    """Saves a checkpoint at the end of each stage only, in all runs of a module.

    A checkpoint costs more here than the epoch before it. For modules whose runs are not resumed
    within a stage.
    """
    from mortal import saving_stage_ends_only

    with saving_stage_ends_only():
        yield


@pytest.fixture(scope="module")
def shared_programs():
    """Compiles equal stages once in all runs of a module; see `mortal.sharing_programs`."""
    from mortal import sharing_programs

    with sharing_programs():
        yield


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of `mortal.RECIPE`, run without any interruption."""
    from mortal import RECIPE

    return trained_once("whole", RECIPE, tmp_path_factory)


@pytest.fixture(scope="session")
def one_stage(tmp_path_factory):
    """The folder of `mortal.ONE_STAGE`, run without any interruption."""
    from mortal import ONE_STAGE

    return trained_once("one_stage", ONE_STAGE, tmp_path_factory)


def trained_once(name, recipe, tmp_path_factory):
    """Returns a copy of a run that the session's first worker to need it trains."""
    from mortal import train_to_end

    session = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        session = session.parent
    with (session / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (session / name).exists():
            train_to_end(session / f"{name}.unfinished", recipe)
            (session / f"{name}.unfinished").rename(session / name)
    return shutil.copytree(session / name, tmp_path_factory.mktemp(name) / "run")
