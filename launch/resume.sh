#!/usr/bin/env bash
# Runs a script, and lets it go on from its last checkpoint if there is one. For launchers that start a job again:
#
#   launch/resume.sh runs/job script.py --save runs/job [other arguments of the script]
#
# The script must take --resume FOLDER. A checkpoint of distlib.save() is whole or not there: it is exchanged with the
# old one in one step, so that a job killed while it saved finds the one before.
set -euo pipefail

if (($# < 2)); then
    echo "usage: $0 CHECKPOINT script.py [arguments]" >&2
    exit 2
fi
checkpoint=$1
shift

if [[ -e $checkpoint/manifest.json ]]; then
    echo "resume.sh: going on from $checkpoint" >&2
    exec python "$@" --resume "$checkpoint"
fi
exec python "$@"
