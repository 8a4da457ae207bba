"""Functions of the user that a recipe names as metrics: names, output and errors."""

import jax.numpy as jnp
import pytest

from jaxft import EarlyStop, Recipe, RecipeError, Stage, example_function

RECIPE = {"model": "cifar_resnet8", "data": "digits"}
STAGE = Stage("all", {"*": 0.1}, 1)


def hits(logits, targets):
    return logits.argmax(-1) == targets.argmax(-1)


def accuracy(logits, targets):
    return hits(logits, targets)


def mean_hits(logits, targets):
    return hits(logits, targets).mean()


class Scores:
    @staticmethod
    def margin(logits, targets):
        return jnp.max(logits, -1) - jnp.min(logits, -1)


@pytest.mark.parametrize("function", ["hits", "Scores.margin"])
def test_check_accepts_numbers_of_any_type(function):
    example_function.check(f"test_example_function:{function}", "a metric", 3)


def test_check_rejects_metric_of_a_wrong_shape():
    name = "test_example_function:mean_hits"
    message = rf"a metric is '{name}', which returns shape \[\] .* one value per example, .*\[4\]"
    with pytest.raises(RecipeError, match=message):
        example_function.check(name, "a metric", 3)


def test_metric_is_called_by_the_name_of_its_function():
    names = example_function.metric_names(
        ["test_example_function:hits", "test_example_function:Scores.margin"], taken=()
    )
    assert names == ["hits", "margin"]


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (("f1",), "a metric is 'f1': it is written MODULE:FUNCTION"),
        (("no_such:f1",), "a metric is 'no_such:f1', and there is no module 'no_such'"),
        (("test_example_function:f1",), "test_example_function.py has no 'f1'"),
        (("test_example_function:accuracy",), "but there is another one called 'accuracy'. Rename"),
        (("test_example_function:hits",) * 2, "but there is another one called 'hits'"),
    ],
)
def test_recipe_rejects_wrong_metrics(metrics, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(**RECIPE, stages=STAGE, metrics=metrics)


@pytest.mark.parametrize(
    "fields", [{"monitor": "hit"}, {"until": EarlyStop("hit", mode="max")}], ids=str
)
def test_recipe_rejects_monitor_of_an_unknown_metric(fields):
    stage = Stage("late", {"*": 0.1}, 1, **fields)
    message = "stage 'late': monitor is 'hit'; the metrics are accuracy, top5, loss, hits. Did you"
    metrics = ("test_example_function:hits",)
    with pytest.raises(RecipeError, match=message):
        Recipe(**RECIPE, stages=(STAGE, stage), metrics=metrics)


def test_recipe_accepts_monitor_of_its_metrics():
    metrics = ("test_example_function:hits",)
    stages = [
        Stage("best", {"*": 0.1}, 1, monitor="hits"),
        Stage("stop", {"*": 0.1}, 1, until=EarlyStop("hits", mode="min")),
    ]
    recipe = Recipe(**RECIPE, stages=stages, metrics=metrics)
    assert [stage.best_by for stage in recipe.stages] == [("hits", "max"), ("hits", "min")]
