"""Out of memory: one error that names the ways out, and a run that resumes."""

import dataclasses

import jax
import pytest
from test_start_arrays import ALL, GIVEN, NET

from jaxft import RecipeError, Stage, finetune, lr_finder
from jaxft.lr_finder import ramp, range_test, trial
from jaxft.train import train_stages
from jaxft.train.auto_rgn import block_norms
from jaxft.train.stage_program import StageProgram
from jaxft.train.trainer import Trainer

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


def compile_without_step(program, shapes, compile_stage=train_stages.compile_stage):
    return compile_stage(program, shapes)._replace(step=refuse)


PLACES = {
    "compile": (train_stages, "compile_stage", refuse),
    "step": (train_stages, "compile_stage", compile_without_step),
    "evaluation": (Trainer, "evaluate", refuse),
}


@pytest.mark.parametrize(("owner", "name", "instead"), PLACES.values(), ids=PLACES)
def test_out_of_memory_error_names_ways_out(owner, name, instead, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, instead)
        with pytest.raises(RecipeError, match=ADVICE):
            run(tmp_path / "run")


@pytest.mark.slow
def test_run_out_of_memory_resumes(tmp_path, monkeypatch):
    stages = (*ALL.stages, Stage("more", {"*": 1e-4}, 1, restore="last"))
    recipe = dataclasses.replace(ALL, stages=stages)
    whole = run(tmp_path / "whole", recipe)

    def second_stage_fails(program, shapes, compile_stage=train_stages.compile_stage):
        return refuse() if program.index else compile_stage(program, shapes)

    with monkeypatch.context() as patch:
        patch.setattr(train_stages, "compile_stage", second_stage_fails)
        with pytest.raises(RecipeError, match="stage 'more': a batch of 8 images"):
            run(tmp_path / "run", recipe)
    assert run(tmp_path / "run", recipe).weights.read_bytes() == whole.weights.read_bytes()


def test_other_runtime_error_is_not_replaced(tmp_path, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: the driver")

    monkeypatch.setattr(train_stages, "compile_stage", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        run(tmp_path / "run")


def test_out_of_memory_of_range_test_and_block_norms(monkeypatch):
    tried = trial(ALL, ramp(ALL.stages[0], low=1e-4, high=1.0, steps=10), model=NET, **IN_MEMORY)
    monkeypatch.setattr(lr_finder, "compile_stage", refuse)
    monkeypatch.setattr(StageProgram, "gradient_norms", refuse)
    for probe in (
        lambda: range_test(tried, low=1e-4, high=1.0),
        lambda: block_norms(tried.program, tried.params, tried.stats, tried.batches(5)),
    ):
        with pytest.raises(RecipeError, match=ADVICE):
            probe()
