"""scripts/tpu_vm.sh with a fake gcloud, whose two workers are local folders."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "tpu_vm.sh"

GCLOUD = """#!/usr/bin/env bash
set -e
printf '%s\\n' "$*" >> "$CLOUD/calls"
[[ $1 == storage ]] && exit
for argument; do
    case $argument in
        --worker=*) worker=${argument#*=} ;;
        --command=*) command=${argument#*=} ;;
    esac
done
[[ $worker == all ]] && workers=(0 1) || workers=("$worker")
case $4 in
    describe) echo 2 ;;
    ssh) for k in "${workers[@]}"; do (cd "$CLOUD/$k" && HOME=$PWD bash -c "$command"); done ;;
    scp)
        arguments=("${@:5}") && [[ $5 == --recurse ]] && arguments=("${@:6}")
        for k in "${workers[@]}"; do
            cp -r "${arguments[0]/#vm:/$CLOUD/$k/}" "${arguments[1]/#vm:/$CLOUD/$k/}"
        done
        ;;
esac
"""

UV = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> ~/uv
mkdir -p ~/jaxft-venv/bin && cp "$CLOUD/bin/python" ~/jaxft-venv/bin/python
"""

PYTHON = """#!/usr/bin/env bash
printf '<%s>' "$@" && ls jaxft/distributed.py && exit 75
"""


@pytest.fixture
def cloud(tmp_path):
    for folder in ("bin", "0", "1"):
        (tmp_path / folder).mkdir()
    for name, text in {"gcloud": GCLOUD, "uv": UV, "python": PYTHON}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def tpu_vm(cloud, *arguments, path=None):
    path = f"{cloud / 'bin'}:{os.environ['PATH']}" if path is None else path
    return subprocess.run(
        ["/bin/bash", SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PATH": path, "CLOUD": str(cloud)},
    )


def calls(cloud):
    return (cloud / "calls").read_text() if (cloud / "calls").exists() else ""


def test_tpu_vm_setup_run_and_collect(cloud):
    done = tpu_vm(cloud, "setup", "vm", "zone")
    assert done.returncode == 0, done.stderr
    for worker in "01":
        assert (cloud / worker / "jaxft" / "scripts" / "finetune.py").exists()
        assert "jaxft[tpu,gcs]" in (cloud / worker / "uv").read_text()

    (cloud / "1" / "jaxft.pid").write_text(str(os.getpid()))  # a run that goes on
    options = ("--workdir", "gs://bucket/run", "--data", "tfds:it's a set")
    done = tpu_vm(cloud, "run", "vm", "zone", "configs/quickstart.py", *options)
    assert "already running" in done.stdout
    assert not (cloud / "1" / "jaxft.log").exists()

    (cloud / "1" / "jaxft.pid").unlink()
    done = tpu_vm(cloud, "run", "vm", "zone", "configs/quickstart.py", *options)
    assert done.returncode == 75, done.stderr  # the program's own: preempted, to be run again
    program = "<-u><scripts/finetune.py><configs/quickstart.py><--workdir><gs://bucket/run>"
    assert done.stdout == f"{program}<--data><tfds:it's a set>jaxft/distributed.py\n"
    assert "--zone=zone --worker=all" in calls(cloud)

    done = tpu_vm(cloud, "collect", "vm", "zone", "jaxft.log", cloud / "home")
    assert done.returncode == 0, done.stderr
    for worker in "01":
        assert program in (cloud / "home" / f"worker{worker}" / "jaxft.log").read_text()
    tpu_vm(cloud, "collect", "vm", "zone", "gs://bucket/run", cloud / "home")
    assert f"storage cp --recursive gs://bucket/run {cloud}/home" in calls(cloud)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "setup   NAME ZONE"),
        (("stop", "vm", "zone"), "setup   NAME ZONE"),
        (("setup", "vm"), "wrong arguments for setup"),
        (("collect", "vm", "zone", "jaxft.log"), "wrong arguments for collect"),
        (("run", "vm", "zone", "configs/quickstart.py"), "run needs --workdir gs://"),
        (
            ("run", "vm", "zone", "configs/quickstart.py", "--workdir", "x"),
            "run needs --workdir gs",
        ),
        (("run", "vm", "zone", "nowhere.py", "--workdir", "gs://b/r"), "there is no nowhere.py"),
    ],
)
def test_tpu_vm_checks_arguments_before_calling_gcloud(arguments, expected, cloud):
    done = tpu_vm(cloud, *arguments)
    assert (done.returncode, expected in done.stderr, calls(cloud)) == (2, True, ""), done.stderr


def test_tpu_vm_without_gcloud(cloud):
    done = tpu_vm(cloud, "setup", "vm", "zone", path=str(cloud))
    assert (done.returncode, "gcloud is not installed" in done.stderr) == (2, True)
