#!/bin/sh
# Two agents of 64 environments each, in the terminal. Flags are passed on: benchmark/train_local.sh --seed 3
set -e
cd "$(dirname "$0")/.."
exec "${PYTHON:-.venv/bin/python}" ppo_multimodal_peginsert.py --config benchmark/configs/peginsert.yaml \
    --agents 2 --envs-per-agent 64 "$@"
