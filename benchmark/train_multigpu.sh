#!/bin/sh
# One policy on 8 GPUs, 512 environments on each, gradients averaged. It needs a machine with 8 CUDA GPUs and a torch
# with CUDA; what fits into their memory: benchmark/peg_capacity.py. GPUS=2 takes two of them, and --num-envs counts
# those of all. Several machines: in place of --standalone what torchrun's documentation says. Flags are passed on.
set -e
cd "$(dirname "$0")/.."
GPUS="${GPUS:-8}"
exec "${PYTHON:-.venv/bin/python}" -m torch.distributed.run --standalone --nproc_per_node="$GPUS" \
    ppo_multimodal_peginsert.py --config benchmark/configs/peginsert.yaml --num-envs $((512 * GPUS)) "$@"
