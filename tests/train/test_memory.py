"""Out of memory: one error that names the ways out, and a run that resumes."""

import dataclasses

import jax
import pytest
from faults import failing, replaced
from test_start_arrays import ALL, GIVEN, NET

from jaxft import RecipeError, Stage, finetune
from jaxft.lr_finder import ramp, range_test, trial
from jaxft.train.auto_rgn import block_norms

IN_MEMORY = {"data": GIVEN["data"]}

FULL = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore")
ADVICE = (
    r"stage 'all': a batch of 8 images of 4 pixels does not fit into the memory of .*: "
    r"RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n(?s:.*)accumulate=2 .*\n"
    r".*batch_size=4 or smaller"
)


def run(folder, recipe=ALL):
    return finetune(recipe, folder, model=NET, **GIVEN)


def refuse(*_, **__):
    raise FULL


def compile_without_step(compile_stage, *arguments):
    return compile_stage(*arguments)._replace(step=refuse)


PLACES = {
    "compile": ("compile", refuse),
    "step": ("compile", compile_without_step),
    "evaluation": ("evaluate", refuse),
}


@pytest.mark.parametrize(("point", "function"), PLACES.values(), ids=PLACES)
def test_out_of_memory_error_names_ways_out(point, function, tmp_path):
    with replaced(point, function), pytest.raises(RecipeError, match=ADVICE):
        run(tmp_path / "run")


@pytest.mark.slow
def test_run_out_of_memory_resumes(tmp_path):
    stages = (*ALL.stages, Stage("more", {"*": 1e-4}, 1, restore="last"))
    recipe = dataclasses.replace(ALL, stages=stages)
    whole = run(tmp_path / "whole", recipe)
    second_stage = pytest.raises(RecipeError, match="stage 'more': a batch of 8 images")
    with failing("compile", FULL, at=2), second_stage:
        run(tmp_path / "run", recipe)
    assert run(tmp_path / "run", recipe).weights.read_bytes() == whole.weights.read_bytes()


def test_other_runtime_error_is_not_replaced(tmp_path):
    error = jax.errors.JaxRuntimeError("INTERNAL: the driver")
    with failing("compile", error), pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        run(tmp_path / "run")


def test_out_of_memory_of_range_test_and_block_norms():
    tried = trial(ALL, ramp(ALL.stages[0], low=1e-4, high=1.0, steps=10), model=NET, **IN_MEMORY)
    with failing("compile trial", FULL), pytest.raises(RecipeError, match=ADVICE):
        range_test(tried, low=1e-4, high=1.0)
    with failing("gradient norms", FULL), pytest.raises(RecipeError, match=ADVICE):
        block_norms(tried.program, tried.params, tried.stats, tried.batches(5))
