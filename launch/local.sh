#!/usr/bin/env bash
# Trains on the devices of this machine. Edit the three lines, or set them: RECORDS=out/records launch/local.sh
set -euo pipefail
: "${CONFIG:=configs/toons.py}"
: "${RECORDS:=out/records}"
: "${WORKDIR:=out/run}"

exec python -m anisora_jax.train --config "$CONFIG" --config.data.records="$RECORDS" --workdir "$WORKDIR" "$@"
