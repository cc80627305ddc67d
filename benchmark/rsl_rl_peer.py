"""rsl_rl as a peer: our vector environments and the flags of our PPO scripts, in its words."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the benchmarks are run as files

from common import cli

RSL_RL = "rsl-rl-lib==5.5.1"


class Adapter:
    """What rsl_rl asks of an environment (its `VecEnv`): one group of observations, and which ends are time limits.

    `env` has just been reset to `obs` (num_envs, n). The ages of its episodes are not told: rsl_rl asks for them to
    spread them at the beginning, which our environments do themselves (`random_phase`).
    """

    def __init__(self, env, obs):
        self.env, self.obs = env, obs
        self.cfg = {}
        self.device = env.device
        self.num_envs = env.num_envs
        self.num_actions = env.single_action_space.shape[0]
        self.TensorDict = cli.require("tensordict", "tensordict").TensorDict

    def get_observations(self):
        return self.TensorDict({"policy": self.obs}, batch_size=[self.num_envs])

    def step(self, actions):
        self.obs, reward, terminated, truncated, _ = self.env.step(actions)
        return self.get_observations(), reward, (terminated | truncated).long(), {"time_outs": truncated}


def make_runner(env, obs, args):
    """rsl_rl's `OnPolicyRunner` on `Adapter(env, obs)`, without its writer, for the Args of one of our PPO scripts."""
    runners = cli.require("rsl_rl.runners", RSL_RL)
    return runners.OnPolicyRunner(Adapter(env, obs), runner_config(args), log_dir=None, device=str(env.device))


def train(runner, iterations: int, warm_up: int) -> float:
    """Environment steps per second of the whole training, of which the first `warm_up` iterations do not count."""
    runner.learn(warm_up)
    began = time.perf_counter()
    runner.learn(iterations - warm_up)
    seconds = time.perf_counter() - began
    return (iterations - warm_up) * runner.cfg["num_steps_per_env"] * runner.env.num_envs / seconds


def runner_config(args, std_type: str = "log") -> dict:
    """The configuration of `rsl_rl.runners.OnPolicyRunner` for the Args of one of our PPO scripts."""
    model = {"class_name": "MLPModel", "hidden_dims": list(args.hidden), "obs_normalization": args.norm_obs}
    model |= {"activation": getattr(args, "activation", "elu")}
    gaussian = {"class_name": "GaussianDistribution", "init_std": args.init_std, "std_type": std_type}
    # rsl_rl before 5.5 does not know this setting.
    mixed = {"use_mixed_precision": True} if getattr(args, "precision", "float32") == "bfloat16" else {}
    return {
        "num_steps_per_env": args.num_steps,
        "save_interval": 0,  # read only with a writer
        "torch_compile_mode": "default" if args.compile else None,  # of actor and critic
        "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
        "actor": model | {"distribution_cfg": gaussian},
        "critic": model,
        "algorithm": {
            "class_name": "PPO",
            "num_learning_epochs": args.update_epochs,
            "num_mini_batches": args.num_minibatches,
            "clip_param": args.clip_coef,
            "gamma": args.gamma,
            "lam": args.gae_lambda,
            "value_loss_coef": args.vf_coef / 2,  # its value loss has no factor 0.5
            "entropy_coef": args.ent_coef,
            "learning_rate": args.learning_rate,
            "max_grad_norm": args.max_grad_norm,
            "use_clipped_value_loss": args.clip_vloss,
            "schedule": "adaptive" if args.desired_kl else "fixed",
            "desired_kl": args.desired_kl or None,
            "normalize_advantage_per_mini_batch": args.norm_adv,
            **mixed,
        },
    }
