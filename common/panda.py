"""Kinematics and mass matrix of the Franka Panda in torch, a batch at a time, on any device.

Source of the Denavit-Hartenberg parameters (Craig's convention): Franka Control Interface documentation, "Robot and
interface specifications". Masses and inertias are those of the compiled model of common/assets/panda.xml.
"""

import math

import mujoco
import numpy as np
import torch

# a (m), d (m), alpha (rad) of each joint, and of the flange after the seventh.
DH = (
    (0.0, 0.333, 0.0),
    (0.0, 0.0, -math.pi / 2),
    (0.0, 0.316, math.pi / 2),
    (0.0825, 0.0, math.pi / 2),
    (-0.0825, 0.384, -math.pi / 2),
    (0.0, 0.0, math.pi / 2),
    (0.088, 0.0, math.pi / 2),
    (0.0, 0.107, 0.0),
)
HAND_YAW = -math.pi / 4  # the hand about the flange's z axis
LOWER = (-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973)  # rad
UPPER = (2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973)
TORQUE_LIMITS = (87.0, 87.0, 87.0, 87.0, 12.0, 12.0, 12.0)  # Nm
JOINTS = tuple(f"joint{i}" for i in range(1, 8))


class Frames:
    """Forward kinematics of joint angles `q` (N, 7): `position` (N, 3) and `rotation` (N, 3, 3) of the hand, and of
    the seven link frames `origins` (N, 7, 3) and `rotations` (N, 7, 3, 3), columns being axes; all in the robot's base.
    """

    def __init__(self, q: torch.Tensor):
        zeros = torch.zeros(len(q), 3, dtype=q.dtype, device=q.device)
        x, y, z = (zeros.index_fill(1, torch.tensor([i], device=q.device), 1.0) for i in range(3))
        cos, sin = torch.cos(q), torch.sin(q)
        p, origins, axes = zeros, [], []
        for i, (a, d, alpha) in enumerate(DH):
            ca, sa = round(math.cos(alpha)), round(math.sin(alpha))  # all alpha are multiples of a right angle
            p = p + a * x
            y, z = ca * y + sa * z, ca * z - sa * y
            p = p + d * z
            if i < 7:
                c, s = cos[:, i, None], sin[:, i, None]
                x, y = c * x + s * y, c * y - s * x
                origins.append(p)
                axes.append(torch.stack((x, y, z), 2))
        c, s = math.cos(HAND_YAW), math.sin(HAND_YAW)
        self.position, self.rotation = p, torch.stack((c * x + s * y, c * y - s * x, z), 2)
        self.origins, self.rotations = torch.stack(origins, 1), torch.stack(axes, 1)

    def point(self, offset: float) -> torch.Tensor:
        """(N, 3) position of the point `offset` m along the hand's z axis."""
        return self.position + offset * self.rotation[:, :, 2]

    def jacobian(self, offset: float) -> torch.Tensor:
        """(N, 6, 7) geometric Jacobian, linear over angular velocity, of the point `offset` m along the hand's z."""
        z = self.rotations[..., 2]
        linear = torch.linalg.cross(z, self.point(offset)[:, None] - self.origins)
        return torch.cat((linear, z), 2).transpose(1, 2)


class MassMatrix:
    """The arm's joint-space mass matrix for a model of the Panda; hand and fingers are one body with link7."""

    def __init__(self, model: mujoco.MjModel, device: str | torch.device = "cpu"):
        data = mujoco.MjData(model)
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        masses, centres, inertias = [], [], []
        for link in range(1, 8):
            frame = data.body(f"link{link}")
            names = [f"link{link}"] + (["hand", "left_finger", "right_finger"] if link == 7 else [])
            parts = [data.body(name) for name in names]
            mass = np.array([model.body(name).mass[0] for name in names])
            com = mass @ np.stack([part.xipos for part in parts]) / mass.sum()
            tensor = np.zeros((3, 3))
            for name, part, m in zip(names, parts, mass, strict=True):
                axes, r = part.ximat.reshape(3, 3), part.xipos - com
                tensor += axes @ np.diag(model.body(name).inertia) @ axes.T + m * (r @ r * np.eye(3) - np.outer(r, r))
            R = frame.xmat.reshape(3, 3)
            masses.append(mass.sum())
            centres.append(R.T @ (com - frame.xpos))
            inertias.append(R.T @ tensor @ R)
        tensor = lambda values: torch.tensor(np.array(values), dtype=torch.float32, device=device)  # noqa: E731
        self.mass, self.centre, self.inertia = tensor(masses), tensor(centres), tensor(inertias)
        self.armature = torch.diag(tensor([model.joint(name).armature[0] for name in JOINTS]))
        # moves[l, i]: link l moves with joint i.
        self.moves = torch.tril(torch.ones(7, 7, device=device))[..., None]

    def __call__(self, frames: Frames) -> torch.Tensor:
        """(N, 7, 7) in kg m2, armature included."""
        R, z = frames.rotations, frames.rotations[..., 2]
        com = frames.origins + (R @ self.centre[..., None])[..., 0]
        arm = com[:, :, None] - frames.origins[:, None]  # (N, link, joint, 3)
        linear = torch.linalg.cross(z[:, None].expand_as(arm), arm) * self.moves
        angular = (z[:, None] * self.moves) @ R  # (N, link, joint, 3) in the axes of the link
        matrix = (linear @ linear.transpose(2, 3)) * self.mass[:, None, None]
        matrix = matrix + angular @ self.inertia @ angular.transpose(2, 3)
        return matrix.sum(1) + self.armature


def inverse_kinematics(
    q: torch.Tensor, position: torch.Tensor, rotation: torch.Tensor, offset: float, iterations: int = 8
) -> torch.Tensor:
    """(N, 7) joint angles near `q` (N, 7) at which the point `offset` m along the hand's z axis is at `position`
    (N, 3) and the hand's axes are `rotation` (N, 3, 3): damped least squares, without regard to joint limits.
    """
    damping = 1e-6 * torch.eye(6, dtype=q.dtype, device=q.device)
    for _ in range(iterations):
        frames = Frames(q)
        J = frames.jacobian(offset)
        error = torch.cat((position - frames.point(offset), rotation_error(rotation, frames.rotation)), 1)
        q = q + (J.transpose(1, 2) @ torch.linalg.solve(J @ J.transpose(1, 2) + damping, error[..., None]))[..., 0]
    return q


def rotation_error(target: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
    """(N, 3) rotation vector, in the base's axes, from `current` to `target`, each (N, 3, 3); to first order."""
    return 0.5 * torch.linalg.cross(current, target, dim=1).sum(2)


def quaternion_down(rotation: torch.Tensor) -> torch.Tensor:
    """(N, 4) w, x, y, z with x > 0 of rotations (N, 3, 3) whose z axis points down and whose yaw is within +-pi."""
    r = rotation
    x = 0.5 * (1 + r[:, 0, 0] - r[:, 1, 1] - r[:, 2, 2]).clamp(min=1e-6).sqrt()
    parts = (r[:, 2, 1] - r[:, 1, 2], 4 * x * x, r[:, 0, 1] + r[:, 1, 0], r[:, 0, 2] + r[:, 2, 0])
    return torch.stack(parts, 1) / (4 * x[:, None])
