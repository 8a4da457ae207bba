"""Creates a TPU slice and runs `jaxft finetune` on its workers, by gcloud.

Imports the standard library only.
"""

import hashlib
import shlex
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tpu_slices import ACTIVE, LOST, MISSING, Command, InstanceGroup, QueuedResource, Worker

ROOT = Path(__file__).resolve().parents[1]
PREEMPTED = 75  # exit code of `jaxft finetune`: the same command resumes
CONNECTION_ATTEMPTS = 60  # until workers that have never answered are given up

# Folder of the run on a worker. The run holds a lock there as long as it lives; a process number
# alone may belong to another process.
RUN = "~/jaxft-run"

REPORT = f"""
cd {RUN} 2> /dev/null || exit 0
for name in digest command exit; do echo "$name=$(cat $name 2> /dev/null)"; done
flock -n -s lock true || echo running=yes
echo "last=$(tail -n 1 log 2> /dev/null)"
"""


def install_script(digest: str) -> str:
    """Returns a shell program that installs ~/jaxft.tgz and prints "installed", or an error."""
    return f"""
mkdir -p {RUN}
(
    flock 8
    [ "$(cat {RUN}/digest)" != {digest} ] || exit 0
    set -eo pipefail
    rm -rf ~/jaxft && mkdir ~/jaxft && tar xzf ~/jaxft.tgz -C ~/jaxft
    export PATH=~/.local/bin:$PATH
    command -v uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    uv venv --allow-existing --python 3.13 ~/jaxft-venv
    uv pip install --python ~/jaxft-venv/bin/python -e ~/jaxft'[tpu,gcs]'
    echo {digest} > {RUN}/digest
) > {RUN}/install.log 2>&1 8> {RUN}/install.lock
[ $? = 0 ] && echo installed || tail -n 20 {RUN}/install.log
"""


def start_script(label: str, environment: str, arguments: list[str]) -> str:
    """Returns a shell program that starts the run and does not wait for it.

    It does nothing where a run is going on or has ended, as after a second launcher.
    """
    program = f"""
exec >> {RUN}/log 2>&1
{environment} ~/jaxft-venv/bin/python -u scripts/finetune.py {shlex.join(arguments)} 9>&-
echo $? > {RUN}/exit.new
mv {RUN}/exit.new {RUN}/exit
"""
    return f"""
cd {RUN} && exec 9> lock && flock -w 2 9 || exit 0
[ -e exit ] && exit 0
: > log; echo {shlex.quote(label)} > command
cd ~/jaxft
setsid nohup bash -c {shlex.quote(program)} > /dev/null 2>&1 < /dev/null &
echo $! > {RUN}/pid
"""


class GcloudError(Exception):
    """A gcloud command failed; it may succeed later."""


class LostError(Exception):
    """The slice was preempted, or its request failed, before it was active."""


class Report(NamedTuple):
    """The run on a worker: its arguments, last line and exit code; digest of the checkout."""

    command: str = ""
    digest: str = ""
    last: str = ""
    exit: int | None = None
    running: bool = False


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def checkout_files() -> list[str]:
    """Returns the files of this checkout that git does not ignore, without the tests."""
    command = ["git", "ls-files", "-z", "-co", "--exclude-standard", "--", ".", ":!tests"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"{ROOT} must be a git checkout, to be copied to the workers.") from error
    return sorted(name for name in done.stdout.split("\0") if name and (ROOT / name).is_file())


@dataclass
class Launcher:
    """Executes the gcloud commands of a slice and of a run on it.

    Attributes:
      slice: the slice.
      poll_seconds: seconds between two looks at the slice or the run.
      dry_run: print the commands, and act as if each succeeded.
      project: the project in Google Cloud.
      workers: the machines of the slice, after `up`.
    """

    slice: QueuedResource | InstanceGroup
    poll_seconds: int
    dry_run: bool
    project: str = "PROJECT"
    workers: list[Worker] = field(default_factory=list)

    def gcloud(self, command: Command) -> str:
        """Returns the output of a gcloud command; raises GcloudError if it fails."""
        if self.dry_run:
            print(shlex.join(["gcloud", *command]), flush=True)
            return ""
        done = subprocess.run(
            ["gcloud", *command], capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        if done.returncode:
            reason = done.stderr.strip() or f"exit code {done.returncode}"
            words = " ".join(word for word in command[:5] if not word.startswith("-"))
            raise GcloudError(f"gcloud {words} failed: {reason}")
        return done.stdout.strip()

    def gcloud_or_none(self, command: Command) -> str | None:
        """Returns the output of a command, or None if its resource does not exist."""
        try:
            return self.gcloud(command)
        except GcloudError as error:
            if "not_found" in str(error).lower() or "was not found" in str(error):
                return None
            raise

    def state(self) -> str:
        """Returns the state of the slice, and stores its workers if it is active."""
        state, workers = self.slice.find(self.gcloud_or_none)
        self.workers = workers or self.workers
        if self.dry_run:
            self.workers = self.slice.workers()
        return state

    def ssh(self, worker: Worker, script: str) -> str:
        """Returns the output of a shell program on a worker; raises GcloudError."""
        return self.gcloud(self.slice.ssh(worker, script))

    def on_workers(self, call: Callable[..., Any], *each: Any) -> list[Any]:
        """Returns the results of `call(worker, ...)` for each worker, called in threads."""
        with ThreadPoolExecutor(1 if self.dry_run else 16) as pool:
            return list(pool.map(call, self.workers, *each))

    def up(self) -> None:
        """Creates the slice unless it is active, and waits for it; raises LostError."""
        state, shown = self.state(), ""
        if state in LOST:
            if state != MISSING:
                self.down()
            say(f"Creating {self.slice.name}: {self.slice.accelerator} in {self.slice.zone}.")
            for command in self.slice.create(self.project):
                try:
                    self.gcloud(command)
                except GcloudError as error:
                    if "already exists" not in str(error).replace("_", " ").lower():
                        raise
            state = "requested"
        while state != ACTIVE and not self.dry_run:
            if state in LOST:
                raise LostError(f"{self.slice.name} is {state}.")
            if state != shown:
                say(f"{self.slice.name} is {state}.")
                shown = state
            time.sleep(self.poll_seconds)
            try:
                state = self.state()
            except GcloudError as error:
                state = str(error)
        say(f"{self.slice.name} is {ACTIVE}.")

    def down(self) -> None:
        """Deletes the slice and what belongs to it."""
        say(f"Deleting {self.slice.name}.")
        for command in self.slice.delete():
            self.gcloud_or_none(command)

    def report(self, worker: Worker) -> Report:
        """Returns the state of the run on a worker."""
        lines = self.ssh(worker, REPORT).splitlines()
        values = dict(line.partition("=")[::2] for line in lines)
        return Report(
            *(values.get(name, "") for name in ("command", "digest", "last")),
            int(values["exit"]) if values.get("exit") else None,
            "running" in values,
        )

    def finetune(self, arguments: list[str], port: int) -> int:
        """Runs `jaxft finetune` on all workers, or joins it if it is running; prints its log.

        Args:
          arguments: the command's arguments.
          port: port at which the first worker waits for the others.

        Returns:
          Its exit code; 75 if it can resume on a new slice.
        """
        started, printed, failures = False, 0, 0
        while True:
            try:
                reports = self.on_workers(self.report)
                ended = started and not any(report.running for report in reports)
                if not started:
                    self.start(reports, arguments, port)
                    started = True
                printed += self.print_log(printed)
                if ended:
                    return self.exit_code(reports)
                if self.dry_run:
                    return 0
            except GcloudError as error:
                say(str(error))
                failures += 1
                if self.is_lost():
                    return PREEMPTED
                if not started and failures == CONNECTION_ATTEMPTS:
                    raise
            time.sleep(self.poll_seconds)

    def start(self, reports: list[Report], arguments: list[str], port: int) -> None:
        """Installs the checkout and starts the run, where it has not been started."""
        command = shlex.join(arguments).replace("\n", " ")
        running = {report.command for report in reports if report.running}
        if running - {command}:
            raise SystemExit(f"another run is going on there: {', '.join(running)}")
        if running:
            say("The run is going on. Its log:")
        else:
            self.install(reports)
            reports = [Report()] * len(reports)

        def start_worker(worker: Worker, report: Report) -> None:
            if report.running or report.exit is not None:
                return
            index = self.workers.index(worker)
            environment, options = self.slice.process(self.workers, index, port)
            self.ssh(worker, start_script(command, environment, [*arguments, *options]))

        self.on_workers(start_worker, reports)

    def install(self, reports: list[Report]) -> None:
        """Installs this checkout on the workers whose digest differs; forgets earlier runs."""
        files, hashed = checkout_files(), hashlib.sha256()
        for name in files:
            hashed.update(f"{name}\0".encode() + (ROOT / name).read_bytes())
        digest = hashed.hexdigest()

        def install_worker(worker: Worker, report: Report) -> None:
            if report.exit is not None:
                self.ssh(worker, f"rm -f {RUN}/exit")
            if report.digest == digest:
                return
            self.gcloud(self.slice.copy(worker, archive, f"{worker.node}:jaxft.tgz"))
            answer = self.ssh(worker, install_script(digest))
            if not self.dry_run and not answer.endswith("installed"):
                raise SystemExit(f"the installation on {worker} failed:\n{answer}")

        with tempfile.TemporaryDirectory() as folder:
            archive = f"{folder}/jaxft.tgz"
            with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
                for name in files:
                    tar.add(ROOT / name, name)
            self.on_workers(install_worker, reports)

    def print_log(self, printed: int) -> int:
        """Prints the first worker's log until the run or the connection ends.

        Args:
          printed: bytes of the log that have been printed.

        Returns:
          The number of bytes that this call has printed.
        """
        tail = f"tail -c +{printed + 1} -s 0.2 -f --pid=$(cat {RUN}/pid) {RUN}/log"
        # gcloud repeats a command whose connection is lost, which would print the same bytes again.
        once = f"mkdir {RUN}/{time.time_ns()} 2> /dev/null || exit 0"
        command = self.slice.ssh(self.workers[0], f"{once}; {tail}")
        if self.dry_run:
            self.gcloud(command)
            return 0
        count, out = 0, sys.stdout.buffer
        with subprocess.Popen(
            ["gcloud", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:
            for chunk in iter(partial(process.stdout.read1, 65536), b""):
                out.write(chunk)
                out.flush()
                count += len(chunk)
        return count

    def exit_code(self, reports: list[Report]) -> int:
        """Returns the exit code of a run that has ended on all workers.

        If a process fails, the others end with 75. On a preempted slice every failure counts as 75.
        """
        failed = [
            (worker, report.exit)
            for worker, report in zip(self.workers, reports, strict=True)
            if report.exit not in (0, None, PREEMPTED)
        ]
        if not failed or self.is_lost():
            return 0 if all(report.exit == 0 for report in reports) else PREEMPTED
        worker, code = failed[0]
        log = self.ssh(worker, f"tail -n 20 {RUN}/log")
        say(f"{worker} ended with exit code {code}; the last lines of its log:\n{log}")
        return code

    def is_lost(self) -> bool:
        """Returns whether the slice is preempted or missing; False if gcloud does not answer."""
        try:
            return self.state() in LOST
        except GcloudError:
            return False
