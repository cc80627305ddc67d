#!/bin/sh
# Eight agents of 256 environments each, one group of runs on Weights & Biases. Run `wandb login` before, or set
# WANDB_MODE=offline. On a CPU as many agents as there are cores train at once. Flags are passed on.
set -e
cd "$(dirname "$0")/.."
exec "${PYTHON:-.venv/bin/python}" ppo_multimodal_peginsert.py --config benchmark/configs/peginsert.yaml \
    --agents 8 --envs-per-agent 256 --use-wandb "$@"
