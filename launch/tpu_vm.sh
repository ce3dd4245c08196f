#!/usr/bin/env bash
# Trains on all workers of a TPU VM: launch/tpu_vm.sh, from the top of the repository. Edit the three lines, or set
# them. It sends this working tree, installs it, starts a process on each worker, and shows worker 0's log; Ctrl-C stops
# only the showing. The same command again follows a run that lives, and goes on with one that was stopped or preempted,
# also on a new TPU VM of the name. launch/tpu_vm.sh stop: saves and stops. Logs: anisora/train.log in each worker's
# home. 8, 16, 32 to 256 chips will do: each clip of the recipes' batches of 8 is shared by an eighth of them.
set -euo pipefail
: "${TPU:=anisora}" "${ZONE:=us-east5-a}"
: "${SHARE:=10.0.0.2:/share}"  # NFS (Filestore), mounted at /mnt/anisora: holds latents/ and weights, gets run/
: "${CONFIG:=configs/wan21_i2v_14b.py}" "${PRETRAINED=/mnt/anisora/Wan2.1-I2V-14B-480P}"  # PRETRAINED= starts anew

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

words=(--config "$CONFIG" --config.pretrained="$PRETRAINED" --config.data.records=/mnt/anisora/latents
  --config.model.kernel=splash --config.mesh.fsdp=8 --config.mesh.seq=-1 --workdir /mnt/anisora/run "$@")
remote all "set -eu
mkdir -p anisora && cd anisora
if [ -e train.pid ] && kill -0 \"\$(cat train.pid)\" 2>/dev/null; then exit; fi
sudo mkdir -p /mnt/anisora
mountpoint -q /mnt/anisora || sudo mount -t nfs $(printf %q "$SHARE") /mnt/anisora
tar -xzf ../anisora.tar.gz
able='import ensurepip, sys; sys.exit(sys.version_info < (3, 11))'
python=\$(for p in python3.12 python3.11 python3; do \$p -c \"\$able\" 2>/dev/null && echo \$p && break; done) || {
  sudo apt-get update -q && sudo apt-get install -qy python3.11-venv && python=python3.11  # images bring 3.10
}
.venv/bin/python -m pip --version >/dev/null 2>&1 || \$python -m venv .venv
.venv/bin/python -m pip install --quiet --editable '.[tpu]'
nohup .venv/bin/python -u -m anisora_jax.train $(printf '%q ' "${words[@]}")>>train.log 2>&1 </dev/null &
echo \$! >train.pid"
# shellcheck disable=SC2016  # the worker expands it
remote 0 'tail -n 40 --follow --pid="$(cat anisora/train.pid)" anisora/train.log'
