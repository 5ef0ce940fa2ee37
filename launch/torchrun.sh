#!/usr/bin/env bash
# One host, torchrun: one rank per GPU, or per two cores where there is none.
#
#   launch/torchrun.sh script.py [arguments of the script]
#   RANKS=4 launch/torchrun.sh script.py
#
# --standalone lets torchrun choose a free port, so that two jobs on one host do not meet each other.
set -euo pipefail

(($#)) || {
    echo "usage: $0 script.py [arguments of the script]" >&2
    exit 2
}

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
cores=$(getconf _NPROCESSORS_ONLN)
if ((gpus > 0)); then default=$gpus; else default=$(((cores + 1) / 2)); fi
ranks=${RANKS:-$default}
[[ $ranks =~ ^[1-9][0-9]*$ ]] || {
    echo "$0: RANKS=$ranks must be a number of ranks, 1 or more" >&2
    exit 2
}

# Ranks share the cores; torchrun alone would give each rank one thread.
threads=$((cores / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

exec torchrun --standalone --nproc-per-node "$ranks" "$@"
