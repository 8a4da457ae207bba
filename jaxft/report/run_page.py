"""The page of a run: scores, curves, stages, mistakes, calibration, time, recipe, versions."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from jaxft import recipe_file
from jaxft.evaluation import Evaluation
from jaxft.labels import FROZEN
from jaxft.recipe import Recipe
from jaxft.report import html_elements as html
from jaxft.report.curves import curves, seconds_figure
from jaxft.report.evaluation_figures import (
    MAX_CLASSES,
    confusion_figure,
    frequent_errors,
    reliability_figure,
)
from jaxft.report.examples import VIEWS, contact_sheet
from jaxft.report.run_record import PHASES, Row, RunRecord, stage_seconds
from jaxft.report.run_report import ImageReport, RunReport
from jaxft.stages import Stage

_ROWS = 20  # classes or pairs of classes in a table
_TABLE = ("group", "parameters", "share", "lr", "schedule", "norm layers")


def run_page(report: RunReport) -> tuple[str, dict[str, bytes]]:
    """Returns the page of a run, and its pictures as PNG by file name."""
    record, pictures = report.record, dict[str, bytes]()
    sections = {
        "Curves": _curves(record, pictures),
        "Stages": _stages(report),
    }
    if report.images is not None:
        sections |= _image_sections(report.images, record.recipe, pictures)
    sections["Time"] = _time(record, pictures)
    sections["Recipe"] = [html.preformatted(recipe_text(record.recipe))]
    sections["Versions"] = _versions(record)
    shown = {name: parts for name, parts in sections.items() if any(parts)}
    body = [
        html.tiles(_tiles(report)),
        *map(html.note, report.problems),
        *(html.section(name, *parts) for name, parts in shown.items()),
    ]
    recipe, data = record.recipe, record.data
    subtitle = [
        f"{recipe.model}, {len(data['classes']):,} classes. {recipe.data}: {data['train']:,} "
        f"images to train on, {data['val']:,} to validate.",
    ]
    if not record.has_ended:
        stage = recipe.stages[record.progress.stage].name
        subtitle.append(
            f"This run has not ended: stage {stage!r}, after epoch {record.progress.epoch}."
        )
    return html.page(record.name, subtitle, body, list(shown)), pictures


def recipe_text(recipe: Recipe) -> str:
    """Returns the fields of a recipe that differ from their defaults, as YAML."""
    fields = recipe_file.fields(recipe)
    plain = Recipe(model="any", data="any", stages=(Stage("any", {"*": 1.0}, 1),))
    default = recipe_file.fields(plain)
    changed = {name: value for name, value in fields.items() if value != default[name]}
    optional = default["stages"][0]
    changed["stages"] = [
        {
            name: value
            for name, value in stage.items()
            if value != optional[name] or name == "epochs"
        }
        for stage in fields["stages"]
    ]
    return str(yaml.safe_dump(changed, sort_keys=False, allow_unicode=True)).rstrip()


def number(value: float | None) -> str:
    """Returns a score with four digits, and an em dash for none."""
    return "-" if value is None else f"{value:.4f}"


def duration(seconds: float) -> str:
    """Returns a duration such as `2 h 03 min`, `4 min 05 s` or `6.1 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60:02} min"
        if minutes >= 60
        else f"{minutes} min {rest:02} s"
    )


def counted(count: int, noun: str) -> str:
    """Returns a number and its noun, such as `1 epoch` or `2 epochs`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _tiles(report: RunReport) -> dict[str, tuple[str, str]]:
    record, score = report.record, report.record.score
    scores = report.images.scores if report.images else None
    interval = ""
    if scores and scores.interval:
        interval = "95 % confidence: {:.3f} to {:.3f}".format(*scores.interval)
    tiles = {"accuracy": (number(score.accuracy), interval), "loss": (number(score.loss), "")}
    if score.top5 is not None and len(record.data["classes"]) > 5:
        tiles["top-5 accuracy"] = (number(score.top5), "")
    tiles |= {name: (number(value), "") for name, value in score.custom.items()}
    if scores and scores.calibration_error is not None:
        tiles["calibration error"] = (number(scores.calibration_error), "")
    if total := sum(row["seconds"] for row in record.rows):
        tiles["training"] = (duration(total), counted(len(record.rows), "epoch"))
    return tiles


def _curves(record: RunRecord, pictures: dict[str, bytes]) -> list[str]:
    figures = curves(record)
    pictures.update({f"{name}.png": png for name, (_, png) in figures.items()})
    if not figures:
        return []
    names = ", ".join(f"{i} {name}" for i, name in enumerate(record.stages, 1))
    dashes = f" Dashed lines separate the stages: {names}." if len(record.stages) > 1 else ""
    return [
        html.figures({name: svg for name, (svg, _) in figures.items()}),
        html.note(f"Learning rates are those of each epoch's first step.{dashes}"),
    ]


def _stages(report: RunReport) -> list[str]:
    record, parts = report.record, list[str]()
    for i, stage in enumerate(record.recipe.stages, 1):
        rows = record.stages.get(stage.name, [])
        parts.append(html.heading(f"{i}. {stage.name}"))
        if rows:
            accuracies = [row["val_accuracy"] or 0.0 for row in rows]
            best = max(range(len(rows)), key=accuracies.__getitem__)
            steps = rows[-1]["step"] - _step_before(record, stage.name)
            parts.append(
                html.paragraph(
                    f"{counted(len(rows), 'epoch')}, {counted(steps, 'step')}, "
                    f"{duration(sum(row['seconds'] for row in rows))}; "
                    f"{rows[-1]['images_per_second']:,.0f} images a second in the last epoch. "
                    f"Best accuracy {number(rows[best]['val_accuracy'])} in epoch "
                    f"{rows[best]['epoch']}, last {number(rows[-1]['val_accuracy'])}."
                    + _kept_start(record, stage)
                    + _average_text(rows[-1])
                )
            )
        else:
            parts.append(html.paragraph("No epoch of it has been recorded in this run."))
        if table := report.tables.get(stage.name):
            parts.append(html.table(_TABLE, table, dim=FROZEN))
        else:
            patterns = ", ".join(map(str, stage.train))
            parts.append(html.paragraph(f"Trains {patterns}; all other parameters are frozen."))
    return parts


def _kept_start(record: RunRecord, stage: Stage) -> str:
    """Returns a sentence if the run's last stage ended with the weights at its start."""
    progress = record.progress
    is_last = record.has_ended and stage == record.recipe.stages[-1]
    if not is_last or stage.restore == "last" or progress.best_epoch:
        return ""
    accuracy = number(progress.best.accuracy)
    return f" No epoch improved on the start of the stage, which is kept: accuracy {accuracy}."


def _average_text(row: Row) -> str:
    """Returns a sentence on the average of the stage's start and end, if it ends with one."""
    if not (curve := row.get("wise")):
        return ""
    accuracy = number(curve["val_accuracy"][str(curve["alpha"])])
    return f" Averaged with its start, alpha {curve['alpha']:g}: accuracy {accuracy}."


def _step_before(record: RunRecord, name: str) -> int:
    """Returns the last step before a stage's first epoch."""
    steps = [0]
    for row in record.rows:
        if row["stage"] == name:
            break
        steps.append(row["step"])
    return steps[-1]


def _image_sections(
    images: ImageReport, recipe: Recipe, pictures: dict[str, bytes]
) -> dict[str, list[str]]:
    scores, judged = images.scores, images.judged
    sections = {"Classes": _classes(scores, pictures)}
    wrong = int((~judged.hits).sum())
    if not wrong:
        sections["Worst mistakes"] = [html.paragraph("No validation image is classified wrongly.")]
    elif images.mistakes:
        sections["Worst mistakes"] = [
            html.note(
                f"The {len(images.mistakes)} with the highest loss of {wrong:,} validation images "
                "that are classified wrongly: class, prediction and its probability, file."
            ),
            html.gallery(images.mistakes),
        ]
        pictures["mistakes.png"] = contact_sheet(images.mistakes)
    if images.uncertain:
        sections["Least certain"] = [
            html.note("Validation images with the lowest probability of their predicted class."),
            html.gallery(images.uncertain),
        ]
        pictures["least_certain.png"] = contact_sheet(images.uncertain)
    if scores.calibration_error is not None:
        svg, pictures["calibration.png"] = reliability_figure(judged.confidence, judged.hits)
        sections["Calibration"] = [
            html.figure(svg, "Reliability diagram"),
            html.note(
                "Accuracy of the validation images by the probability of their predicted class. On "
                "the dashed line both are equal; below it the network is too confident. The "
                f"calibration error is {scores.calibration_error:.4f}."
            ),
        ]
    if images.views:
        sections["Augmented images"] = _views(images, recipe, pictures)
    return sections


def _views(images: ImageReport, recipe: Recipe, pictures: dict[str, bytes]) -> list[str]:
    parts = []
    for i, (name, examples) in enumerate(images.views.items()):
        parts += [html.heading(name), html.gallery(examples, views=True)]
        pictures[f"augmented{i or ''}.png"] = contact_sheet(examples, columns=VIEWS + 1)
    later = {
        "random erasing": any(recipe.settings(s).random_erasing for s in recipe.stages),
        "mixup": any(recipe.settings(s).mixup for s in recipe.stages),
        "CutMix": any(recipe.settings(s).cutmix for s in recipe.stages),
    }
    names = [name for name, is_on in later.items() if is_on]
    remark = f" Not shown, because steps apply it to batches: {', '.join(names)}." if names else ""
    text = f"Training images, and their views in the first {VIEWS} epochs.{remark}"
    return [html.note(text), *parts]


def _classes(scores: Evaluation, pictures: dict[str, bytes]) -> list[str]:
    parts = []
    if scores.confusion is not None and len(scores.classes) <= MAX_CLASSES:
        svg, pictures["confusion.png"] = confusion_figure(scores)
        caption = "Shaded by the share of each class's images."
        parts.append(html.figure(svg, "Confusion matrix", caption=caption))
    elif scores.confusion is not None and (errors := frequent_errors(scores, _ROWS)):
        parts.append(html.note("The most frequent errors:"))
        parts.append(html.table(("images", "class", "prediction"), _counted(errors)))
    classes, remark = scores.classes, ""
    if len(classes) > _ROWS:
        present = [each for each in classes if each.images]
        classes = tuple(sorted(present, key=lambda each: each.f1)[:_ROWS])
        remark = f"The {_ROWS} of {len(scores.classes):,} classes with the lowest F1:"
    rows = [
        (each.name, f"{each.images:,}", *map(number, (each.precision, each.recall, each.f1)))
        if each.images
        else (each.name, "0", "-", "-", "-")
        for each in classes
    ]
    header = ("class", "images", "precision", "recall", "F1")
    return [*parts, html.note(remark) if remark else "", html.table(header, rows)]


def _counted(errors: Sequence[tuple[int, str, str]]) -> list[tuple[str, str, str]]:
    return [(f"{count:,}", true, predicted) for count, true, predicted in errors]


def _time(record: RunRecord, pictures: dict[str, bytes]) -> list[str]:
    seconds = stage_seconds(record)
    if not seconds:
        return []
    svg, pictures["time.png"] = seconds_figure(seconds)
    phases = {PHASES[name]: [each.phases[name] for each in seconds.values()] for name in PHASES}
    rows = {name: times for name, times in phases.items() if any(times)}
    is_restarted = len(record.starts) > 1
    if is_restarted:
        rows["restarts"] = [each.restarts for each in seconds.values()]
    cells = [(name, *(f"{time:.1f}" for time in times)) for name, times in rows.items()]
    text = (
        "Seconds of the main program. Stages after the first compile, and checkpoints are written, "
        "while training continues. "
    )
    if is_restarted:
        text += (
            f"The run was started {len(record.starts)} times. Restarts count from the last epoch "
            "recorded before a restart to the next, without that epoch's phases: work that was "
            "repeated, and the time in which nothing ran."
        )
    return [
        html.figure(svg, "Seconds of each stage"),
        html.table(["", *seconds], cells),
        html.note(text),
    ]


def _versions(record: RunRecord) -> list[str]:
    if not record.starts:
        return []
    last: Mapping[str, Any] = record.starts[-1]
    rows = [(name, str(value)) for name, value in (last.get("versions") or {}).items() if value]
    if git := last.get("git"):
        rows.append(("git commit", git["commit"] + (" with changes" if git["dirty"] else "")))
    rows += [
        (name, str(last[key]))
        for name, key in (
            ("device", "device"), ("devices", "devices"), ("processes", "processes"),
            ("host", "host"), ("started", "time"),
        )
        if key in last
    ]  # fmt: skip
    rows.append(("command", " ".join(map(str, last.get("command", [])))))
    return [html.table(("", "last start"), rows)]
