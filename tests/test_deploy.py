"""The loop in docs/deploy.md runs as it stands, on other people's kind of files, and sees what the environment sees."""

import re
from pathlib import Path

import menagerie_like
import numpy as np
import onnxruntime
import pytest
import torch

from common import checkpoint
from common.envs.go2 import Go2Env

PAGE = Path(__file__).parents[1] / "docs" / "deploy.md"
SCENE = '<mujoco><include file="{}"/><worldbody><geom type="plane" size="0 0 1"/></worldbody></mujoco>'


def loop() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return block


def test_it_is_short_and_needs_little():
    lines = [line for line in loop().splitlines() if line.strip()]
    assert len(lines) <= 30
    assert [line for line in lines if "import" in line] == ["import mujoco", "import numpy as np", "import onnxruntime"]


@pytest.mark.parametrize("kind", ("motors", "servos"))
def test_it_sees_and_does_what_the_environment_does(kind, tmp_path, monkeypatch):
    """Its states, fed to the environment, give its observations; its targets are those of training."""
    monkeypatch.chdir(tmp_path)
    xml_path = menagerie_like.write(tmp_path, kind)
    (tmp_path / "scene.xml").write_text(SCENE.format(Path(xml_path).name))
    torch.manual_seed(0)
    policy = torch.nn.Linear(225, 12)
    torch.nn.init.normal_(policy.weight, std=0.06)
    checkpoint.export_onnx(policy, torch.zeros(1, 225), "policy.onnx")

    seen, namespace = [], {}

    class Spy(onnxruntime.InferenceSession):
        def run(self, names, inputs):
            actions = super().run(names, inputs)
            data = namespace["data"]
            seen.append((inputs["obs"][0].copy(), data.qpos.copy(), data.qvel.copy(), actions[0][0]))
            return actions

    monkeypatch.setattr(onnxruntime, "InferenceSession", Spy)
    exec(loop().replace("range(500)", "range(60)"), namespace)
    assert len(seen) == 60

    settings = {"observation": "proprioceptive", "history": 5, "xml_path": xml_path, "spawn_noise": 0.0}
    env = Go2Env(1, physics_threads=1, **settings)
    env.fixed_commands = torch.tensor([[0.5, 0.0, 0.0]])
    obs, _ = env.reset()
    for step, (theirs, qpos, qvel, action) in enumerate(seen):
        env.physics.qpos[0], env.physics.qvel[0] = torch.from_numpy(qpos), torch.from_numpy(qvel)
        env._read_state()
        obs = env._observe(torch.tensor([step == 0]))
        np.testing.assert_allclose(obs[0].numpy(), theirs, atol=1e-5)
        env.action = torch.from_numpy(action)[None]
    assert np.ptp([qpos for _, qpos, _, _ in seen], axis=0)[7:].min() > 0.01  # every joint moved
    # The torque of a joint is that of the environment's actuator at the same state and action.
    env.physics.reset(torch.tensor([True]), torch.from_numpy(qpos)[None], torch.from_numpy(qvel)[None])
    env.pending[:] = 0
    env.step(torch.from_numpy(action)[None])
    target = namespace["POSE"] + namespace["ACTION_SCALE"] * action
    np.testing.assert_allclose(env.physics.ctrl[0].numpy(), target, atol=1e-6)
    assert (namespace["KP"], namespace["KD"]) == (env.cfg.kp, env.cfg.kd)
    assert namespace["CONTROL_DT"] == 0.02 and (namespace["LIMIT"] == env.model.actuator_forcerange[:, 1]).all()


def test_a_policy_that_stands_stands(tmp_path, monkeypatch, capsys):
    """Ten seconds with the default pose as target, on a model with ten times our damping."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scene.xml").write_text(SCENE.format(Path(menagerie_like.write(tmp_path, "motors")).name))
    policy = torch.nn.Linear(225, 12)
    torch.nn.init.zeros_(policy.weight), torch.nn.init.zeros_(policy.bias)
    checkpoint.export_onnx(policy, torch.zeros(1, 225), "policy.onnx")
    exec(loop(), {})
    x, height = map(float, re.findall(r"(-?\d+\.\d+) m", capsys.readouterr().out))
    assert abs(x) < 0.1 and 0.27 < height < 0.34
