"""benchmark/go2_transfer.py simulates what its rows say, and counts what fell."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmark"))
import go2_transfer  # noqa: E402

from common.envs.go2 import Go2Env  # noqa: E402
from common.envs.go2_config import Go2Config  # noqa: E402


def stand(obs):
    return torch.zeros(len(obs), 12)


@pytest.fixture
def args():
    return Namespace(xml_path=None, eval_episodes=1, impratio=100.0)


def test_joints_and_physics_are_those_of_the_row(args, monkeypatch):
    made = []

    def spy(policy, cfg, device, episodes, seed, counts):
        made.append(Go2Env(2, device, seed, cfg, 1))
        return evaluate(policy, cfg, device, episodes, seed, counts)

    evaluate = go2_transfer.evaluate
    monkeypatch.setattr(go2_transfer, "evaluate", spy)
    cfg = Go2Config(observation="proprioceptive", history=5, episode_seconds=1.5, randomise=True)
    fine = go2_transfer.measure(stand, cfg, "0.002 s, newton", "elliptic", 2.0, 0.2, args)
    coarse = go2_transfer.measure(stand, cfg, "training", "elliptic", 0.5, 1.0, args)
    for env, row in zip(made, (fine, coarse), strict=True):
        env.reset()
        for _ in range(2):  # the second episode has the same joints
            fields, model = env.physics.fields, env.model
            assert (fields["dof_damping"][:, 6:] == row["damping"]).all()
            torch.testing.assert_close(fields["dof_frictionloss"][:, 6:].mean().item(), row["frictionloss"])
            for name in ("body_mass", "body_inertia", "dof_armature", "actuator_gainprm", "actuator_forcerange"):
                nominal = torch.from_numpy(getattr(model, name)).expand_as(fields[name])
                torch.testing.assert_close(fields[name], nominal, rtol=1e-6, atol=1e-9)
            env._reset(torch.ones(2, dtype=torch.bool))
        assert env.cfg.command_vx == (-1.0, 1.5) and env.latency.tolist() == [0, 0]
    assert made[0].model.opt.timestep == pytest.approx(0.002) and made[1].model.opt.timestep == pytest.approx(0.01)
    assert made[0].model.opt.impratio == 100 and made[1].model.opt.impratio == 1
    assert made[0].model.opt.cone == made[1].model.opt.cone == 1
    assert fine["episodes"] == 54 and fine["falls"] == fine["beyond_10_degrees"] == 0 and not fine["meets_goal"]


def test_falls_are_counted_by_both_rules(args):
    """A robot that leans by 15 degrees breaks our rule and has not fallen; one that throws itself over has."""
    cfg = Go2Config(episode_seconds=1.5)
    lean = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.6, -2.4, 0.0, 1.6, -2.4])
    leaning = go2_transfer.measure(lambda obs: lean.expand(len(obs), 12), cfg, "training", "pyramidal", 0.5, 0.0, args)
    assert leaning["falls"] == 0 and leaning["beyond_10_degrees"] == 54
    over = torch.tensor([3.0, 0, 0, 3.0, 0, 0] * 2)
    thrown = go2_transfer.measure(lambda obs: over.expand(len(obs), 12), cfg, "training", "pyramidal", 0.5, 0.0, args)
    assert thrown["falls"] == thrown["beyond_10_degrees"] == 54 and len(thrown["fallen_commands"]) == 54
