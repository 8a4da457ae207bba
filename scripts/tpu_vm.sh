#!/usr/bin/env bash
# Runs jaxft on all workers of a Cloud TPU VM; jax joins the processes by itself.
set -euo pipefail

usage() {
    cat <<'TEXT'
Sets up a TPU VM, runs a recipe on all its workers, and copies the results.

    scripts/tpu_vm.sh setup   NAME ZONE
    scripts/tpu_vm.sh run     NAME ZONE CONFIG --workdir gs://BUCKET/RUN [options of finetune.py]
    scripts/tpu_vm.sh collect NAME ZONE REMOTE LOCAL

setup    Copies this checkout to ~/jaxft on each worker and installs it with the extras tpu and gcs.
         Repeat it after a change.
run      Starts scripts/finetune.py on each worker and shows the log of the first one until it ends.
         The run survives a lost connection: the same command shows its log again. After the run has
         ended or been preempted, the same command resumes it from its last checkpoint.
collect  Copies a gs:// folder, or REMOTE of each worker (log: jaxft.log), to LOCAL.

Needs gcloud, logged in, with a project set.
TEXT
}

fail() {
    echo "tpu_vm.sh: $1" >&2
    exit 2
}

log() { echo "+ $*" >&2; }

# Runs a command on one worker, or on all.
on_worker() {
    local worker=$1 command=$2
    log "worker $worker: $command"
    gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="$worker" --command="$command"
}

setup() {
    local root
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    archive=$(mktemp -d) # not local: the trap outlives the function
    trap 'rm -rf "$archive"' EXIT
    # Tracked files with their local changes; no runs, no environments.
    (cd "$root" && git ls-files -z | tar czf "$archive/jaxft.tgz" --null -T -)
    log "copies $root to all workers"
    gcloud compute tpus tpu-vm scp "$archive/jaxft.tgz" "$name:jaxft.tgz" \
        --zone="$zone" --worker=all
    on_worker all "$(
        cat <<'REMOTE'
set -e
rm -rf ~/jaxft && mkdir ~/jaxft && tar xzf ~/jaxft.tgz -C ~/jaxft
export PATH=~/.local/bin:$PATH
command -v uv > /dev/null || python3 -m pip install --quiet --user uv # brings a newer Python
uv venv --quiet --allow-existing --python '>=3.11' ~/jaxft-venv
uv pip install --quiet --python ~/jaxft-venv/bin/python -e ~/jaxft'[tpu,gcs]'
REMOTE
    )"
}

run() {
    local arguments
    [[ " $* " == *" --workdir gs://"* || " $* " == *" --workdir=gs://"* ]] ||
        fail "run needs --workdir gs://BUCKET/RUN, which all workers can reach."
    [[ $1 == /* || -f $(dirname "${BASH_SOURCE[0]}")/../$1 ]] ||
        fail "there is no $1 in this checkout; setup copies only the checkout."
    arguments=$(printf ' %q' "$@")
    # setsid keeps the run alive without the connection; each worker runs one at a time.
    on_worker all "$(
        cat <<REMOTE
cd ~/jaxft
if [ -f ~/jaxft.pid ] && kill -0 "\$(cat ~/jaxft.pid)" 2> /dev/null; then
    echo "already running"
else
    rm -f ~/jaxft.status
    setsid nohup bash -c '~/jaxft-venv/bin/python -u scripts/finetune.py "\$@"; echo \$? > ~/jaxft.status' \\
        jaxft$arguments > ~/jaxft.log 2>&1 < /dev/null &
    echo \$! > ~/jaxft.pid
fi
REMOTE
    )"
    # tail ends with the run; return the run's exit status, 75 if it was preempted.
    on_worker 0 'tail -n +1 -F --pid="$(cat ~/jaxft.pid)" ~/jaxft.log; exit "$(cat ~/jaxft.status)"'
}

collect() {
    local remote=$1 local=$2 count
    mkdir -p "$local"
    if [[ $remote == gs://* ]]; then
        log "copies $remote to $local"
        gcloud storage cp --recursive "$remote" "$local"
        return
    fi
    count=$(gcloud compute tpus tpu-vm describe "$name" --zone="$zone" \
        --format='value(networkEndpoints.len())')
    for ((worker = 0; worker < count; worker++)); do
        mkdir -p "$local/worker$worker"
        log "copies $remote of worker $worker to $local/worker$worker"
        gcloud compute tpus tpu-vm scp --recurse "$name:$remote" "$local/worker$worker" \
            --zone="$zone" --worker="$worker"
    done
}

case ${1:-} in
    setup) least=3 most=3 ;;
    run) least=4 most=1000 ;;
    collect) least=5 most=5 ;;
    -h | --help)
        usage
        exit
        ;;
    *)
        usage >&2
        exit 2
        ;;
esac
(($# >= least && $# <= most)) || fail "wrong arguments for $1; --help shows them."
command -v gcloud > /dev/null || fail "gcloud is not installed: https://cloud.google.com/sdk."
command=$1 name=$2 zone=$3
shift 3
"$command" "$@"
