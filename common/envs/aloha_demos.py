"""A reverse curriculum for the ALOHA tasks: episodes that begin in states of scripted demonstrations."""

import torch

from common import cli, distributed
from common.envs.aloha import AlohaConfig, AlohaEnv
from common.envs.aloha_eval import Policy, evaluate, plain
from common.envs.aloha_expert import Expert

DEMO_STEPS = 300  # control steps, far more than the expert takes, whatever the time limit of the training
ATTEMPTS = 4  # of the expert in each world


class Curriculum:
    """Starts in states of scripted demonstrations (Florensa et al. 2017; Salimans and Chen 2018): at most `frontier`
    steps before success, which grows by STEP when enough of the episodes of its farther half have succeeded.
    """

    DEMOS = 64
    STEP, ENOUGH, OFTEN = 5, 100, 0.8  # control steps; how many episodes decide; which share of them must succeed

    def __init__(self, cfg: AlohaConfig, training: AlohaEnv, seed: int):
        device = training.device
        self.frontier = self.STEP
        training.start_states = self.starts
        self.counts = torch.zeros(2, device=device)  # of the farther half since the last decision: episodes, successes
        self.back = torch.zeros(
            training.num_envs, dtype=torch.long, device=device
        )  # steps before success of each one's start
        self.back_before = self.back
        settings = {"obs_type": "state", "critic": "pixels", "env_backend": "fast", "episode_steps": DEMO_STEPS}
        envs = AlohaEnv(self.DEMOS, device, seed, **plain(cfg) | settings)
        expert = Expert(cfg, device)
        envs.reset()
        states, waiting = [], torch.ones(self.DEMOS, dtype=torch.bool, device=device)
        self.length = torch.zeros(self.DEMOS, dtype=torch.long, device=device)
        while waiting.any():
            solves = len(states) < ATTEMPTS * DEMO_STEPS
            cli.check(solves, f"--demo-resets: the scripted expert does not solve the task within {DEMO_STEPS} steps")
            states.append(envs.get_state())
            _, _, _, _, info = envs.step(expert(envs))
            first = waiting & info["_episode"] & (info["episode"]["success"] > 0)
            self.length[first] = len(states)  # an attempt that fails is followed by another, which is not told apart
            waiting &= ~first
        envs.close()
        self.states = {name: torch.stack([state[name] for state in states]) for name in states[0]}  # (steps, demos, n)

    def states_before(self, back: torch.Tensor) -> dict[str, torch.Tensor]:
        """The states `back` (k,) steps before the success of demonstrations drawn at random, or of their beginning."""
        demo = torch.randint(len(self.length), back.shape, device=back.device)
        step = (self.length[demo] - back).clamp(min=0)
        return {name: value[step, demo] for name, value in self.states.items()}

    def starts(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """`start_states` of the training environment."""
        self.back_before = self.back.clone()  # of the episodes that have ended, which `learn` is told of next
        self.back[rows] = torch.randint(1, self.frontier + 1, rows.shape, device=rows.device)
        return self.states_before(self.back[rows])

    def learn(self, info: dict):
        """Counts the successes of the episodes that ended in one step, by its `info`."""
        counted = info["_episode"] & (self.back_before > self.frontier / 2)
        self.counts += torch.stack((counted.sum(), (info["episode"]["success"] * counted).sum()))

    def advance(self):
        """Moves the frontier, of all ranks, where success is frequent; at most to the longest demonstration's start."""
        ended, succeeded = distributed.total(self.counts).tolist()
        if ended >= self.ENOUGH:
            self.counts.zero_()
            if succeeded >= self.OFTEN * ended:
                self.frontier = min(self.frontier + self.STEP, int(self.length.max()))

    def state_dict(self) -> dict:
        return {"frontier": self.frontier, "back": self.back, "counts": self.counts}

    def load_state_dict(self, state: dict):
        self.frontier = state["frontier"]
        self.back, self.counts = (state[name].to(self.counts.device) for name in ("back", "counts"))

    def measure(self, policy: Policy, cfg: AlohaConfig, episodes: int, device) -> dict:
        """{steps before success: success rate} of the deterministic policy from there, up to beyond the frontier."""
        rates = {}
        for back in range(25, self.frontier + 50, 25):
            starts = lambda rows, back=back: self.states_before(torch.full_like(rows, back))  # noqa: E731
            result = evaluate(policy, cfg, device, episodes, start_states=starts)
            rates[str(back)] = result["success_rate"]
        return rates
