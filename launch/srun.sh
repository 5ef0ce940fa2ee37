#!/usr/bin/env bash
# Slurm, at once: one rank per task. From a login node, or inside an allocation made by salloc.
#
#   launch/srun.sh --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 -- script.py [arguments of the script]
#
# What stands before -- goes to srun. Address and port come from Slurm's variables; to choose them yourself:
#   export MASTER_ADDR=node7-ib MASTER_PORT=29500
set -euo pipefail

options=()
while (($#)) && [[ $1 != -- ]]; do
    options+=("$1")
    shift
done
if (($# < 2)); then
    echo "usage: $0 [options of srun] -- script.py [arguments]" >&2
    exit 2
fi
shift

# --kill-on-bad-exit: when a rank fails, the others end too instead of waiting for it.
exec srun --kill-on-bad-exit=1 "${options[@]}" python "$@"
