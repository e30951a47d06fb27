#!/bin/sh
# One attempt of a run as a Ray Job, with Ray's own command line alone: the line of launch/README.md.
#
#   launch/submit.sh ADDRESS NAME NUMBER RECIPE [KEY=VALUE …]
#
# GRACE   seconds between a stop and the kill: what a save needs (`rlkd plan RECIPE` says it); 180 if not set
# RUNS    where runs are kept, a folder that every node has; ./runs if not set
set -eu
if [ $# -lt 4 ]; then
  sed -n '2,7p' "$0" >&2
  exit 2
fi
address=$1 name=$2 number=$3 recipe=$4
shift 4
exec ray job submit --address "$address" --submission-id "$name-$number" --working-dir . \
  --runtime-env-json "{\"env_vars\": {\"RAY_JOB_STOP_WAIT_TIME_S\": \"${GRACE:-180}\"},
    \"excludes\": [\"/runs\", \".git\", \"/models\", \".venv\", \"*.safetensors\", \"*.gguf\"]}" \
  -- python -m rlkd train "$recipe" "$@" "name=$name" "report.directory=${RUNS:-$PWD/runs}"
