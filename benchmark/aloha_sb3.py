"""The document's recipe for ALOHA, PPO from pixels alone, by ours and by Stable-Baselines3, at the same settings.

    python benchmark/aloha_sb3.py --sb3 FOLDER

Both train on the same fast environment with the hyperparameters of `--preset document` (Stable-Baselines3 is what the
document trains with), without any warm start, for the same number of steps, in turn and with one thread each; fewer
--num-steps than the preset's 2048 make a shorter comparison. The picture is small, since the document's 480 x 640
pixels make a linear layer of 139 million weights and a rollout of 7.5 GB. The figures are steps per second after the
first iteration, rollout and update, and the curves of the return and of the highest level while training: `ours` is
also the honest curve of the document's preset.

FOLDER is that of `pip install --no-deps --target FOLDER stable-baselines3==2.9.2 cloudpickle`, where it is not
installed. What stays different: Stable-Baselines3 takes no unbounded actions, so its box is +-10, ten of its standard
deviations. Both run in float32.
"""

import json
import os
import sys
import time
from pathlib import Path

import isaac_speed
import tools
import torch

import ppo_aloha_cnn as ppo
from common import cli
from common.envs.aloha import TASKS, AlohaConfig, AlohaEnv
from common.files import write_json
from common.meter import Meter, episode_metrics
from common.storage import take

PRESET = ppo.PRESETS["document"]
CURVES = ("charts/episodic_return", "env/highest_level", "env/success")
MINIBATCH_SIZE = PRESET["num_envs"] * PRESET["num_steps"] // PRESET["num_minibatches"]
BOUND = 10.0  # of Stable-Baselines3's actions, at the initial standard deviation of 1


def train_sb3(args) -> dict:
    """Steps per second after the first iteration, and {name: [(step, mean of the episodes that ended)]}."""
    sys.path[:0] = [str(args.sb3)] if args.sb3 else []
    stable_baselines3 = cli.require("stable_baselines3", "--no-deps stable-baselines3==2.9.2 cloudpickle")
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import VecEnv

    class Adapter(VecEnv):
        """AlohaEnv as Stable-Baselines3 sees environments: arrays, and a list of infos."""

        def __init__(self, envs: AlohaEnv):
            self.envs, self.episodes = envs, Meter()
            box = type(envs.single_action_space)(-BOUND, BOUND, envs.single_action_space.shape)
            super().__init__(envs.num_envs, envs.single_observation_space, box)

        def reset(self):
            return self.envs.reset(seed=args.seed, options={"random_phase": True})[0].numpy()

        def step_async(self, actions):
            self.actions = torch.from_numpy(actions)

        def step_wait(self):
            obs, reward, terminated, truncated, info = self.envs.step(self.actions)
            self.episodes.add(episode_metrics(info), info["_episode"])
            infos = [{"TimeLimit.truncated": limit} for limit in truncated.tolist()]
            for i in (terminated | truncated).nonzero().flatten().tolist():
                infos[i]["terminal_observation"] = take(info["final_obs"], i).numpy()
            return obs.numpy(), reward.numpy(), (terminated | truncated).numpy(), infos

        def close(self):
            self.envs.close()

        def env_is_wrapped(self, wrapper_class, indices=None):
            return [False] * self.num_envs

        def get_attr(self, attr_name, indices=None):
            return [None] * self.num_envs

        def set_attr(self, *arguments, **keywords):
            raise NotImplementedError

        env_method = set_attr

    class Record(BaseCallback):
        """When the rollouts began, and how the episodes went that ended in them."""

        def _init_callback(self):
            self.times, self.curves = [], {name: [] for name in CURVES}

        def _on_rollout_start(self):
            self.times.append(time.perf_counter())

        def _on_rollout_end(self):
            means = envs.episodes.means()
            for name in self.curves.keys() & means.keys():
                self.curves[name].append((self.num_timesteps, means[name].item()))

        def _on_step(self):
            return True

    envs = Adapter(AlohaEnv(PRESET["num_envs"], "cpu", args.seed, **environment(args)))
    batch_size = PRESET["num_envs"] * args.num_steps
    settings = {"n_steps": args.num_steps, "batch_size": MINIBATCH_SIZE}
    settings |= {"n_epochs": PRESET["update_epochs"], "learning_rate": PRESET["learning_rate"], "gamma": 0.99}
    settings |= {"ent_coef": PRESET["ent_coef"], "vf_coef": 0.5 * PRESET["vf_coef"], "seed": args.seed}
    settings |= {"max_grad_norm": PRESET["max_grad_norm"], "device": "cpu"}
    hidden = list(ppo.Args.hidden)
    network = {"net_arch": {"pi": hidden, "vf": hidden}, "activation_fn": torch.nn.ELU}
    model = stable_baselines3.PPO("CnnPolicy", envs, policy_kwargs=network, **settings)
    record = Record()
    model.learn(args.iterations * batch_size, record)
    seconds = time.perf_counter() - record.times[1]
    envs.close()
    return {"steps_per_second": (args.iterations - 1) * batch_size / seconds, "curves": record.curves}


def environment(args) -> dict:
    """Settings of AlohaEnv: the preset's, with a small picture and one thread."""
    preset = {name: value for name, value in PRESET.items() if name in AlohaConfig.__dataclass_fields__}
    return preset | {"env_id": args.env_id, "threads": 1} | picture(args)


def picture(args) -> dict:
    return {"image_height": args.image_height, "image_width": args.image_width, "mesh_detail": args.mesh_detail}


def train_ours(args, run_dir: Path) -> dict:
    """The same of ours."""
    flags = ["--preset", "document", "--env-id", args.env_id, "--seed", args.seed, "--num-iterations", args.iterations]
    for name, value in picture(args).items():
        flags += [f"--{name.replace('_', '-')}", value]
    flags += ["--num-steps", args.num_steps]
    flags += ["--num-minibatches", PRESET["num_envs"] * args.num_steps // MINIBATCH_SIZE]
    flags += ["--device", "cpu", "--ranks", 1, "--threads", 1, "--log-interval", 1, "--log-dir", run_dir]
    flags += ["--eval-episodes", args.episodes, "--no-save-video"]
    log = run_dir.with_suffix(".log")
    tools.finish(tools.start("ppo_aloha_cnn.py", flags, log), log)
    rate = tools.logged_rate(run_dir, PRESET["num_envs"] * args.num_steps)
    scalars = tools.read_scalars(run_dir)
    curves = {name: scalars[name] for name in CURVES if name in scalars}
    summary = json.loads((run_dir / "summary.json").read_text())
    evaluated = {name: summary[name] for name in ("episodes", "success_rate", "highest_level", "mean_return")}
    return {"steps_per_second": rate, "curves": curves, "deterministic": evaluated}


def main():
    parser = tools.parser(__doc__)
    parser.add_argument("--sb3", type=Path, help="folder of `pip install --target`, if it is not installed")
    parser.add_argument("--env-id", choices=list(TASKS), default="AlohaInsertion-v0")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=4, help="the first is not timed")
    parser.add_argument("--num-steps", type=int, default=PRESET["num_steps"], help="per environment and iteration")
    parser.add_argument("--image-height", type=int, default=60)
    parser.add_argument("--image-width", type=int, default=80)
    parser.add_argument("--mesh-detail", type=float, default=0.012, help="what is finer is not drawn (m)")
    parser.add_argument("--episodes", type=int, default=64, help="of the evaluation of ours at the end")
    parser.add_argument("--one-side", type=Path, help="file that Stable-Baselines3's side is written to, and no more")
    args = parser.parse_args()
    if args.num_steps % (MINIBATCH_SIZE // PRESET["num_envs"]):
        parser.error(f"--num-steps got {args.num_steps}; it takes a multiple of {MINIBATCH_SIZE // PRESET['num_envs']}")
    if args.iterations < 2:
        parser.error(f"--iterations got {args.iterations}; it takes 2 or more")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    if args.one_side:
        write_json(args.one_side, train_sb3(args))
        return
    began, folder = time.time(), tools.new_folder(args, "aloha_sb3")
    sides = {"ours": train_ours(args, folder / "ours")}
    print(f"ours: {sides['ours']['steps_per_second']:,.0f} steps/s", flush=True)
    if isaac_speed.sb3_version(args.sb3) != "none":
        side, log = folder / "sb3.json", folder / "sb3.log"
        tools.finish(tools.start("benchmark/aloha_sb3.py", [*sys.argv[1:], "--one-side", side], log), log)
        sides["sb3"] = json.loads(side.read_text())
        sides["ratio"] = sides["ours"]["steps_per_second"] / sides["sb3"]["steps_per_second"]
        print(f"Stable-Baselines3: {sides['sb3']['steps_per_second']:,.0f} steps/s, ratio {sides['ratio']:.2f}")
    sides["settings"] = PRESET | picture(args) | {"env_id": args.env_id, "num_steps": args.num_steps}
    sides["settings"] |= {"iterations": args.iterations, "minibatch_size": MINIBATCH_SIZE}
    versions = {"stable-baselines3": isaac_speed.sb3_version(args.sb3)}
    tools.write(args, "aloha_sb3", [args.seed], PRESET["num_envs"], began, sides, versions)


if __name__ == "__main__":
    main()
