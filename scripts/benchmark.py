"""Benchmarks the seed's three stages in jaxft and in plain PyTorch: time, FLOPs, memory.

    python scripts/benchmark.py data/hymenoptera resnet50.safetensors --stride-in-1x1

Trains the head for five epochs, then layer4 with it for five, then everything for two, in batches
of 16 without augmentation; frozen layers use running statistics. Both sides start from the same
weights and see the same batches, and their losses are compared before any step is timed.

Steps of both sides alternate in rounds. The tables show medians, ranges, and the time of eager
PyTorch, in the faster of its two memory layouts, divided by the time of the row. A whole run is
timed in a separate process. The run of jaxft includes compilation, the validation of the start and
checkpoints; the PyTorch run is `scripts/plain_pytorch.py`. Without torch and torchvision only jaxft
is measured. `--device gpu` runs everything in bfloat16. `--topology v5e-1` compares programs for
TPUs and GPUs that are not there with plain Flax instead, see `benchmark_topology.py`.
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

import benchmark_topology
import jax
import numpy as np
import plain_pytorch
from plain_pytorch import RATES

from jaxft import SGD, Recipe, Stage, finetune
from jaxft.lr_finder import Trial, trial
from jaxft.report.console import Console
from jaxft.steps_per_execution import sent
from jaxft.train.stage_program import StageProgram, with_prefixes
from jaxft.weights.key_maps import torch_tensors

Steps = Callable[[], list[float]]
"""Runs one call of training, of one or several steps; returns the losses when they are computed."""

EAGER = {"torch": False, "torch, channels_last": True}
"""Names of the eager PyTorch rows: whether their memory layout is channels_last."""

STEPS_PER_CALL = 4
"""`steps_per_execution` of jaxft. On CPU the kernel clears XLA's temporary memory in each call."""


def the_recipe(args: argparse.Namespace) -> Recipe:
    """Returns the recipe of the benchmark."""
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
        steps_per_execution=STEPS_PER_CALL,
        dtype="bfloat16" if args.device == "gpu" else "float32",
        stages=tuple(Stage(name, rates, epochs) for (name, rates), epochs in stages),
    )


def our_step(trial: Trial, program: StageProgram) -> tuple[Steps, Any]:
    """Returns a function that trains on the trial's first batch, and the compiled programs."""
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
        metrics = jax.device_get(record.metrics)
        return np.ravel(metrics.loss / metrics.examples).tolist()

    return step, compiled


def torch_step(
    trial: Trial, args: argparse.Namespace, *, channels_last: bool, compiled: bool = False
) -> Steps:
    """Returns a function that trains on the trial's first batch in PyTorch."""
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
    """Measures the steps of each stage: milliseconds by each side, FLOPs and memory of jaxft."""
    rows = []
    for stage in the_recipe(args).stages:
        tried = trial(the_recipe(args), stage)
        whole = tried.program
        roomy = dataclasses.replace(
            whole, recipe=dataclasses.replace(whole.recipe, cache_mib=2**20)
        )
        (kept,) = with_prefixes([roomy], (tried.params, tried.stats), images=(1, 1))
        several = dataclasses.replace(whole.recipe, steps_per_execution=STEPS_PER_CALL)
        programs = {
            "ours": whole,
            f"ours, {STEPS_PER_CALL} a call": dataclasses.replace(whole, recipe=several),
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
            while len(losses[name]) < STEPS_PER_CALL:
                losses[name] += step()
        bound = 2e-2 if args.device == "gpu" else 1e-3
        for name, values in losses.items():
            if not np.allclose(values, losses["ours"], rtol=bound):
                sys.exit(f"stage {stage.name!r}: unequal losses, {name} {values}, {losses}")
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, step in sides.items():
                start, count = time.perf_counter(), 0
                while count < args.steps:
                    count += len(step())
                times[name].append(1e3 * (time.perf_counter() - start) / count)
        rows.append(
            {"stage": stage.name, "ms": times, "temp_mib": memory, "flops": flops, "loss": losses}
        )
        show_steps(rows[-1])
    return rows


def show_steps(row: dict[str, Any]) -> None:
    """Prints the steps of a stage as rows of a Markdown table."""
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


class StageClock(Console):
    """A console that prints nothing and records when stages end."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.ends: list[float] = []

    def say(self, text: str) -> None:
        """Records the time of the sentence that ends a stage."""
        if text.startswith("Stage "):
            self.ends.append(time.perf_counter())


def our_run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the recipe; returns its accuracy and the seconds of each stage.

    The first stage includes the time before it.
    """
    console, start = StageClock(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        score = finetune(the_recipe(args), Path(folder) / "run", console=console).score
    ends = [start, *console.ends]
    seconds, peak = np.diff(ends).tolist(), plain_pytorch.peak_mib()
    return {"seconds": seconds, "accuracy": score.accuracy, "peak_mib": peak}


def scaling(args: argparse.Namespace) -> dict[str, Any]:
    """Measures images per second of the last stage's steps on all devices."""
    tried = trial(the_recipe(args), the_recipe(args).stages[-1])
    step, _ = our_step(tried, tried.program)
    step()
    times = []
    for _ in range(args.rounds):
        start = time.perf_counter()
        step()
        times.append(args.batch_size / (time.perf_counter() - start))
    return {"devices": jax.device_count(), "images_per_second": times}


CHILDREN = {"jaxft": our_run, "PyTorch": plain_pytorch.train, "scaling": scaling}


def child(name: str, arguments: list[str], devices: int = 1) -> dict[str, Any]:
    """Runs one of `CHILDREN` in a separate process and returns its results."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, __file__, *arguments, "--child", name],
        env={**os.environ, "XLA_FLAGS": flags} if devices > 1 else None,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def have_torch() -> bool:
    """Returns whether torch and torchvision are installed."""
    return all(map(importlib.util.find_spec, ("torch", "torchvision")))


def compare_runs(args: argparse.Namespace, arguments: list[str]) -> list[dict[str, Any]]:
    """Times whole runs of both sides and prints them as rows of a Markdown table."""
    sides = ["jaxft", "PyTorch"] if have_torch() else ["jaxft"]
    rows = []
    for _ in range(args.runs):
        for side in sides:
            row = {"by": side, **child(side, arguments)}
            rows.append(row)
            cells = [f"{seconds:.1f}" for seconds in (*row["seconds"], sum(row["seconds"]))]
            print(
                f"| {side} | {' | '.join(cells)} | {row['accuracy']:.3f} | {row['peak_mib']:.0f} |",
                flush=True,
            )
    return rows


def table(*columns: str) -> None:
    """Prints the head of a Markdown table."""
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)


def main(arguments: list[str]) -> None:
    if any(argument.startswith("--topology") for argument in arguments):
        benchmark_topology.main(arguments)
        return
    parser = plain_pytorch.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of steps")
    parser.add_argument("--steps", type=int, default=2, help="steps of each side in a round")
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="also measure torch.compile (takes minutes)",
    )
    parser.add_argument("--runs", type=int, default=1, help="whole runs of each side")
    parser.add_argument(
        "--devices", type=int, nargs="*", default=[], help="numbers of virtual devices to measure"
    )
    parser.add_argument("--out", type=Path, help="JSON file for all measurements")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        print(json.dumps(CHILDREN[args.child](args)))
        return
    results: dict[str, Any] = {"model": args.model, "image_size": args.image_size}
    table("stage", "by", "ms a step", "PyTorch / it", "GFLOP", "temporary MiB")
    results["steps"] = compare_steps(args)
    if args.runs:
        table("by", *(f"{name}, s" for name in RATES), "in all, s", "accuracy", "peak MiB")
        results["runs"] = compare_runs(args, arguments)
    if args.devices:
        table("devices", "images a second")
        results["scaling"] = [child("scaling", arguments, devices) for devices in args.devices]
        for row in results["scaling"]:
            print(f"| {row['devices']} | {statistics.median(row['images_per_second']):.1f} |")
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
