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


def _dh_matrices() -> tuple[torch.Tensor, torch.Tensor]:
    """Rotation of joint i's frame in its parent's as C0 + cos(q) C1 + sin(q) C2, (3, 8, 3, 3), and its position there,
    (8, 3). The eighth, which does not move, is the hand's.
    """
    rotation, position = torch.zeros(3, 8, 3, 3, dtype=torch.float64), torch.zeros(8, 3, dtype=torch.float64)
    for i, (a, d, alpha) in enumerate(DH):
        # All alpha are multiples of a right angle, whose sines and cosines are whole numbers.
        ca, sa = round(math.cos(alpha)), round(math.sin(alpha))
        rotation[0, i] = torch.tensor([[0, 0, 0], [0, 0, -sa], [0, 0, ca]])
        rotation[1, i] = torch.tensor([[1, 0, 0], [0, ca, 0], [0, sa, 0]])
        rotation[2, i] = torch.tensor([[0, -1, 0], [ca, 0, 0], [sa, 0, 0]])
        position[i] = torch.tensor([a, -sa * d, ca * d], dtype=torch.float64)
    return rotation, position


DH_ROTATION, DH_POSITION = _dh_matrices()


class Frames:
    """Forward kinematics of joint angles `q` (N, 7): `position` (N, 3) and `rotation` (N, 3, 3) of the hand, and of
    the seven link frames `origins` (N, 7, 3) and `rotations` (N, 7, 3, 3), columns being axes; all in the robot's base.
    """

    def __init__(self, q: torch.Tensor):
        fixed, with_cos, with_sin = DH_ROTATION.to(q)
        q = torch.nn.functional.pad(q, (0, 1), value=HAND_YAW)[..., None, None]  # (N, 8, 1, 1)
        steps = (fixed + torch.cos(q) * with_cos + torch.sin(q) * with_sin).unbind(1)
        rotations = [steps[0]]
        for step in steps[1:]:
            rotations.append(rotations[-1] @ step)
        rotations = torch.stack(rotations, 1)
        offsets = DH_POSITION.to(q).expand(len(q), 8, 3)
        moved = rotations[:, :-1] @ offsets[:, 1:, :, None]
        positions = torch.cat((offsets[:, :1], moved[..., 0]), 1).cumsum(1)
        self.position, self.rotation = positions[:, 7], rotations[:, 7]
        self.origins, self.rotations = positions[:, :7], rotations[:, :7]

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
        self.centre = tensor(centres)
        # M is a sum of m v v' and w I w'; with these roots it is one product of a matrix with its transpose.
        self.root_mass, self.root_inertia = tensor(np.sqrt(masses)), tensor(np.linalg.cholesky(inertias))
        self.armature = torch.diag(tensor([model.joint(name).armature[0] for name in JOINTS]))
        # moved[i, l]: joint i moves link l.
        self.moved = torch.triu(torch.ones(7, 7, device=device))[..., None]

    def __call__(self, frames: Frames) -> torch.Tensor:
        """(N, 7, 7) in kg m2, armature included."""
        R, z = frames.rotations, frames.rotations[..., 2]
        com = frames.origins + (R @ self.centre[..., None])[..., 0]
        arm = com[:, None] - frames.origins[:, :, None]  # (N, joint, link, 3)
        linear = torch.linalg.cross(z[:, :, None].expand_as(arm), arm) * self.root_mass[:, None]
        angular = z @ (R @ self.root_inertia).transpose(1, 2).flatten(2)  # (N, joint, 3 * link)
        factor = (torch.cat((linear, angular.view_as(arm)), 3) * self.moved).flatten(2)
        return factor @ factor.transpose(1, 2) + self.armature


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
