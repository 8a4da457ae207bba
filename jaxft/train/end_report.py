"""Writes a run's report at its end."""

from pathlib import Path

import jax

from jaxft.classifier import Classifier
from jaxft.labels import Tree
from jaxft.train.state import Progress
from jaxft.train.trainer import Trainer


def write_end_report(
    workdir: Path, trainer: Trainer, progress: Progress, params: Tree, stats: Tree
) -> Path | None:
    """Writes `report.html` and its pictures; returns the path of the page.

    The results of the run are complete: an error becomes a line of output, and None is returned.
    Evaluates the validation images once. With several processes only the main one calls this, and
    the report leaves the images out: an evaluation would need all processes.

    Args:
      workdir: folder of the run.
      trainer: the trainer, after the last stage.
      progress: counters and scores.
      params, stats: the weights on the host.
    """
    try:
        # Matplotlib is slow to import, and a run can do without.
        from jaxft.report.run_record import RunRecord, read_starts, run_name
        from jaxft.report.run_report import RunReport, report_of, stage_tables
        from jaxft.report.write_report import write_report

        recipe, rows = trainer.recipe, trainer.metrics.rows
        starts = read_starts(workdir)
        record = RunRecord(run_name(workdir), recipe, rows, starts, progress, trainer.data)
        if jax.process_count() > 1:
            remark = f"Images are left out of this report: jaxft report {workdir} adds them."
            tables = stage_tables(recipe, params, stats)
            return write_report(workdir, RunReport(record, tables, problems=[remark]))
        program = trainer.programs[-1]
        classifier = Classifier(
            program.model, params, stats, trainer.splits.train.classes, recipe.preprocessing,
            pixels=program.pixels, multi_label=program.loss.multi_label, tta=recipe.tta,
            matmul_precision=recipe.matmul_precision, batch_size=recipe.batch_size,
            workers=recipe.workers,
        )  # fmt: skip
        return write_report(workdir, report_of(record, classifier, trainer.splits))
    except Exception as error:
        reason = " ".join(str(error).split())
        trainer.console.say(f"\nThe report is not written: {type(error).__name__}: {reason}")
        return None
