"""Estimates the cost of each stage of a recipe, without images and without the devices.

    jaxft plan CONFIG --topology v5e-8 [--json FILE] [recipe options]

CONFIG is a recipe as for `jaxft finetune`. Its programs are compiled for the topology: TPU slices,
named as in gcloud (v5e-8, v4-32, 2xv5e-16; needs libtpu, extra `tpu`, but no TPU), NVIDIA GPUs
(a100-8, h100-8, h200-1; needs the extra `cuda`, but no GPU), or `cpu`, this machine's.

Prints for each stage how many parameters train, and per device the operations, memory traffic and
communication of a step, its memory, and an estimate of its time from the published numbers of the
chip. If a batch does not fit into the memory, bisection finds the largest that does, within 3 %.

Neither the recipe's images nor its weights are read; options give the number of images.
"""

import dataclasses
import json
from collections.abc import Sequence
from functools import partial

import jax

from jaxft import recipe_file
from jaxft.checkpoint import atomic
from jaxft.cli.command_setup import (
    check_writable,
    command_parser,
    count_argument,
    run_until_signal,
)
from jaxft.cli.program_cache import keep_programs
from jaxft.cli.recipe_options import read_recipe
from jaxft.plan_cost import CPU, RunPlan, StagePlanCost, stage_cost
from jaxft.report import plan_text
from jaxft.report.console import Console
from jaxft.report.device_advice import device_advice
from jaxft.report.stage_text import spared, title


def run(arguments: Sequence[str], program: str = "jaxft plan") -> int:
    """Runs the command; returns its exit code."""
    return run_until_signal(partial(_plan, arguments, program))


def _plan(arguments: Sequence[str], program: str) -> None:
    parser = command_parser(__doc__, "jaxft plan", program, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument(
        "--topology", metavar="NAME", required=True, help="v5e-8, h100-8, ..., or cpu"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to this file")
    for option, default, text in (
        ("--train-images", 10_000, "number of images to train on; default: 10,000"),
        ("--val-images", 1_000, "number of images to validate; default: 1,000"),
        ("--classes", 10, "number of classes; default: 10"),
    ):
        parser.add_argument(option, type=count_argument, default=default, metavar="N", help=text)
    known, options = parser.parse_known_args(arguments)
    # Compiling for a chip needs no chip, and a run may hold those of this machine.
    jax.config.update("jax_platforms", "cpu")
    if known.topology == CPU:
        keep_programs()
    else:  # jax cannot read programs for other machines again
        jax.config.update("jax_enable_compilation_cache", False)
    if known.json:
        check_writable(atomic.anywhere(known.json).parent)
    plan = RunPlan.of_recipe(
        read_recipe(known.config, options, program),
        known.topology,
        train_images=known.train_images,
        val_images=known.val_images,
        classes=known.classes,
    )
    costs = _print_costs(plan, known.topology)
    if known.json:
        atomic.anywhere(known.json).parent.mkdir(parents=True, exist_ok=True)
        atomic.write(known.json, json.dumps(_json(plan, known.topology, costs), indent=2) + "\n")


def _print_costs(plan: RunPlan, topology: str) -> list[StagePlanCost]:
    """Compiles the stages one by one; prints each table as soon as it is known."""
    console, costs = Console(), []
    programs = plan.programs()
    console.say(plan_text.heading(plan, topology))
    for remark in device_advice(plan.model, [each.sizes for each in programs], plan.devices):
        console.say(remark)
    for program in programs:
        cost = stage_cost(plan, program.index)
        costs.append(cost)
        console.row(f"\n{title(cost.program, len(programs))}", style="bold")
        console.say(f"{spared(cost.program)}\n")
        for row in plan_text.rows(plan, cost):
            console.row(row)
    if plan.chip:
        console.say(f"\n{plan_text.closing(plan.chip)}")
    return costs


def _json(plan: RunPlan, topology: str, costs: Sequence[StagePlanCost]) -> dict[str, object]:
    return {
        "topology": topology,
        "devices": len(plan.devices),
        "chip": plan.chip and dataclasses.asdict(plan.chip),
        "recipe": recipe_file.fields(plan.recipe),
        "train_images": len(plan.splits.train),
        "val_images": len(plan.splits.val),
        "classes": plan.model.num_classes,
        "stages": [cost.to_json() for cost in costs],
    }
