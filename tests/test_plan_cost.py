"""Cost of a recipe's stages, planned without images and without the devices."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest

from jaxft import L2SP, Adam, LinearProbe, ParallelError, Recipe, RecipeError, Stage, plan_cost
from jaxft.checkpoint.contents import Snapshot
from jaxft.hlo_cost import HloCost, hlo_cost
from jaxft.plan_cost import RunPlan, StagePlanCost, largest, stage_cost
from jaxft.topology import CHIPS
from jaxft.train.compiled_stage import compile_stage, step_shapes
from jaxft.train.state import opt_state_shapes

STAGES = (
    Stage("head", {"fc": 1e-2}, epochs=2),
    Stage("late", {"fc": 1e-3, "layer3": 1e-3}, epochs=3, accumulate=2, batch_size=4),
    Stage("all", {"*": 1e-3}, epochs=3, auto_rgn=True),
)
RECIPE = Recipe(
    model="cifar_resnet8", data="folder:nowhere", image_size=8, batch_size=6, augment="none",
    optimizer=Adam(), stages=STAGES,
)  # fmt: skip
HEAD, LAYER3, ALL = 325, 55_877, 74_965  # parameters, of 5 classes


def planned(recipe=RECIPE, topology="cpu", *, train_images=10, val_images=4, classes=5):
    return RunPlan.of_recipe(
        recipe, topology, train_images=train_images, val_images=val_images, classes=classes
    )


def cost_of(**changed):
    """A cost without anything, except for what is changed."""
    empty = dict.fromkeys((field.name for field in dataclasses.fields(HloCost)), 0)
    counts = ("collectives", "collective_bytes", "convolutions", "operands", "layouts")
    dicts = {name: {} for name in counts}
    return HloCost(**(empty | dicts | changed))


@pytest.mark.slow
def test_stage_cost_is_that_of_compiled_programs():
    plan = planned()
    programs = plan.programs()
    for index, trained in enumerate((HEAD, LAYER3, ALL)):
        state = opt_state_shapes(programs, index, plan.shapes[0])
        compiled = compile_stage(programs[index], Snapshot(*plan.shapes, state))
        cost = stage_cost(plan, index)
        memory = compiled.step.memory_analysis()
        assert cost.programs["step"].memory == (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
        )
        assert cost.programs["step"] == hlo_cost(compiled.step)
        assert (cost.trained, cost.flops) == (trained, compiled.flops)
        assert sum(each.flops for each in cost.features) == compiled.prefix_flops
        assert (cost.fits, cost.seconds, cost.images_per_second) == (True, None, None)
        # Adam's two moments and the weights in float32, and the counts of steps.
        arrays = 3 * trained + sum(leaf.size for leaf in jax.tree.leaves(plan.shapes[1]))
        assert 0 < cost.kept - 4 * arrays < 200
        assert cost.memory == cost.kept + max(each.memory for each in cost.programs.values())
    names = ["features of layer2", "features of layer3", "gradient_norms", "step", "validation"]
    assert sorted({*stage_cost(plan, 0).programs, *cost.programs}) == names


def test_step_shapes_are_those_of_a_step():
    stages = (*STAGES[:2], dataclasses.replace(STAGES[2], anchor=L2SP(1e-2)))
    plan = planned(dataclasses.replace(RECIPE, stages=stages))
    for program in plan.programs():
        opt_state = opt_state_shapes(plan.programs(), program.index, plan.shapes[0])
        shapes = step_shapes(program, Snapshot(*plan.shapes, opt_state))
        state, record = jax.eval_shape(program.train_step(), *shapes)
        assert jax.tree.map(lambda x: x.shape, state) == jax.tree.map(lambda x: x.shape, shapes[0])
        assert record.metrics.loss.shape == ()


@pytest.mark.slow
def test_stage_cost_of_linear_probe_is_that_of_features():
    probe = dataclasses.replace(RECIPE, stages=(Stage("probe", {"fc": LinearProbe()}),))
    cost = stage_cost(planned(probe), 0)
    assert sorted(cost.programs) == ["features of layer3", "validation"]
    (features,) = cost.features
    assert cost.flops == features.flops > 0
    assert cost.trained == HEAD


def test_seconds_range_from_overlap_to_sum():
    program = planned().programs()[1]
    step = cost_of(flops=2 * 197e9, bytes_accessed=4 * 819e6)
    cost = StagePlanCost(program, LAYER3, {"step": step}, 0, CHIPS["v5e"], 4)
    # 2 ms of computation, 4 ms of memory traffic.
    assert cost.seconds == pytest.approx((4e-3, 6e-3))
    assert cost.images_per_second == pytest.approx((4 / 6e-3, 4 / 4e-3))
    assert dataclasses.replace(cost, programs={}).seconds is None


@pytest.mark.parametrize(("wanted", "limit", "steps"), [(0, 64, 6), (5, 64, 6), (63, 64, 6)])
def test_largest_bisects(wanted, limit, steps):
    asked = []

    def attempt(number):
        asked.append(number)
        return str(number) if number <= wanted else None

    assert largest(attempt, limit) == (wanted, str(wanted) if wanted else None)
    assert len(asked) == steps


def test_largest_passes_numbers_that_are_too_small():
    """Neither 4 nor 2 is tried again once 4 is too small."""
    asked = []

    def attempt(number):
        asked.append(number)
        return False if number < 6 else str(number) if number <= 6 else None

    assert largest(attempt, 8) == (6, "6")
    assert asked == [4, 6, 7]
    assert largest(lambda number: False if number < 6 else None, 8) == (0, None)


def test_largest_stops_within_3_percent():
    number, _ = largest(lambda n: n if n <= 1000 else None, limit=4096)
    assert 970 <= number <= 1000


@pytest.fixture
def chip_for(monkeypatch):
    """Returns a plan for a chip, on which programs of larger batches than `most` do not compile."""

    def plan_for(most, memory=0):
        def compiled(program, shapes):
            if program.settings.batch_size > most:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: CompileTimeHbmOom")
            return SimpleNamespace(step=program, gradient_norms=None, prefix={}, score=program)

        monkeypatch.setattr(plan_cost, "compile_stage", compiled)
        monkeypatch.setattr(
            plan_cost,
            "hlo_cost",
            lambda program: cost_of(memory=memory * program.settings.batch_size),
        )
        recipe = dataclasses.replace(RECIPE, batch_size=100)
        return dataclasses.replace(planned(recipe), chip=CHIPS["v5e"])

    return plan_for


@pytest.mark.parametrize(("most", "expected"), [(100, 100), (99, 98), (41, 40), (2, 2), (1, 0)])
def test_stage_cost_finds_largest_batch(chip_for, most, expected):
    """Batches divide into the two parts of `accumulate`."""
    cost = stage_cost(chip_for(most), 0)
    assert (cost.wanted, cost.batch_size) == (100, expected)
    assert cost.fits == (most == 100)
    assert cost.trained == HEAD
    assert bool(cost.programs) == bool(expected)


def test_stage_cost_counts_state_at_best_epoch(chip_for):
    """40 images need all of the chip's memory, and the state at the best epoch needs some too."""
    assert stage_cost(chip_for(100, memory=CHIPS["v5e"].usable // 40), 0).batch_size == 38


def test_stage_cost_raises_other_errors_of_the_compiler(monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(plan_cost, "compile_stage", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        stage_cost(planned(), 0)


@pytest.mark.parametrize("topology", ["gpu", "v5e-7"])
def test_plan_for_unknown_topology(topology):
    with pytest.raises(ParallelError, match=f"'{topology}'.* A plan can also be for 'cpu'"):
        planned(topology=topology)


def test_plan_checks_recipe():
    stage = dataclasses.replace(STAGES[0], class_weights=(1.0, 2.0))
    plan = planned(dataclasses.replace(RECIPE, stages=(stage,)))
    with pytest.raises(RecipeError, match="stage 'head': it has 2 class_weights"):
        plan.programs()
