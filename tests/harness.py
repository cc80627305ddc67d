"""What the tests of all training scripts share: an entry per script, and an environment whose episodes are known.

A new script joins the tests of test_ppo_scripts.py and test_run_scripts.py by an entry in SCRIPTS.
"""

import contextlib
import importlib
import math
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
from torch.utils._pytree import tree_leaves, tree_map

from common import checkpoint, distributed
from common.logger import to_numbers

ROOT = Path(__file__).parent.parent
PIXELS = Dict({"rgb": Box(0, 255, (36, 36, 3), np.uint8), "proprio": Box(-np.inf, np.inf, (5,))})
ALOHA = Dict({"pixels": Box(0, 255, (36, 36, 3), np.uint8), "agent_pos": Box(-np.inf, np.inf, (5,))})
ACTIONS = {"box": Box(-1, 1, (3,)), "discrete": Discrete(4), "multi": MultiDiscrete([2, 3, 4])}


@dataclass
class Script:
    """tiny: settings with which an iteration of main() on ScriptedEnv takes a moment.
    environment: {name in the script: what takes its place and makes a ScriptedEnv}.
    """

    name: str
    tiny: dict
    environment: dict[str, Callable]
    # --- for test_ppo_scripts.py
    schedules: dict[str, str] = field(default_factory=dict)  # {setting at the end: at the beginning}; tests fix them
    variants: dict[str, dict] = field(default_factory=lambda: {"box": {}})  # settings of main() that learn differently
    normalised: dict = field(default_factory=dict)  # settings of what is averaged over ranks beside observations
    compiles: tuple[str, ...] = ("box",)  # variants that take --compile
    statistics: str = "normalise"  # the agent's RunningMeanStd of observations
    spaces: dict = field(default_factory=dict)  # what an Agent reads of its environments beside the two spaces
    sources: tuple[str, ...] = ("common/*.py",)  # files that read its settings
    read_elsewhere: frozenset = frozenset()  # settings that are read by a name put together at run time
    # --- for test_run_scripts.py
    flags: tuple = ()  # of its task and of a short evaluation
    size: tuple = ()  # of an iteration that takes a moment
    length: Callable[[int], list] = lambda n: ["--num-iterations", n]  # of n iterations
    num_envs: int = 0  # of that size
    batch: int = 0  # environment steps of such an iteration
    task: str = ""  # name of its folder
    preset: str = ""
    finished: tuple = ()  # more flags of the run that the tests look at
    loss: str = "losses/policy_loss"  # a metric of its log that every update has
    metrics: frozenset = frozenset()  # of its log, beside those that all have
    results: frozenset = frozenset()  # of an evaluation
    files: frozenset = frozenset()  # in the folder of evaluations, beside the JSON files
    exact: dict[str, list] = field(default_factory=dict)  # {name: flags that a resumed run must cope with}
    evaluate: str = ""  # the function that evaluates
    long_evaluation: tuple = ()  # flags of an evaluation that takes a minute
    big: tuple = ()  # flags with which one checkpoint fits on a disk of 3 MB and two do not
    mistakes: tuple = ()  # (flags, words of the sentence...)
    syntax_errors: tuple = ()  # (flags, a word of the message)
    without: dict[str, str] = field(default_factory=dict)  # {test: why this script does without it}

    @cached_property
    def ppo(self) -> ModuleType:
        return importlib.import_module(self.name)

    @property
    def path(self) -> Path:
        return ROOT / f"{self.name}.py"

    def args(self, **settings):
        """Args with the settings of `tiny`; schedules stay where they begin."""
        settings = self.tiny | settings
        fixed = {end: settings[begin] for end, begin in self.schedules.items() if begin in settings}
        return self.ppo.Args(**fixed | settings)

    def agent(self, obs_dim=4, actions="box", **settings):
        torch.manual_seed(0)
        space = ACTIONS[actions] if isinstance(actions, str) else actions
        more = {name: dim or obs_dim for name, dim in self.spaces.items()}
        envs = SimpleNamespace(single_observation_space=Box(-1, 1, (obs_dim,)), single_action_space=space, **more)
        return self.ppo.Agent(envs, self.ppo.Args(**{"hidden": (16,)} | settings))


class SilentLogger:
    """Keeps what main() logs."""

    lines = []

    def __init__(self, *args, enabled=True):
        SilentLogger.lines, self.enabled = [], enabled

    def log(self, metrics, step):
        if self.enabled:
            SilentLogger.lines.append(to_numbers(metrics) | {"step": step})

    def progress(self, step):
        pass

    def close(self):
        pass


def rows_of_this_rank(draw, seed, n, *shape):
    """(n, *shape): this rank's part of what all ranks draw together."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    everyone = draw(n * world_size, *shape, generator=torch.Generator().manual_seed(seed))
    return everyone[rank * n : rank * n + n]


def shown(vectors, space):
    """Observations of `space` that tell the vectors (N, 5) apart: those themselves, or repeated to its shape."""
    if isinstance(space, Dict):
        return {name: shown(vectors, part) for name, part in space.items()}
    size = math.prod(space.shape)
    values = vectors.repeat(1, math.ceil(size / 5))[:, :size].view(-1, *space.shape)
    return (128 + 30 * values).clamp(0, 255).byte() if space.dtype == np.uint8 else values


def rows(obs, dims):
    """All there is in each observation as one vector: (first `dims` dimensions, n)."""
    return torch.cat([part.flatten(dims).float() for part in tree_leaves(obs)], -1)


def where(mask, a, b):
    """torch.where by row, in every tensor of a dict."""
    return tree_map(lambda x, y: torch.where(mask.view(*mask.shape, *[1] * (x.dim() - mask.dim())), x, y), a, b)


class ScriptedEnv:
    """Robots whose episodes end when ENDS says so: {(step within the rollout, robot over all ranks): how}. What they
    observe depends on time and robot alone, the reward on the action too. Everything is kept.
    """

    ENDS = {(2, 0): "terminated", (3, 1): "truncated", (7, 3): "truncated", (7, 4): "terminated"}
    ENDS |= {(0, 5): "truncated", (1, 5): "terminated", (4, 5): "truncated", (5, 5): "truncated"}
    single_action_space, outlier = ACTIONS["box"], None
    single_observation_space, policy_dim, critic_dim = Box(-np.inf, np.inf, (5,)), 5, 5
    exact_resume, metric_names, kept, resets, seeds = False, (), [], [], []

    def __init__(self, num_envs, seed):
        self.num_envs, self.device, self.clock = num_envs, "cpu", 0
        self.nan_resets, self.returns, self.lengths = torch.zeros(()), torch.zeros(num_envs), torch.zeros(num_envs)
        self.first = num_envs * int(os.environ.get("RANK", 0))
        ScriptedEnv.kept, ScriptedEnv.resets, ScriptedEnv.seeds = [], [], [seed]

    def _draw(self, what, *shape):
        return 1 + 2 * rows_of_this_rank(torch.randn, 10 * self.clock + what, self.num_envs, *shape)

    def _observe(self, what):
        return shown(self._draw(what, 5), self.single_observation_space)

    def reset(self, seed=None, options=None):
        ScriptedEnv.resets.append(options)
        ScriptedEnv.seeds.append(seed)
        self.obs = self._observe(0)
        return self.obs, {}

    def step(self, actions):
        ends = [self.ENDS.get((self.clock % 8, self.first + i)) for i in range(self.num_envs)]
        self.clock += 1
        terminated = torch.tensor([end == "terminated" for end in ends])
        truncated = torch.tensor([end == "truncated" for end in ends])
        reward = self._draw(1) + 0.3 * actions.float().reshape(self.num_envs, -1).mean(1)
        if self.outlier and self.clock == self.outlier:
            reward[2] = 1000.0
        done, next_obs = terminated | truncated, self._observe(0)
        # Nothing is promised about the rows of final_obs where no episode has ended.
        nothing = tree_map(lambda x: torch.full_like(x, 255 if x.dtype == torch.uint8 else 1e6), next_obs)
        final_obs = where(done, self._observe(2), nothing)
        kept = dict(obs=self.obs, actions=actions.clone(), reward=reward.clone(), final_obs=final_obs)
        ScriptedEnv.kept.append(kept | dict(next_obs=next_obs, terminated=terminated, truncated=truncated))
        self.obs, self.returns, self.lengths = next_obs, self.returns + reward, self.lengths + 1
        episode = {"r": self.returns, "l": self.lengths, "speed": self.returns / self.lengths}
        info = {"final_obs": final_obs, "_episode": done, "episode": episode}
        self.returns, self.lengths = self.returns * ~done, self.lengths * ~done
        return next_obs, reward, terminated, truncated, info | {"log": {"Episode/term": 2.0 * self.clock}}

    def mirror_obs(self, obs):
        return -obs

    def mirror_actions(self, actions):
        return -actions

    def state_dict(self):
        return {}

    def close(self):
        pass


def kept(first=0, last=None):
    """What ScriptedEnv kept of the steps `first` to `last`, stacked: {name: (steps, num_envs, ...)}."""
    steps = ScriptedEnv.kept[first:last]
    found = tree_map(lambda *values: torch.stack(values), *steps)
    found["done"] = found["terminated"] | found["truncated"]
    return found


def unshuffled(minibatches, observations):
    """The samples of one epoch's minibatches in the order of `observations` (T, N, ...): {name: (T * N, ...)}."""
    dims = minibatches[0].values.dim()  # of an LSTM's sequences two
    names = ("actions", "logprobs", "advantages", "returns", "values")
    samples = {name: torch.cat([getattr(m, name).flatten(0, dims - 1) for m in minibatches]) for name in names}
    samples["obs"] = torch.cat([rows(m.obs, dims).flatten(0, dims - 1) for m in minibatches])
    match = (rows(observations, 2).flatten(0, 1)[:, None] == samples["obs"]).all(2)
    assert (match.sum(0) == 1).all() and (match.sum(1) == 1).all()  # every sample once
    order = match.float().argmax(1)
    return {name: tensor[order] for name, tensor in samples.items()}


def advantages_by_definition(rewards, values, next_values, ended, gamma, gae_lambda):
    """A_t = sum_k (gamma lambda)^(k - t) (r_k + gamma V_{k+1} - V_k), up to the episode's or the rollout's end."""
    advantages = np.zeros_like(rewards)
    for t, i in np.ndindex(*rewards.shape):
        for k in range(t, len(rewards)):
            delta = rewards[k, i] + gamma * next_values[k, i] - values[k, i]
            advantages[t, i] += (gamma * gae_lambda) ** (k - t) * delta
            if ended[k, i]:
                break
    return advantages


def shaken(agent, scale=0.5):
    """The agent away from its initial weights, where all outputs are nearly zero."""
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return agent


@contextlib.contextmanager
def process_restored():
    """One thread for torch; afterwards the signal handlers and the threads are as they were."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def stand_in(script: Script, replace=setattr):
    """Replaces what main() would do besides learning."""
    for name, make in script.environment.items():
        replace(script.ppo, name, make)
    replace(script.ppo, "run_evaluation", lambda *args: {"score": 0.0})
    replace(script.ppo, "report", lambda *args: None)
    replace(script.ppo, "run_info", dict)
    replace(script.ppo, "Logger", SilentLogger)
    replace(checkpoint, "export_onnx", lambda *args: None)
    replace(distributed, "num_cores", lambda: 1)


# For the scripts that learn from a replay buffer.
OFF_POLICY = dict(device="cpu", ranks=1, hidden=(16, 16), num_envs=6, num_steps=8, num_iterations=2, total_timesteps=0)
OFF_POLICY |= dict(batch_size=16, buffer_size=600, learning_starts=12, updates_per_step=2, policy_frequency=2)
OFF_POLICY |= dict(log_interval=1, checkpoint_interval=1000, save_video=False)
OFF_POLICY_SIZE = ("--batch-size", 32, "--learning-starts", 70, "--buffer-size", 2000, "--hidden", 16)
OFF_POLICY_MISTAKES = (
    ("--num-envs 9 --ranks 2", "--num-envs", "2 ranks"),
    ("--batch-size 31 --num-envs 2 --ranks 2", "--batch-size", "2 ranks"),
    ("--batch-size 0", "--batch-size", "above 0"),
    ("--buffer-size 5 --num-envs 4 --n-step 3", "--buffer-size", "at least", "12"),
    ("--tau 1.5", "--tau"),
    ("--n-step 0", "--n-step", "above 0"),
    ("--updates-per-step 0", "--updates-per-step"),
    ("--v-min 100", "--v-min", "--v-max"),
    ("--num-atoms 1", "--num-atoms"),
    ("--observation rgb", "--observation", "no CNN"),
    ("--objects absent.stl", "--objects", "absent.stl"),
    ("--held-out absent.stl", "--held-out", "absent.stl"),
    ("--env-id CartPole-v1", "CartPole-v1", "continuous"),
    ("--env-id Isaac-Cartpole-Direct", "--env-id", "Real2Sim-v0"),
)
# Tests of code in common/ that take long.
ONCE = (
    "test_torchrun",
    "test_killed_again_and_again_a_run_loses_at_most_one_interval",
)
SAME_CODE = "what does this is the same code of common/, tested with the other scripts"

SCRIPTS = {
    script.name: script
    for script in (
        Script(
            name="ppo_go2_mujoco",
            tiny=dict(device="cpu", ranks=1, precision="float32", hidden=(16, 16), mirror=False, learning_rate=1e-3)
            | dict(num_envs=6, num_steps=8, num_iterations=2, num_minibatches=1, update_epochs=1, desired_kl=0.0)
            | dict(log_interval=1, checkpoint_interval=1000, save_video=False),
            environment={"Go2Env": lambda num_envs, device, seed, **settings: ScriptedEnv(num_envs, seed)},
            schedules={"final_gamma": "gamma", "final_kl": "desired_kl"},
            sources=("common/*.py", "common/envs/go2*.py"),
            read_elsewhere=frozenset(f"command_{name}" for name in ("vx", "vy", "yaw", "height", "jump"))
            | {
                f"{name}_range"
                for name in ["friction", "mass", "payload", "strength", "gain", "damping", "frictionloss", "armature"]
            },
            flags=("--episode-seconds", 1, "--eval-episodes", 8),
            size=("--num-envs", 32, "--num-steps", 24),
            num_envs=32,
            batch=32 * 24,
            task="Go2-v0",
            preset="laptop",
            metrics=frozenset({"charts/episodic_return", "eval/fall_rate"}),
            results=frozenset(["fall_rate", "lin_vel_error", "yaw_rate_error", "foot_lift", "duty_factor"]),
            files=frozenset({"final_model.png"}),
            exact={"default": [], "full": ["--randomise", "--commands", "full", "--history", 2]},
            evaluate="common.envs.go2_eval.evaluate",
            long_evaluation=("--eval-episodes", 4000, "--episode-seconds", 20, "--termination-degrees", 180),
            big=("--hidden", 256, 128, 64),
            mistakes=(
                ("--num-envs 33 --ranks 2", "--num-envs", "2 ranks"),
                ("--num-envs 4 --num-steps 8 --num-minibatches 5 --ranks 1", "--num-minibatches", "divisor of the 32"),
                ("--final-std -1", "--final-std"),
                ("--reward-weights nonsense=1", "--reward-weights", "nonsense", "air_time"),
                ("--xml-path {tmp}/robot.xml", "--xml-path", "FR_hip_joint"),
                ("--xml-path {tmp}/absent.xml", "--xml-path", "absent.xml"),
                ("--action-latency 9", "--action-latency", "9"),
                ("--backend warp --solver pgs", "warp", "PGS"),
                ("--save-trajectories out.hdf5", "--save-trajectories", "--eval-only"),
            ),
            syntax_errors=(("--commands sideways", "velocity"), ("--command-vx 1", "--command-vx")),
        ),
        Script(
            name="ppo_continuous_isaac",
            tiny=dict(device="cpu", ranks=1, hidden=(16, 16), lstm_size=8, activation="tanh", learning_rate=1e-3)
            | dict(num_envs=6, num_steps=8, num_iterations=2, num_minibatches=1, update_epochs=1, desired_kl=0.0)
            | dict(log_interval=1, checkpoint_interval=1000, save_video=False),
            environment={"make_env": lambda env_id, num_envs, device, seed, **settings: ScriptedEnv(num_envs, seed)},
            variants={name: {"actions": name} for name in ACTIONS}
            | {f"lstm {name}": {"actions": name, "lstm": True} for name in ACTIONS},
            normalised={"norm_reward": True},
            compiles=("box", "multi"),
            spaces={"policy_dim": None, "critic_dim": None},
            read_elsewhere=frozenset({"physics", "clip_actions", "history", "launcher_args"}),
            flags=("--env-id", "CartPole-v1", "--eval-episodes", 4),
            size=("--num-envs", 4, "--num-steps", 16, "--update-epochs", 2, "--num-minibatches", 2),
            length=lambda n: ["--total-timesteps", n * 64],
            num_envs=4,
            batch=64,
            task="CartPole-v1",
            preset="classic",
            finished=("--norm-obs", "--norm-reward"),
            metrics=frozenset({"eval/mean_return"}),
            results=frozenset({"mean_length"}),
            exact={
                "mlp": ["--env-id", "InvertedPendulum-v5", "--norm-obs", "--norm-reward"],
                "lstm": ["--env-id", "CartPoleMasked-v0", "--lstm", "--norm-obs", "--norm-reward"],
            },
            evaluate="common.envs.isaac_eval.evaluate",
            long_evaluation=("--eval-episodes", 1_000_000),
            big=("--hidden", 256, 256),
            mistakes=(
                ("--num-envs 9 --ranks 2", "--num-envs", "2 ranks"),
                ("--num-envs 4 --num-steps 8 --num-minibatches 5 --ranks 1", "--num-minibatches", "of the 32 samples"),
                ("--lstm --num-envs 4 --num-minibatches 8 --ranks 1", "--num-minibatches", "of the 4 environments"),
                ("--lstm --num-minibatches 1 --ranks 1 --compile", "--lstm", "--compile"),
                ("--min-std 2", "--min-std", "--init-std"),
                ("--history 0", "--history", "above 0"),
                ("--clip-actions -1", "--clip-actions"),
                ("--headless", "--headless"),  # a flag of Isaac Lab's launcher, where there is no Isaac Lab
            ),
            syntax_errors=(("--activation gelu", "tanh"), ("--preset big", "isaac-ant")),
        ),
        Script(
            name="ppo_aloha_cnn",
            tiny=dict(device="cpu", ranks=1, hidden=(16, 16), embedding=16, learning_rate=1e-3)
            | dict(num_envs=6, num_steps=8, num_iterations=2, num_minibatches=1, update_epochs=1, desired_kl=0.0)
            | dict(log_interval=1, checkpoint_interval=1000, save_video=False),
            environment={"AlohaEnv": lambda num_envs, device, seed, **settings: ScriptedEnv(num_envs, seed)},
            variants={"box": {}, "pixels": {"space": ALOHA}},
            normalised={"norm_reward": True},
            statistics="stats",
            sources=("common/*.py", "common/envs/aloha*.py"),
            flags=("--eval-episodes", 4, "--episode-steps", 5, "--obs-type", "state"),
            size=("--num-envs", 4, "--num-steps", 16, "--update-epochs", 2, "--num-minibatches", 2),
            num_envs=4,
            batch=64,
            task="AlohaInsertion-v0",
            preset="fast",
            metrics=frozenset({"eval/success_rate", "rollout/ep_rew_mean", "rollout/ep_len_mean"}),
            results=frozenset({"success_rate", "mean_reward", "mean_length"}),
            exact={
                "pixels": ["--obs-type", "pixels_agent_pos", "--critic", "state", "--bc-coef", 0.5, "--norm-reward"]
            },
            evaluate="common.envs.aloha_eval.evaluate",
            long_evaluation=("--eval-episodes", 4000, "--episode-steps", 300),
            big=("--hidden", 256, 256),
            mistakes=(
                ("--embedding 0", "--embedding"),
                ("--min-std 2", "--min-std", "--init-std"),
                ("--bc-minutes 0", "--bc-minutes"),
                ("--bc-coef -1", "--bc-coef"),
                ("--image-height 0", "--image-height"),
                ("--image-width 35", "--image-width", "36 or more"),
                ("--threads -1", "--threads"),
            ),
            syntax_errors=(("--obs-type sideways", "pixels_agent_pos"), ("--env-id Aloha", "AlohaTransferCube-v0")),
            without=dict.fromkeys(ONCE, SAME_CODE),
        ),
        Script(
            name="ppo_real2sim_mjx",
            tiny=dict(device="cpu", ranks=1, hidden=(16, 16), learning_rate=1e-3, norm_reward=False)
            | dict(num_envs=6, num_steps=8, num_iterations=2, num_minibatches=1, update_epochs=1, desired_kl=0.0)
            | dict(target_kl=0.0, log_interval=1, checkpoint_interval=1000, save_video=False),
            environment={"Real2SimEnv": lambda num_envs, device, seed, **settings: ScriptedEnv(num_envs, seed)},
            normalised={"norm_reward": True},
            sources=("common/*.py", "common/envs/real2sim*.py"),
            flags=("--eval-episodes", 4, "--max-episode-steps", 10),
            size=("--num-envs", 4, "--num-steps", 16, "--update-epochs", 2, "--num-minibatches", 2),
            num_envs=4,
            batch=64,
            task="Real2Sim-v0",
            preset="laptop",
            metrics=frozenset({"eval/success_rate"}),
            results=frozenset({"success_rate", "success_once_rate", "goal_distance"}),
            exact={"full": ["--observation", "full", "--norm-reward"]},
            evaluate="common.envs.real2sim_eval.evaluate",
            long_evaluation=("--eval-episodes", 40_000, "--max-episode-steps", 200),
            big=("--hidden", 256, 256),
            mistakes=(
                ("--goal-height 2 3", "--goal-height"),
                ("--held-out absent.stl", "--held-out", "absent.stl"),
                ("--observation rgb", "--observation", "no CNN"),
                ("--min-std 2", "--min-std", "--init-std"),
            ),
            syntax_errors=(("--observation sideways", "compact"),),
            without=dict.fromkeys(ONCE, SAME_CODE),
        ),
        Script(
            name="sac_real2sim_mjx",
            tiny=OFF_POLICY,
            environment={"make": lambda args, num_envs, seed, **more: ScriptedEnv(num_envs, seed)},
            sources=("common/*.py", "common/envs/real2sim*.py"),
            flags=("--env-id", "InvertedPendulum-v5", "--eval-episodes", 4),
            size=("--num-envs", 4, "--num-steps", 16, *OFF_POLICY_SIZE),
            length=lambda n: ["--total-timesteps", n * 64],
            num_envs=4,
            batch=64,
            task="InvertedPendulum-v5",
            preset="gymnasium",
            finished=("--norm-obs", "--save-replay"),
            loss="losses/qf_loss",
            metrics=frozenset({"losses/actor_loss", "losses/alpha", "losses/entropy", "eval/mean_return"}),
            results=frozenset({"mean_length"}),
            exact={
                "twin": ["--norm-obs", "--save-replay", "--n-step", 3],
                "c51": ["--norm-obs", "--save-replay", "--distributional", "--buffer-size", 200],
                "robot": ["--env-id", "Real2Sim-v0", "--max-episode-steps", 10, "--save-replay", "--norm-obs"],
            },
            evaluate="common.envs.isaac_eval.evaluate",
            long_evaluation=("--eval-episodes", 1_000_000),
            big=("--hidden", 200, 200),
            mistakes=(
                *OFF_POLICY_MISTAKES,
                ("--alpha 0", "--alpha"),
                ("--alpha inf", "--alpha"),
                ("--target-entropy nan", "--target-entropy"),
                ("--log-std-min 3", "--log-std-min", "--log-std-max"),
            ),
            syntax_errors=(("--activation gelu", "silu"), ("--preset big", "laptop")),
            without=dict.fromkeys(ONCE, SAME_CODE),
        ),
        Script(
            name="ddpg_real2sim_mjx",
            tiny=OFF_POLICY,
            environment={"make": lambda args, num_envs, seed, **more: ScriptedEnv(num_envs, seed)},
            sources=("common/*.py", "common/envs/real2sim*.py"),
            flags=("--env-id", "InvertedPendulum-v5", "--eval-episodes", 4),
            size=("--num-envs", 4, "--num-steps", 16, *OFF_POLICY_SIZE),
            length=lambda n: ["--total-timesteps", n * 64],
            num_envs=4,
            batch=64,
            task="InvertedPendulum-v5",
            preset="gymnasium",
            finished=("--norm-obs", "--save-replay"),
            loss="losses/qf_loss",
            metrics=frozenset({"losses/actor_loss", "eval/mean_return"}),
            results=frozenset({"mean_length"}),
            exact={
                "twin": ["--norm-obs", "--save-replay", "--n-step", 3],
                "c51": ["--norm-obs", "--save-replay", "--distributional", "--buffer-size", 200],
                "robot": ["--env-id", "Real2Sim-v0", "--max-episode-steps", 10, "--save-replay", "--norm-obs"],
            },
            evaluate="common.envs.isaac_eval.evaluate",
            long_evaluation=("--eval-episodes", 1_000_000),
            big=("--hidden", 200, 200),
            mistakes=(*OFF_POLICY_MISTAKES, ("--noise-min 2", "--noise-min", "--noise-max")),
            syntax_errors=(("--activation gelu", "silu"), ("--preset big", "laptop")),
            without=dict.fromkeys(ONCE, SAME_CODE),
        ),
        Script(
            name="ppo_gr00t",
            tiny=dict(device="cpu", ranks=1, hidden=(16, 16), learning_rate=1e-3, policy="mlp", observation="state")
            | dict(num_envs=6, num_steps=8, num_iterations=2, num_minibatches=1, update_epochs=1, desired_kl=0.0)
            | dict(log_interval=1, checkpoint_interval=1000, save_video=False),
            environment={"make": lambda args, num_envs, device, seed=1, threads=0: ScriptedEnv(num_envs, seed)},
            statistics="stats",
            sources=("common/*.py", "common/envs/pick*.py", "common/envs/vla.py"),
            flags=("--policy", "mlp", "--eval-episodes", 4, "--max-episode-steps", 10),
            size=("--num-envs", 4, "--num-steps", 16, "--update-epochs", 2, "--num-minibatches", 2),
            num_envs=4,
            batch=64,
            task="Pick-v0",
            preset="mlp",
            metrics=frozenset({"eval/success_rate"}),
            results=frozenset({"success_rate", "mean_length"}),
            exact={"mlp": []},
            evaluate="common.envs.pick_eval.evaluate",
            long_evaluation=("--eval-episodes", 20_000, "--max-episode-steps", 128),
            big=("--hidden", 256, 256),
            mistakes=(
                ("--policy mlp --min-std 2", "--min-std", "--init-std"),
                ("--policy mlp --observation images", "--observation", "state"),
                ("--observation state", "--observation", "images"),
                ("--chunk 1", "--chunk", "2 or more"),
                ("--compile", "--compile", "--policy mlp"),
                ("--noise-level 0", "--noise-level"),
                ("--unfreeze-schedule legs:3", "--unfreeze-schedule", "legs:3", "adapter"),
                ("--env-id PegInsert-v0 --demos 2", "--demos", "PegInsert-v0"),
                ("--difficulty 2", "--difficulty"),
            ),
            syntax_errors=(
                ("--policy sideways", "gaussian-residual"),
                ("--tune everything", "lora"),
                ("--env-id gym_aloha/AlohaInsertion-v0", "AlohaInsertion-v0"),
            ),
            without=dict.fromkeys(ONCE, SAME_CODE),
        ),
        Script(
            name="ppo_multimodal_peginsert",
            tiny=dict(device="cpu", ranks=1, hidden=(16, 16), learning_rate=1e-3, norm_reward=False)
            | dict(num_envs=6, num_steps=8, num_iterations=2, num_minibatches=1, update_epochs=1, desired_kl=0.0)
            | dict(log_interval=1, checkpoint_interval=1000, save_video=False),
            environment={"PegInsertEnv": lambda num_envs, device, seed, **settings: ScriptedEnv(num_envs, seed)},
            variants={"box": {}, "pixels": {"observation": "multimodal", "embedding": 16, "space": PIXELS}},
            normalised={"norm_reward": True},
            statistics="stats",
            sources=("common/*.py", "common/envs/peg_insert*.py"),
            flags=("--eval-episodes", 4, "--max-episode-steps", 10),
            size=("--num-envs", 4, "--num-steps", 16, "--update-epochs", 2, "--num-minibatches", 2),
            num_envs=4,
            batch=64,
            task="PegInsert-v0",
            preset="laptop",
            metrics=frozenset({"eval/success_rate"}),
            results=frozenset({"success_rate", "success_once_rate", "engaged_rate", "keypoint_distance"}),
            exact={"state": ["--norm-reward"]},
            evaluate="common.envs.peg_insert_eval.evaluate",
            long_evaluation=("--eval-episodes", 20_000, "--max-episode-steps", 150),
            big=("--hidden", 256, 256),
            mistakes=(
                ("--embedding 0", "--embedding"),
                ("--min-std 2", "--min-std", "--init-std"),
                ("--observation multimodal --image-size 35", "--image-size", "36 or more"),
            ),
            syntax_errors=(("--observation sideways", "multimodal"),),
            without=dict.fromkeys(ONCE, SAME_CODE),
        ),
    )
}
