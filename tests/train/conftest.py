"""The unbroken run that interrupted ones are compared with."""

import pytest


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of `mortal.RECIPE`, run without any interruption."""
    from mortal import go_on

    workdir = tmp_path_factory.mktemp("whole")
    go_on(workdir)
    return workdir
