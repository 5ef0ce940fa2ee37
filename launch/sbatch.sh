#!/usr/bin/env bash
# Slurm, queued: copy this file, set the lines below, then `sbatch sbatch.sh script.py [arguments of the script]`.
#SBATCH --job-name=distlib
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
# Whole hosts: else a site's default memory per core is all that ranks get.
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
# The login node's ulimits would come along otherwise; EFA and InfiniBand need unlimited locked memory.
#SBATCH --propagate=NONE
# Preempted, or on a node that fails: queued again. One log for all tries. A minute before the time is up, this script
# gets USR1.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@60
set -euo pipefail

(($#)) || {
    echo "usage: sbatch sbatch.sh script.py [arguments of the script]" >&2
    exit 2
}

# source /path/to/venv/bin/activate
# On EFA hosts, unless the system finds them already (srun hands on what is exported; set no FI_ or RDMAV_ variable):
# export LD_LIBRARY_PATH=/opt/amazon/ofi-nccl/lib:/opt/amazon/efa/lib
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK

# To go on from the last checkpoint, here and after each requeue:   export CHECKPOINT=/shared/job, and let the script
# save there. (--gpus-per-node, not --gpus-per-task: ranks of a node must see each other's GPUs.)
command=(python "$@")
if [[ -n ${CHECKPOINT:-} ]]; then
    command=("${LAUNCH:-$SLURM_SUBMIT_DIR/launch}/resume.sh" "$CHECKPOINT" "$@")
fi

interrupted=0
# shellcheck disable=SC2329  # the trap calls it
again() {
    interrupted=1
    if [[ -n ${CHECKPOINT:-} ]]; then
        echo "sbatch.sh: time is up, queued again; $CHECKPOINT is where it will go on" >&2
        scontrol requeue "$SLURM_JOB_ID" || echo "sbatch.sh: it cannot be queued again, see above" >&2
    fi
}
trap again USR1

# srun makes the ranks: a script that sbatch starts without it is a world of one.
# srun does not inherit --cpus-per-task from sbatch since Slurm 22.05.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" "${command[@]}" &
ranks=$!

# A signal interrupts wait, not the ranks: then wait again.
while
    status=0
    wait "$ranks" || status=$?
    ((interrupted && status > 128))
do
    interrupted=0
done
exit "$status"
