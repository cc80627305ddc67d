"""common/assets/panda.xml and common/panda.py against published figures and MuJoCo's own kinematics."""

import math
from pathlib import Path

import mujoco
import numpy as np
import pytest
import torch

from common.panda import JOINTS, LOWER, UPPER, Frames, MassMatrix, inverse_kinematics, quaternion_down

PANDA = Path(__file__).parents[1] / "common/assets/panda.xml"
# Franka Control Interface documentation, Craig's convention: a, d (m), alpha (rad) of joints 1 to 7 and of the flange.
A = (0, 0, 0, 0.0825, -0.0825, 0, 0.088, 0)
D = (0.333, 0, 0.316, 0, 0.384, 0, 0, 0.107)
ALPHA = tuple(np.radians((0, -90, 90, 90, -90, 90, 90, 0)))
LIMITS = ((-2.8973, 2.8973), (-1.7628, 1.7628), (-2.8973, 2.8973), (-3.0718, -0.0698))
LIMITS += ((-2.8973, 2.8973), (-0.0175, 3.7525), (-2.8973, 2.8973))
TORQUES = (87, 87, 87, 87, 12, 12, 12)  # Nm
MASSES = (4.970684, 0.646926, 3.228604, 3.587895, 1.225946, 1.666555, 0.735522)  # kg, Gaz et al. 2019
OFFSET = 0.1034  # m, the hand's "tcp"


@pytest.fixture(scope="module")
def panda():
    return mujoco.MjModel.from_xml_path(str(PANDA))


def flange(q) -> np.ndarray:
    """4x4 pose of the flange, by multiplying homogeneous matrices."""
    pose = np.eye(4)
    for a, d, alpha, theta in zip(A, D, ALPHA, (*q, 0.0), strict=True):
        ca, sa, ct, st = math.cos(alpha), math.sin(alpha), math.cos(theta), math.sin(theta)
        rows = [[ct, -st, 0, a], [st * ca, ct * ca, -sa, -sa * d], [st * sa, ct * sa, ca, ca * d], [0, 0, 0, 1]]
        pose = pose @ np.array(rows)
    return pose


def poses(n=20) -> np.ndarray:
    return np.random.default_rng(0).uniform(LOWER, UPPER, (n, 7))


def at(model, q) -> mujoco.MjData:
    data = mujoco.MjData(model)
    data.qpos[:7] = q
    mujoco.mj_forward(model, data)
    return data


def test_forward_kinematics_is_denavit_hartenberg(panda):
    """The model's hand and the torch kinematics', both to 1e-6 of the published parameters; the hand is turned by -45
    degrees about the flange."""
    turn = np.array([[1, 1, 0], [-1, 1, 0], [0, 0, math.sqrt(2)]]) / math.sqrt(2)
    frames = Frames(torch.from_numpy(poses()))
    for i, q in enumerate(poses()):
        expected, hand = flange(q), at(panda, q).body("hand")
        np.testing.assert_allclose(hand.xpos, expected[:3, 3], atol=1e-6)
        np.testing.assert_allclose(hand.xmat.reshape(3, 3), expected[:3, :3] @ turn, atol=1e-6)
        np.testing.assert_allclose(frames.position[i], hand.xpos, atol=1e-6)
        np.testing.assert_allclose(frames.rotation[i], hand.xmat.reshape(3, 3), atol=1e-6)


def test_single_precision_is_enough():
    q = torch.from_numpy(poses())
    exact, rounded = Frames(q), Frames(q.float())
    torch.testing.assert_close(rounded.point(OFFSET).double(), exact.point(OFFSET), atol=2e-6, rtol=0)


def test_figures(panda):
    for name, limits, torque in zip(JOINTS, LIMITS, TORQUES, strict=True):
        joint = panda.joint(name)
        np.testing.assert_allclose(joint.range, limits)
        np.testing.assert_allclose(panda.jnt_actfrcrange[joint.id], (-torque, torque))
    assert tuple(zip(*LIMITS, strict=True)) == (LOWER, UPPER)
    for link, mass in enumerate(MASSES, start=1):
        assert panda.body(f"link{link}").mass[0] == pytest.approx(mass)
    assert panda.body("hand").mass[0] == pytest.approx(0.73)
    for finger in ("finger_joint1", "finger_joint2"):
        np.testing.assert_allclose(panda.joint(finger).range, (0, 0.04))


def test_pads_meet_in_the_middle(panda):
    """Closed, the two pads' faces touch in the hand's plane y = 0, .017608 m high, their lower end at the fingertip."""
    data = at(panda, poses()[0])
    hand, rotation = data.body("hand").xpos, data.body("hand").xmat.reshape(3, 3)
    for name, side in (("left_pad", 1), ("right_pad", -1)):
        centre = (data.geom(name).xpos - hand) @ rotation
        size = panda.geom(name).size
        assert centre[1] == pytest.approx(side * size[1]) and centre[0] == pytest.approx(0)
        assert 2 * size[2] == pytest.approx(0.017608)
        tip = (data.site("fingertip").xpos - hand) @ rotation
        assert centre[2] + size[2] == pytest.approx(tip[2], abs=1e-5)
        assert tip[2] == pytest.approx(0.0584 + 0.053671)


def test_only_the_pads_collide(panda):
    touching = [panda.geom(i).name for i in range(panda.ngeom) if panda.geom(i).conaffinity[0]]
    assert sorted(touching) == ["left_pad", "right_pad"]
    assert not panda.geom_contype.any()


def test_jacobian(panda):
    frames = Frames(torch.from_numpy(poses()))
    jacobian = frames.jacobian(OFFSET)
    for i, q in enumerate(poses()):
        linear, angular = np.zeros((3, panda.nv)), np.zeros((3, panda.nv))
        mujoco.mj_jacSite(panda, at(panda, q), linear, angular, panda.site("tcp").id)
        np.testing.assert_allclose(jacobian[i], np.concatenate((linear, angular))[:, :7], atol=1e-9)


def test_mass_matrix(panda):
    """Fingers closed, as the torch matrix has them; against MuJoCo's."""
    matrices = MassMatrix(panda)(Frames(torch.from_numpy(poses()).float()))
    for q, matrix in zip(poses(), matrices, strict=True):
        full = np.zeros((panda.nv, panda.nv))
        mujoco.mj_fullM(panda, at(panda, q), full)
        np.testing.assert_allclose(matrix, full[:7, :7], atol=5e-6)
    assert matrices.diagonal(dim1=1, dim2=2).min() > 0.1  # armature


def test_inverse_kinematics():
    """From 0.2 rad away it comes back to the pose, though to other joint angles: seven joints for six numbers."""
    generator = torch.Generator().manual_seed(0)
    q = torch.tensor([0.0, 0.3, 0.0, -1.9, 0.0, 2.2, 0.8]).repeat(50, 1)
    q = q + 0.2 * (2 * torch.rand(50, 7, generator=generator) - 1)
    goal = Frames(q)
    start = q + 0.2 * (2 * torch.rand(50, 7, generator=generator) - 1)
    found = inverse_kinematics(start, goal.point(OFFSET), goal.rotation, OFFSET)
    frames = Frames(found)
    torch.testing.assert_close(frames.point(OFFSET), goal.point(OFFSET), atol=2e-6, rtol=0)
    torch.testing.assert_close(frames.rotation, goal.rotation, atol=5e-6, rtol=0)
    assert (found - q).abs().max() > 0.01


@pytest.mark.parametrize("yaw", (-2.5, -0.7, 0.0, 0.7, 2.5))
def test_quaternion_down(yaw):
    expected, matrix = np.zeros(4), np.zeros(9)
    tilt = 0.1
    mujoco.mju_euler2Quat(expected, np.array([math.pi - tilt, 0.05, yaw]), "XYZ")
    mujoco.mju_quat2Mat(matrix, expected)
    quaternion = quaternion_down(torch.from_numpy(matrix.reshape(1, 3, 3)))[0].numpy()
    assert quaternion[1] > 0
    np.testing.assert_allclose(quaternion, expected * np.sign(expected[1]), atol=1e-9)
