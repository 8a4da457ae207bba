"""Staged fine-tuning for JAX: which layers train, at which learning rate, in each stage.

The names in `__all__` and the documented contents of the modules among them are the public
interface. Everything else may change without notice.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxft import data, models, strategies, weights
    from jaxft.anchor import L1SP, L2SP
    from jaxft.classifier import Classifier, Predictions
    from jaxft.comparison import compare
    from jaxft.early_stopping import EarlyStop, PlateauStop
    from jaxft.ema import EMA
    from jaxft.errors import (
        CheckpointError,
        DataError,
        InterruptedRunError,
        JaxftError,
        LabelError,
        ModelError,
        NonFiniteError,
        ParallelError,
        PatternError,
        RecipeError,
        WeightsError,
    )
    from jaxft.evaluation import Evaluation, evaluate
    from jaxft.greedy_soup import Soup, soup
    from jaxft.labels import FROZEN, combine, label, partition, paths, summary
    from jaxft.linear_probe import LinearProbe, logistic_regression
    from jaxft.lora_adapters import lora, merge_lora
    from jaxft.losses import Focal
    from jaxft.nnx_filter import trainable_filter
    from jaxft.optim import gradients, schedules
    from jaxft.optim.adaptive_optimizers import Adagrad, Lion, NAdam, RAdam
    from jaxft.optim.carry import carry
    from jaxft.optim.carry_report import CarryReport
    from jaxft.optim.optax_rule import Optax
    from jaxft.optim.optimizers import SGD, Adam, AdamW, RMSprop
    from jaxft.optim.plateau import ReduceLROnPlateau
    from jaxft.optim.schedule_free import evaluation_params
    from jaxft.optim.transform import multi_transform, trainable_only
    from jaxft.recipe import Recipe
    from jaxft.report.console import Console
    from jaxft.stacked_layers import LayerStack, stack, unstack
    from jaxft.stage_plan import StagePlan, plan
    from jaxft.stages import Stage
    from jaxft.state_shapes import abstract_state
    from jaxft.train.finetune import Result, finetune
    from jaxft.update import Update
    from jaxft.weight_averaging import WiSE

    __version__: str

# The module of each name. Names are imported on first use: the `jaxft` program handles signals
# before it imports jax, and to label a tree, nobody should wait for Flax, Orbax and TFDS.
_MODULES = {
    name: module
    for module, names in {
        "labels": ["label", "partition", "combine", "paths", "summary", "FROZEN"],
        "nnx_filter": ["trainable_filter"],
        "stacked_layers": ["LayerStack", "stack", "unstack"],
        "optim.optimizers": ["SGD", "Adam", "AdamW", "RMSprop"],
        "optim.adaptive_optimizers": ["Adagrad", "Lion", "NAdam", "RAdam"],
        "optim.optax_rule": ["Optax"],
        "optim.transform": ["multi_transform", "trainable_only"],
        "optim.carry": ["carry"],
        "optim.carry_report": ["CarryReport"],
        "optim.plateau": ["ReduceLROnPlateau"],
        "optim.schedule_free": ["evaluation_params"],
        "stages": ["Stage"],
        "update": ["Update"],
        "linear_probe": ["LinearProbe", "logistic_regression"],
        "weight_averaging": ["WiSE"],
        "greedy_soup": ["Soup", "soup"],
        "early_stopping": ["EarlyStop", "PlateauStop"],
        "anchor": ["L1SP", "L2SP"],
        "ema": ["EMA"],
        "losses": ["Focal"],
        "lora_adapters": ["lora", "merge_lora"],
        "stage_plan": ["plan", "StagePlan"],
        "state_shapes": ["abstract_state"],
        "errors": [
            "JaxftError", "PatternError", "LabelError", "RecipeError", "ModelError", "WeightsError",
            "DataError", "CheckpointError", "NonFiniteError", "InterruptedRunError",
            "ParallelError",
        ],
        "recipe": ["Recipe"],
        "classifier": ["Classifier", "Predictions"],
        "comparison": ["compare"],
        "evaluation": ["Evaluation", "evaluate"],
        "report.console": ["Console"],
        "train.finetune": ["Result", "finetune"],
    }.items()
    for name in names
}  # fmt: skip
_SUBMODULES = {
    path.rpartition(".")[2]: path
    for path in ("data", "strategies", "models", "weights", "optim.gradients", "optim.schedules")
}

__all__ = [  # in the order of the documentation
    "EMA",
    "FROZEN",
    "L1SP",
    "L2SP",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "CarryReport",
    "CheckpointError",
    "Classifier",
    "Console",
    "DataError",
    "EarlyStop",
    "Evaluation",
    "Focal",
    "InterruptedRunError",
    "JaxftError",
    "LabelError",
    "LayerStack",
    "LinearProbe",
    "Lion",
    "ModelError",
    "NAdam",
    "NonFiniteError",
    "Optax",
    "ParallelError",
    "PatternError",
    "PlateauStop",
    "Predictions",
    "RAdam",
    "RMSprop",
    "Recipe",
    "RecipeError",
    "ReduceLROnPlateau",
    "Result",
    "Soup",
    "Stage",
    "StagePlan",
    "Update",
    "WeightsError",
    "WiSE",
    "abstract_state",
    "carry",
    "combine",
    "compare",
    "data",
    "evaluate",
    "evaluation_params",
    "finetune",
    "gradients",
    "label",
    "logistic_regression",
    "lora",
    "merge_lora",
    "models",
    "multi_transform",
    "partition",
    "paths",
    "plan",
    "schedules",
    "soup",
    "stack",
    "strategies",
    "summary",
    "trainable_filter",
    "trainable_only",
    "unstack",
    "weights",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


if not TYPE_CHECKING:  # otherwise a type checker would accept any name

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            return import_module("importlib.metadata").version("jaxft")
        if name in _SUBMODULES:
            value: Any = import_module(f"jaxft.{_SUBMODULES[name]}")
        elif name in _MODULES:
            value = getattr(import_module(f"jaxft.{_MODULES[name]}"), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value
