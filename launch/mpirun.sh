#!/usr/bin/env bash
# One or several hosts, Open MPI: needs `pip install 'distlib-train[mpi]'`, which brings mpirun too.
#
#   RANKS=2 launch/mpirun.sh script.py                            two ranks on this host
#   RANKS=16 HOSTFILE=hosts.txt launch/mpirun.sh script.py        hosts.txt has lines like: 10.0.0.5 slots=8
#
# The ranks find each other through mpi4py; no address or port is needed. If the hosts have several networks, say
# which address of the first host the others reach: export DISTLIB_MASTER_ADDR=10.0.0.5
#
# MPICH and Intel MPI: mpiexec -n "$RANKS" -f "$HOSTFILE" python script.py
set -euo pipefail

: "${RANKS:?set RANKS to the number of ranks}"
(($#)) || {
    echo "usage: RANKS=2 $0 script.py [arguments of the script]" >&2
    exit 2
}
[[ $RANKS =~ ^[1-9][0-9]*$ ]] || {
    echo "$0: RANKS=$RANKS must be a number of ranks, 1 or more" >&2
    exit 2
}
options=(-np "$RANKS" --bind-to none) # threads of a rank may use any core; Open MPI would pin them to one
if [[ -n ${HOSTFILE:-} ]]; then
    options+=(--hostfile "$HOSTFILE")
elif [[ -z ${OMP_NUM_THREADS:-} ]]; then # ranks share this host's cores; torch alone would use all of them in each
    threads=$(($(getconf _NPROCESSORS_ONLN) / RANKS))
    export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi
if [[ $(id -u) == 0 ]]; then options+=(--allow-run-as-root); fi # in containers

# What the ranks on other hosts need from this environment.
for name in PATH LD_LIBRARY_PATH VIRTUAL_ENV OMP_NUM_THREADS DISTLIB_MASTER_ADDR; do
    if [[ -n ${!name:-} ]]; then options+=(-x "$name"); fi
done

exec mpirun "${options[@]}" python "$@"
