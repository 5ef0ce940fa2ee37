#!/usr/bin/env bash
# Slurm, queued: copy this file, set the lines below, then `sbatch sbatch.sh script.py [arguments of the script]`.
#SBATCH --job-name=distlib
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail

# source /path/to/venv/bin/activate
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK

# srun makes the ranks: a script that sbatch starts without it is a world of one.
# srun does not inherit --cpus-per-task from sbatch since Slurm 22.05.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" python "$@"
