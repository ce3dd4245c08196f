#!/usr/bin/env bash
# Trains on all workers of a TPU VM: launch/tpu_vm.sh, from this folder. Edit the three lines, or set them. It sends this
# working tree, installs it, starts a process on each worker, and shows worker 0's log; Ctrl-C stops only the showing.
# The same command again follows a run that lives, and goes on with one that was stopped or preempted, also on a new TPU
# VM of the name. launch/tpu_vm.sh stop: saves and stops. Logs: anisora/train.log in each worker's home.
set -euo pipefail
: "${TPU:=anisora}" "${ZONE:=us-east5-a}"
: "${SHARE:=10.0.0.2:/share}"  # NFS (Filestore): holds records/, gets run/, and is mounted at /mnt/anisora
: "${CONFIG:=configs/wan21_i2v_14b.py}"

remote() {  # a command on workers: all, or 0
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker="$1" --command="$2"
}

if [ "${1:-}" = stop ]; then
  # shellcheck disable=SC2016  # the worker expands it
  remote all 'kill -TERM "$(cat anisora/train.pid)"'
  exit
fi

tree=$(mktemp)
trap 'rm -f "$tree"' EXIT
git ls-files -z --cached --others --exclude-standard | tar --null --files-from=- --create --gzip --file="$tree"
gcloud compute tpus tpu-vm scp "$tree" "$TPU:anisora.tar.gz" --zone="$ZONE" --worker=all

words=(--config "$CONFIG" --config.model.kernel=splash --config.data.records=/mnt/anisora/records
  --workdir /mnt/anisora/run "$@")
remote all "set -eu
mkdir -p anisora && cd anisora
if [ -e train.pid ] && kill -0 \"\$(cat train.pid)\" 2>/dev/null; then exit; fi
sudo mkdir -p /mnt/anisora
mountpoint -q /mnt/anisora || sudo mount -t nfs $(printf %q "$SHARE") /mnt/anisora
tar -xzf ../anisora.tar.gz
test -x .venv/bin/python || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --editable '.[tpu]'
nohup .venv/bin/python -u -m anisora_jax.train $(printf '%q ' "${words[@]}")>>train.log 2>&1 </dev/null &
echo \$! >train.pid"
# shellcheck disable=SC2016  # the worker expands it
remote 0 'tail -n 40 --follow --pid="$(cat anisora/train.pid)" anisora/train.log'
