#!/bin/sh
# Every figure that the README and docs quote comes from one of these lines, run on an otherwise idle machine: another
# busy process costs more than its share, as both sides of a comparison wait for their slower thread.
# Minutes are for two cores. Results go to benchmark/results/, training runs to runs/benchmark/.
set -e
cd "$(dirname "$0")/.."
PY="${PYTHON:-.venv/bin/python}"

$PY benchmark/go2_env_speed.py                                       # 12 min
$PY benchmark/go2_time_to_walk.py --seeds 1 2 3                      # 44 min: 3 trainings, 180 evaluations
# One discount, one desired KL and a free standard deviation on both sides.
$PY benchmark/go2_vs_rsl_rl.py --seeds 1 2 3 --final-gamma 0.97 --final-kl 0.02 --final-std 0 --min-std 0.01 # 45 min
$PY benchmark/go2_reliability.py --kills 20 --minutes 10             # 20 min
$PY benchmark/isaac_reliability.py --kills 20                       # 4 min
$PY benchmark/go2_variants.py --seeds 1                              # 18 min
$PY benchmark/go2_reference.py --minutes 25 --evaluations 6          # 27 min
$PY benchmark/peg_env_speed.py                                       # 3 min
$PY benchmark/peg_insert.py --variants state --seeds 1               # 35 min of one core
$PY benchmark/peg_insert.py --variants all rgb tactile blind --levels 0.3 --difficulty 0.3 --num-iterations 80
$PY benchmark/peg_capacity.py                                        # 1 min: computed, no GPU
$PY benchmark/real2sim.py --algorithms sac --seeds 1 2 3 --per-object --eval-interval 50 --total-timesteps 487424
$PY benchmark/real2sim.py --algorithms sac_gamma_0.97 --seeds 1 2 --eval-interval 50 --total-timesteps 487424
$PY benchmark/pick_env_speed.py                                      # 4 min
$PY benchmark/real2sim.py --algorithms ppo ddpg --seeds 1
PPO_RUN=$(ls -d runs/benchmark/real2sim-*/ppo_1 | tail -1)
$PY benchmark/real2sim.py --algorithms ppo_scans --seeds 1 --per-object --model-path "$PPO_RUN"
$PY benchmark/real2sim.py --algorithms ppo_place --seeds 1 --model-path "$PPO_RUN"    # goes on from holding
PLACE_RUN=$(ls -d runs/benchmark/real2sim-*/ppo_place_1 | tail -1)
$PY benchmark/real2sim.py --algorithms ppo_place_on --seeds 1 --model-path "$PLACE_RUN"
$PY benchmark/real2sim.py --algorithms ddpg_gamma_0.9 --seeds 1 --eval-interval 50 --total-timesteps 487424
$PY benchmark/real2sim.py --algorithms ddpg_anneal --seeds 1 --eval-interval 50
$PY benchmark/real2sim_env_speed.py --engines mujoco
SAC_RUN=$(ls -d runs/benchmark/real2sim-*/sac_2 | tail -1)           # three scans, from a policy that knows the box
$PY benchmark/real2sim.py --algorithms sac_scans --seeds 1 --per-object --resume "$SAC_RUN" --learning-starts 50000 \
    --total-timesteps 675000
$PY benchmark/sac_gym.py --games Pendulum-v1 --seeds 1 2 3               # 10 min
$PY benchmark/aloha_env_speed.py                                     # 3 min, and the expert's 1,600 episodes
$PY benchmark/gr00t_memory.py                                        # 1 min: computed, no GPU
$PY benchmark/gr00t.py --seeds 1 2 3                                 # 3 seeds of two policies
$PY benchmark/gr00t.py --policies mlp --seeds 1 2 3
$PY benchmark/gr00t_mlp.py                                           # 6 min
$PY benchmark/aloha.py --preset long --seeds 1 --keep-policy
$PY benchmark/aloha.py --tasks AlohaInsertion-v0 --seeds 1 --name "1, then with shadows" --keep-policy --preset fast \
    --model-path benchmark/results/aloha_insertion.pt --bc-expert 0.3 --bc-minutes 8 --bc-learning-rate 1e-3 \
    --bc-frames 60000 --shadows --supersample 2 --mesh-detail 0.006 --num-iterations 10 --package-episodes 48
$PY benchmark/aloha.py --tasks AlohaInsertion-v0 --seeds 1 --demo-resets --episodes 64 --preset fast --obs-type state \
    --bc-coef 0 --critic-iterations 0 --episode-steps 60 --init-std 0.1 --num-steps 64 --num-minibatches 4 \
    --update-epochs 4 --desired-kl 0.03 --num-iterations 55
$PY benchmark/aloha_sb3.py ${SB3:+--sb3 "$SB3"}                       # 10 min
$PY benchmark/go2_transfer.py --seeds 7 --impratio 1                 # 18 min
# Peers that are no package, or not one that is installed here: CLEANRL is CleanRL's ppo_continuous_action.py, SB3 the
# folder of `pip install --no-deps --target FOLDER stable-baselines3==2.9.2 cloudpickle`. Without them they are left out.
$PY benchmark/isaac_small.py --seeds 1 2 3                           # 15 min
$PY benchmark/isaac_speed.py ${CLEANRL:+--cleanrl "$CLEANRL"} ${SB3:+--sb3 "$SB3"}                    # 60 min
[ -z "$CLEANRL" ] || $PY benchmark/real2sim.py --algorithms cleanrl --minutes 5.6 \
    --cleanrl "$(dirname "$CLEANRL")/sac_continuous_action.py"       # in a copy of CleanRL's repository, 7 min
$PY benchmark/gym_mujoco.py --seeds 1 2 3 --headline-seeds 1 2 3 4 5 ${CLEANRL:+--cleanrl "$CLEANRL"} # 4 h
if [ -n "$ISAAC_PYTHON" ]; then  # the Python of an environment with Isaac Lab 3.x, docs/isaac.md
    $ISAAC_PYTHON benchmark/isaac_kitless.py --seeds 1 2 3           # 10 min
    $ISAAC_PYTHON benchmark/isaac_kitless.py --env-id Isaac-Ant-Direct --iterations 64 --clip-actions 1 --seeds 1 --no-peer \
        --eval-interval 16                                           # 15 min
    $ISAAC_PYTHON benchmark/isaac_kitless.py --env-id Isaac-Humanoid-Direct --num-envs 256 --iterations 64 --clip-actions 1 \
        --seeds 1 --no-peer --eval-interval 16                       # 8 min
fi
if $PY -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    $PY benchmark/go2_gpu.py --seeds 1 2 3 --cuda-graphs             # 20 min on one GPU
fi
