"""The peers of ppo_continuous_isaac.py on Gymnasium's MuJoCo tasks: CleanRL, Stable-Baselines3 and rsl_rl.

    python benchmark/isaac_peers.py sb3 --num-envs 8 --num-steps 256 --iterations 30 --warm-up 10 --log-dir runs/peer

Trains with one of them and leaves `summary.json`: environment steps per second after the warm-up. CleanRL's script is
no package: `cleanrl_script` makes a copy of a file of yours that runs on today's Gymnasium, and isaac_speed.py and
gym_mujoco.py start that copy.

All get ppo_continuous_action.py's settings: two networks of 64-64 tanh, Adam at 3e-4, gamma .99, lambda .95, 10 epochs
of 32 minibatches, both clippings at .2, value coefficient .5, gradient norm .5, observations normalised. What stays
different: rsl_rl has no reward normalisation, neither here has it; it clips the gradients of actor and critic apart,
and its environments are ours, as it brings none. Stable-Baselines3 and rsl_rl run without their TensorBoard writers.
"""

import argparse
import hashlib
import sys
import time
from pathlib import Path

import rsl_rl_peer
import torch

import ppo_continuous_isaac as ppo
from common import cli
from common.files import write_json

LEARNING_RATE, EPOCHS, MINIBATCHES, HIDDEN = 3e-4, 10, 32, (64, 64)
SB3 = "--no-deps stable-baselines3==2.9.2 cloudpickle"

# ppo_continuous_action.py is written for Gymnasium 0.29. What Gymnasium 1.x needs, and no more: (old, new, why).
CLEANRL_PATCHES = (
    (
        "lambda obs: np.clip(obs, -10, 10))",
        "lambda obs: np.clip(obs, -10, 10), env.observation_space)",
        "TransformObservation takes the new observation space",
    ),
    (
        "for i in range(args.num_envs)]\n    )",
        "for i in range(args.num_envs)],\n        autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,\n    )",
        "an environment is reset within the step that ends it, which was the rule before",
    ),
    (
        'for info in infos["final_info"]:',
        'ended = infos["final_info"]["episode"]\n'
        "                for info in [\n"
        '                    {"episode": {k: ended[k][i] for k in "rl"}} for i in np.flatnonzero(ended["_r"])\n'
        "                ]:",
        "final_info is a dict of arrays, no longer a list of dicts",
    ),
)


def cleanrl_script(path: Path, folder: Path, name="ppo_continuous_action.py", patches=CLEANRL_PATCHES):
    """(a copy of CleanRL's script `path`, which is its `name`, in `folder` with the patches, and what to say of it in a
    result file).
    """
    cli.check(path.is_file(), f"--cleanrl got {str(path)!r}; it takes the file cleanrl/{name}")
    source = path.read_text()
    about = {"sha256": hashlib.sha256(source.encode()).hexdigest(), "patches": [why for *_, why in patches]}
    for old, new, why in patches:
        cli.check(source.count(old) == 1, f"--cleanrl got {str(path)!r}, of another version: no place to patch: {why}")
        source = source.replace(old, new)
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / name
    copy.write_text(source)
    return copy, about


def train_sb3(args) -> float:
    """Steps per second of Stable-Baselines3's PPO."""
    sys.path[:0] = [args.sb3] if args.sb3 else []
    stable_baselines3 = cli.require("stable_baselines3", SB3)
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

    class Stopwatch(BaseCallback):
        """The times at which the rollouts began."""

        def _init_callback(self):
            self.times = []

        def _on_rollout_start(self):
            self.times.append(time.perf_counter())

        def _on_step(self):
            return True

    batch_size = args.num_envs * args.num_steps
    kind = SubprocVecEnv if args.subprocesses else DummyVecEnv
    envs = VecNormalize(make_vec_env(args.env_id, args.num_envs, args.seed, vec_env_cls=kind), gamma=0.99)
    settings = {"n_steps": args.num_steps, "batch_size": batch_size // MINIBATCHES, "n_epochs": EPOCHS}
    settings |= {"learning_rate": LEARNING_RATE, "clip_range_vf": 0.2, "seed": args.seed, "device": "cpu"}
    network = {"net_arch": {"pi": list(HIDDEN), "vf": list(HIDDEN)}}
    model = stable_baselines3.PPO("MlpPolicy", envs, policy_kwargs=network, **settings)
    watch = Stopwatch()
    model.learn(args.iterations * batch_size, watch)
    seconds = time.perf_counter() - watch.times[args.warm_up]
    envs.close()
    return (args.iterations - args.warm_up) * batch_size / seconds


def train_rsl_rl(args) -> float:
    """Steps per second of rsl_rl's PPO on our vector environment."""
    from common.envs.gym_loop import GymnasiumEnv

    settings = {"hidden": HIDDEN, "num_steps": args.num_steps, "num_minibatches": MINIBATCHES, "update_epochs": EPOCHS}
    settings |= {"learning_rate": LEARNING_RATE, "clip_vloss": True, "init_std": 1.0}
    torch.manual_seed(args.seed)
    env = GymnasiumEnv(args.env_id, args.num_envs)
    obs, _ = env.reset(seed=args.seed)
    runner = rsl_rl_peer.make_runner(env, obs, ppo.Args(**ppo.PRESETS["mujoco"] | settings))
    return rsl_rl_peer.train(runner, args.iterations, args.warm_up)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["sb3", "rsl_rl"])
    parser.add_argument("--env-id", default="HalfCheetah-v4")
    parser.add_argument("--num-envs", type=int, default=8)
    parser.add_argument("--num-steps", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=10, help="iterations before the clock starts")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sb3", default="", help="folder of `pip install --target`, if it is not installed")
    parser.add_argument("--subprocesses", action="store_true", help="sb3: one process per environment")
    parser.add_argument("--log-dir", type=Path, required=True)
    args = parser.parse_args()
    cli.check(0 < args.warm_up < args.iterations, f"--warm-up got {args.warm_up}; it takes 1 to --iterations less 1")
    rate = {"sb3": train_sb3, "rsl_rl": train_rsl_rl}[args.peer](args)
    write_json(args.log_dir / "summary.json", {"SPS": rate, "torch_threads": torch.get_num_threads()})
    print(f"{args.peer}: {rate:,.0f} steps/s")


if __name__ == "__main__":
    main()
