"""Staged fine-tuning for JAX: which layers train, at which rate, in each stage."""

from importlib import import_module
from typing import Any

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

# What labels a tree must not import what trains a ResNet: the rest comes when asked for.
_LAZY = {
    "Recipe": "jaxft.recipe",
    "finetune": "jaxft.train",
    "data": None,
    "models": None,
    "weights": None,
}

__all__ = [  # in the order in which one meets them
    "label",
    "partition",
    "combine",
    "paths",
    "summary",
    "multi_transform",
    "carry",
    "FROZEN",
    "Stage",
    "Update",
    "LogisticRegression",
    "EarlyStop",
    "Plateau",
    "Anchor",
    "SGD",
    "Adam",
    "AdamW",
    "RMSprop",
    "ReduceLROnPlateau",
    "plan",
    "StagePlan",
    "logistic_regression",
    "JaxftError",
    "PatternError",
    "LabelError",
    "RecipeError",
    "ModelError",
    "WeightsError",
    "DataError",
    "CheckpointError",
    "NonFiniteError",
    "InterruptedRunError",
    "ParallelError",
    "gradients",
    "methods",
    "schedules",
    *_LAZY,
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _LAZY[name]
    return (
        import_module(f"jaxft.{name}") if module is None else getattr(import_module(module), name)
    )
