"""Programs kept between runs: their folder, its size, damaged entries, equal programs."""

import os
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxft.cli import program_cache
from jaxft.cli.program_cache import keep_programs

NAMES = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """The folder of compiled programs, empty; restores JAX's cache."""
    options = {name: jax.config.values[name] for name in NAMES}
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path))
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    with warnings.catch_warnings():
        yield tmp_path / "programs"
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compiled():
    """Compiles a program that takes its argument's memory, or reads it from the cache."""

    def halve(x):
        return jnp.tanh(x @ x) / 2

    jax.clear_caches()
    return jax.jit(halve, donate_argnums=0).lower(jnp.ones((8, 8))).compile()


def entries(folder):
    """Returns the kept entries of the program of `compiled`, by name."""
    return {path.name: path.read_bytes() for path in folder.glob("jit_halve-*-cache")}


@pytest.mark.parametrize(
    ("cache", "given", "expected"),
    [(".", None, "programs"), (".", "elsewhere", "elsewhere"), ("file", None, None)],
)
def test_keep_programs_folder(programs, tmp_path, monkeypatch, cache, given, expected):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / cache))
    jax.config.update("jax_compilation_cache_dir", given and str(tmp_path / given))
    keep_programs()
    folder = jax.config.jax_compilation_cache_dir
    assert folder == (expected and str(tmp_path / expected))
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0


def test_program_from_cache_is_equal(programs):
    keep_programs()
    first, kept = compiled(), entries(programs)
    again = compiled()
    assert len(kept) == 1
    assert entries(programs) == kept
    x = jax.random.normal(jax.random.key(0), (8, 8))
    assert first(x.copy()).tobytes() == again(x.copy()).tobytes()
    sizes, read = first.memory_analysis(), again.memory_analysis()
    assert sizes.alias_size_in_bytes == read.alias_size_in_bytes == x.nbytes
    assert sizes.temp_size_in_bytes == read.temp_size_in_bytes
    assert first.cost_analysis()["flops"] == again.cost_analysis()["flops"]


@pytest.mark.parametrize("damage", [lambda x: b"", lambda x: x[:99], lambda x: x[:-9] + b"?" * 9])
def test_damaged_program_is_replaced(programs, capfd, damage):
    keep_programs()
    compiled()
    ((name, content),) = entries(programs).items()
    (programs / name).write_bytes(damage(content))
    compiled()
    replaced = entries(programs)
    assert replaced != {name: damage(content)}
    compiled()
    assert entries(programs) == replaced
    assert capfd.readouterr().err == ""


def test_unwritable_folder_is_reported_once(programs, tmp_path, capfd):
    (tmp_path / "file").touch()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "file"))
    keep_programs()
    for _ in range(2):
        compiled()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"Compiled programs cannot be kept in {tmp_path / 'file'}: FileExists")


def test_oldest_programs_are_deleted(programs, monkeypatch):
    programs.mkdir()
    for age, name in enumerate(["new", "used", "old"]):
        (programs / f"{name}-cache").write_bytes(bytes(4))
        os.utime(programs / f"{name}-cache", (1e9 - age, 1e9))
    for limit, kept in ((12, {"new", "used", "old"}), (10, {"new"})):
        monkeypatch.setattr(program_cache, "MAX_BYTES", limit)
        keep_programs()
        assert {path.name for path in programs.iterdir()} == {f"{name}-cache" for name in kept}
        jax.config.update("jax_compilation_cache_dir", None)
