"""One compilation cache for the suite: the same programs recur in many tests and processes."""

import os
import tempfile

_cache = tempfile.TemporaryDirectory(prefix="jaxft-tests-", ignore_cleanup_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
