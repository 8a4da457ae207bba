"""Fixtures that several modules of whole runs share."""

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


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of `mortal.RECIPE`, run without any interruption."""
    from mortal import train_to_end

    workdir = tmp_path_factory.mktemp("whole")
    train_to_end(workdir)
    return workdir


@pytest.fixture(scope="session")
def one_stage(tmp_path_factory):
    """The folder of `mortal.ONE_STAGE`, run without any interruption."""
    from mortal import ONE_STAGE, train_to_end

    workdir = tmp_path_factory.mktemp("one_stage")
    train_to_end(workdir, ONE_STAGE)
    return workdir
