"""The page of several runs side by side: scores, curves, differences of their recipes, time."""

from collections.abc import Mapping, Sequence

from jaxft.errors import RecipeError
from jaxft.recipe_differences import differences
from jaxft.report import html_elements as html
from jaxft.report.curves import compared
from jaxft.report.run_page import duration, number, recipe_text
from jaxft.report.run_record import PHASES, RunRecord, stage_seconds


def comparison_page(records: Sequence[RunRecord]) -> str:
    """Returns the page of several runs.

    Raises:
      RecipeError: there are fewer than two.
    """
    if len(records) < 2:
        raise RecipeError("a comparison needs at least two runs.")
    named = _named(records)
    metrics = ["accuracy", "loss", *_shared_metrics(records)]
    sections = {
        "Scores": [html.table(*_scores(named))],
        "Curves": [
            html.figures({metric: compared(named, metric)[0] for metric in metrics})
            if any(record.rows for record in records)
            else ""
        ],
        "Recipes": _recipes(named),
        "Time": _time(named),
    }
    shown = {name: parts for name, parts in sections.items() if any(parts)}
    body = [html.section(name, *parts) for name, parts in shown.items()]
    title = f"{len(named)} runs"
    return html.page(title, [", ".join(named)], body, list(shown))


def _named(records: Sequence[RunRecord]) -> dict[str, RunRecord]:
    """Returns the records by name; runs with the same name are numbered."""
    named: dict[str, RunRecord] = {}
    for record in records:
        names = (record.name, *(f"{record.name} ({i})" for i in range(2, len(records) + 1)))
        named[next(name for name in names if name not in named)] = record
    return named


def _shared_metrics(records: Sequence[RunRecord]) -> list[str]:
    """Returns the own metrics that all recipes have."""
    custom = [list(record.score.custom) for record in records]
    return [name for name in custom[0] if all(name in names for names in custom)]


def _scores(named: Mapping[str, RunRecord]) -> tuple[list[str], list[list[str]]]:
    metrics = list(dict.fromkeys(name for each in named.values() for name in each.score.values))
    rows = []
    for name, record in named.items():
        ended = len(record.recipe.stages) if record.has_ended else record.progress.stage
        rows.append(
            [
                name,
                *(number(record.score.values.get(metric)) for metric in metrics),
                f"{ended} of {len(record.recipe.stages)}",
                str(len(record.rows)),
                f"{record.progress.step:,}",
                duration(sum(row["seconds"] for row in record.rows)),
            ]
        )
    return ["run", *metrics, "stages ended", "epochs", "steps", "training"], rows


def _recipes(named: Mapping[str, RunRecord]) -> list[str]:
    (first, start), *others = named.items()
    parts = []
    for name, record in others:
        changed = differences(start.recipe, record.recipe)
        parts.append(html.heading(f"{first} and {name}"))
        if changed:
            rows = [str(each).partition(": ")[::2] for each in changed]
            cells = [(path, *values.rpartition(" -> ")[::2]) for path, values in rows]
            parts.append(html.table(("field", first, name), cells))
        else:
            parts.append(html.paragraph("Their recipes give the same result."))
        if record.data["val"] != start.data["val"]:
            parts.append(
                html.paragraph(
                    f"They validate with {start.data['val']:,} and {record.data['val']:,} images, "
                    "so that their scores cannot be compared."
                )
            )
    return [
        *parts,
        html.heading(f"Recipe of {first}"),
        html.preformatted(recipe_text(start.recipe)),
    ]


def _time(named: Mapping[str, RunRecord]) -> list[str]:
    rows = [
        [name, stage, *(f"{each.phases[phase]:.1f}" for phase in PHASES), f"{each.restarts:.1f}"]
        for name, record in named.items()
        for stage, each in stage_seconds(record).items()
    ]
    header = ["run", "stage", *PHASES, "restarts"]
    return [html.table(header, rows), html.note("Seconds of each stage.")] if rows else []
