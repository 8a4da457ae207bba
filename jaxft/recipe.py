"""Recipe: a whole run as one frozen dataclass, read from Python or YAML, saved as YAML."""

import dataclasses
import math
import os
import runpy
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import pydantic
import yaml

from jaxft.checkpoint import atomic
from jaxft.choices import Augment, Balance
from jaxft.data import OnBadImage, Preprocessing
from jaxft.data.geometry import Interpolation
from jaxft.data.split_expressions import parse
from jaxft.dataclass_checks import CLASSES, checked, unknown
from jaxft.errors import DataError, JaxftError, RecipeError
from jaxft.models import Model, create, user_factory
from jaxft.models.model import OPTIONS
from jaxft.optim.optimizers import SGD, Optimizer
from jaxft.stages import Stage, check_stages

# But how fast a run is, what it may lose, and, by rounding, what more devices add up.
CHANGES_NOTHING = (
    "workers", "cache_mib", "disk_cache_mib", "sharding", "checkpoint_steps", "sync_steps",
    "steps_per_execution", "remat", "on_nonfinite",
)  # fmt: skip
# What a stage may say for itself.


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """Fields of a recipe that a stage may override, resolved for one stage; see `Recipe`."""

    batch_size: int
    augment: Augment
    views: int
    erasing: float
    mixup: float
    cutmix: float
    label_smoothing: float
    balance: Balance


_OF_A_STAGE = tuple(field.name for field in dataclasses.fields(StageSettings))

_RATE = "rates belong to the stages, Stage(..., train={'fc': 1e-3})"


@checked(
    lr=_RATE,
    learning_rate=_RATE,
    epochs="each stage has its own, Stage(..., epochs=5)",
    scheduler="it is a field of the stage, Stage(..., schedule=...)",
    schedule="it is a field of the stage, Stage(..., schedule=...)",
    num_classes="the data says how many classes there are",
    pretrained="write weights='torchvision:ResNet50_Weights.IMAGENET1K_V2'",
)
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run: network, weights, data, stages. Each field is an option of its name."""

    model: str
    """Network, e.g. resnet50 (`jaxft.models.names()` lists them), or MODULE:FUNCTION, which builds
    one of your own for a number of classes."""
    data: str
    """Images: folder:PATH (train/<class>/*.jpg, val/<class>/*.jpg, or <class>/*.jpg), tfds:NAME,
    tfds_dir:PATH (prepared) or digits[:5-9]."""
    stages: tuple[Stage, ...]
    """What trains in each stage, at which rates, for how long."""
    weights: str | None = None
    """Pretrained weights: a file or run, hf:OWNER/REPO, torchvision:ENUM.MEMBER, https://...; none:
    from scratch."""
    head: Literal["fresh", "zeros", "xavier", "keep"] = "fresh"
    """A new head for the data's classes, drawn as torch does, zero, or by Xavier's rule; or the
    weights' own (then the classes must agree)."""
    head_classes: Literal["match", "ignore"] = "match"
    """Whether a head that is kept (head keep, or a fork) must be of the images' classes, by name,
    and is put in their order; or its outputs are taken for these classes as they are."""
    optimizer: Optimizer = SGD(momentum=0.9)
    """The rule that turns gradients into updates; rates belong to the stages."""
    batch_size: int = 32
    """Images a step."""
    seed: int = 0
    """Of the head, the order, the augmentation and the choice of `shots`."""
    shots: int | None = None
    """Train on this many images of each class; none: on all."""
    train_split: str | None = None
    """What trains, e.g. train[:80%], train+test, train[10/class]; none: the split train."""
    val_split: str | None = None
    """What validates, likewise; none: val or validation, else what train leaves, or a fifth."""
    on_bad_image: OnBadImage = "error"
    """Images that cannot be read end the run before it starts, or are skipped and listed."""
    drop_last: bool = False
    """Leave out an epoch's last batch if it is not full; else its missing rows are masked."""
    balance: Balance = "none"
    """Of classes of unequal size: weights in the loss, or sampling each class as often."""
    augment: Augment = "crop_flip"
    """Training views: random resized crop and flip, alone or with colour jitter, RandAugment or
    TrivialAugment; small shifts; flips; or none (the evaluation's)."""
    views: int = 0
    """Train on so many augmented views of each image, one an epoch, over and over; 0: on a new one
    each epoch. What frozen layers make of so few can be kept."""
    erasing: float = 0.0
    """The chance that a random box of a training image is erased."""
    mixup: float = 0.0
    """Blend pairs of training images: alpha of Beta(alpha, alpha), often 0.2; 0: off. With cutmix
    too, each batch gets either."""
    cutmix: float = 0.0
    """Paste a box from one training image into another: alpha, often 1; 0: off."""
    label_smoothing: float = 0.0
    """The share of each target that is spread over all classes; validation losses are without."""
    reduction: Literal["mean", "sum"] = "mean"
    """Whether gradients are of the mean loss of a batch or of the sum, as in d2l's recipes; what is
    shown is the mean."""
    tta: Literal["none", "flip"] = "none"
    """Validation sees each image, or also its mirror (the mean of both logits)."""
    image_size: int | None = None
    """Side of the images that the network sees, in pixels; none: the weights' own, or 224."""
    resize_size: int | None = None
    """Short side before the central crop of evaluation; none: as much larger than the crop as the
    weights' own is, or 256 for 224."""
    resize_mode: Literal["short_side", "squash"] | None = None
    """Whether the short side gets resize_size or both do; none: the weights' own, or short_side."""
    interpolation: Interpolation | None = None
    """Of scaling; none: the weights' own, or bilinear."""
    mean: tuple[float, float, float] | None = None
    """Of the RGB channels, on 0 to 1; none: the weights' own, or ImageNet's."""
    std: tuple[float, float, float] | None = None
    """Likewise."""
    stride_in_1x1: bool = False
    """Bottlenecks stride in their first 1x1 convolution (He et al., Caffe, Keras), not the 3x3."""
    concat_pool: bool = False
    """fastai's head: maximum and mean of each channel, then two linear layers."""
    head_layers: tuple[int | Literal["relu"], ...] = ()
    """What the head has before its last linear layer: the widths of more such layers, and relu;
    256 relu 32, say."""
    binary: bool = False
    """One logit for two classes, whose loss is then torch's BCEWithLogitsLoss."""
    dropout: float = 0.0
    """Of the features before the head (of fastai's head: before its last linear layer, and half of
    it before the first)."""
    drop_path: float = 0.0
    """Stochastic depth: the chance that the last residual block is left out; linear in depth."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Of the computation; parameters, statistics and optimizer are float32, or with float64, which
    needs JAX_ENABLE_X64=1, float64 too, as by torch's `.double()`."""
    remat: bool = False
    """The backward pass computes each block again and remembers what came into it alone
    (`jax.checkpoint`): a forward pass more, for less memory, though not on CPU, where XLA undoes
    it; changes no result but by rounding."""
    statistics: Literal["global", "replica"] = "global"
    """What norm layers see of a batch on several devices: all of it, or each device its part, as in
    torch's DistributedDataParallel."""
    sharding: Literal["replicated", "fsdp"] = "replicated"
    """Whether each device holds all parameters, or a part of the large ones; changes no result
    but by rounding."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A step or a validation that is not finite ends the run; or such steps are left out and
    counted, and such an epoch is never the best."""
    checkpoint_steps: int = 0
    """Also save a checkpoint every so many steps; 0: after each epoch. Changes no result."""
    sync_steps: int = 10
    """The host looks at losses every so many steps; changes no result."""
    steps_per_execution: int = 1
    """Batches that one call of a compiled program works through: more, where a step takes no longer
    than Python needs between two; changes no result but by rounding. On CPU convolutions of
    networks other than jaxft's own are slow in its loop."""
    workers: int = 2
    """Threads that read images, 0 for none of their own; changes no result."""
    cache_mib: int = 512
    """Memory for decoded images, in MiB, so that later epochs read no files, and as much for what a
    stage's first, frozen layers make of them and for batches to validate; changes no result but by
    rounding."""
    disk_cache_mib: int = 0
    """More than memory holds: room for what frozen layers make in memory-mapped files, in MiB, in
    the folder for temporary files (TMPDIR); they go with the run. 0: it is in memory."""
    from_scratch: tuple[Stage, ...] = ()
    """If given: for comparison, also train the network from random weights in these stages."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        counts = {
            1: (
                "shots",
                "batch_size",
                "image_size",
                "resize_size",
                "sync_steps",
                "steps_per_execution",
            ),
            0: ("workers", "cache_mib", "disk_cache_mib", "checkpoint_steps", "views"),
        }
        for least, fields in counts.items():
            low = [f for f in fields if (n := getattr(self, f)) is not None and n < least]
            if low:
                raise RecipeError(f"{', '.join(low)} must be at least {least}.")
        if (self.resize_size or self.image_size or 1) < (self.image_size or 1):
            raise RecipeError(
                f"resize_size {self.resize_size} is below image_size {self.image_size}: there is "
                "no such crop of the scaled image."
            )
        if self.head == "keep" and self.weights is None:
            raise RecipeError("head='keep' keeps that of the weights, and weights is None.")
        if not 0 <= self.seed < 2**63:
            raise RecipeError(f"seed is {self.seed}; it must be at least 0 and below 2**63.")
        if self.mean is not None and not all(map(math.isfinite, self.mean)):
            raise RecipeError(f"mean is {self.mean}; each must be finite.")
        if self.std is not None and not all(0 < s < math.inf for s in self.std):
            raise RecipeError(f"std is {self.std}; each must be positive and finite.")
        self._check_splits()
        self._check_objective()
        check_stages(self.stages)
        if self.from_scratch:
            check_stages(self.from_scratch)
        for stage in (*self.stages, *self.from_scratch):
            self.during(stage)

    def _check_splits(self) -> None:
        for field in ("train_split", "val_split"):
            expression = getattr(self, field)
            try:
                parse("train" if expression is None else expression)
            except DataError as error:
                raise RecipeError(f"{field}: {error}") from error

    def _check_objective(self) -> None:
        if not 0 <= self.erasing <= 1:
            raise RecipeError(f"erasing is {self.erasing}; a chance lies between 0 and 1.")
        if not 0 <= self.label_smoothing < 1:
            raise RecipeError(
                f"label_smoothing is {self.label_smoothing}; it must be at least 0 and below 1."
            )
        for field in ("mixup", "cutmix"):
            alpha = getattr(self, field)
            if not 0 <= alpha < math.inf:
                raise RecipeError(f"{field} is {alpha}; its alpha must be 0 (off) or positive.")
            if alpha and self.batch_size == 1:
                raise RecipeError(f"{field} mixes images of a batch; batch_size is 1.")

    @property
    def preprocessing(self) -> Preprocessing:
        """What is done to every image before the network sees it."""
        return self._preprocessing(Preprocessing())

    def expecting(self, own: Preprocessing) -> "Recipe":
        """This recipe, with what it leaves open about images as the weights' `own` has it."""
        return dataclasses.replace(self, **dataclasses.asdict(self._preprocessing(own)))

    def _preprocessing(self, own: Preprocessing) -> Preprocessing:
        size = self.image_size or own.image_size
        margin = (own.resize_size or own.image_size) / own.image_size
        return Preprocessing(
            image_size=size,
            resize_size=self.resize_size or round(size * margin),
            resize_mode=self.resize_mode or own.resize_mode,
            interpolation=self.interpolation or own.interpolation,
            mean=self.mean or own.mean,
            std=self.std or own.std,
        )

    def during(self, stage: Stage) -> "Recipe":
        """This recipe as it is in a stage, which goes before it in what it says for itself.

        Raises RecipeError where the two do not go together.
        """
        own = {field: getattr(stage, field) for field in _OF_A_STAGE}
        own = {field: value for field, value in own.items() if value is not None}
        recipe = self
        if own:
            nothing: dict[str, Any] = dict.fromkeys(own)
            plain = dataclasses.replace(stage, **nothing)
            try:
                recipe = dataclasses.replace(self, stages=(plain,), from_scratch=(), **own)
            except RecipeError as error:
                raise RecipeError(f"stage {stage.name!r}: {error}") from error
        if recipe.batch_size % stage.accumulate:
            raise RecipeError(
                f"stage {stage.name!r}: a batch of {recipe.batch_size} cannot be worked through in "
                f"{stage.accumulate} equal parts; set accumulate to a divisor."
            )
        return recipe

    def settings(self, stage: Stage) -> "StageSettings":
        """Returns the settings of a stage: its own where it has them, else the recipe's.

        Raises:
          RecipeError: the stage and the recipe do not go together.
        """
        recipe = self.during(stage)
        return StageSettings(**{field: getattr(recipe, field) for field in _OF_A_STAGE})

    def check_own_network(self) -> None:
        """Raises RecipeError for fields that shape jaxft's networks alone."""
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        said = [name for name in OPTIONS if getattr(self, name) != fields[name]]
        if said:
            raise RecipeError(
                f"{', '.join(said)} shape jaxft's own networks; a network that is given has such "
                "things in itself. Leave them out of the recipe."
            )

    def network(self, num_classes: int) -> Model:
        """The recipe's network, without any arrays yet.

        Raises RecipeError for a name or options that do not fit, ModelError for a factory that
        fails.
        """
        if user_factory.names_factory(self.model):
            return user_factory.build(self.model, num_classes)
        options = {name: getattr(self, name) for name in OPTIONS}
        return create(self.model, num_classes=num_classes, **options)


def read(path: str | os.PathLike[str]) -> Recipe:
    """Reads a recipe: a Python file that defines `recipe`, or a run's `recipe.yaml`.

    Raises:
      RecipeError: no such file, no recipe in it, or fields that do not fit; all at once.
    """
    file = atomic.anywhere(path)
    if not file.is_file():
        raise RecipeError(f"{path}: no such recipe. It must be a .py or .yaml file.")
    if not atomic.in_bucket(file):
        user_factory.search_in(file.parent)
    if file.suffix == ".py":
        recipe = _run_file(str(file)).get("recipe")
        if not isinstance(recipe, Recipe):
            raise RecipeError(f"{path} defines no recipe: it must say recipe = Recipe(...).")
        return recipe
    try:
        fields = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is no YAML: {error}") from error
    if not isinstance(fields, dict):
        raise RecipeError(f"{path} holds no fields of a recipe, such as 'model: resnet50'.")
    return from_fields(fields, source=str(path))


def _run_file(path: str) -> dict[str, Any]:
    try:
        return runpy.run_path(path)
    except JaxftError:
        raise
    except SyntaxError as error:
        place = f"{error.filename}:{error.lineno}"
        raise RecipeError(f"{place}: {type(error).__name__}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((frame.lineno for frame in reversed(frames) if frame.filename == path), "?")
        raise RecipeError(f"{path}:{line}: {type(error).__name__}: {error}") from error


def from_fields(fields: Any, *, source: str) -> Recipe:
    """Returns the recipe whose `fields` these are; `source` names their origin in errors.

    Raises RecipeError with all fields that do not fit.
    """
    try:
        return _adapter().validate_python(fields)
    except pydantic.ValidationError as error:
        raise RecipeError(f"{source}: " + "\n  ".join(map(_complaint, error.errors()))) from None


def save(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Writes a recipe as YAML that `read` takes back as an equal one."""
    atomic.write(path, yaml.safe_dump(fields(recipe), sort_keys=False))


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
    return from_fields(fields(recipe), source="recipe")


def decisive(recipe: Recipe) -> dict[str, Any]:
    """Returns the fields on which the result depends, as JSON has them."""
    return {name: x for name, x in fields(recipe).items() if name not in CHANGES_NOTHING}


def fields(recipe: Recipe) -> dict[str, Any]:
    """The recipe as YAML, or JSON, has it."""
    return dict(_adapter().dump_python(recipe, mode="json", warnings=False))


def _complaint(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors, with the name that was meant."""
    place, message = error["loc"], error["msg"]
    if error["type"] == "unexpected_keyword_argument":
        # A place has the names of fields, indices, and the classes that a union was tried with.
        classes = [CLASSES[key] for key in place[:-1] if key in CLASSES]
        in_stage = place[0] in ("stages", "from_scratch")
        cls = classes[-1] if classes else Stage if in_stage else Recipe
        message = f"Unexpected: {unknown(cls, str(place[-1]))}"
    return f"{'.'.join(map(str, place))}: {message}"


@cache
def _adapter() -> pydantic.TypeAdapter[Recipe]:
    return pydantic.TypeAdapter(Recipe)  # which is slow to make, and asked at each checkpoint
