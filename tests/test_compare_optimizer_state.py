"""`scripts/compare_optimizer_state.py`: its rows for jaxft and optax."""

import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import compare_optimizer_state as script


@pytest.mark.parametrize(
    ("library", "policy", "least", "most", "cells"),
    [
        ("jaxft", 'carry="keep"', 0, 1e-12, ["kept", "20/0", "yes", "6/12"]),
        ("optax", "multi_transform, new state", 0.1, 1, ["lost", "0/0", "yes", "5/10"]),
        ("optax", "chain(freeze, adam), same state", 0.05, 1, ["kept", "20/20", "yes", "9/9"]),
    ],
)
def test_optimizer_state_after_unfreezing(library, policy, least, most, cells):
    with jax.enable_x64(True):
        run = script.POLICIES[library][policy](script.plain())
        difference, *others = script.row(run, script.reference())
    assert least <= float(difference) < most
    assert others == cells


@pytest.mark.slow
def test_tables_of_optimizer_state_fit_80_columns():
    with jax.enable_x64(True):
        lines = script.tables()
    assert max(map(len, lines)) <= 80
    assert lines[-1].split() == ["jaxft", *["yes"] * len(script.NETWORKS)]
