"""The seed's three stages here and as a plain PyTorch script: steps, whole runs, FLOPs, memory.

    python scripts/benchmark.py data/hymenoptera resnet50.safetensors --stride-in-1x1

The head for five epochs, layer4 with it for five, everything for two; batches of 16, no
augmentation, frozen layers with running statistics. Weights and batches are the same on both sides
and losses are compared before anything is timed. Rounds of steps alternate; shown are medians, the
range, and how many times as long eager PyTorch takes, in the faster of its two layouts. Whole runs
are processes of their own, ours with all it does (validation of the start, checkpoints,
compilation), PyTorch's by `scripts/plain_pytorch.py`; it is left out where torch and torchvision
are not installed. `--device gpu` runs all in bfloat16.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import plain_pytorch
from plain_pytorch import RATES

from jaxft import SGD, Recipe, Stage, finetune
from jaxft.report.console import Console
from jaxft.train.compiled_stage import sent
from jaxft.train.lr_finder import Trial, trial
from jaxft.train.opening import with_prefixes
from jaxft.train.stage_program import StageProgram
from jaxft.weights.key_maps import torch_tensors

Steps = Callable[[], list[float]]
"""Takes a step of training, or a few in one call, and returns their losses, once they are there."""

EAGER = {"torch": False, "torch, channels_last": True}
"""PyTorch's layouts."""

A_CALL = 4
"""Steps in one call of ours: XLA on CPU has the kernel clear its temporaries anew for each."""


def the_recipe(args: argparse.Namespace) -> Recipe:
    stages = zip(RATES.items(), args.epochs, strict=True)
    return Recipe(
        model=args.model,
        weights=str(args.weights),
        data=f"folder:{args.data}",
        optimizer=SGD(momentum=0.9),
        batch_size=args.batch_size,
        augment="none",
        image_size=args.image_size,
        resize_size=args.image_size * 256 // 224,
        stride_in_1x1=args.stride_in_1x1,
        steps_per_execution=A_CALL,
        dtype="bfloat16" if args.device == "gpu" else "float32",
        stages=tuple(Stage(name, rates, epochs) for (name, rates), epochs in stages),
    )


def our_step(trial: Trial, program: StageProgram) -> tuple[Steps, Any]:
    """A step on the trial's first batch, or a few of them, over and over; and what was compiled."""
    compiled, state, frozen = dataclasses.replace(trial, program=program).compile()
    (batch,) = trial.batches(1)
    rows = batch.image
    for block in compiled.prefix.values() if program.prefix.train else ():
        rows = block(trial.params, trial.stats, rows)
    places, number = program.recipe.steps_per_execution, np.int32(0)
    batches = sent(program.devices, [jax.device_get(batch._replace(image=rows))] * places, places)

    def step() -> list[float]:
        nonlocal state
        state, record = compiled.step(state, frozen, *batches, number, None)
        loss, _, _, examples = map(np.ravel, jax.device_get(record.metrics))
        return (loss / examples).tolist()

    return step, compiled


def torch_step(
    trial: Trial, args: argparse.Namespace, *, channels_last: bool, compiled: bool = False
) -> Steps:
    """The same in PyTorch."""
    import torch
    from torch.nn.functional import cross_entropy

    device = "cuda" if args.device == "gpu" else "cpu"
    layout = torch.channels_last if channels_last else torch.contiguous_format
    module = plain_pytorch.network(args.model, args.stride_in_1x1)
    trees = torch_tensors(trial.params, trial.stats), (trial.params, trial.stats)
    pairs = zip(*map(jax.tree.leaves, trees), strict=True)
    state = {t.name: torch.from_numpy(t.to_torch(np.asarray(x)).copy()) for t, x in pairs}
    module.fc = torch.nn.Linear(module.fc.in_features, trial.program.model.num_classes)
    module.load_state_dict(state, strict=False)
    module.to(device, memory_format=layout)
    optimizer = plain_pytorch.begin(module, trial.program.plan.stage.name)
    (batch,) = trial.batches(1)
    images = trial.program.recipe.preprocessing.normalize(np.asarray(batch.image))
    inputs = torch.from_numpy(np.moveaxis(np.asarray(images), -1, 1).copy())
    inputs = inputs.to(device, memory_format=layout)
    forward = torch.compile(module) if compiled else module
    labels = torch.tensor(np.asarray(batch.target)).long().to(device)

    def step() -> list[float]:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=args.device == "gpu"):
            loss = cross_entropy(forward(inputs), labels)
        loss.backward()
        optimizer.step()
        return [float(loss.item())]

    return step


def compare_steps(args: argparse.Namespace) -> list[dict[str, Any]]:
    """For each stage: milliseconds of a step by each side, FLOPs and memory of ours."""
    rows = []
    for stage in the_recipe(args).stages:
        tried = trial(the_recipe(args), stage)
        whole = tried.program
        roomy = dataclasses.replace(
            whole, recipe=dataclasses.replace(whole.recipe, cache_mib=2**20)
        )
        (kept,) = with_prefixes([roomy], (tried.params, tried.stats), images=(1, 1))
        several = dataclasses.replace(whole.recipe, steps_per_execution=A_CALL)
        programs = {
            "ours": whole,
            f"ours, {A_CALL} a call": dataclasses.replace(whole, recipe=several),
            "ours, kept": kept,
        }
        sides: dict[str, Steps] = {}
        memory, flops = {}, {}
        for name, program in programs.items():
            if program is not kept or kept.prefix.train:
                sides[name], compiled = our_step(tried, program)
                memory[name] = compiled.step.memory_analysis().temp_size_in_bytes / 2**20
                flops[name] = compiled.flops
        if have_torch():
            for name, channels_last in EAGER.items():
                sides[name] = torch_step(tried, args, channels_last=channels_last)
            if args.compiled:
                sides["torch, compiled"] = torch_step(
                    tried, args, channels_last=True, compiled=True
                )
        losses: dict[str, list[float]] = {name: [] for name in sides}
        for name, step in sides.items():
            while len(losses[name]) < A_CALL:
                losses[name] += step()
        bound = 2e-2 if args.device == "gpu" else 1e-3
        for name, found in losses.items():
            if not np.allclose(found, losses["ours"], rtol=bound):
                sys.exit(f"stage {stage.name!r}: unequal losses, {name} {found}, {losses}")
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, step in sides.items():
                began, taken = time.perf_counter(), 0
                while taken < args.steps:
                    taken += len(step())
                times[name].append(1e3 * (time.perf_counter() - began) / taken)
        rows.append(
            {"stage": stage.name, "ms": times, "temp_mib": memory, "flops": flops, "loss": losses}
        )
        show_steps(rows[-1])
    return rows


def show_steps(row: dict[str, Any]) -> None:
    medians = {name: statistics.median(times) for name, times in row["ms"].items()}
    eager = min((medians[name] for name in EAGER if name in medians), default=None)
    for name, times in row["ms"].items():
        ratio = f"{eager / medians[name]:.2f}" if eager and name not in EAGER else ""
        flops, memory = row["flops"].get(name), row["temp_mib"].get(name)
        cells = (
            row["stage"], name, f"{medians[name]:.0f} ({min(times):.0f}-{max(times):.0f})", ratio,
            f"{flops / 1e9:.3g}" if flops else "", f"{memory:.0f}" if memory else "",
        )  # fmt: skip
        print("| " + " | ".join(cells) + " |", flush=True)


class Ends(Console):
    """A console that shows nothing and notes when stages end."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.at: list[float] = []

    def say(self, text: str) -> None:
        """Takes note of the sentence that ends a stage."""
        if text.startswith("Stage "):
            self.at.append(time.perf_counter())


def our_run(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each stage, the first with all before it, and the accuracy."""
    console, began = Ends(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        score = finetune(the_recipe(args), Path(folder) / "run", console=console).score
    ends = [began, *console.at]
    seconds, peak = np.diff(ends).tolist(), plain_pytorch.peak_mib()
    return {"seconds": seconds, "accuracy": score.accuracy, "peak_mib": peak}


def scaling(args: argparse.Namespace) -> dict[str, Any]:
    """Images per second of a step of everything, over all devices that there are."""
    tried = trial(the_recipe(args), the_recipe(args).stages[-1])
    step, _ = our_step(tried, tried.program)
    step()
    times = []
    for _ in range(args.rounds):
        began = time.perf_counter()
        step()
        times.append(args.batch_size / (time.perf_counter() - began))
    return {"devices": jax.device_count(), "images_per_second": times}


CHILDREN = {"jaxft": our_run, "PyTorch": plain_pytorch.train, "scaling": scaling}


def child(which: str, arguments: list[str], devices: int = 1) -> dict[str, Any]:
    """What one of `CHILDREN` finds, in a process of its own."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, __file__, *arguments, "--child", which],
        env={**os.environ, "XLA_FLAGS": flags} if devices > 1 else None,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def have_torch() -> bool:
    return all(map(importlib.util.find_spec, ("torch", "torchvision")))


def compare_runs(args: argparse.Namespace, arguments: list[str]) -> list[dict[str, Any]]:
    sides = ["jaxft", "PyTorch"] if have_torch() else ["jaxft"]
    found = []
    for _ in range(args.runs):
        for side in sides:
            found.append({"by": side, **child(side, arguments)})
            row = found[-1]
            cells = [f"{seconds:.1f}" for seconds in (*row["seconds"], sum(row["seconds"]))]
            print(
                f"| {side} | {' | '.join(cells)} | {row['accuracy']:.3f} | {row['peak_mib']:.0f} |",
                flush=True,
            )
    return found


def table(*columns: str) -> None:
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)


def main(arguments: list[str]) -> None:
    parser = plain_pytorch.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of steps")
    parser.add_argument("--steps", type=int, default=2, help="of a round")
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="PyTorch's step by torch.compile too (takes minutes)",
    )
    parser.add_argument("--runs", type=int, default=1, help="of the whole recipe by each side")
    parser.add_argument("--devices", type=int, nargs="*", default=[], help="virtual ones, to scale")
    parser.add_argument("--out", type=Path, help="a JSON file for all that was measured")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        print(json.dumps(CHILDREN[args.child](args)))
        return
    found: dict[str, Any] = {"model": args.model, "image_size": args.image_size}
    table("stage", "by", "ms a step", "PyTorch / it", "GFLOP", "temporary MiB")
    found["steps"] = compare_steps(args)
    if args.runs:
        table("by", *(f"{name}, s" for name in RATES), "in all, s", "accuracy", "peak MiB")
        found["runs"] = compare_runs(args, arguments)
    if args.devices:
        table("devices", "images a second")
        found["scaling"] = [child("scaling", arguments, devices) for devices in args.devices]
        for row in found["scaling"]:
            print(f"| {row['devices']} | {statistics.median(row['images_per_second']):.1f} |")
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
