"""Facts of a run's report beyond its records: stage tables, evaluation, pictures."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from jaxft import stage_plan
from jaxft.classifier import Classifier
from jaxft.data.fingerprint import fingerprint
from jaxft.data.open_source import open_collection
from jaxft.data.select_splits import select
from jaxft.data.source import Splits
from jaxft.data.validate import check_images, without_warnings
from jaxft.errors import DataError, JaxftError
from jaxft.evaluation import Evaluation, labelled_logits, score_logits
from jaxft.labels import Tree
from jaxft.models.lora_model import with_lora
from jaxft.models.nnx_adapter import init_shapes
from jaxft.models.norm_modes import norm_modes
from jaxft.recipe import Recipe
from jaxft.report.console import group_rows
from jaxft.report.examples import Example, Judgements, augmented, gallery, judge
from jaxft.report.run_record import RunRecord

GroupTable = Sequence[tuple[str, ...]]
"""Group, parameters, share, learning rate, schedule, norm layers; a row per group."""


@dataclass(frozen=True)
class ImageReport:
    """The validation images as the run's weights classify them, and training images.

    Attributes:
      scores: the evaluation.
      judged: prediction for each image.
      mistakes, uncertain: the worst mistakes and the least certain images.
      views: augmented training images, by the stages that train on them.
    """

    scores: Evaluation
    judged: Judgements
    mistakes: Sequence[Example]
    uncertain: Sequence[Example]
    views: Mapping[str, Sequence[Example]]


@dataclass(frozen=True)
class RunReport:
    """Everything on the page of a run.

    Attributes:
      record: the run's records.
      tables: groups of each stage, by name; empty without the network.
      images: None if the images or the network cannot be opened.
      problems: why something is left out.
    """

    record: RunRecord
    tables: Mapping[str, GroupTable] = field(default_factory=dict)
    images: ImageReport | None = None
    problems: Sequence[str] = ()


def report_of(record: RunRecord, classifier: Classifier, splits: Splits) -> RunReport:
    """Returns the report of a run whose network and images are open; evaluates it once."""
    tables = stage_tables(record.recipe, classifier.params, classifier.stats)
    return RunReport(record, tables, image_report(record.recipe, classifier, splits))


def reopened_report(record: RunRecord, workdir: Path) -> RunReport:
    """Returns the report of a run from its folder, without what can no longer be opened."""
    recipe = record.recipe
    try:
        classifier = Classifier.load(workdir, batch_size=recipe.batch_size, workers=recipe.workers)
    except JaxftError as error:
        return RunReport(record, problems=[f"The network cannot be opened: {error}"])
    model = with_lora(classifier.model, recipe.lora, recipe.lora_alpha)
    tables = stage_tables(recipe, *init_shapes(model))
    try:
        images = image_report(recipe, classifier, open_images(record))
    except (JaxftError, OSError) as error:
        return RunReport(record, tables, problems=[f"The images cannot be opened: {error}"])
    return RunReport(record, tables, images)


def open_images(record: RunRecord) -> Splits:
    """Opens the images of a run again; checks those to validate.

    Raises:
      DataError: they cannot be opened, or have changed since the run, which also happens if the run
        received its images as `finetune(data=...)`.
    """
    recipe = record.recipe
    splits = select(
        open_collection(recipe.data, recipe.split_by),
        train=recipe.train_split, val=recipe.val_split, shots=recipe.shots, seed=recipe.seed,
    )  # fmt: skip
    val = check_images({"val": splits.val}, recipe.on_bad_image)[0]["val"]
    digest = record.data.get("fingerprint", {}).get("val")
    if len(val) != record.data["val"] or (digest and fingerprint(val) != digest):
        raise DataError(f"{recipe.data} no longer has the images that the run validated with.")
    return Splits(splits.train, val)


def stage_tables(recipe: Recipe, params: Tree, stats: Tree) -> dict[str, GroupTable]:
    """Returns the table of groups of each stage, as a run prints it; takes arrays or shapes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run has printed them
        plans = stage_plan.plan(recipe.stages, params)
    tables: dict[str, GroupTable] = {}
    for plan in plans:
        norms = norm_modes(params, stats, plan.labels, plan.stage.norm_choices)
        tables[plan.stage.name] = list(group_rows(plan, params, norms))
    return tables


@without_warnings()
def image_report(recipe: Recipe, classifier: Classifier, splits: Splits) -> ImageReport:
    """Evaluates the validation images and reads the pictures of a report."""
    logits, targets = labelled_logits(classifier, splits.val)
    judged = judge(logits, targets, classifier.classes)
    preprocessing = classifier.preprocessing
    return ImageReport(
        score_logits(logits, targets, classifier.classes),
        judged,
        gallery(splits.val, judged.worst, judged, preprocessing),
        gallery(splits.val, judged.least_certain, judged, preprocessing),
        _views(recipe, splits),
    )


def _views(recipe: Recipe, splits: Splits) -> dict[str, list[Example]]:
    """Returns augmented training images, once for stages with the same augmentation."""
    stages: dict[str, list[int]] = {}
    for index, stage in enumerate(recipe.stages):
        if not stage.linear_probe:
            stages.setdefault(str(recipe.settings(stage).augment), []).append(index)
    views, count = {}, 4 if len(stages) == 1 else 2
    for augment, indices in stages.items():
        names = ", ".join(recipe.stages[index].name for index in indices)
        with suppress(Exception):  # a source of the user may raise anything
            views[f"{augment}: stage {names}"] = augmented(splits.train, recipe, indices[0], count)
    return {name: examples for name, examples in views.items() if examples}
