"""scripts/gke.yaml and scripts/skypilot.yaml: their fields, and the commands in them."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import bucket
import pytest
import yaml

from jaxft.cli.finetune import _parse
from jaxft.cli.recipe_options import read_recipe
from jaxft.topology import CHIPS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GKE = yaml.safe_load((ROOT / "scripts" / "gke.yaml").read_text())
SKYPILOT = yaml.safe_load((ROOT / "scripts" / "skypilot.yaml").read_text())
(REPLICATED,) = GKE["spec"]["replicatedJobs"]
JOB = REPLICATED["template"]["spec"]
POD = JOB["template"]["spec"]
(CONTAINER,) = POD["containers"]
SHELL = {"gke": CONTAINER["args"][0], "skypilot": SKYPILOT["setup"] + SKYPILOT["run"]}


@pytest.mark.parametrize("file", SHELL)
def test_commands_are_those_of_this_package(file, monkeypatch):
    """The last command is `finetune` with a recipe of configs/, and receives the signals."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    launcher, program, command, recipe, *options = shlex.split(SHELL[file].splitlines()[-1])
    assert (launcher, Path(program).name, command) == ("exec", "jaxft", "finetune")
    known, fields = _parse([str(ROOT / "configs" / Path(recipe).name), *options], "jaxft finetune")
    assert known.workdir in ("gs://BUCKET/quickstart", "$WORKDIR")
    assert read_recipe(known.config, fields, "jaxft finetune").dtype == "bfloat16"
    (extras,) = re.findall(r"\[([\w,]+)\]'", SHELL[file])
    assert set(extras.split(",")) == {"tpu", "gcs"} <= PROJECT["optional-dependencies"].keys()
    subprocess.run(["bash", "-n"], input=SHELL[file], text=True, check=True)


def test_gke_names_wheel_and_python_of_this_version():
    wheel = f"jaxft-{PROJECT['version']}-py3-none-any.whl"
    assert f"'/jaxft/{wheel}[" in SHELL["gke"]
    assert f"dist/{wheel} " in (ROOT / "scripts" / "gke.yaml").read_text()
    image, _, version = CONTAINER["image"].partition(":")
    required = PROJECT["requires-python"].removeprefix(">=")
    assert image == "python"  # Docker's official image
    assert [*map(int, version.split("."))] >= [*map(int, required.split("."))]


def test_gke_requests_whole_slice():
    selector, chips = POD["nodeSelector"], CONTAINER["resources"]["limits"]["google.com/tpu"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"
    shape = selector["cloud.google.com/gke-tpu-topology"]
    assert JOB["parallelism"] == JOB["completions"]  # a pod for each machine
    assert CHIPS["v5e"].shapes[JOB["parallelism"] * chips] == shape
    port = CONTAINER["env"][0]["value"]
    assert CONTAINER["env"] == [{"name": "JAX_COORDINATOR_PORT", "value": port}]
    assert {"containerPort": int(port)} in CONTAINER["ports"]
    assert (GKE["kind"], GKE["apiVersion"]) == ("JobSet", "jobset.x-k8s.io/v1alpha2")


@pytest.mark.parametrize(
    ("exit_code", "disrupted", "expected"),
    [(75, False, "restart"), (75, True, "restart"), (137, True, "restart"), (1, False, "fail")],
)
def test_gke_restarts_after_preemption_only(exit_code, disrupted, expected):
    """Applies the first rule that matches, as Kubernetes does."""
    assert (POD["restartPolicy"], JOB["backoffLimit"]) == ("Never", 0)  # as the rules need
    action = "Count"
    for rule in JOB["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        if codes:
            assert (codes["containerName"], codes["operator"]) == (CONTAINER["name"], "NotIn")
        if exit_code not in codes["values"] if codes else disrupted:
            action = rule["action"]
            break
    # A job that its policy fails matches the JobSet's rule; every other failure restarts.
    (rule,) = GKE["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert {"Count": "restart", "FailJob": "fail"}[action] == expected
    assert GKE["spec"]["failurePolicy"]["maxRestarts"] > 0


def test_gke_copies_wheel_and_recipe_from_bucket(tmp_path):
    command = next(line for line in SHELL["gke"].splitlines() if line.startswith("python "))
    _, _, program = shlex.split(command)
    program = program.replace("BUCKET", "bucket").replace('"/jaxft"', repr(str(tmp_path / "jaxft")))
    with bucket.serve() as served:
        for name in ("wheel", "quickstart.py"):
            served.objects[f"jaxft/{name}"] = (name.encode(), 1)
        environment = {**os.environ, "STORAGE_EMULATOR_HOST": served.url}
        subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)
    copied = {path.name: path.read_text() for path in (tmp_path / "jaxft").iterdir()}
    assert copied == {"wheel": "wheel", "quickstart.py": "quickstart.py"}


def test_skypilot_recovers_spot_slices_and_exit_code_75():
    resources = SKYPILOT["resources"]
    assert SKYPILOT.keys() == {"name", "workdir", "resources", "envs", "setup", "run"}
    assert (resources["use_spot"], SKYPILOT["workdir"]) == (True, ".")
    assert resources["job_recovery"] == {"recover_on_exit_codes": [75]}
    name, size = resources["accelerators"].removeprefix("tpu-").split("-")
    assert int(size) // CHIPS[name].cores in CHIPS[name].shapes
    assert resources["accelerator_args"] == {"runtime_version": f"v2-alpha-tpu{name}"}
