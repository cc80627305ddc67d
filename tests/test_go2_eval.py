"""The evaluation of the Go2 on policies whose worth is known, its heat map and its video."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from common import video
from common.envs import go2_eval
from common.envs.go2 import Go2Env
from common.envs.go2_config import LEGS, Go2Config

KEYS = {"episodes", "mean_return", "return_ci95", "mean_length", "fall_rate", "fall_ci95", "lin_vel_error"}
KEYS |= {"lin_vel_error_ci95", "yaw_rate_error", "yaw_rate_error_ci95", "mean_power", "cost_of_transport"}
KEYS |= {"foot_lift", "duty_factor", "grid"}


def config(**changes) -> Go2Config:
    return Go2Config(**{"episode_seconds": 3.0} | changes)


def stand(obs):
    return torch.zeros(len(obs), 12)


@pytest.fixture(scope="module")
def standing() -> dict:
    return go2_eval.evaluate(stand, config(), "cpu", episodes=64)


def test_standing(standing):
    """A robot that stands never falls, keeps its feet down, and its error is the command itself."""
    assert standing.keys() >= KEYS
    assert standing["episodes"] == 126 and standing["falls"] == 0 and standing["fall_rate"] == 0
    assert standing["mean_length"] == 150
    assert standing["duty_factor"] == [1, 1, 1, 1] and standing["foot_lift"] == [0, 0, 0, 0]
    command = np.array(standing["grid"]["command"])
    np.testing.assert_allclose(standing["grid"]["lin_vel_error"], np.hypot(command[:, 0], command[:, 1]), atol=0.02)
    np.testing.assert_allclose(standing["grid"]["yaw_rate_error"], np.abs(command[:, 2]), atol=0.02)
    assert standing["lin_vel_error"] == pytest.approx(np.hypot(command[:, 0], command[:, 1]).mean(), abs=0.01)
    assert standing["mean_power"] < 3 and standing["cost_of_transport"] == 0
    json.dumps(standing, allow_nan=False)


def test_grid(standing):
    command = np.array(standing["grid"]["command"])
    assert command.shape == (126, 3)
    for column, values in enumerate((np.linspace(-1, 2, 7), (-0.5, 0, 0.5), (-0.6, 0, 0.6))):
        np.testing.assert_allclose(np.unique(command[:, column]), values, atol=1e-6)
    assert len(np.unique(command, axis=0)) == 63  # every combination, twice
    shapes = {name: np.array(values).shape for name, values in standing["grid"].items()}
    assert shapes == {"command": (126, 3), "mean_velocity": (126, 3)} | dict.fromkeys(
        ("lin_vel_error", "yaw_rate_error", "fallen", "max_tilt", "return"), (126,)
    )
    fixed = go2_eval.command_grid(config(command_vx=(0.5, 0.5)), 5, 10)
    assert fixed.shape == (18, 5) and (fixed[:, 0] == 0.5).all() and (fixed[:, 3:] == 0).all()


def test_zero_commands():
    zero = config(command_vx=(0.0, 0.0), command_vy=(0.0, 0.0), command_yaw=(0.0, 0.0), commands="full")
    result = go2_eval.evaluate(stand, zero, "cpu", episodes=4)
    assert result["falls"] == 0 and result["lin_vel_error"] < 0.02 and result["yaw_rate_error"] < 0.02
    assert result["grid"]["command"] == pytest.approx(np.array([[0, 0, 0, 0.3, 0]] * 4))


def test_falling():
    """A robot that throws itself over within the first second gets no credit for tracking."""
    over = torch.tensor([3.0, 0, 0, 3.0, 0, 0] * 2)
    result = go2_eval.evaluate(lambda obs: over.expand(len(obs), 12), config(), "cpu", episodes=63)
    assert result["fall_rate"] == 1 and result["falls"] == 63 and result["mean_length"] < 50
    command = np.array(result["grid"]["command"])
    np.testing.assert_allclose(result["grid"]["lin_vel_error"], np.hypot(command[:, 0], command[:, 1]), atol=1e-6)
    np.testing.assert_allclose(result["grid"]["yaw_rate_error"], np.abs(command[:, 2]), atol=1e-6)


@pytest.mark.parametrize("index, leg", list(enumerate(("FL", "FR", "RL", "RR"))))
def test_foot_order(index, leg):
    """One leg taps: it alone is lifted, by what the geometry says, and the other three stay down."""
    steps = 0

    def tap(obs):
        nonlocal steps
        steps += 1
        action = torch.zeros(4, 3)
        if steps % 25 < 4:
            action[LEGS.index(leg)] = torch.tensor([0.0, 1.0, -2.0])
        return action.flatten().expand(len(obs), 12)

    still = config(spawn_noise=0.0, command_vx=(0.2, 0.2), command_vy=(0.0, 0.0), command_yaw=(0.0, 0.0))
    result = go2_eval.evaluate(tap, still, "cpu", episodes=1)
    others = [i for i in range(4) if i != index]
    assert result["falls"] == 0
    assert 0.04 < result["foot_lift"][index] < 0.1 and max(result["foot_lift"][i] for i in others) < 0.005
    assert 0.6 < result["duty_factor"][index] < 0.9 and min(result["duty_factor"][i] for i in others) > 0.97


def test_observation_layout():
    """The layout that the files state is that of the environment: each part, unscaled, is the state it names."""
    for changes in ({}, {"commands": "full"}, {"observation": "proprioceptive"}):
        env = Go2Env(3, "cpu", 1, config(**changes))
        env.reset(seed=1)
        for _ in range(20):
            obs, *_ = env.step(torch.rand(3, 12, generator=env.generator) - 0.5)
        layout = go2_eval.observation_layout(env.cfg)
        parts = obs.split([size for _, size, _ in layout], 1)
        state = {f"command_{name}": env.command[:, i : i + 1] for i, name in enumerate(("vx", "vy", "yaw"))}
        state |= {"last_action": env.action}
        state |= {name: getattr(env, name) for name in ("lin_vel", "ang_vel", "gravity", "dof_pos", "dof_vel")}
        if changes.get("commands") == "full":
            state |= {"command_height": env.command[:, 3:4], "command_jump": env.command[:, 4:5]}
        for (name, _, scale), part in zip(layout, parts, strict=True):
            torch.testing.assert_close(part / scale, state[name])


def test_plot(standing, tmp_path):
    grid = standing["grid"] | {"fallen": [i < 5 for i in range(126)]}
    falling = standing | {"grid": grid}
    shades = []
    for name, result in (("none", standing), ("some", json.loads(json.dumps(falling)))):
        image = np.asarray(Image.open(go2_eval.plot_grid(result, tmp_path / "eval" / f"{name}.png")).convert("RGB"))
        assert image.shape[0] > 500 and image.shape[1] > 1000
        shades.append((np.abs(image.astype(int) - (200, 30, 30)).sum(2) < 10).sum())
    assert shades[0] == 0 and shades[1] > 500  # red labels, only where robots fell


def test_plot_averages():
    x, y, values = np.array([0, 0, 0, 1, 1.0]), np.array([5, 5, 6, 6, 5.0]), np.array([1, 3, 4, 8, 7.0])
    xs, ys, table = go2_eval._pivot(x, y, values)
    assert xs.tolist() == [0, 1] and ys.tolist() == [5, 6]
    np.testing.assert_array_equal(table, [[2, 7], [4, 8]])


def test_script_stays_in_the_trained_ranges():
    for cfg in (Go2Config(commands="full"), Go2Config(command_vx=(0.3, 1.0), command_vy=(0.0, 0.0))):
        script = go2_eval.command_script(cfg)
        titles = [title for title, _, _ in script]
        assert ("backward" in titles) == (cfg.command_vx[0] < 0) and ("jump" in titles) == (cfg.commands == "full")
        for title, share, command in script:
            assert share > 0 and len(command) == 4
            for name, value in zip(("vx", "vy", "yaw", "height"), command, strict=True):
                low, high = getattr(cfg, f"command_{name}")
                assert title in ("stand", "jump") or low <= value <= high


def test_video(tmp_path, monkeypatch):
    """The captions say what was commanded, in order; a jump is commanded in the segment of that name alone."""
    if video.find_gl() is None:
        pytest.skip(video.missing_gl_message())
    frames = []
    frame = video.Recorder.frame

    def spy(self, qpos, lines, *rest):
        frames.append((lines, *rest))
        return frame(self, qpos, lines, *rest) if len(frames) % 20 == 0 else None

    monkeypatch.setattr(video.Recorder, "frame", spy)
    path = tmp_path / "videos" / "a.mp4"
    assert go2_eval.record_video(stand, config(commands="full"), path, seconds=8) == path
    assert path.stat().st_size > 1000 and len(frames) == 200
    titles = list(dict.fromkeys(lines[0].split("   ")[0] for lines, _, _ in frames))
    assert titles == [title for title, _, _ in go2_eval.command_script(Go2Config(commands="full"))]
    jumps = {lines[0].split("   ")[0] for lines, _, _ in frames if "jump" in lines[1][0]}
    assert jumps == {"jump"}
    assert any("vx +2.00 m/s" in lines[1][0] for lines, _, _ in frames)
    assert {body for _, body, _ in frames} == {"base"}
    assert all(arrows for lines, _, arrows in frames if lines[0].startswith(("forward", "sideways", "backward")))


def test_video_of_a_fall(tmp_path, monkeypatch):
    if video.find_gl() is None:
        pytest.skip(video.missing_gl_message())
    captions = []
    monkeypatch.setattr(video.Recorder, "frame", lambda self, qpos, lines, *rest: captions.append(lines))
    over = torch.tensor([[3.0, 0, 0, 3.0, 0, 0] * 2])
    go2_eval.record_video(lambda obs: over, config(), tmp_path / "a.mp4", seconds=1)
    assert len(captions) == 25 and ("fell and starts again", "#FF6060") in captions[-1]


def test_no_video_without_gl(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(video, "find_gl", lambda: None)
    assert go2_eval.record_video(stand, config(), tmp_path / "a.mp4") is None
    assert capsys.readouterr().out.strip() == video.missing_gl_message()
    assert not list(tmp_path.iterdir())


def test_arrows_point_along_the_heading():
    qpos = np.array([1.0, 2, 0.3, np.cos(np.pi / 4), 0, 0, np.sin(np.pi / 4)])  # turned left by 90 degrees
    (_, forward, _), (_, left, _) = go2_eval._velocity_arrows(qpos, np.pi / 2, np.array([1.0, 0]), np.array([0, 1.0]))
    np.testing.assert_allclose(forward, (0, 0.45, 0), atol=1e-12)
    np.testing.assert_allclose(left, (-0.45, 0, 0), atol=1e-12)
    assert go2_eval._velocity_arrows(qpos, 0.0, np.zeros(2), np.zeros(2)) == []


def test_report(standing, tmp_path, capsys):
    go2_eval.report(stand, config(), standing, tmp_path, "final_model", save_video=False)
    assert json.loads((tmp_path / "eval" / "final_model.json").read_text())["falls"] == 0
    assert (tmp_path / "eval" / "final_model.png").is_file()
    assert "0 of 126 fell" in capsys.readouterr().out


def test_jumps_by_hand():
    """Standing is no jump; a thrust of all legs while the jump is commanded leaves the ground, arrives and lands."""
    changes = {"commands": "full", "termination_degrees": 60.0}
    result = go2_eval.evaluate_jumps(stand, config(**changes), "cpu", 8)
    assert result["jump_success_rate"] == result["jump_airborne_rate"] == result["jump_fall_rate"] == 0
    low, high = Go2Config().command_jump
    assert low <= result["jump_target"] <= high and result["jump_apex"] < 0.35
    thrust = torch.tensor([0, -2.5, 5.5] * 2 + [0, -4.5, 5.5] * 2)

    def jump(obs):
        return torch.where(obs[:, 13:14] > 0, thrust, 0.0)

    result = go2_eval.evaluate_jumps(jump, config(**changes), "cpu", 8)
    assert result["jump_airborne_rate"] == 1 and result["jump_success_rate"] > 0.8 and result["jump_apex"] > 0.6
