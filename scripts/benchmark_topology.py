"""Compares steps of jaxft with those of plain Flax, compiled for TPUs and GPUs that are not there.

    python scripts/benchmark.py --topology v5e-1 --reference flax
    python scripts/benchmark.py --topology v5e-8 --rows all fsdp replica mixup accumulate
    python scripts/benchmark.py --topology h100-1

Needs libtpu (extra `tpu`) and no TPU, or the extra `cuda` and no GPU. XLA's estimates of cycles,
bytes and memory are deterministic. A ResNet-50 at 224 pixels, in bfloat16, 256 images on one chip
or 128 on each of several. The reference is `plain_flax.py`, in the same stage with the same
statistics. Columns, for a chip:

    cycles      millions, estimated by XLA for TPUs; see `jaxft.hlo_cost.HloCost`
    GB          read and written
    MiB         arguments, results and temporary arrays
    products    convolutions and matrix products
    NHWC        convolutions of cuDNN with channels last
    bfloat16    products of bfloat16
    transposes  instructions that only change a layout
    exchanges   all-reduces and other collectives

A row compiles two programs. Each takes one to four minutes on two cores.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from plain_flax import LR, TRAINS, plain_step

from jaxft import SGD, Recipe, Stage
from jaxft.checkpoint.contents import Snapshot
from jaxft.hlo_cost import HloCost, hlo_cost
from jaxft.plan_cost import RunPlan
from jaxft.topology import Topology
from jaxft.train.compiled_stage import step_shapes
from jaxft.train.state import opt_state_shapes

Row = tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]
"""Stage, norm modes, and fields of the stage, of the recipe and arguments of `plain_step`."""

SINGLE: dict[str, Row] = {
    "head": ("head", "batch", {}, {}, {}),
    "late": ("late", "batch", {}, {}, {}),
    "all": ("all", "batch", {}, {}, {}),
    "remat": ("all", "batch", {}, {"remat": True}, {"remat": True}),
    "head, running": ("head", "frozen_eval", {}, {}, {}),
    "late, running": ("late", "frozen_eval", {}, {}, {}),
    "head, cached": ("head", "frozen_eval", {}, {"augment": "none"}, {}),
    "late, cached": ("late", "frozen_eval", {}, {"augment": "none"}, {}),
    "float32": ("all", "batch", {}, {"dtype": "float32"}, {"dtype": "float32"}),
}
SEVERAL: dict[str, Row] = SINGLE | {
    "fsdp": ("all", "batch", {}, {"sharding": "fsdp"}, {}),
    "replica": ("all", "batch", {}, {"statistics": "replica"}, {}),
    "mixup": ("all", "batch", {}, {"mixup": 0.2}, {}),
    "accumulate": ("all", "batch", {"accumulate": 4}, {}, {}),
}
SLICES: dict[str, Row] = {"slice": ("all", "batch", {}, {"statistics": "slice"}, {})}


TPU_COLUMNS: dict[str, Callable[[HloCost], str]] = {
    "cycles": lambda cost: f"{cost.cycles / 1e6:.1f}",
    "GB": lambda cost: f"{cost.bytes_accessed / 1e9:.1f}",
    "MiB": lambda cost: f"{cost.memory / 2**20:,.0f}",
    "exchanges": lambda cost: str(sum(cost.collectives.values())),
}
GPU_COLUMNS: dict[str, Callable[[HloCost], str]] = {
    "GB": TPU_COLUMNS["GB"],
    "MiB": TPU_COLUMNS["MiB"],
    "products": lambda cost: str(sum(cost.operands.values())),
    "NHWC": lambda cost: str(cost.layouts.get("b01f_o01i->b01f", 0)),
    "bfloat16": lambda cost: str(cost.operands.get("bf16 x bf16", 0)),
    "transposes": lambda cost: str(cost.transposes),
    "exchanges": TPU_COLUMNS["exchanges"],
}


def our_cost(topology: str, batch_size: int, row: Row) -> HloCost:
    """Compiles a step of jaxft."""
    stage_name, norms, stage_fields, recipe_fields, _ = row
    names = {"fc": "fc", "layer4": "layer4", "rest": "*"}
    stage = Stage(
        stage_name,
        train={names[group]: LR[group] for group in TRAINS[stage_name]},
        epochs=5,
        norms=norms,
        **stage_fields,
    )
    recipe = Recipe(
        model="resnet50",
        data="no images",
        optimizer=SGD(momentum=0.9),
        batch_size=batch_size,
        cache_mib=10**6,
        stages=(stage,),
        **{"dtype": "bfloat16", **recipe_fields},
    )
    plan = RunPlan.of_recipe(recipe, topology, train_images=10_000, val_images=1_000, classes=2)
    (program,) = plan.programs()
    step = jax.jit(program.train_step(), donate_argnums=0)
    snapshot = Snapshot(*plan.shapes, opt_state_shapes((program,), 0, plan.shapes[0]))
    return hlo_cost(plan.devices.lower(step, *step_shapes(program, snapshot)).compile())


def plain_cost(topology: str, batch_size: int, row: Row) -> HloCost:
    """Compiles a step of plain Flax."""
    stage, norms, _, _, options = row
    devices = Topology.parse(topology).devices()
    step, shapes = plain_step(
        stage, batch_statistics=norms == "batch", batch_size=batch_size, devices=devices, **options
    )
    return hlo_cost(devices.lower(step, *shapes).compile())


def timed(compute: Callable[[], HloCost]) -> tuple[HloCost, float]:
    """Returns a cost and the seconds that compilation took."""
    started = time.perf_counter()
    return compute(), time.perf_counter() - started


def main(arguments: list[str]) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", required=True, help="such as v5e-1, v5e-8, v4-8 or h100-8")
    parser.add_argument("--reference", choices=("flax", "none"), default="flax")
    parser.add_argument("--rows", nargs="+", help="names of rows; all by default")
    parser.add_argument("--images-per-chip", type=int, help="256 on one chip, else 128")
    parser.add_argument("--out", type=Path, help="JSON file for all numbers")
    args = parser.parse_args(arguments)
    topology = Topology.parse(args.topology)
    jax.config.update("jax_platforms", "cpu")  # nothing runs on a chip
    rows = SINGLE if topology.chips == 1 else SEVERAL
    if topology.slices > 1:
        rows = rows | SLICES
    if unknown := set(args.rows or ()) - rows.keys():
        parser.error(f"unknown rows {sorted(unknown)}; {args.topology} has {', '.join(rows)}")
    batch_size = topology.chips * (args.images_per_chip or (256 if topology.chips == 1 else 128))

    columns = GPU_COLUMNS if topology.chip.gpu else TPU_COLUMNS
    main_column, *others = columns
    titles = ["row", f"{main_column} ours / Flax", "ratio", *others, "seconds to compile"]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}", flush=True)
    results, references = [], dict[str, tuple[HloCost, float]]()
    for name in args.rows or rows:
        row = rows[name]
        ours, seconds = timed(lambda row=row: our_cost(args.topology, batch_size, row))
        result: dict[str, Any] = {"row": name, "jaxft": dataclasses.asdict(ours)}
        costs = [ours]
        if args.reference == "flax":
            key = repr((row[:2], row[4]))  # fsdp, for instance, is compared with the plain step
            if key not in references:
                references[key] = timed(lambda row=row: plain_cost(args.topology, batch_size, row))
            costs.append(references[key][0])
            result["flax"] = dataclasses.asdict(costs[1])
        results.append(result)
        first, *rest = (" / ".join(map(column, costs)) for column in columns.values())
        sizes = [cost.bytes_accessed if topology.chip.gpu else cost.cycles for cost in costs]
        ratio = f"{sizes[0] / sizes[1]:.2f}" if len(costs) > 1 else ""
        cells = [name, first, ratio, *rest, f"{seconds:.0f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
        if args.out:  # after each row: the whole table takes long
            args.out.write_text(json.dumps({"topology": args.topology, "rows": results}, indent=1))
