"""TPU slices by name, and the gcloud commands that create, find, reach and delete them.

Imports the standard library only. The commands are those of the documentation at
https://docs.cloud.google.com:

- `/tpu/docs/queued-resources` and `/tpu/docs/runtimes`: v4, v5e, v5p and v6e in the Cloud TPU API,
  which receives fixes only and does not support TPU7x
- `/tpu/docs/spot-compute` and `/compute/docs/tpus/create-tpu-mig-multi-host-slice`: v5p, v6e and
  TPU7x as managed instance groups of Compute Engine
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

Command = list[str]
Find = Callable[[Command], str | None]
"""Returns the output of a gcloud command, or None if its resource does not exist."""

ACTIVE, MISSING = "ACTIVE", "MISSING"
LOST = {MISSING, "PREEMPTED", "FAILED", "SUSPENDING", "SUSPENDED", "DELETING"}
LOST |= {"STOPPING", "STOPPED", "TERMINATED", "DEPROVISIONING"}
"""States after which a slice does not become active again."""

SQUARES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}


class Chip(NamedTuple):
    """A TPU version.

    Attributes:
      cores: what a slice's name counts per chip: 2 for `v4-8`, which has 4 chips; 1 for `v5e-8`.
      shapes: number of chips to topology.
      type: prefix of the accelerator type in the Cloud TPU API; empty without support.
      runtime: software version in the Cloud TPU API.
      machine: prefix of the machine type in Compute Engine; empty without support.
      image: image family in Compute Engine.
    """

    cores: int
    shapes: dict[int, str]
    type: str = ""
    runtime: str = ""
    machine: str = ""
    image: str = "ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e"


CHIPS = {
    "v4": Chip(2, CUBES, "v4", "tpu-ubuntu2204-base"),
    "v5e": Chip(1, SQUARES, "v5litepod", "v2-alpha-tpuv5-lite"),
    "v5p": Chip(2, CUBES, "v5p", "v2-alpha-tpuv5", "ct5p-hightpu"),
    "v6e": Chip(1, SQUARES, "v6e", "v2-alpha-tpuv6e", "ct6e-standard"),
    "tpu7x": Chip(2, CUBES, machine="tpu7x-standard", image="ubuntu-accel-2404-amd64-tpu-tpu7x"),
}


class Worker(NamedTuple):
    """A machine of a slice: a VM, or in the Cloud TPU API a node and an index in it."""

    node: str
    index: int | None = None

    def __str__(self) -> str:
        return self.node if self.index is None else f"{self.node} worker {self.index}"


@dataclass(frozen=True)
class Slice:
    """One or several TPU slices.

    Attributes:
      name: name in Google Cloud.
      accelerator: such as `v5e-8`.
      zone: zone in Google Cloud.
      chip: the TPU version.
      chips: number of chips in each slice.
      slices: number of slices.
      spot: whether Google Cloud may preempt it.
    """

    name: str
    accelerator: str
    zone: str
    chip: Chip
    chips: int
    slices: int
    spot: bool

    @property
    def chips_per_worker(self) -> int:
        """Number of chips in one machine."""
        return self.chips if self.chip.shapes is SQUARES and self.chips <= 8 else 4

    @property
    def size(self) -> int:
        """Number of machines in each slice."""
        return self.chips // self.chips_per_worker

    def ssh(self, worker: Worker, script: str) -> Command:
        """Returns the command that runs a shell program on a worker."""
        return self._reach(worker, "ssh", worker.node, f"--command={script}")

    def copy(self, worker: Worker, source: str, target: str) -> Command:
        """Returns the command that copies a file or folder from or to `NODE:PATH`."""
        return self._reach(worker, "scp", "--recurse", source, target)

    def _reach(self, worker: Worker, *words: str) -> Command:
        command = ["compute", *words, f"--zone={self.zone}", "--quiet"]
        if worker.index is not None:
            command[1:1] = ["tpus", "tpu-vm"]
            command.append(f"--worker={worker.index}")
        return command


class QueuedResource(Slice):
    """A queued resource of the Cloud TPU API."""

    def create(self, project: str) -> list[Command]:
        """Returns the commands that create the slice in a project."""
        del project
        several = [f"--node-count={self.slices}", f"--node-prefix={self.name}"]
        create = ["compute", "tpus", "queued-resources", "create", self.name, f"--zone={self.zone}"]
        create += several if self.slices > 1 else [f"--node-id={self.name}"]
        create.append(f"--accelerator-type={self.chip.type}-{self.chips * self.chip.cores}")
        create.append(f"--runtime-version={self.chip.runtime}")
        return [[*create, "--spot"] if self.spot else create]

    def delete(self) -> list[Command]:
        """Returns the commands that delete the slice and its parts."""
        delete = ["compute", "tpus", "queued-resources", "delete", self.name, f"--zone={self.zone}"]
        return [[*delete, "--force", "--quiet"]]

    def workers(self) -> list[Worker]:
        """Returns the machines of the slice."""
        nodes = [f"{self.name}-{index}" for index in range(self.slices)]
        nodes = nodes if self.slices > 1 else [self.name]
        return [Worker(node, index) for node in nodes for index in range(self.size)]

    def find(self, find: Find) -> tuple[str, list[Worker]]:
        """Returns state and workers; the first node that is not ready decides the state."""
        tpus, zone = ["compute", "tpus"], f"--zone={self.zone}"
        request = [*tpus, "queued-resources", "describe", self.name, zone]
        state = find([*request, "--format=value(state.state)"]) or MISSING
        workers = self.workers()
        for node in dict.fromkeys(worker.node for worker in workers) if state == ACTIVE else ():
            node_state = find([*tpus, "tpu-vm", "describe", node, zone, "--format=value(state)"])
            if node_state != "READY":
                return node_state or MISSING, []
        return state, workers if state == ACTIVE else []

    def process(self, workers: list[Worker], index: int, port: int) -> tuple[str, list[str]]:
        """Returns environment and options of a process. JAX finds the other processes."""
        del workers, index
        return f"JAX_COORDINATOR_PORT={port}", []


class InstanceGroup(Slice):
    """A managed instance group of Compute Engine, whose VMs form one slice."""

    def create(self, project: str) -> list[Command]:
        """Returns the commands that create the slice in a project."""
        zone, region = f"--zone={self.zone}", self.zone.rpartition("-")[0]
        parts = f"{self.name}-{self.accelerator}"  # a name for each accelerator
        template = [
            *("compute", "instance-templates", "create", parts, "--maintenance-policy=TERMINATE"),
            f"--machine-type={self.chip.machine}-{self.chips_per_worker}t",
            *(f"--image-family={self.chip.image}", "--image-project=ubuntu-os-accelerator-images"),
            *("--boot-disk-size=200GB", "--scopes=cloud-platform"),
        ]
        if self.spot:
            template += ["--provisioning-model=SPOT", "--instance-termination-action=STOP"]
        group = ["compute", "instance-groups", "managed", "create", self.name, zone]
        group += [f"--template={parts}", f"--size={self.size}"]
        group.append("--default-action-on-vm-failure=do-nothing")
        if self.size == 1:
            return [template, group]
        policy = ["compute", "resource-policies", "create", "workload-policy", parts]
        policy += [f"--region={region}", "--type=HIGH_THROUGHPUT"]
        policy.append(f"--accelerator-topology={self.chip.shapes[self.chips]}")
        path = f"projects/{project}/regions/{region}/resourcePolicies/{parts}"
        return [policy, template, [*group, f"--workload-policy={path}"]]

    def delete(self) -> list[Command]:
        """Returns the commands that delete the slice and its parts."""
        parts, region = f"{self.name}-{self.accelerator}", self.zone.rpartition("-")[0]
        commands = [
            ["instance-groups", "managed", "delete", self.name, f"--zone={self.zone}"],
            ["instance-templates", "delete", parts],
            ["resource-policies", "delete", parts, f"--region={region}"],
        ]
        return [["compute", *each, "--quiet"] for each in commands[: 3 if self.size > 1 else 2]]

    def workers(self) -> list[Worker]:
        """Returns placeholders: Compute Engine chooses the ends of the names."""
        return [Worker(f"{self.name}-vm{index:02}") for index in range(self.size)]

    def find(self, find: Find) -> tuple[str, list[Worker]]:
        """Returns state and workers; a lost VM decides the state."""
        command = ["compute", "instance-groups", "managed", "list-instances", self.name]
        text = find([*command, f"--zone={self.zone}", "--format=json"])
        if not text:
            return MISSING, []
        vms = json.loads(text)
        states = {vm.get("instanceStatus", "CREATING") for vm in vms}
        if states & LOST:
            return min(states & LOST), []
        if states != {"RUNNING"} or len(vms) != self.size:
            return "CREATING", []
        urls = sorted(vm["instance"] for vm in vms)
        return ACTIVE, [Worker(url.rpartition("/")[2]) for url in urls]

    def process(self, workers: list[Worker], index: int, port: int) -> tuple[str, list[str]]:
        """Returns environment and options of a process. VMs know each other by their names."""
        options = ["--processes", str(len(workers))]
        if len(workers) > 1:
            options += ["--process", str(index), "--coordinator", f"{workers[0].node}:{port}"]
        return "", options


def find_slice(
    name: str, accelerator: str, zone: str, *, compute_engine: bool, spot: bool
) -> QueuedResource | InstanceGroup:
    """Returns the slice of these names.

    Args:
      name: name in Google Cloud.
      accelerator: chip and size. Names of v4, v5p and tpu7x count TensorCores, two per chip.
      zone: zone in Google Cloud.
      compute_engine: use Compute Engine, as tpu7x always does, instead of the Cloud TPU API.
      spot: let Google Cloud preempt it.

    Raises:
      ValueError: gcloud would refuse a name, or there is no such slice.
    """
    problems = []
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
        problems.append(
            f"NAME is {name!r}; it must be at most 40 lower-case letters, digits and hyphens, with "
            "a letter first and no hyphen last."
        )
    if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z0-9]+", zone):
        problems.append(f"--zone is {zone!r}; it must be a zone such as us-central2-b.")
    match = re.fullmatch(r"(?:([1-9]\d*)x)?(\w+)-(\d+)", accelerator.replace("litepod", "e"))
    chip = CHIPS.get(match[2]) if match else None
    if not match or not chip:
        problems.append(
            f"ACCELERATOR is {accelerator!r}; it must be a chip and a size: v5e-8, v4-32, or "
            f"2xv5e-16 for two slices. The chips are {', '.join(CHIPS)}."
        )
        raise ValueError("\n".join(problems))
    chips, slices = int(match[3]) // chip.cores, int(match[1] or 1)
    if int(match[3]) % chip.cores or chips not in chip.shapes:
        sizes = ", ".join(f"{match[2]}-{count * chip.cores}" for count in chip.shapes)
        problems.append(f"ACCELERATOR is {accelerator!r}; the sizes are {sizes}.")
    compute_engine = compute_engine or not chip.type
    if compute_engine and not chip.machine:
        problems.append(f"Compute Engine has no {match[2]}; omit --compute-engine.")
    if compute_engine and slices > 1:
        problems.append(f"ACCELERATOR is {accelerator!r}; Compute Engine forms one slice only.")
    if problems:
        raise ValueError("\n".join(problems))
    kind = InstanceGroup if compute_engine else QueuedResource
    return kind(name, f"{match[2]}-{match[3]}", zone, chip, chips, slices, spot)
