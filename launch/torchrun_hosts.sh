#!/usr/bin/env bash
# Several hosts, torchrun: run the same command on every host, in any order.
#
#   HOSTS=4 FIRST_HOST=10.0.0.5 launch/torchrun_hosts.sh script.py [arguments of the script]
#
#   HOSTS        how many hosts take part
#   FIRST_HOST   an address of one of them that all others reach; torchrun serves the rendezvous there
#   PORT         a port that is free on FIRST_HOST and open between the hosts (29400)
#   JOB          the job's name; give two jobs at once two names and two ports
#   RANKS        ranks per host (the number of GPUs, or 1)
set -euo pipefail

: "${HOSTS:?set HOSTS to the number of hosts}"
: "${FIRST_HOST:?set FIRST_HOST to an address of the first host}"
(($#)) || {
    echo "usage: HOSTS=4 FIRST_HOST=10.0.0.5 $0 script.py [arguments of the script]" >&2
    exit 2
}
[[ $HOSTS =~ ^[1-9][0-9]*$ ]] || {
    echo "$0: HOSTS=$HOSTS must be a number of hosts, 1 or more (hosts that come and go: torchrun_elastic.sh)" >&2
    exit 2
}
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
ranks=${RANKS:-$((gpus > 0 ? gpus : 1))}
[[ $ranks =~ ^[1-9][0-9]*$ ]] || {
    echo "$0: RANKS=$ranks must be a number of ranks, 1 or more" >&2
    exit 2
}

# EFA: NCCL finds it if libfabric and aws-ofi-nccl are on LD_LIBRARY_PATH, and wants no other variable
# (docs/launching.md). --no-python distlib doctor in place of the script tells.
# Where hosts have several networks, name the one to use, for gloo (CPU) and NCCL (GPU):
#   export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0

exec torchrun \
    --nnodes "$HOSTS" \
    --nproc-per-node "$ranks" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$FIRST_HOST:${PORT:-29400}" \
    --rdzv-id "${JOB:-distlib}" \
    "$@"
