"""Fixtures of the tests of scripts. Each file, or its parameters, says by a fixture `script` which one."""

import copy
from types import SimpleNamespace

import pytest
import torch
from harness import ACTIONS, ScriptedEnv, process_restored, stand_in
from helpers import finish, start, tiny

from common import checkpoint
from common.logger import to_numbers


@pytest.fixture
def restored():
    with process_restored():
        yield


@pytest.fixture
def run_main(script, restored, monkeypatch, tmp_path):
    """Runs main() with tiny settings on ScriptedEnv and gives the final checkpoint."""
    stand_in(script, monkeypatch.setattr)
    runs = []

    def run(actions="box", space=ScriptedEnv.single_observation_space, **settings):
        monkeypatch.setattr(ScriptedEnv, "single_action_space", ACTIONS[actions])
        monkeypatch.setattr(ScriptedEnv, "single_observation_space", space)
        runs.append(tmp_path / f"run{len(runs)}")
        args = script.args(**{"log_dir": str(runs[-1])} | settings)
        script.ppo.main(args)
        state = checkpoint.load(f"{args.log_dir}/checkpoints/final_model.pt", script.ppo.SCRIPT)
        return state | {"learning_rate": state["optimizer"]["param_groups"][0]["lr"].item()}

    return run


@pytest.fixture
def minibatches(script, monkeypatch):
    """All that ppo_loss receives while main() runs, with a copy of the agent, and the statistics it gives."""
    calls, loss = [], script.ppo.ppo_loss

    def spy(agent, args, minibatch):
        memory = [minibatch[name] for name in ("state", "starts") if name in minibatch]
        call = SimpleNamespace(agent=copy.deepcopy(agent), memory=memory, **minibatch)
        result = loss(agent, args, minibatch)
        call.stats = to_numbers(result[1])
        calls.append(call)
        return result

    monkeypatch.setattr(script.ppo, "ppo_loss", spy)
    return calls


@pytest.fixture
def gradients(monkeypatch):
    """Every gradient as Adam sees it, in one vector each."""
    seen = []

    class Adam(torch.optim.Adam):
        def step(self):
            seen.append(torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]]).clone())
            super().step()

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    return seen


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory):
    """{script's name: `finished`}, filled as they are asked for."""
    return {}


@pytest.fixture
def finished(script, finished_runs, tmp_path_factory):
    """The folder, stdout and stderr of a training of six iterations on two ranks, named as by default."""
    if script.name not in finished_runs:
        folder = tmp_path_factory.mktemp("finished")
        flags = [*tiny(script, 6), *script.finished, "--eval-interval", 4, "--exp-name", "x", "--seed", 5, "--ranks", 2]
        out, err = finish(start(script, *flags, cwd=folder))
        [run_dir] = (folder / "runs" / "x").iterdir()
        finished_runs[script.name] = run_dir, out, err
    return finished_runs[script.name]


NO_JOINTS = '<mujoco><worldbody><body><freejoint/><geom size=".1"/></body></worldbody></mujoco>'


@pytest.fixture
def mistakes(finished, tmp_path):
    """A folder with files that no run can use, and an empty one within to start in."""
    (tmp_path / "robot.xml").write_text(NO_JOINTS)
    (tmp_path / "config.yaml").write_text("num_robots: 3")
    model = (finished[0] / "checkpoints" / "final_model.pt").read_bytes()
    (tmp_path / "damaged.pt").write_bytes(model[: len(model) // 2])
    checkpoint.save(tmp_path / "other.pt", {"script": "sac_other", "args": {}})
    (tmp_path / "cwd").mkdir()
    return tmp_path
