#!/usr/bin/env python3
"""Creates TPU slices in Google Cloud and runs a recipe on all their workers.

    scripts/tpu.py up      NAME ACCELERATOR --zone ZONE
    scripts/tpu.py run     NAME ACCELERATOR --zone ZONE -- CONFIG --workdir gs://BUCKET/RUN ...
    scripts/tpu.py status  NAME ACCELERATOR --zone ZONE
    scripts/tpu.py collect NAME ACCELERATOR --zone ZONE REMOTE LOCAL
    scripts/tpu.py down    NAME ACCELERATOR --zone ZONE

up       Creates the slice and waits until it is active.
run      Does the same, installs this checkout on each worker unless its content is there already,
         starts `jaxft finetune` on each with the arguments after `--`, and prints the first
         worker's log. The run does not need the connection: after Ctrl-C, the same command prints
         its log again. When the slice is preempted, or the run ends with exit code 75, a new slice
         is created, on which the run resumes from its last checkpoint.
status   Prints the state of the slice, and of the run on each worker.
collect  Copies a gs:// folder, or REMOTE of each worker (its log: jaxft-run/log), to LOCAL.
down     Deletes the slice.

ACCELERATOR is for instance v4-32, v5e-8, v5p-8, v6e-16 or tpu7x-16, or 2xv5e-16 for two slices.
Needs gcloud, logged in, with a project; needs no Python package.
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

from tpu_launcher import PREEMPTED, ROOT, GcloudError, Launcher, LostError, checkout_files, say
from tpu_slices import ACTIVE, find_slice

LONGEST_WAIT = 600  # seconds before a new slice is requested


def run_with_retries(launcher: Launcher, args: argparse.Namespace) -> int:
    """Runs the recipe, on a new slice after each preemption; returns its exit code."""
    for attempt in range(args.retries + 1):
        try:
            if attempt:
                wait = min(LONGEST_WAIT, args.poll_seconds * 2**attempt)
                say(f"Retry {attempt} of {args.retries} on a new slice, in {wait} s.")
                time.sleep(wait)
                launcher.down()
            launcher.up()
            code = launcher.finetune(args.finetune, args.coordinator_port)
        except (LostError, GcloudError) as error:
            if not attempt and isinstance(error, GcloudError):
                raise  # such as a missing permission
            say(str(error))
            continue
        if code != PREEMPTED:
            say(f"The run ended with exit code {code}. `down` deletes {launcher.slice.name}.")
            return code
        say("The slice was preempted, or the run ended with exit code 75.")
    say(f"No more than {args.retries} retries; the same command resumes the run.")
    return PREEMPTED


def status(launcher: Launcher) -> int:
    """Prints the state of the slice, and of the run on each worker."""
    state = launcher.state()
    print(f"{launcher.slice.name}: {launcher.slice.accelerator}, {state}")
    if state == ACTIVE or launcher.dry_run:
        reports = launcher.on_workers(launcher.report)
        for worker, report in zip(launcher.workers, reports, strict=True):
            ended = "no run" if report.exit is None else f"ended with exit code {report.exit}"
            print(f"{worker}: {'running' if report.running else ended}\n    {report.last}")
    return 0


def collect(launcher: Launcher, remote: str, local: Path) -> int:
    """Copies a folder of a bucket, or a file or folder of each worker."""
    folders = [local]
    copies = [["storage", "cp", "--recursive", remote, str(local)]]
    if not remote.startswith("gs://"):
        state = launcher.state()
        if state != ACTIVE and not launcher.dry_run:
            raise GcloudError(f"{launcher.slice.name} is {state}; its files cannot be copied.")
        folders = [local / f"worker{number}" for number in range(len(launcher.workers))]
        copies = [
            launcher.slice.copy(worker, f"{worker.node}:{remote}", str(folder))
            for worker, folder in zip(launcher.workers, folders, strict=True)
        ]
    for folder, copy in zip(folders, copies, strict=True):
        if not launcher.dry_run:
            folder.mkdir(parents=True, exist_ok=True)
        launcher.gcloud(copy)
    return 0


def down(launcher: Launcher, yes: bool) -> int:
    """Deletes the slice, after a question."""
    question = f"Delete {launcher.slice.name} in {launcher.slice.zone}, and the run on it? [y/N] "
    if not (yes or launcher.dry_run or (sys.stdin.isatty() and input(question).lower() == "y")):
        say("Nothing is deleted. Answer y, or use --yes.")
        return 1
    launcher.down()
    return 0


def run_problems(arguments: list[str]) -> list[str]:
    """Returns what is wrong with the arguments of `jaxft finetune`.

    Replaces the path of the recipe by its path in the checkout.
    """
    if not arguments:
        return ["run needs `-- CONFIG --workdir gs://BUCKET/RUN`."]
    problems, recipe = [], Path(arguments[0]).resolve()
    if not recipe.is_file():
        problems.append(f"there is no recipe {arguments[0]!r}.")
    elif not recipe.is_relative_to(ROOT) or str(recipe.relative_to(ROOT)) not in checkout_files():
        problems.append(f"{recipe} is not copied to the workers; move it to {ROOT / 'configs'}.")
    else:
        arguments[0] = str(recipe.relative_to(ROOT))
    if "--workdir=gs://" not in "=".join(arguments):
        problems.append("run needs --workdir gs://BUCKET/RUN, which all workers can reach.")
    return problems


def gcloud_problems(launcher: Launcher) -> list[str]:
    """Returns why gcloud cannot be used; finds the project."""
    if not shutil.which("gcloud"):
        return ["gcloud is not installed; see https://cloud.google.com/sdk."]
    account = ["auth", "list", "--filter=status:ACTIVE", "--format=value(account)"]
    if not launcher.gcloud(account):
        return ["gcloud is not logged in; run `gcloud auth login`."]
    launcher.project = launcher.gcloud(["config", "get-value", "project"])
    if not launcher.project:
        return ["gcloud has no project; run `gcloud config set project PROJECT`."]
    return []


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on")
    return int(text)


def parse(argv: list[str]) -> argparse.Namespace:
    """Returns the options; the arguments after `--` are `finetune`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {
        name: commands.add_parser(name) for name in ("up", "run", "status", "collect", "down")
    }
    for command in parsers.values():
        command.add_argument("name", metavar="NAME")
        command.add_argument("accelerator", metavar="ACCELERATOR")
        command.add_argument("--zone", required=True, help="such as us-central2-b")
        command.add_argument(
            "--compute-engine",
            action="store_true",
            help="instance group of Compute Engine, as for tpu7x; default: Cloud TPU API",
        )
        command.add_argument("--on-demand", action="store_true", help="default: a spot slice")
        command.add_argument("--dry-run", action="store_true", help="only print the commands")
        command.add_argument("--poll-seconds", type=_number, default=10, help="default: 10")
    parsers["run"].add_argument(
        "--retries", type=_number, default=30, help="new slices; default: 30"
    )
    parsers["run"].add_argument(
        "--coordinator-port",
        type=int,
        default=8476,
        help="open port of the first worker; default: 8476, because some networks block JAX's 8482",
    )
    parsers["collect"].add_argument("remote", metavar="REMOTE")
    parsers["collect"].add_argument("local", metavar="LOCAL", type=Path)
    parsers["down"].add_argument("--yes", action="store_true", help="do not ask")
    end = argv.index("--") if "--" in argv else len(argv)
    return parser.parse_args(argv[:end], argparse.Namespace(finetune=argv[end + 1 :]))


def main(argv: list[str]) -> int:
    args, problems, launcher = parse(argv), [], None
    if args.command == "run":
        problems += run_problems(args.finetune)
    try:
        kind = {"compute_engine": args.compute_engine, "spot": not args.on_demand}
        found = find_slice(args.name, args.accelerator, args.zone, **kind)
        launcher = Launcher(found, args.poll_seconds, args.dry_run)
        if not problems and not args.dry_run:
            problems += gcloud_problems(launcher)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        say("\n".join(problems))
        return 2
    match args.command:
        case "up":
            launcher.up()
            return 0
        case "run":
            return run_with_retries(launcher, args)
        case "status":
            return status(launcher)
        case "collect":
            return collect(launcher, args.remote, args.local)
        case _:
            return down(launcher, args.yes)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (GcloudError, LostError) as error:
        say(str(error))
        sys.exit(1)
    except (KeyboardInterrupt, BrokenPipeError):
        say("\nStopped. What runs or waits in Google Cloud continues; the same command shows it.")
        os._exit(130)
