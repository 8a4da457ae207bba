"""Staged fine-tuning for JAX: which layers train, at which learning rate, in each stage.

The names in `__all__` and the documented contents of the modules among them are the public
interface. Everything else may change without notice.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jaxft import methods
from jaxft.early_stopping import EarlyStop, Plateau
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
from jaxft.l2_sp import Anchor
from jaxft.labels import FROZEN, combine, label, partition, paths, summary
from jaxft.linear_probe import LogisticRegression, logistic_regression
from jaxft.optim import gradients, schedules
from jaxft.optim.carry import carry
from jaxft.optim.optimizers import SGD, Adam, AdamW, RMSprop
from jaxft.optim.plateau import ReduceLROnPlateau
from jaxft.optim.transform import multi_transform
from jaxft.stage_plan import StagePlan, plan
from jaxft.stages import Stage, Update

if TYPE_CHECKING:
    from jaxft import data, models, weights
    from jaxft.recipe import Recipe
    from jaxft.report.console import Console
    from jaxft.train import Result, finetune

# Imported on first use: to label a tree, nobody should wait for Flax, Orbax and TFDS.
_LAZY = {
    "Recipe": "jaxft.recipe",
    "finetune": "jaxft.train",
    "Result": "jaxft.train",
    "Console": "jaxft.report.console",
    "data": None,
    "models": None,
    "weights": None,
}

__all__ = [  # in the order of the documentation
    "FROZEN",
    "SGD",
    "Adam",
    "AdamW",
    "Anchor",
    "CheckpointError",
    "Console",
    "DataError",
    "EarlyStop",
    "InterruptedRunError",
    "JaxftError",
    "LabelError",
    "LogisticRegression",
    "ModelError",
    "NonFiniteError",
    "ParallelError",
    "PatternError",
    "Plateau",
    "RMSprop",
    "Recipe",
    "RecipeError",
    "ReduceLROnPlateau",
    "Result",
    "Stage",
    "StagePlan",
    "Update",
    "WeightsError",
    "carry",
    "combine",
    "data",
    "finetune",
    "gradients",
    "label",
    "logistic_regression",
    "methods",
    "models",
    "multi_transform",
    "partition",
    "paths",
    "plan",
    "schedules",
    "summary",
    "weights",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("jaxft")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _LAZY[name]
    if module is None:
        return import_module(f"jaxft.{name}")
    return getattr(import_module(module), name)
