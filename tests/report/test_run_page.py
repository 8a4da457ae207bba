"""The page of a run: every kind of run gives a page that a browser shows without a problem."""

import dataclasses
import re

import browser
import numpy as np
import pytest
from PIL import Image

from jaxft import Recipe, Stage
from jaxft.evaluation import score_logits
from jaxft.report.comparison_page import comparison_page
from jaxft.report.examples import Example, judge
from jaxft.report.run_page import recipe_text, run_page
from jaxft.report.run_record import RunRecord, stage_seconds
from jaxft.report.run_report import ImageReport, RunReport
from jaxft.train.metrics import Score
from jaxft.train.state import Progress

SCORE = Score(0.5, 0.75, 0.9)
RECIPE = Recipe(
    model="resnet18",
    data="folder:<i>cats</i>",
    mixup=0.2,
    stages=(Stage("head", {"fc": 1e-3}, 2), Stage("all <b>", {"*": 1e-4}, 3)),
)
GROUPS = [
    ("fc", "23,508,032", "0.1%", "0.001", "CosineAnnealingLR", "running (53)"),
    ("frozen", "9", "99.9%", "-", "-", "-"),
]


def row(stage, epoch, step, **changes):
    times = {"validation": 1.0, "compile": 0.5, "checkpoint": 0.25, "feature": 0.5}
    return {
        "stage": stage,
        "epoch": epoch,
        "step": step,
        **{f"{kind}_{name}": 1 / step for kind in ("train", "val") for name in SCORE.values},
        "lr": {"fc": 0.1 / step, "a$b$": 0.0},
        "time": f"2026-01-01T00:00:{10 * step:02}.000+00:00",
        "seconds": 4.0,
        "step_seconds": 2.0,
        "input_wait_seconds": 1.0,
        "images_per_second": 12.5,
        **{f"{name}_seconds": seconds for name, seconds in times.items()},
        **changes,
    }


def record(classes=("ants", "bees"), **changes):
    names = [stage.name for stage in RECIPE.stages]
    steps = [(names[0], 1), (names[0], 2), (names[1], 1), (names[1], 2), (names[1], 3)]
    rows = [row(name, epoch, step) for step, (name, epoch) in enumerate(steps, 1)]
    start = {"time": "2026-01-01T00:00:00.000+00:00", "versions": {"jax": "<0.10>"}, "command": []}
    start["git"] = {"commit": "0123456789abcdef" * 3, "dirty": True}
    progress = Progress(1, 3, 5, SCORE, SCORE, SCORE, best_epoch=3, ended="3 of 3 epochs done")
    data = {"classes": list(classes), "train": 20, "val": 12}
    values = {"rows": rows, "starts": [start], "progress": progress, "data": data, **changes}
    return RunRecord("runs & more", RECIPE, **values)


def images(logits, targets, classes):
    judged = judge(logits, targets, classes)
    picture = Image.effect_noise((144, 144), 64).convert("RGB")
    examples = [Example(picture, (*judged.captions[i], f"{i}.jpg")) for i in range(3)]
    scores = score_logits(logits, targets, classes)
    return ImageReport(scores, judged, examples, examples, {"flip: stage head": examples * 2})


def report(classes=("ants", "bees"), *, multi_label=False, nan=False, correct=False, **changes):
    rng, k = np.random.default_rng(0), len(classes)
    targets = rng.integers(0, 2, (12, k)) if multi_label else rng.integers(0, k, 12)
    logits = rng.normal(size=(12, k))
    if correct:
        logits = 9 * np.eye(k)[targets]
    if nan:
        logits[:] = np.nan
    tables = {stage.name: GROUPS for stage in RECIPE.stages}
    return RunReport(record(classes, **changes), tables, images(logits, targets, classes))


NAN_ROWS = [
    row("head", epoch, epoch, train_loss=None, val_loss=None, val_accuracy=0.0, lr={"fc": None})
    for epoch in (1, 2)
]
NAMES = (
    "<b>bold", "</svg><script>", "$x^2$", "\udce9t\u00e9", "\u8702",
    "a class with a name that is much longer than any column of a table on a phone", "x" * 200,
    *(f"class {k}" for k in range(8)),
)  # fmt: skip
RESTARTED = [{"time": f"2026-01-01T00:00:{second}+00:00"} for second in ("00", "35")]
CURVE = {"alpha": 1.0, "val_accuracy": {"0.0": 0.5, "0.5": 0.75, "1.0": 0.75}}
AVERAGED = [row(stage, 1, step, wise=CURVE) for step, stage in enumerate(("head", "all <b>"), 1)]
PAGES = {
    "restarted": lambda: report(starts=RESTARTED),
    "averaged": lambda: report(rows=AVERAGED),
    "start kept": lambda: report(
        progress=Progress(1, 3, 5, SCORE, SCORE, SCORE, best_epoch=0, ended="3 of 3 epochs done")
    ),
    "names": lambda: report(NAMES),  # some have no images
    "multi-label": lambda: report(("a", "b", "c"), multi_label=True),
    "thousand classes": lambda: report([f"n{k:08}" for k in range(1000)]),
    "diverged": lambda: report(nan=True, rows=NAN_ROWS),
    "linear probe": lambda: report(correct=True, rows=[row("head", 1, 1, lr={}, time=None)]),
    "no rows": lambda: RunReport(record(rows=[], starts=[]), problems=["The images are <gone>."]),
    "comparison": lambda: comparison_page(
        [record(), dataclasses.replace(record(), recipe=dataclasses.replace(RECIPE, mixup=0.0))]
    ),
}


@pytest.fixture(scope="module")
def pages():
    reports = {name: build() for name, build in PAGES.items()}
    return {
        name: each if isinstance(each, str) else run_page(each)[0] for name, each in reports.items()
    }


@pytest.mark.smoke
def test_pages_have_no_problem_in_a_browser(pages, tmp_path):
    assert browser.problems(pages, tmp_path) == []


@pytest.mark.smoke
def test_browser_finds_planted_problems(tmp_path):
    page = (
        '<section id="a"><h2>A</h2></section><div style="width:2000px">wide</div>'
        '<img src="http://127.0.0.1:9/x.png" alt="it"><script>console.error("oh")</script>'
    )
    found = "\n".join(browser.problems({"bad": page}, tmp_path))
    for expected in ("a has only a heading", "pixels wide", "it is no image", "loads http", "oh"):
        assert expected in found


def test_run_page_states_that_the_start_of_the_last_stage_is_kept(pages):
    sentence = "No epoch improved on the start of the stage, which is kept: accuracy 0.7500."
    assert [name for name, page in pages.items() if sentence in page] == ["start kept"]


@pytest.mark.slow
def test_run_page_escapes_names(pages):
    for name, page in pages.items():
        body = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
        for markup in ("<b>bold", "<script", "<i>cats", "<0.10>", "<gone>", "all <b>"):
            assert markup not in body, name
    assert "&lt;b&gt;bold" in pages["names"]
    assert "\\udce9t\u00e9" in pages["names"]
    assert all(page.encode() for page in pages.values())


@pytest.mark.slow
def test_run_page_lists_frequent_errors_of_many_classes(pages):
    page = pages["thousand classes"]
    assert "The most frequent errors" in page
    assert "of 1,000 classes with the lowest F1" in page
    assert len(page) < 300_000


@pytest.mark.slow
def test_run_page_leaves_out_sections_without_content(pages):
    titles = {name: re.findall("<h2>(.*?)</h2>", page) for name, page in pages.items()}
    assert titles["no rows"] == ["Stages", "Recipe"]
    assert "The images are &lt;gone&gt;." in pages["no rows"]
    assert "Calibration" not in titles["multi-label"]
    assert "Time" not in titles["linear probe"]
    assert "No validation image is classified wrongly." in pages["linear probe"]


@pytest.mark.slow
def test_comparison_lists_different_fields(pages):
    text = re.sub("<[^>]*>", " ", pages["comparison"])
    assert re.search(r"mixup\s+0\.2\s+0\.0", text)


def test_recipe_text_has_changed_fields_only():
    text = recipe_text(RECIPE)
    assert "mixup: 0.2" in text
    assert "cutmix" not in text
    assert "epochs: 2" in text
    assert "carry" not in text


def test_judge_ranks_mistakes_and_uncertain_images():
    logits = np.log([[0.9, 0.1], [0.8, 0.2], [0.45, 0.55], [0.3, 0.7]])
    judged = judge(logits, np.array([0, 1, 0, 1]), ("ant", "bee"))
    assert judged.worst == [1, 2]
    assert judged.least_certain[:2] == [2, 3]
    assert judged.captions[0] == ("ant", "correct, 90%")
    assert judged.captions[1] == ("bee", "ant, 80%")


def test_judge_counts_nan_as_worst_mistake():
    judged = judge(np.array([[1.0, 0.0], [np.nan, 0.0]]), np.array([1, 0]), ("ant", "bee"))
    assert judged.worst == [1, 0]
    assert judged.least_certain[0] == 1


def test_judge_names_missed_and_wrong_labels():
    judged = judge(np.array([[3.0, -3.0, 3.0]]), np.array([[1, 1, 0]]), ("a", "b", "c"))
    assert judged.captions == [("a", "missed: b", "wrong: c")]
    assert judged.worst == [0]


def test_stage_seconds_counts_each_second_once():
    seconds = stage_seconds(record())
    # Ten seconds between rows, of which four phases record 2 + 1 + 1 + 0.5 + 0.25.
    assert seconds["head"].phases == {
        "steps": 4.0, "input": 1.0, "features": 1.0, "validation": 2.0, "compile": 1.0,
        "checkpoints": 0.5, "other": 10.5,
    }  # fmt: skip
    assert seconds["head"].restarts == 0.0


def test_stage_seconds_attributes_gaps_to_restarts():
    seconds = stage_seconds(record(starts=RESTARTED))
    assert seconds["head"].restarts == 0.0
    assert seconds["all <b>"].restarts == 5.25  # between 30 and 40 seconds
    assert seconds["all <b>"].phases["other"] == 10.5
