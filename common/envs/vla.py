"""The tasks of a vision-language-action policy: environments with cameras, a state, a sentence and chunks of actions.

`Pick-v0` is one by itself; peg insertion and the two tasks of ALOHA are made one by `Chunks`. See docs/gr00t.md.
"""

from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from PIL import Image
from torch.utils._pytree import tree_map

from common import video
from common.distributed import num_cores
from common.envs import pick_eval
from common.envs.pick import INSTRUCTIONS, PickEnv
from common.envs.pick_eval import FILM_SIZE, MOST_ENVS
from common.evaluation import SEED, Policy, can_film, device_of, mean_return, play_from_resets, rates, save_and_print
from common.storage import to

SENTENCES = {
    "Pick-v0": INSTRUCTIONS,
    "PegInsert-v0": ("insert the peg into the hole",),
    "AlohaInsertion-v0": ("insert the peg into the socket",),
    "AlohaTransferCube-v0": ("hand the red cube to the left arm",),
}


def make(args, num_envs: int, device, seed: int = 1, threads: int = 0) -> VectorEnv:
    """The task `args.env_id` in the settings of `PickConfig`, as far as it has them. Its observation is a dict of
    pictures by camera, `state` (n,) and `instruction`, the index of its sentence, or with `args.observation` state
    numbers alone; an action is (chunk, n), or (n,) where the chunk is 1. Raises ValueError for settings that do not
    fit and for a package that is missing.
    """
    if args.env_id == "Pick-v0":
        return PickEnv(num_envs, device, seed, cfg=args, physics_threads=threads)
    if args.chunk < 1:
        raise ValueError(f"--chunk takes 1 or more, got {args.chunk}")
    pictures = args.observation == "images"
    if args.env_id == "PegInsert-v0":
        from common.envs.peg_insert import PegInsertEnv

        settings = {"observation": "multimodal" if pictures else "state", "modalities": ("rgb", "proprio")}
        settings |= {"image_size": args.image_size, "difficulty": args.difficulty, "backend": args.backend}
        settings |= {"max_episode_steps": args.max_episode_steps}
        env = PegInsertEnv(num_envs, device, seed, physics_threads=threads, **settings)
        return Chunks(env, {"wrist": "rgb", "state": "proprio"}, args.chunk, args.reward == "sparse")
    from common.envs.aloha import AlohaEnv

    settings = {"env_id": args.env_id, "threads": threads}
    settings |= {"obs_type": "pixels_agent_pos" if pictures else "state", "backend": args.backend}
    settings |= {"image_height": args.image_size, "image_width": args.image_size}
    settings |= {"reward": "sparse" if args.reward == "sparse" else "progress", "reward_gamma": args.reward_gamma}
    env = AlohaEnv(num_envs, device, seed, episode_steps=args.max_episode_steps, **settings)
    return Chunks(env, {"top": "pixels", "state": "agent_pos"}, args.chunk)


class Chunks(VectorEnv):
    """Another environment with chunks of its actions, whose observations have the names of a policy's.

    A world whose episode ends within a chunk gets zeros for the rest of it, which are worth nothing; `final_obs` shows
    its end. Pictures are drawn at every control step, of which the last one is seen.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
    exact_resume = True  # `load_state_dict` restores all there is

    def __init__(self, env: VectorEnv, names: dict[str, str], chunk: int, first_success: bool = False):
        """names: {of the policy's observation: the environment's}, read where that is a dict. first_success: the reward
        is 1 where `success_once` becomes true, in place of the environment's own.
        """
        self.env, self.names, self.chunk, self.first_success = env, names, chunk, first_success
        self.num_envs, self.device, self.metric_names = env.num_envs, env.device, env.metric_names
        self.single_observation_space = space = env.single_observation_space
        if isinstance(space, gym.spaces.Dict):
            spaces = {name: space[own] for name, own in names.items()}
            self.single_observation_space = gym.spaces.Dict(spaces | {"instruction": gym.spaces.Discrete(1)})
        shape = env.single_action_space.shape
        self.single_action_space = gym.spaces.Box(-1.0, 1.0, shape if chunk == 1 else (chunk, *shape))
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.succeeded = torch.zeros(self.num_envs, device=self.device)

    @property
    def nan_resets(self) -> torch.Tensor:
        return self.env.nan_resets

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """As the environment's."""
        self.succeeded = torch.zeros_like(self.succeeded)
        return self._named(self.env.reset(seed=seed, options=options)[0]), {}

    def step(self, actions: torch.Tensor):
        """Executes one chunk of actions (num_envs, chunk, n); see docs/environments.md for what it returns."""
        actions = actions.view(self.num_envs, self.chunk, -1)
        total = torch.zeros(self.num_envs, device=self.device)
        terminated = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        truncated = torch.zeros_like(terminated)
        last = None  # of each world the end of its episode, or else of the chunk
        for k in range(self.chunk):
            running = ~(terminated | truncated)
            action = torch.where(running[:, None], actions[:, k], 0.0)
            obs, reward, ended, cut, info = self.env.step(action)
            if self.first_success:
                won = info["episode"]["success_once"]
                reward = won - self.succeeded
                self.succeeded = torch.where(ended | cut, 0.0, won)
            total = total + torch.where(running, reward, 0.0)
            terminated = terminated | (running & ended)
            truncated = truncated | (running & cut)
            new = {"final_obs": info["final_obs"], "episode": info["episode"]}
            last = new if last is None else tree_map(lambda a, b: _rows(running, a, b), new, last)  # noqa: B023
        done = terminated | truncated
        info = {"final_obs": self._named(last["final_obs"]), "_final_obs": done, "_episode": done}
        info |= {"episode": last["episode"], "nan_resets": self.nan_resets}
        return self._named(obs), total, terminated, truncated, info

    def _named(self, obs):
        if not isinstance(obs, dict):
            return obs
        instruction = torch.zeros(self.num_envs, dtype=torch.long, device=self.device)
        return {name: obs[own] for name, own in self.names.items()} | {"instruction": instruction}

    def state_dict(self) -> dict:
        """Everything exact resume needs."""
        return {"env": self.env.state_dict(), "succeeded": self.succeeded}

    def load_state_dict(self, state: dict):
        self.env.load_state_dict(state["env"])
        self.succeeded = state["succeeded"].to(self.device)

    def close_extras(self, **kwargs):
        self.env.close()


def _rows(mask: torch.Tensor, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    return torch.where(mask.view(-1, *[1] * (new.dim() - 1)), new, old)


def expert(args, device) -> Callable[[VectorEnv], torch.Tensor] | None:
    """What gives the actions (num_envs, chunk, n) of a scripted expert for the present states, where there is one."""
    if args.env_id == "Pick-v0":
        from common.envs.pick_expert import Expert

        return Expert()
    if args.env_id == "PegInsert-v0":
        return None
    from common.envs.aloha_expert import Expert

    return lambda envs: look_ahead(envs, Expert(envs.env.cfg, device))


def look_ahead(envs: Chunks, step_expert: Callable[[VectorEnv], torch.Tensor]) -> torch.Tensor:
    """The chunk (num_envs, chunk, n) that an expert for single steps takes from here, of which each action depends on
    what the earlier ones did: played, and taken back.
    """
    state = envs.env.state_dict()
    actions = []
    for _ in range(envs.chunk):
        actions.append(step_expert(envs.env))
        envs.env.step(actions[-1])
    envs.env.load_state_dict(state)
    return torch.stack(actions, 1)


def evaluate(policy: Policy, args, device, episodes: int, seed: int = SEED, threads: int = 0) -> dict:
    """Success, return and length of `policy` in at least `episodes` fresh episodes; more of `Pick-v0`, see there.
    threads: 0: all cores.
    """
    if args.env_id == "Pick-v0":
        return pick_eval.evaluate(policy, args, device, episodes, seed, threads)
    envs = make(args, min(episodes, MOST_ENVS), device, seed, threads or num_cores())
    columns = play_from_resets(policy, envs, device, episodes)  # `Chunks` begins later episodes within a chunk
    envs.close()
    result = {"episodes": len(columns["r"]), "seed": seed} | mean_return(columns["r"])
    return result | {"mean_length": columns["l"].mean().item()} | rates(columns, "success")


def report(policy: Policy, args, result: dict, run_dir: Path, name: str, save_video: bool = True):
    """Writes eval/{name}.json and videos/{name}.mp4 into `run_dir`, and prints the main numbers."""
    if args.env_id == "Pick-v0":
        pick_eval.report(policy, args, result, run_dir, name, save_video)
        return
    save_and_print(result, run_dir, name, f", {result['mean_length']:.0f} control steps")
    if save_video:
        record_video(policy, args, run_dir / "videos" / f"{name}.mp4")


@torch.no_grad()
def record_video(policy: Policy, args, path: str | Path, episodes: int = 2, seed: int = SEED):
    """Whole episodes of one world on the CPU, in real time: of `Pick-v0` every control step, of the others what the
    policy sees. Returns the path of the mp4; where there is nothing to see, says so in one sentence and returns None.
    """
    if args.env_id == "Pick-v0":
        return pick_eval.record_video(policy, args, path, seed=seed)
    if args.observation == "state":
        print(f"no film: a policy for {args.env_id} that observes a state has no pictures to show", flush=True)
        return None
    if not can_film():
        return None
    device = device_of(policy)
    envs = make(args, 1, "cpu", seed, 1)

    def frames() -> Iterable[np.ndarray]:
        obs, _ = envs.reset(seed=seed)
        ended = 0
        while ended < episodes:
            pictures = [value[0].numpy() for value in obs.values() if value.dim() == 4]
            sized = [np.asarray(Image.fromarray(p).resize((FILM_SIZE,) * 2, Image.NEAREST)) for p in pictures]
            yield np.concatenate(sized, 1)
            obs, _, _, _, info = envs.step(policy(to(obs, device)).cpu())
            ended += int(info["_episode"])

    with closing(envs):
        return video.write_mp4(path, frames(), envs.env.metadata["render_fps"] / args.chunk)
