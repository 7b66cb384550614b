#!/usr/bin/env bash
# What loratune does on its first GPU, on a machine without a network. With a network, in a checkout:
#
#     scripts/gpu.sh pack [DIR]                 # makes gpu-parcels/, parcels of wheels of at most 60 MiB each
#
# On the machine, with the checkout and the parcels:
#
#     scripts/gpu.sh run [--out DIR] [PART ...] # installs from the parcels, runs the parts, appends to DIR/results.jsonl
#     scripts/gpu.sh run --dry [PART ...]       # the same on a CPU, with tiny models and few steps
#     scripts/gpu.sh run --help                 # what parts there are
#
# PYTHON (default: python3) is the interpreter that has torch; nothing is installed into its environment.
set -euo pipefail
case "${1:-}" in
    pack | run) ;;
    *) sed -n '2,/^set /{/^#/p}' "$0" >&2; exit 2 ;;
esac
command=$1
shift
scripts=$(cd "$(dirname "$0")" && pwd)
# Without PYTHONSAFEPATH, the working directory would come before what is installed.
PYTHONSAFEPATH=1 PYTHONPATH=$scripts${PYTHONPATH:+:$PYTHONPATH} exec "${PYTHON:-python3}" -m "first_gpu.$command" "$@"
