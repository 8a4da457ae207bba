"""scripts/tpu.py with a fake gcloud, whose workers are local folders."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxft.topology import CHIPS

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

import tpu_slices  # noqa: E402

# The slice is the file `state`. Each line of `states` replaces it in turn.
GCLOUD = r"""#!/usr/bin/env bash
echo "${*//$'\n'/ }" >> "$CLOUD/calls"
cd "$CLOUD"
fail() { echo "ERROR: (gcloud) $1" >&2; exit "${2:-1}"; }
next() {
    [ -e state ] || fail "NOT_FOUND: the resource was not found"
    if [ -s states ]; then head -n 1 states > state; sed -i 1d states; fi
}
for argument; do
    case $argument in
        --worker=*) worker=${argument#*=} ;;
        --command=*) command=${argument#*=} ;;
        --size=*) echo "${argument#*=}" > size ;;
    esac
done
[ -e offline ] && fail "no connection"
case "$*" in
    "auth list"*) cat account ;;
    "config get-value project") cat project ;;
    "storage cp"*) ;;
    *" create "*)
        [ -e quota ] && fail "$(cat quota)"
        [[ $* == *workload-policy\ * || $* == *instance-templates* ]] && exit
        [[ $* == *instance-groups* ]] && echo RUNNING > state || echo ACTIVE > state
        ;;
    *" delete "*) rm -rf state node_state vm ;;
    *queued-resources\ describe*) next && cat state ;;
    *tpu-vm\ describe*) cat node_state 2> /dev/null || echo READY ;;
    *list-instances*)
        next
        for ((k = 0; k < $(cat size); k++)); do
            machines+="${machines:+,}{\"instance\": \"zones/z/instances/ants-a$k\","
            machines+=" \"instanceStatus\": \"$(cat state)\"}"
        done
        echo "[$machines]"
        ;;
    *\ ssh\ *)
        [[ $3 == ssh ]] && node=$4 || node=$5
        [[ $2 == ssh ]] && node=$3
        export HOME=$CLOUD/vm/$node-${worker:-0}
        mkdir -p "$HOME" && cd "$HOME"
        if [[ $command == *--pid=* && -e $CLOUD/drop ]]; then
            rm "$CLOUD/drop"
            read -r line < <(bash -c "$command")
            echo "$line"
            bash -c "$command" # gcloud repeats a command whose connection is lost
            exit
        fi
        if [[ $command == *--pid=* && -e $CLOUD/release && ! -e $CLOUD/released ]]; then
            touch "$CLOUD/released"
            echo > "$CLOUD/release" &
        fi
        bash -c "$command"
        ;;
    *\ scp\ *)
        for argument; do
            case $argument in
                *:*) node=${argument%%:*}; remote=$CLOUD/vm/$node-${worker:-0}/${argument#*:}
                     paths+=("$remote") ;;
                /*) paths+=("$argument") ;;
            esac
        done
        mkdir -p "$CLOUD/vm/$node-${worker:-0}"
        cp -r "${paths[@]}"
        ;;
    *) fail "unknown command" ;;
esac
"""

UV = r"""#!/usr/bin/env bash
echo "$*" >> ~/uv
[ -e "$CLOUD/no_network" ] && { echo "no wheel for libtpu"; exit 1; }
mkdir -p ~/jaxft-venv/bin && cp "$CLOUD/bin/python" ~/jaxft-venv/bin/python
"""

# A worker's Python: `program` decides its output and exit code, by `$worker` and `$start`.
PYTHON = r"""#!/usr/bin/env bash
worker=$(basename "$HOME")
echo "$worker" >> "$CLOUD/starts"
start=$(grep -c "^$worker$" "$CLOUD/starts")
printf '<%s>' "$@" && echo " port $JAX_COORDINATOR_PORT"
ls jaxft/distributed.py
. "$CLOUD/program"
"""

RUN = ("configs/quickstart.py", "--workdir", "gs://bucket/run", "--data", "tfds:it's a set")


@pytest.fixture
def cloud(tmp_path):
    (tmp_path / "bin").mkdir()
    for name, text in {"gcloud": GCLOUD, "uv": UV, "python": PYTHON}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    for name, text in {"account": "me", "project": "ours", "calls": "", "starts": ""}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "program").write_text("exit 0")
    return tmp_path


def start(cloud, *arguments, **options):
    command, *rest = map(str, arguments)
    env = {**os.environ, "PATH": f"{cloud / 'bin'}:{os.environ['PATH']}", "CLOUD": str(cloud)}
    rest = [*rest[:2], "--zone=us-central2-b", "--poll-seconds=0", *rest[2:]]
    return subprocess.Popen(
        [sys.executable, ROOT / "scripts" / "tpu.py", command, *rest],
        cwd=ROOT,
        text=True,
        **{"env": env, "stdin": subprocess.DEVNULL, "stdout": -1, "stderr": -1, **options},
    )


def tpu(cloud, *arguments, **options):
    """Returns the exit code, standard output and standard error."""
    process = start(cloud, *arguments, **options)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def lines(path, *words):
    """Returns the lines of a file that contain all words."""
    return [line for line in path.read_text().splitlines() if all(word in line for word in words)]


def test_queued_resource_from_up_to_down(cloud):
    (cloud / "states").write_text("WAITING_FOR_RESOURCES\nWAITING_FOR_RESOURCES\nACTIVE\n")
    code, _, err = tpu(cloud, "up", "ants", "v4-16")
    assert (code, err.count("is WAITING_FOR_RESOURCES"), "is ACTIVE" in err) == (0, 1, True), err
    create = "compute tpus queued-resources create ants --zone=us-central2-b --node-id=ants "
    create += "--accelerator-type=v4-16 --runtime-version=tpu-ubuntu2204-base --spot"
    assert lines(cloud / "calls", " create ") == [create]

    code, out, err = tpu(cloud, "run", "ants", "v4-16", "--", *RUN)
    assert code == 0, err
    program = "<-u><scripts/finetune.py><configs/quickstart.py><--workdir><gs://bucket/run><--data>"
    assert out == f"{program}<tfds:it's a set> port 8476\njaxft/distributed.py\n"
    assert "The run ended with exit code 0. `down` deletes ants." in err
    assert sorted(lines(cloud / "starts")) == ["ants-0", "ants-1"]
    for worker in "01":
        assert "jaxft[tpu,gcs]" in (cloud / "vm" / f"ants-{worker}" / "uv").read_text()
        assert not (cloud / "vm" / f"ants-{worker}" / "jaxft" / "tests").exists()

    (cloud / "program").write_text("echo epoch $start; [ $start = 2 ]")
    code, out, _ = tpu(cloud, "run", "ants", "v4-16", "--coordinator-port", "99", "--", *RUN)
    assert (code, out.endswith("port 99\njaxft/distributed.py\nepoch 2\n")) == (0, True)
    assert len(lines(cloud / "calls", " scp ")) == 2  # none for the second run

    code, out, _ = tpu(cloud, "status", "ants", "v4-16")
    assert out == (
        "ants: v4-16, ACTIVE\n"
        "ants worker 0: ended with exit code 0\n    epoch 2\n"
        "ants worker 1: ended with exit code 0\n    epoch 2\n"
    )
    assert tpu(cloud, "collect", "ants", "v4-16", "jaxft-run/log", cloud / "logs")[0] == 0
    for worker in "01":
        assert "epoch 2" in (cloud / "logs" / f"worker{worker}" / "log").read_text()
    assert tpu(cloud, "collect", "ants", "v4-16", "gs://bucket/run", cloud / "logs")[0] == 0
    assert lines(cloud / "calls", "storage cp") == [
        f"storage cp --recursive gs://bucket/run {cloud}/logs"
    ]

    code, _, err = tpu(cloud, "down", "ants", "v4-16")  # no terminal to ask at
    assert (code, "--yes" in err, lines(cloud / "calls", " delete ")) == (1, True, [])
    assert tpu(cloud, "down", "ants", "v4-16", "--yes")[0] == 0
    assert lines(cloud / "calls", " delete ") == [
        "compute tpus queued-resources delete ants --zone=us-central2-b --force --quiet"
    ]
    assert "MISSING" in tpu(cloud, "status", "ants", "v4-16")[1]


def test_instance_group_from_run_to_down(cloud):
    (cloud / "program").write_text("[ $worker$start != ants-a1-01 ] || exit 75")
    code, out, err = tpu(cloud, "run", "ants", "tpu7x-16", "--", *RUN)
    assert code == 0, err
    assert "<--processes><2><--process><0><--coordinator><ants-a0:8476> port \n" in out
    log = (cloud / "vm" / "ants-a1-0" / "jaxft-run" / "log").read_text()
    assert "<--processes><2><--process><1><--coordinator><ants-a0:8476> port \n" in log
    created = lines(cloud / "calls", " create ")
    assert [line.split(" create ")[0] for line in created] == 2 * [
        "compute resource-policies",
        "compute instance-templates",
        "compute instance-groups managed",
    ]
    assert "--type=HIGH_THROUGHPUT --accelerator-topology=2x2x2" in created[0]
    assert "--machine-type=tpu7x-standard-4t" in created[1]
    assert "--provisioning-model=SPOT" in created[1]
    assert "--size=2 --default-action-on-vm-failure=do-nothing --workload-policy=projects/ours/regi"
    assert "projects/ours/regions/us-central2/resourcePolicies/ants-tpu7x-16" in created[2]
    assert tpu(cloud, "down", "ants", "tpu7x-16", "--yes")[0] == 0
    assert len(lines(cloud / "calls", " delete ")) == 6  # also between the two runs


def test_run_on_two_slices_starts_all_nodes(cloud):
    assert tpu(cloud, "run", "ants", "2xv5e-8", "--", *RUN)[0] == 0
    assert sorted(lines(cloud / "starts")) == ["ants-0-0", "ants-1-0"]
    assert lines(cloud / "calls", " create ", "--node-count=2 --node-prefix=ants", "v5litepod-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    "first_start",
    [
        "exit 75",
        "echo SUSPENDED > $CLOUD/state; exit 143",
        "echo PREEMPTED > $CLOUD/node_state; exit 137",
        "rm -f $CLOUD/state; exit 1",
        "rm -rf $CLOUD/state ~/jaxft-run; kill -9 $PPID",  # no exit code is left
    ],
)
def test_run_continues_on_a_new_slice_after_preemption(first_start, cloud):
    (cloud / "program").write_text(f"[ $start != 1 ] || {{ {first_start}; }}")
    code, _, err = tpu(cloud, "run", "ants", "v4-8", "--", *RUN)
    assert (code, "Retry 1 of 30 on a new slice" in err) == (0, True), err
    assert lines(cloud / "starts") == ["ants-0"] * 2
    assert len(lines(cloud / "calls", " create ")) == 2
    assert len(lines(cloud / "calls", " scp ")) == 2  # a new slice is empty


def test_run_retries_a_failed_request(cloud):
    (cloud / "states").write_text("PROVISIONING\nFAILED\n")
    code, _, err = tpu(cloud, "run", "ants", "v4-8", "--", *RUN)
    assert (code, "ants is FAILED.\nRetry 1 of 30" in err) == (0, True), err
    assert lines(cloud / "starts") == ["ants-0"]


def test_run_ends_after_the_last_retry(cloud):
    (cloud / "program").write_text("exit 75")
    code, _, err = tpu(cloud, "run", "ants", "v4-8", "--retries", "2", "--", *RUN)
    assert (code, "No more than 2 retries; the same command resumes the run." in err) == (75, True)
    assert lines(cloud / "starts") == ["ants-0"] * 3


def test_run_ends_with_the_code_and_log_of_the_worker_that_failed(cloud):
    (cloud / "program").write_text("[ $worker = ants-0 ] && exit 75; echo out of memory; exit 137")
    code, out, err = tpu(cloud, "run", "ants", "v4-16", "--", *RUN)
    assert (code, "out of memory" in out) == (137, False)
    assert "ants worker 1 ended with exit code 137; the last lines of its log:\n<-u>" in err
    assert "\nout of memory\n" in err
    assert len(lines(cloud / "calls", " create ")) == 1


BLOCKED = """
echo first
[ $worker = ants-0 ] && read < "$CLOUD/release"
echo second
"""


def test_run_joins_a_run_after_ctrl_c(cloud):
    os.mkfifo(cloud / "blocked")
    (cloud / "program").write_text(BLOCKED.replace("/release", "/blocked"))
    process = start(cloud, "run", "ants", "v4-16", "--", *RUN, start_new_session=True)
    assert [process.stdout.readline() for _ in range(3)][2] == "first\n"
    assert "ants worker 0: running\n    first" in tpu(cloud, "status", "ants", "v4-16")[1]
    other = tpu(cloud, "run", "ants", "v4-16", "--", *RUN, "--batch-size", "8")
    assert (other[0], "another run is going on there: configs/quickstart.py" in other[2]) == (
        1,
        True,
    )

    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, "the same command shows it" in err) == (130, True), err
    joined = start(cloud, "run", "ants", "v4-16", "--", *RUN)
    assert [joined.stdout.readline() for _ in range(3)][2] == "first\n"
    (cloud / "blocked").write_text("\n")
    out, err = joined.communicate(timeout=60)
    assert (joined.returncode, out, "The run is going on." in err) == (0, "second\n", True), err
    assert sorted(lines(cloud / "starts")) == ["ants-0", "ants-1"]


def test_two_launchers_start_one_run(cloud):
    os.mkfifo(cloud / "blocked")
    (cloud / "program").write_text(BLOCKED.replace("/release", "/blocked"))
    launchers = [start(cloud, "run", "ants", "v4-16", "--", *RUN) for _ in range(2)]
    for process in launchers:
        assert [process.stdout.readline() for _ in range(3)][2] == "first\n"
    (cloud / "blocked").write_text("\n")
    for process in launchers:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, "second\n"), err
    assert sorted(lines(cloud / "starts")) == ["ants-0", "ants-1"]


def test_run_connects_again(cloud):
    """The connection ends after the first line; with the second one the run goes on."""
    os.mkfifo(cloud / "release")
    (cloud / "drop").touch()
    (cloud / "program").write_text(BLOCKED)
    code, out, err = tpu(cloud, "run", "ants", "v4-16", "--", *RUN)
    assert (code, out.count("<scripts/finetune.py>"), out.count("first")) == (0, 1, 1), err
    assert out.endswith("first\nsecond\n")
    assert sorted(lines(cloud / "starts")) == ["ants-0", "ants-1"]


def test_run_installs_only_what_changed(cloud):
    assert tpu(cloud, "run", "ants", "v4-8", "--", *RUN)[0] == 0
    (cloud / "vm" / "ants-0" / "jaxft-run" / "digest").write_text("older")
    (cloud / "no_network").touch()
    code, _, err = tpu(cloud, "run", "ants", "v4-8", "--", *RUN)
    assert (code, "the installation on ants worker 0 failed:\nno wheel for libtpu" in err) == (
        1,
        True,
    )
    (cloud / "no_network").unlink()
    assert tpu(cloud, "run", "ants", "v4-8", "--", *RUN)[0] == 0
    assert len(lines(cloud / "calls", " scp ")) == 3
    assert tpu(cloud, "run", "ants", "v4-8", "--", *RUN)[0] == 0
    assert len(lines(cloud / "calls", " scp ")) == 3


@pytest.mark.parametrize(
    ("accelerator", "options", "expected"),
    [
        ("v4-32", (), ["queued-resources create ants", "--accelerator-type=v4-32", "--worker=3"]),
        ("v5e-8", (), ["--accelerator-type=v5litepod-8", "--spot", "JAX_COORDINATOR_PORT=8476"]),
        ("v5p-8", ("--on-demand",), ["--accelerator-type=v5p-8 --runtime-version=v2-alpha-tpuv5"]),
        ("2xv6e-16", (), ["--node-count=2", "ssh ants-1 ", "--worker=3"]),
        ("v6e-8", ("--compute-engine",), ["ct6e-standard-8t", "compute ssh ants-vm00 "]),
        ("tpu7x-8", (), ["tpu7x-standard-4t", "ubuntu-accel-2404-amd64-tpu-tpu7x"]),
        ("tpu7x-32", (), ["--accelerator-topology=2x2x4", "--size=4", "--coordinator ants-vm00:"]),
    ],
)
def test_dry_run_prints_all_commands_and_executes_none(accelerator, options, expected, cloud):
    printed = ""
    for command, *arguments in (
        ("run", "--", *RUN),
        ("status",),
        ("collect", "jaxft-run/log", cloud / "logs"),
        ("down",),
    ):
        all_options = (*options, "--dry-run", *arguments)
        code, out, err = tpu(cloud, command, "ants", accelerator, *all_options)
        assert code == 0, err
        printed += out
    for text in (*expected, "tail -c +1", "delete ants", "uv pip install"):
        assert text in printed, text
    assert shlex.split(printed).count("gcloud") == printed.count("gcloud compute")
    assert ("--spot" in printed or "SPOT" in printed) == ("--on-demand" not in options)
    assert not lines(cloud / "calls")
    assert not (cloud / "logs").exists()


@pytest.mark.parametrize(
    ("command", "name", "accelerator", "arguments", "expected"),
    [
        ("up", "Ants", "v5e-8", (), "NAME is 'Ants'"),
        ("up", "ants-", "v5e-8", (), "NAME is 'ants-'"),
        ("up", "ants", "h100-8", (), "The chips are v4, v5e, v5p, v6e, tpu7x."),
        ("up", "ants", "8", (), "The chips are"),
        ("up", "ants", "v4-9", (), "the sizes are v4-8, v4-16"),
        ("up", "ants", "0xv4-8", (), "The chips are"),
        ("up", "ants", "v5e-8", ("--compute-engine",), "Compute Engine has no v5e"),
        ("up", "ants", "2xtpu7x-8", (), "one slice only"),
        ("up", "ants", "v5e-8", ("--zone", "us"), "--zone is 'us'"),
        ("up", "ants", "v5e-8", ("--poll-seconds", "-1"), "'-1' is no number from 0 on"),
        ("run", "ants", "v5e-8", (), "run needs `-- CONFIG --workdir gs://BUCKET/RUN`"),
        ("run", "ants", "v5e-8", ("--", *RUN[:1]), "run needs --workdir gs://BUCKET/RUN"),
        ("run", "ants", "v5e-8", ("--", *RUN[:2], "runs"), "run needs --workdir gs://BUCKET/RUN"),
        ("run", "ants", "v5e-8", ("--", "nowhere.py", *RUN[1:]), "there is no recipe 'nowhere.py'"),
        ("run", "ants", "v5e-8", ("--", sys.executable, *RUN[1:]), "is not copied to the workers"),
    ],
)
def test_wrong_arguments_are_errors_before_gcloud_runs(
    command, name, accelerator, arguments, expected, cloud
):
    code, _, err = tpu(cloud, command, name, accelerator, *arguments)
    assert (code, expected in err, lines(cloud / "calls")) == (2, True, []), err


def test_all_problems_are_printed_at_once(cloud):
    code, _, err = tpu(cloud, "run", "A", "v4-9", "--zone", "us", "--", "nowhere.py")
    assert (code, len(err.splitlines())) == (2, 5), err


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("account", "gcloud is not logged in; run `gcloud auth login`."),
        ("project", "gcloud has no project; run `gcloud config set project PROJECT`."),
    ],
)
def test_gcloud_must_be_configured(file, expected, cloud):
    (cloud / file).write_text("")
    code, _, err = tpu(cloud, "up", "ants", "v5e-8")
    assert (code, err, lines(cloud / "calls", "compute")) == (2, f"{expected}\n", [])


def test_gcloud_must_be_installed(cloud):
    environment = {**os.environ, "PATH": str(cloud)}
    code, _, err = tpu(cloud, "up", "ants", "v5e-8", env=environment)
    assert (code, err) == (2, "gcloud is not installed; see https://cloud.google.com/sdk.\n")


def test_zone_is_required():
    command = [sys.executable, ROOT / "scripts" / "tpu.py", "up", "ants", "v5e-8"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, "required: --zone" in done.stderr) == (2, True)


def test_first_failure_of_create_is_not_retried(cloud):
    (cloud / "quota").write_text("Quota limit 'TPUV5sPodPerProject' has been exceeded.")
    code, _, err = tpu(cloud, "run", "ants", "v5e-8", "--", *RUN)
    assert (code, "create ants failed: ERROR" in err, "Quota limit" in err) == (1, 1, 1)
    assert len(lines(cloud / "calls", " create ")) == 1


def test_create_accepts_parts_that_exist(cloud):
    (cloud / "quota").write_text("The resource 'ants' already exists")
    (cloud / "size").write_text("1")
    (cloud / "state").write_text("TERMINATED\n")
    code, _, err = tpu(cloud, "up", "ants", "tpu7x-8")
    assert (code, "ants is MISSING" in err) == (1, True), err  # accepted, but nothing was created


def test_launcher_imports_no_package():
    done = subprocess.run(
        [sys.executable, "-E", "-S", ROOT / "scripts" / "tpu.py", "--help"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, "scripts/tpu.py collect NAME" in done.stdout) == (0, True), done.stderr


@pytest.mark.parametrize("name", [name for name in CHIPS if name.startswith("v")])  # no GPUs
def test_slices_are_those_of_the_plan_command(name):
    chip, planned = tpu_slices.CHIPS[name], CHIPS[name]
    assert (chip.cores, chip.shapes) == (planned.cores, planned.shapes)
    for chips in planned.shapes:
        accelerator = f"{name}-{chips * chip.cores}"
        options = {"compute_engine": False, "spot": True}
        found = tpu_slices.find_slice("ants", accelerator, "us-central2-b", **options)
        assert (found.chips, found.accelerator) == (chips, accelerator)
        assert found.size * found.chips_per_worker == chips
