#!/bin/bash
# Rendered by: rlkd render configs/grpo-tiny.yaml --for docker
# The run in one container, and again the same command while it ends with 75 (interrupted, saved). Start it where the
# recipe's paths begin: that folder is /work in the container, and the runs are written there.
set -u
asked=
container=grpo-tiny-$$
trap 'asked=1; docker kill --signal=TERM "$container" >/dev/null 2>&1' TERM INT
attempt=0
while [ -z "$asked" ]; do
  docker run --rm --init --name "$container" \
    --stop-timeout=60 --shm-size=8g --cpus=4 --memory=16g \
    --user "$(id -u):$(id -g)" --env HOME=/tmp --env USER=rlkd --volume "$PWD:/work" --workdir /work \
    rlkd:cpu rlkd train configs/grpo-tiny.yaml preempt.grace_s=60 &
  run=$!
  while kill -0 "$run" 2>/dev/null; do
    if [ -z "$asked" ]; then wait "$run"; continue; fi
    docker kill --signal=TERM "$container" >/dev/null 2>&1  # again: there may have been no container yet
    sleep 1
  done
  wait "$run"
  code=$?
  if [ "$code" -ne 75 ] || [ -n "$asked" ]; then exit "$code"; fi
  attempt=$((attempt + 1))
  if [ "$attempt" -gt 20 ]; then
    echo "rlkd: interrupted 20 times; the last checkpoint stands" >&2
    exit 75
  fi
  echo "rlkd: interrupted and saved (exit 75); the same command again ($attempt of 20)" >&2
done
exit 75
