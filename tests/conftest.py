"""One compilation cache for the suite: the same programs recur in many tests and processes."""

import os
import tempfile

import pytest

if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers inherit what their parent sets here
    _cache = tempfile.TemporaryDirectory(prefix="jaxft-tests-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Compiled programs of a whole suite would fill gigabytes; few are of use to two modules."""
    yield
    import jax

    jax.clear_caches()
