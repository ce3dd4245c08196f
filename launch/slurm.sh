#!/usr/bin/env bash
# Trains on the nodes of a SLURM job, one process each: sbatch launch/slurm.sh, from the top of the repository. Edit the
# machines and the three lines, or set them: RECORDS=/share/latents sbatch --nodes=4 launch/slurm.sh. 8, 16, 32 to
# 256 devices will do, also when a run goes on: each clip of the recipes' batches of 8 is shared by an eighth of them.
# Logs: slurm-JOB.log, beside you. Ten minutes before its time is over, or when it is preempted, it saves, goes back
# into the queue, and goes on.
#SBATCH --job-name=anisora --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --exclusive --time=24:00:00
#SBATCH --requeue --signal=TERM@600 --open-mode=append --output=slurm-%j.log
set -euo pipefail
: "${CONFIG:=configs/wan21_i2v_14b.py}" "${PRETRAINED=/share/Wan2.1-I2V-14B-480P}"  # PRETRAINED= starts anew
: "${RECORDS:=/share/latents}"  # PRETRAINED, RECORDS and WORKDIR: on a file system that all nodes share
: "${WORKDIR:=/share/run}"

STOPPED=75
status=0
# One process that ends takes the others with it by itself, and has them save first: SLURM must not be faster.
srun --kill-on-bad-exit=0 python -u -m anisora_jax.train --config "$CONFIG" --config.pretrained="$PRETRAINED" \
  --config.data.records="$RECORDS" --config.mesh.fsdp=8 --config.mesh.seq=-1 --workdir "$WORKDIR" \
  --stopped_status=$STOPPED "$@" || status=$?
if [ "$status" -eq $STOPPED ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
