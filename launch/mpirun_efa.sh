#!/usr/bin/env bash
# GPU hosts with EFA, Open MPI: one rank per GPU; NCCL between hosts goes over libfabric.
#
#   HOSTFILE=hosts.txt launch/mpirun_efa.sh script.py [arguments of the script]
#
#   HOSTFILE     lines like: 10.0.0.5 slots=8      (slots: GPUs of that host)
#   RANKS        ranks in all (all slots)
#   PER_HOST     ranks per host (8)
#
# libfabric and aws-ofi-nccl must be on every host, LD_LIBRARY_PATH included: /opt/amazon/efa/lib and
# /opt/amazon/ofi-nccl/lib, where the EFA installer puts them. Look before the first long job:
#   HOSTFILE=hosts.txt launch/mpirun_efa.sh -m distlib doctor         says NET/OFI in the line "fabric"
set -euo pipefail

: "${HOSTFILE:?set HOSTFILE to a file with lines like: 10.0.0.5 slots=8}"
(($#)) || {
    echo "usage: HOSTFILE=hosts.txt $0 script.py [arguments]" >&2
    exit 2
}

# Old recipes for EFA export these. With libfabric >= 1.18 and aws-ofi-nccl >= 1.7 they cost speed or choose a wrong
# provider, so they are neither kept here nor handed on.
obsolete=(FI_EFA_USE_DEVICE_RDMA FI_EFA_FORK_SAFE FI_EFA_ENABLE_SHM_TRANSFER)
[[ ${FI_PROVIDER:-} != efa ]] || obsolete+=(FI_PROVIDER)
[[ ${NCCL_PROTO:-} != [sS]imple ]] || obsolete+=(NCCL_PROTO)
for name in "${obsolete[@]}" "${!RDMAV_@}"; do
    if [[ -n ${!name:-} ]]; then
        echo "mpirun_efa.sh: unset $name=${!name}: obsolete, see docs/launching.md" >&2
        unset "$name"
    fi
done

for name in RANKS PER_HOST; do
    [[ ${!name:-1} =~ ^[1-9][0-9]*$ ]] || {
        echo "$0: $name=${!name} must be a number of ranks, 1 or more" >&2
        exit 2
    }
done

options=(--hostfile "$HOSTFILE" --map-by "ppr:${PER_HOST:-8}:node" --bind-to none)
if [[ -n ${RANKS:-} ]]; then options+=(-np "$RANKS"); fi
if [[ $(id -u) == 0 ]]; then options+=(--allow-run-as-root); fi # in containers

# MPI only helps the ranks to find each other: TCP does, and leaves EFA to NCCL.
options+=(--mca pml ob1 --mca btl "self,sm,tcp")

# What ranks on other hosts need. FI_EFA_USE_HUGE_PAGE=0 is for "Cannot allocate memory" in fork(); NCCL_SOCKET_IFNAME
# for hosts with several networks (NCCL's first contact goes by TCP).
for name in PATH LD_LIBRARY_PATH VIRTUAL_ENV OMP_NUM_THREADS DISTLIB_MASTER_ADDR \
    NCCL_DEBUG NCCL_DEBUG_SUBSYS NCCL_NET_PLUGIN NCCL_SOCKET_IFNAME FI_EFA_USE_HUGE_PAGE; do
    if [[ -n ${!name:-} ]]; then options+=(-x "$name"); fi
done

exec mpirun "${options[@]}" python "$@"
