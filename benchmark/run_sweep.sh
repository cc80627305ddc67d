#!/bin/sh
# Searches hyperparameters, benchmark/configs/sweep_peginsert.yaml:
#   benchmark/run_sweep.sh wandb                 # Weights & Biases: Bayesian, Hyperband; needs `wandb login`
#   benchmark/run_sweep.sh optuna --trials 50    # offline: Optuna's TPE and Hyperband pruner, in a SQLite file
#   benchmark/run_sweep.sh optuna --storage postgresql://user@host/sweeps    # on several machines: one study
# Flags that sweep.py does not know go to every training.
set -e
cd "$(dirname "$0")/.."
exec "${PYTHON:-.venv/bin/python}" benchmark/sweep.py "$@"
