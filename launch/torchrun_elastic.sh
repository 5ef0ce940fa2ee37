#!/usr/bin/env bash
# Several hosts that may come and go, torchrun: run the same command on every host, in any order, also later.
#
#   HOSTS=2:4 FIRST_HOST=10.0.0.5 CHECKPOINT=/shared/job launch/torchrun_elastic.sh script.py --save /shared/job
#
#   HOSTS        the fewest and the most hosts that may take part, MIN:MAX
#   FIRST_HOST   as in torchrun_hosts.sh; if this host goes away, the job ends
#   CHECKPOINT   the checkpoint that the script saves, on a file system that all hosts see
#   RESTARTS     how often the ranks may be started again before the job fails (3)
#   PORT JOB RANKS   as in torchrun_hosts.sh
#
# When a rank fails, or a host comes or goes, torchrun ends all ranks and starts new ones, as many as there is room
# for now. They know nothing but the checkpoint, which distlib loads on any number of ranks. So save often.
set -euo pipefail

: "${HOSTS:?set HOSTS to MIN:MAX, the fewest and the most hosts}"
: "${FIRST_HOST:?set FIRST_HOST to an address of the first host}"
: "${CHECKPOINT:?set CHECKPOINT to the folder where the script saves}"
(($#)) || {
    echo "usage: HOSTS=2:4 FIRST_HOST=10.0.0.5 CHECKPOINT=/shared/job $0 script.py [arguments of the script]" >&2
    exit 2
}
[[ $HOSTS =~ ^[1-9][0-9]*:[1-9][0-9]*$ ]] || {
    echo "$0: HOSTS=$HOSTS must be MIN:MAX, such as 2:4" >&2
    exit 2
}
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
ranks=${RANKS:-$((gpus > 0 ? gpus : 1))}
[[ $ranks =~ ^[1-9][0-9]*$ ]] || {
    echo "$0: RANKS=$ranks must be a number of ranks, 1 or more" >&2
    exit 2
}
here=$(cd "$(dirname "$0")" && pwd)

exec torchrun \
    --nnodes "$HOSTS" \
    --nproc-per-node "$ranks" \
    --max-restarts "${RESTARTS:-3}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$FIRST_HOST:${PORT:-29400}" \
    --rdzv-id "${JOB:-distlib}" \
    --no-python "$here/resume.sh" "$CHECKPOINT" "$@"
