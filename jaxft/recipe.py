"""Recipe: a whole run as one frozen dataclass, read from Python or YAML, saved as YAML."""

import dataclasses
import os
import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic
import yaml

from jaxft import atomic
from jaxft.data import Augment, Preprocessing
from jaxft.errors import RecipeError
from jaxft.optim import SGD, Optimizer
from jaxft.stages import Stage, check_stages


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run: network, weights, data, stages. Each field is an option of its name."""

    model: str
    """Network, e.g. resnet50 (`jaxft.models.names()` lists them)."""
    data: str
    """Images: folder:PATH (train/<class>/*.jpg, val/<class>/*.jpg) or digits[:5-9]."""
    stages: tuple[Stage, ...]
    """What trains in each stage, at which rates, for how long."""
    weights: str | None = None
    """Pretrained weights: a torch-named safetensors file, or asset:NAME; none: from scratch."""
    head: Literal["fresh", "keep"] = "fresh"
    """A new head for the data's classes, or the weights' own (then the class counts must agree)."""
    optimizer: Optimizer = SGD(momentum=0.9)
    """The rule that turns gradients into updates; rates belong to the stages."""
    batch_size: int = 32
    """Images a step."""
    seed: int = 0
    """Of the head, the order, the augmentation and the choice of `shots`."""
    shots: int | None = None
    """Train on this many images of each class; none: on all."""
    augment: Augment = "crop_flip"
    """Training views: random resized crop and flip, small shifts, or none (the evaluation's)."""
    image_size: int = 224
    """Side of the images that the network sees, in pixels."""
    resize_size: int | None = 256
    """Short side before the central crop of evaluation; none: images come in `image_size`."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Of the RGB channels, on 0 to 1; what the weights were trained with."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Likewise."""
    stride_in_1x1: bool = False
    """Bottlenecks stride in their first 1x1 convolution (He et al., Caffe, Keras), not the 3x3."""
    workers: int = 2
    """Threads that read images; changes no result."""
    from_scratch: tuple[Stage, ...] = ()
    """If given: for comparison, also train the network from random weights in these stages."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        low = [f for f in ("batch_size", "image_size", "workers") if getattr(self, f) < 1]
        if low:
            raise RecipeError(f"{', '.join(low)} must be at least 1.")
        if self.seed < 0:
            raise RecipeError(f"seed is {self.seed}; it must not be negative.")
        if not all(s > 0 for s in self.std):
            raise RecipeError(f"std is {self.std}; each must be positive.")
        check_stages(self.stages)
        if self.from_scratch:
            check_stages(self.from_scratch)

    @property
    def preprocessing(self) -> Preprocessing:
        """What is done to every image before the network sees it."""
        return Preprocessing(
            image_size=self.image_size,
            resize_size=self.resize_size,
            mean=self.mean,
            std=self.std,
        )


def read(path: str | os.PathLike[str]) -> Recipe:
    """Reads a recipe: a Python file that defines `recipe`, or a run's `recipe.yaml`.

    Raises:
      RecipeError: no such file, no recipe in it, or fields that do not fit; all at once.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe. It must be a .py or .yaml file.")
    if path.suffix == ".py":
        recipe = runpy.run_path(str(path)).get("recipe")
        if not isinstance(recipe, Recipe):
            raise RecipeError(f"{path} defines no recipe: it must say recipe = Recipe(...).")
        return recipe
    try:
        fields = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is no YAML: {error}") from error
    return _validated(fields, source=str(path))


def save(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Writes a recipe as YAML that `read` takes back as an equal one."""
    atomic.write(Path(path), yaml.safe_dump(_fields(recipe), sort_keys=False))


def resolve(recipe: Recipe) -> Recipe:
    """The recipe as it would be read back: types checked, patterns plain strings.

    Raises:
      RecipeError: a field of a wrong type, or a pattern that YAML cannot hold.
    """
    for stage in (*recipe.stages, *recipe.from_scratch):
        rules = [stage.optimizer, *(getattr(u, "optimizer", None) for u in stage.train.values())]
        wrong = [pattern for pattern in stage.train if not isinstance(pattern, str)]
        wrong += [rule for rule in rules if not isinstance(rule, Optimizer | None)]
        if wrong:
            raise RecipeError(
                f"stage {stage.name!r}: {wrong[0]!r} cannot be saved with the run; a recipe's "
                "patterns are strings, its optimizers jaxft's. (jaxft.plan takes any.)"
            )
    return _validated(_fields(recipe), source="recipe")


def differences(before: Recipe, now: Recipe) -> list[str]:
    """The fields by which two recipes train differently, as `field: before -> now`."""
    return [
        f"{field.name}: {getattr(before, field.name)!r} -> {getattr(now, field.name)!r}"
        for field in dataclasses.fields(Recipe)
        if field.name != "workers" and getattr(before, field.name) != getattr(now, field.name)
    ]


def _fields(recipe: Recipe) -> dict[str, Any]:
    fields = pydantic.TypeAdapter(Recipe).dump_python(recipe, mode="json", warnings=False)
    return dict(fields)


def _validated(fields: Any, *, source: str) -> Recipe:
    try:
        return pydantic.TypeAdapter(Recipe).validate_python(fields)
    except pydantic.ValidationError as error:
        found = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise RecipeError(f"{source}: " + "\n  ".join(found)) from None
