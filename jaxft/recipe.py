"""Recipe: a whole run as one frozen dataclass. `jaxft.recipe_file` reads and saves it."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxft import losses
from jaxft.data import Check, OnBadImage, Preprocessing
from jaxft.data.geometry import Interpolation
from jaxft.data.split_expressions import parse
from jaxft.dataclass_checks import checked
from jaxft.early_stopping import MONITORS, check_monitor
from jaxft.errors import DataError, RecipeError
from jaxft.example_function import metric_names
from jaxft.losses import LossChoice
from jaxft.matmul_precision import MatmulPrecision
from jaxft.models import Model, create, user_factory
from jaxft.models.model import OPTIONS
from jaxft.optim.optimizers import SGD, Optimizer
from jaxft.stage_options import Augment, Balance
from jaxft.stages import Stage, check_shared_schedules, check_stages

# Fields that affect speed, rounding and the work that a crash loses. A run may change them.
RESULT_NEUTRAL_FIELDS = (
    "workers", "worker_processes", "cache_mib", "disk_cache_mib", "device_cache_mib", "sharding",
    "checkpoint_steps", "sync_steps", "steps_per_execution", "remat", "on_nonfinite", "check",
    "augment_on_device",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """Fields of a recipe that a stage may override, resolved for one stage; see `Recipe`."""

    batch_size: int
    augment: Augment
    num_views: int
    random_erasing: float
    mixup: float
    cutmix: float
    loss: LossChoice
    label_smoothing: float
    balance: Balance


_STAGE_FIELDS = tuple(field.name for field in dataclasses.fields(StageSettings))

_LR = "learning rates belong to the stages, Stage(..., train={'fc': 1e-3})"


@checked(
    "loss",
    lr=_LR,
    learning_rate=_LR,
    epochs="each stage has its own, Stage(..., epochs=5)",
    scheduler="it is a field of the stage, Stage(..., schedule=...)",
    schedule="it is a field of the stage, Stage(..., schedule=...)",
    num_classes="the data determines the number of classes",
    criterion="it is called loss",
    pretrained="write weights='torchvision:ResNet50_Weights.IMAGENET1K_V2'",
)
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run: network, weights, data and stages. Each field is a command-line option.

    Raises:
      RecipeError: fields are unknown, missing, wrong or contradictory.
    """

    model: str
    """Network, e.g. resnet50 (`jaxft.models.names()` lists all), or MODULE:FUNCTION, a function
    that builds a network for a number of classes."""
    data: str
    """Images: folder:PATH (train/<class>/*.jpg, val/<class>/*.jpg, or <class>/*.jpg; also gs://),
    csv:FILE, tfds:NAME, tfds_dir:PATH, hf_dataset:PATH, webdataset:PATH or digits[:5-9]."""
    stages: tuple[Stage, ...]
    """Stages, in order: which parameters train, at which learning rate, for how long."""
    weights: str | None = None
    """Pretrained weights: a file or a run, hf:OWNER/REPO, torchvision:ENUM.MEMBER or https://...;
    None: train from scratch."""
    head: Literal["fresh", "zeros", "xavier", "keep"] = "fresh"
    """Initial head. fresh: drawn as torch draws a linear layer; zeros; xavier; keep: the head of
    the pretrained weights, see head_classes."""
    head_classes: Literal["match", "ignore"] = "match"
    """For a head that is kept (head keep, or a fork). match: its class names must
    match the data, and are reordered; ignore: output i is class i of the data."""
    lora: dict[str, int] = dataclasses.field(default_factory=dict)
    """LoRA: rank by pattern of adapters beside kernels; stages train them as `**.lora_*`."""
    lora_alpha: float | None = None
    """Factor alpha / rank of an adapter's change to its kernel; None: a factor of 1."""
    optimizer: Optimizer = SGD(momentum=0.9)
    """Default optimizer of all stages; learning rates belong to the stages."""
    batch_size: int = 32
    """Images per optimizer step, over all devices."""
    seed: int = 0
    """Seed of the head, the order of the images, the augmentation and the choice of `shots`."""
    shots: int | None = None
    """Number of training images per class; None: all."""
    split_by: str | None = None
    """CSV file with the columns path and split, which assigns the image files of data to splits."""
    train_split: str | None = None
    """Training split, e.g. train[:80%], train+test, train[10/class]; None: train."""
    val_split: str | None = None
    """Validation split; None: val or validation if there is one, else the images that train_split
    leaves, or a fifth of train."""
    on_bad_image: OnBadImage = "error"
    """Unreadable images. error: end the run, before it trains if they are checked; skip: leave them
    out and list them."""
    check: Check | None = None
    """Images that are decoded once before the run to find unreadable ones: all, or a sample of
    1,000 per split. None: all if they fit into cache_mib or are to be skipped, else a sample."""
    drop_last: bool = False
    """Drop the last batch of an epoch if it is incomplete; otherwise it is padded and masked."""
    balance: Balance = "none"
    """Compensation for classes of unequal size: weights in the loss, or sampling."""
    augment: Augment = "crop_flip"
    """Training augmentation: random resized crop and flip, alone or with color jitter, RandAugment
    or TrivialAugment; small shifts; flips; or none (the evaluation view)."""
    augment_on_device: bool = False
    """Apply flips, shifts and color jitter on the device, to save time of the host. Same pixels."""
    num_views: int = 0
    """Number of augmented views per image, one per epoch in turn, so that the features of frozen
    layers can be cached; 0: a new view in each epoch."""
    random_erasing: float = 0.0
    """Probability that a random box of a training image is erased."""
    mixup: float = 0.0
    """Mixup: alpha of Beta(alpha, alpha), often 0.2; 0: off. With cutmix on too, each batch gets
    one of the two."""
    cutmix: float = 0.0
    """CutMix: alpha of Beta(alpha, alpha), often 1; 0: off."""
    loss: LossChoice = "cross_entropy"
    """Loss: cross_entropy; bce, the binary cross entropy of each class (torch's
    BCEWithLogitsLoss); Focal(gamma, alpha); or MODULE:FUNCTION, a function of logits and targets
    [b k] that returns the losses [b]."""
    metrics: tuple[str, ...] = ()
    """Further metrics to report, MODULE:FUNCTION each: a function of logits and targets [b k] that
    returns a number per image [b]. A stage may monitor the mean by the function's name."""
    label_smoothing: float = 0.0
    """Share of each target that is spread over all classes. Validation losses are unsmoothed."""
    reduction: Literal["mean", "sum"] = "mean"
    """Gradients of the mean or of the sum of a batch's losses (d2l's recipes use the sum). Reported
    losses are means."""
    tta: Literal["none", "flip"] = "none"
    """Test-time augmentation for validation. flip: average the logits of image and mirror image."""
    image_size: int | None = None
    """Side of the network's input images in pixels; None: as for the weights, or 224."""
    resize_size: int | None = None
    """Short side in pixels before the central crop of evaluation; None: in the same proportion to
    image_size as for the weights, or as 256 to 224."""
    resize_mode: Literal["short_side", "squash"] | None = None
    """Scale the short side to resize_size, or both; None: as for the weights, or short_side."""
    interpolation: Interpolation | None = None
    """Interpolation for scaling; None: as for the weights, or bilinear."""
    mean: tuple[float, float, float] | None = None
    """Mean of the RGB channels, for pixels from 0 to 1; None: as for the weights, or ImageNet's."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of the RGB channels; None: as for the weights, or ImageNet's."""
    stride_in_1x1: bool = False
    """Put the stride of a bottleneck into its first 1x1 convolution (He et al., Caffe, Keras)
    instead of the 3x3 convolution."""
    concat_pool: bool = False
    """Use fastai's head: maximum and mean of each channel, then two linear layers."""
    head_layers: tuple[int | Literal["relu"], ...] = ()
    """Layers of the head before the last: widths of linear layers, and relu; e.g. 256 relu 32."""
    binary: bool = False
    """Use a single logit for two classes, with the loss of torch's BCEWithLogitsLoss. A function
    of yours as the loss receives the logits [0 z]."""
    dropout: float = 0.0
    """Dropout probability before the head (fastai's head: before its last linear layer, and half
    of it before the first)."""
    drop_path: float = 0.0
    """Stochastic depth: probability of skipping the last residual block, linear in depth."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the computation. Parameters, statistics and optimizer state are float32; with
    float64, which needs JAX_ENABLE_X64=1, they are float64 too."""
    matmul_precision: MatmulPrecision = "default"
    """Precision of products and convolutions of float32 arrays on accelerators. default: bfloat16
    factors on TPU, TF32 on NVIDIA GPUs; high: more exact; highest: float32, the slowest."""
    remat: bool = False
    """Recompute each block in the backward pass (`jax.checkpoint`): less memory for one more
    forward pass. Has no effect on CPU, where XLA removes it. Changes results by rounding only."""
    statistics: Literal["global", "slice", "replica"] = "global"
    """Batch statistics of norm layers on several devices: over the whole batch, over the part of
    each TPU slice, or over each device's part, as in torch's DistributedDataParallel."""
    sharding: Literal["replicated", "fsdp"] = "replicated"
    """Copy all parameters to each device, or divide large ones. Rounding may differ."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A non-finite loss, gradient or validation score. stop: end the run; skip: leave out and count
    such steps, and never choose such an epoch as the best."""
    checkpoint_steps: int = 0
    """Steps between additional checkpoints within an epoch; 0: save after each epoch only."""
    sync_steps: int = 10
    """Steps between two transfers of losses from the device to the host."""
    steps_per_execution: int = 1
    """Batches per call of the compiled program, for steps shorter than Python's overhead. On CPU,
    convolutions of networks other than jaxft's are slow in this loop. Rounding may differ."""
    workers: int = 2
    """Number of threads that read images; 0: read in the main thread."""
    worker_processes: int = 0
    """Number of processes that read images in place of the threads, from about 8 cores on."""
    cache_mib: int = 512
    """Memory in MiB for decoded images; and the same again for cached features of frozen layers and
    for validation batches. Changes results by rounding only."""
    disk_cache_mib: int = 0
    """Disk space in MiB for cached features that exceed the memory, in temporary files (TMPDIR); 0:
    cache in memory only."""
    device_cache_mib: int | None = None
    """Memory in MiB of each device for cached features; None: a quarter on TPU and GPU, 0 on CPU.
    Changes results by rounding only."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        counts = {
            "shots batch_size image_size resize_size sync_steps steps_per_execution": 1,
            "workers worker_processes cache_mib disk_cache_mib device_cache_mib": 0,
            "checkpoint_steps num_views": 0,
        }
        for names, minimum in counts.items():
            values = {name: getattr(self, name) for name in names.split()}
            if low := [name for name, n in values.items() if n is not None and n < minimum]:
                raise RecipeError(f"{', '.join(low)} must be at least {minimum}.")
        if (self.resize_size or self.image_size or 1) < (self.image_size or 1):
            raise RecipeError(
                f"resize_size {self.resize_size} is below image_size {self.image_size}: the scaled "
                "image is smaller than its crop."
            )
        if self.on_bad_image == "skip" and self.check == "sample":
            raise RecipeError(
                "on_bad_image='skip' needs check='all': each batch depends on the list of images."
            )
        if self.head == "keep" and self.weights is None:
            raise RecipeError("head='keep' keeps the head of the weights, but weights is None.")
        if self.lora_alpha is not None and not self.lora:
            raise RecipeError("lora_alpha scales adapters, but lora has none; leave it out.")
        if not 0 <= self.seed < 2**63:
            raise RecipeError(f"seed is {self.seed}; it must be at least 0 and below 2**63.")
        if self.mean is not None and not all(map(math.isfinite, self.mean)):
            raise RecipeError(f"mean is {self.mean}; each must be finite.")
        if self.std is not None and not all(0 < s < math.inf for s in self.std):
            raise RecipeError(f"std is {self.std}; each must be positive and finite.")
        self._check_splits()
        self._check_objective()
        check_stages(self.stages)
        metrics = (*MONITORS, *metric_names(self.metrics, taken=MONITORS))
        for stage in self.stages:
            for monitor in stage.monitors:
                check_monitor(monitor, metrics, f"stage {stage.name!r}")
            self.during(stage)
        check_shared_schedules(self.stages, self.batch_size)

    def _check_splits(self) -> None:
        for field in ("train_split", "val_split"):
            try:
                parse("train" if (text := getattr(self, field)) is None else text)
            except DataError as error:
                raise RecipeError(f"{field}: {error}") from error

    def _check_objective(self) -> None:
        if not 0 <= self.random_erasing <= 1:
            raise RecipeError(
                f"random_erasing is {self.random_erasing}; a probability lies between 0 and 1."
            )
        if not 0 <= self.label_smoothing < 1:
            raise RecipeError(
                f"label_smoothing is {self.label_smoothing}; it must be at least 0 and below 1."
            )
        losses.check(self.loss, binary=self.binary)
        for field in ("mixup", "cutmix"):
            alpha = getattr(self, field)
            if not 0 <= alpha < math.inf:
                raise RecipeError(f"{field} is {alpha}; its alpha must be 0 (off) or positive.")
            if alpha and self.batch_size == 1:
                raise RecipeError(f"{field} mixes images of a batch; batch_size is 1.")

    @property
    def preprocessing(self) -> Preprocessing:
        """Preprocessing of every image: size, crop, interpolation, mean and std."""
        return self._preprocessing(Preprocessing())

    def expecting(self, defaults: Preprocessing) -> "Recipe":
        """Returns the recipe with the preprocessing fields that are None set to `defaults`.

        Args:
          defaults: the preprocessing of the pretrained weights.
        """
        return dataclasses.replace(self, **dataclasses.asdict(self._preprocessing(defaults)))

    def _preprocessing(self, defaults: Preprocessing) -> Preprocessing:
        size = self.image_size or defaults.image_size
        resize_ratio = (defaults.resize_size or defaults.image_size) / defaults.image_size
        return Preprocessing(
            image_size=size,
            resize_size=self.resize_size or round(size * resize_ratio),
            resize_mode=self.resize_mode or defaults.resize_mode,
            interpolation=self.interpolation or defaults.interpolation,
            mean=self.mean or defaults.mean,
            std=self.std or defaults.std,
        )

    def during(self, stage: Stage) -> "Recipe":
        """Returns the recipe with the fields that the stage overrides.

        Raises:
          RecipeError: the stage's fields are wrong, or contradict the recipe.
        """
        overrides = {f: x for f in _STAGE_FIELDS if (x := getattr(stage, f)) is not None}
        recipe = self
        if overrides:
            no_overrides: dict[str, Any] = dict.fromkeys(overrides)
            plain_stage = dataclasses.replace(stage, **no_overrides)
            try:
                recipe = dataclasses.replace(self, stages=(plain_stage,), **overrides)
            except RecipeError as error:
                raise RecipeError(f"stage {stage.name!r}: {error}") from error
        if recipe.batch_size % stage.accumulate:
            raise RecipeError(
                f"stage {stage.name!r}: a batch of {recipe.batch_size} cannot be divided into "
                f"{stage.accumulate} equal parts; set accumulate to a divisor."
            )
        return recipe

    def settings(self, stage: Stage) -> StageSettings:
        """Returns the settings of a stage, which take the recipe's value where it sets none.

        Raises:
          RecipeError: the stage's fields are wrong, or contradict the recipe.
        """
        recipe = self.during(stage)
        return StageSettings(**{field: getattr(recipe, field) for field in _STAGE_FIELDS})

    def check_own_network(self) -> None:
        """Raises RecipeError if the recipe sets options of jaxft's networks."""
        if changed := self._changed_options():
            raise RecipeError(
                f"{', '.join(changed)} shape jaxft's own networks, and the run has been passed "
                "another network. Build that network accordingly, and leave them out of the recipe."
            )

    def _changed_options(self) -> dict[str, Any]:
        """Returns the options of the network that are not at their defaults."""
        values = {f.name: (getattr(self, f.name), f.default) for f in dataclasses.fields(self)}
        return {name: values[name][0] for name in OPTIONS if values[name][0] != values[name][1]}

    def network(self, num_classes: int) -> Model:
        """Builds the recipe's network, without arrays.

        Raises:
          RecipeError: the name is unknown, or the options do not fit the network.
          ModelError: the user's factory fails.
        """
        if user_factory.names_factory(self.model):
            return user_factory.build(self.model, num_classes)
        options = self._changed_options() | {"dtype": self.dtype, "image_size": self.image_size}
        return create(self.model, num_classes=num_classes, **options)
