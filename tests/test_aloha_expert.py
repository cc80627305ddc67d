"""The scripted expert: its kinematics are the simulator's, it succeeds in the package, and it recovers."""

import mujoco
import pytest
import torch

from common.envs.aloha import TASKS, AlohaEnv, build_model
from common.envs.aloha_expert import Expert, forward_kinematics, inverse_kinematics


@pytest.fixture(autouse=True)
def log_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make(num_envs=8, **config) -> AlohaEnv:
    env = AlohaEnv(num_envs, obs_type="state", threads=1, **config)
    env.reset(seed=config.pop("seed", 1))
    return env


def play(env, policy, steps=300, disturb=lambda step: None):
    """Success of each world's first episode, and its length."""
    success, length = torch.zeros(env.num_envs, dtype=torch.bool), torch.zeros(env.num_envs)
    for step in range(steps):
        disturb(step)
        *_, info = env.step(policy(env))
        first = info["_episode"] & (length == 0)
        success |= first & (info["episode"]["success"] > 0)
        length = torch.where(first, info["episode"]["l"].float(), length)
        if (length > 0).all():
            break
    return success, length


def joints(count=200, seed=0):
    """Of arms with the elbow up, inside the joints' ranges."""
    random = 2 * torch.rand(count, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 1
    return torch.tensor([0, -0.5, 0.9, 0, 0.8, 0]) + torch.tensor([1.0, 0.5, 0.5, 1.2, 0.7, 1.5]) * random


def test_forward_kinematics_is_mujocos():
    model = build_model("insertion")
    data = mujoco.MjData(model)
    for q in joints(20):
        data.qpos[:6] = q
        mujoco.mj_kinematics(model, data)
        place, axes = forward_kinematics(q)
        base = torch.from_numpy(model.body("vx300s_left").pos)
        torch.testing.assert_close(base + place, torch.from_numpy(data.site("left_tool").xpos))
        torch.testing.assert_close(axes.flatten(), torch.from_numpy(data.site("left_tool").xmat))


def test_inverse_kinematics():
    q = joints()
    place, axes = forward_kinematics(q)
    torch.testing.assert_close(inverse_kinematics(place, axes), q)
    far = inverse_kinematics(torch.tensor([5.0, 0, 0.3], dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    reached = forward_kinematics(far)[0]
    assert torch.isfinite(far).all() and reached[0] > 0.7 and reached[1].abs() < 1e-6


@pytest.mark.parametrize("env_id", TASKS)
def test_it_succeeds_in_the_package(env_id):
    """benchmark/aloha_env_speed.py counts more starts."""
    env = make(12, env_id=env_id, env_backend="gym-aloha")
    success, length = play(env, Expert(env.cfg))
    assert success.all() and length.max() < 200


@pytest.mark.parametrize("env_id", TASKS)
def test_absolute_actions(env_id):
    delta, absolute = make(3, env_id=env_id), make(3, env_id=env_id, action_mode="absolute")
    expert, other = Expert(delta.cfg), Expert(absolute.cfg)
    for _ in range(20):
        action, target = expert(delta), other(absolute)
        assert action.dtype == target.dtype == torch.float32 and action.abs().max() <= 1 + 1e-6
        delta.step(action)
        absolute.step(target)
        arms = [*range(6), *range(8, 14)]
        torch.testing.assert_close(delta.physics.ctrl[:, arms], absolute.physics.ctrl[:, arms], atol=1e-4, rtol=0)
    assert play(absolute, other)[0].all()


def test_it_needs_the_present_state_only():
    env = make(4)
    expert = Expert(env.cfg)
    for _ in range(50):
        env.step(expert(env))
    states = env.physics.qpos.clone(), env.physics.qvel.clone(), env.target.clone()
    action = expert.action(*states)
    env.step(action)
    torch.testing.assert_close(Expert(env.cfg).action(*(s[[2, 0]] for s in states)), action[[2, 0]])


@pytest.mark.parametrize("env_id", TASKS)
def test_it_recovers(env_id):
    """Objects are pushed and, for 15 steps, arms do something random, so that things are missed and dropped. The same
    actions without looking, which succeed when nothing happens, fail.
    """
    calm = make(8, env_id=env_id)
    expert, script = Expert(calm.cfg), []

    def remember(env):
        script.append(expert(env))
        return script[-1]

    assert play(calm, remember)[0].all()
    outcomes = {}
    for name in ("looking", "blind"):
        env = make(8, env_id=env_id, episode_steps=400)
        generator = torch.Generator().manual_seed(0)
        wild = torch.randn(8, 14, generator=generator)

        def push(step, env=env, generator=generator):
            if step in (10, 55):
                env.physics.qvel[:, 16:18] += 0.4 * torch.randn(8, 2, generator=generator).double()

        def policy(env, name=name, wild=wild):
            step = int(env.episode_length.max())
            action = expert(env) if name == "looking" else script[min(step, len(script) - 1)]
            return wild if 60 <= step < 75 else action

        outcomes[name] = play(env, policy, 400, push)[0].float().mean()
    assert outcomes["looking"] >= 0.8 and outcomes["blind"] <= 0.4, outcomes
