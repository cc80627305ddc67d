"""A scripted expert for the ALOHA tasks: a function of the present state alone, so that it can label any state.

Each arm goes above its object, down, closes, lifts; then the peg follows the axis of the socket into it, wherever the
socket is, or the left arm reaches for the cube that the right one holds up. What to do next is read off the geometry
and not remembered, so whatever is dropped or pushed is picked up again. Batched over worlds in torch.
"""

import math

import torch

from common.envs.aloha import AlohaConfig, AlohaEnv

# m, of the ViperX 300 in gym-aloha's vx300s_left.xml: from the base to the shoulder's axis, from there to the elbow's
# (forward and up), on to the wrist's, and from it to the point between the fingertips.
SHOULDER_HEIGHT = 0.079 + 0.04805
UPPER_ARM = (0.05955, 0.0, 0.3)
FOREARM = 0.2 + 0.1
HAND = 0.069744 + 0.135
UPPER_LENGTH, UPPER_ANGLE = math.hypot(UPPER_ARM[0], UPPER_ARM[2]), math.atan2(UPPER_ARM[2], UPPER_ARM[0])
BASES = ((-0.469, 0.5, 0.0), (0.469, 0.5, 0.0))  # m, left and right; the right one faces the left one
LOWEST = (-3.14158, -1.85005, -1.76278, -3.14158, -1.8675, -3.14158)  # rad, the joints' range
HIGHEST = (3.14158, 1.25664, 1.6057, 3.14158, 2.23402, 3.14158)

PITCH = math.radians(60)  # of a gripper that takes something from the table, downwards
HOVER = 0.08  # m above it, where the gripper comes from
FLOOR = 0.02  # m, the lowest a tool goes; below it the fingertips meet the table
MEET = (-0.07, 0.5, 0.2)  # m, where the socket waits for the peg
REST = (0.13, 0.5, 0.2)  # m, where the peg waits for the socket
TOUCHING, INSIDE = 0.12, 0.09  # m between the middles of peg and socket: tip at the mouth; beyond the pin, at .1
LOOSE = 0.01  # m off the axis of the socket that still lets the peg in; the clearance of .008 m guides it
HANDOVER = (0.03, 0.5, 0.25)  # m, where the cube waits for the left arm
ASIDE = (-0.2, 0.5, 0.25)  # m, where the left arm waits for the cube
CLOSED = 0.3  # of the gripper's target, below which it is closing
STILL = 0.03  # m/s, a finger that is stopped by what it holds, or nearly so

# Shares of what is missing by which a joint's target moves in a step. Most of it is steered by the target, which does
# not lag; the rest by the joint itself, which friction keeps behind its target by up to .01 rad.
BY_TARGET, BY_JOINT = 0.6, 0.3


def rotation(axis: int, angle: torch.Tensor) -> torch.Tensor:
    """(..., 3, 3) about axis 0, 1 or 2 by `angle` (...) rad."""
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix = torch.zeros(*angle.shape, 3, 3, dtype=angle.dtype, device=angle.device)
    matrix[..., axis, axis] = 1
    matrix[..., i, i] = matrix[..., j, j] = torch.cos(angle)
    matrix[..., j, i] = torch.sin(angle)
    matrix[..., i, j] = -matrix[..., j, i]
    return matrix


def forward_kinematics(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tool point (..., 3) and axes (..., 3, 3) of joints (..., 6), in the frame of the base. The x axis points out of
    the gripper, y from finger to finger.
    """
    waist = rotation(2, q[..., 0])
    forearm = waist @ rotation(1, q[..., 1] + q[..., 2])
    hand = forearm @ rotation(0, q[..., 3]) @ rotation(1, q[..., 4]) @ rotation(0, q[..., 5])
    elbow = waist @ rotation(1, q[..., 1]) @ torch.tensor(UPPER_ARM, dtype=q.dtype, device=q.device)
    place = elbow + FOREARM * forearm[..., 0] + HAND * hand[..., 0]
    place[..., 2] += SHOULDER_HEIGHT
    return place, hand


def inverse_kinematics(place: torch.Tensor, hand: torch.Tensor) -> torch.Tensor:
    """Joints (..., 6) that bring the tool to `place` (..., 3) with axes `hand` (..., 3, 3) in the base's frame.

    In closed form: the three last axes meet in the wrist. Of the solutions the one with the elbow up and the forearm
    rolled by less than 90 degrees. A place out of reach gets the arm stretched towards it.
    """
    wrist = place - HAND * hand[..., 0]
    waist = torch.atan2(wrist[..., 1], wrist[..., 0])
    ahead, up = torch.hypot(wrist[..., 0], wrist[..., 1]), wrist[..., 2] - SHOULDER_HEIGHT
    far = torch.hypot(ahead, up).clamp(min=0.05)
    at_shoulder = torch.acos(((UPPER_LENGTH**2 + far**2 - FOREARM**2) / (2 * UPPER_LENGTH * far)).clamp(-1, 1))
    at_wrist = torch.acos(((FOREARM**2 + far**2 - UPPER_LENGTH**2) / (2 * FOREARM * far)).clamp(-1, 1))
    slope = torch.atan2(up, ahead)
    shoulder = UPPER_ANGLE - slope - at_shoulder
    elbow = at_wrist - slope - shoulder
    inner = (rotation(2, waist) @ rotation(1, shoulder + elbow)).mT @ hand
    sign = torch.where(inner[..., 2, 0] > 0, -1.0, 1.0).to(place.dtype)
    bend = sign * torch.acos(inner[..., 0, 0].clamp(-1, 1))
    roll = torch.atan2(sign * inner[..., 1, 0], -sign * inner[..., 2, 0])
    turn = torch.atan2(sign * inner[..., 0, 1], sign * inner[..., 0, 2])
    return torch.stack((waist, shoulder, elbow, roll, bend, turn), -1)


def matrix(quaternion: torch.Tensor) -> torch.Tensor:
    """Rotation matrices (..., 3, 3) of quaternions (..., 4), w first."""
    w, x, y, z = quaternion.unbind(-1)
    rows = (
        torch.stack((1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)), -1),
        torch.stack((2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)), -1),
        torch.stack((2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)), -1),
    )
    return torch.stack(rows, -2)


def turn(vector: torch.Tensor) -> torch.Tensor:
    """Rotation matrices (..., 3, 3) about and by rotation vectors (..., 3)."""
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    rows = torch.stack((zero, -z, y), -1), torch.stack((z, zero, -x), -1), torch.stack((-y, x, zero), -1)
    return torch.linalg.matrix_exp(torch.stack(rows, -2))


class Expert:
    """`expert(env)`: the action (num_envs, 14) for the present states, in the units of the environment's actions."""

    def __init__(self, cfg: AlohaConfig, device: str | torch.device = "cpu"):
        self.cfg, self.device = cfg, device
        self.bases = self._tensor(BASES)
        self.facing = self._tensor((1.0, -1.0))  # along x
        self.turned = rotation(2, self._tensor((0.0, math.pi)))  # (2, 3, 3), the bases' axes
        self.lowest, self.highest = self._tensor(LOWEST) - 0.1, self._tensor(HIGHEST) + 0.1
        self.step_size = self._tensor(((cfg.joint_step,) * 6 + (cfg.gripper_step,)) * 2)

    def _tensor(self, values) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.device)

    def __call__(self, env: AlohaEnv) -> torch.Tensor:
        return self.action(env.physics.qpos, env.physics.qvel, env.target)

    def action(self, qpos: torch.Tensor, qvel: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Of any states: (k, nq), (k, nv), and the joints' targets in them (k, 14) as in `env.target`."""
        cfg, qpos, qvel = self.cfg, qpos.double(), qvel.double()
        arms, speeds, targets = qpos[:, :16].view(-1, 2, 8), qvel[:, :16].view(-1, 2, 8), target.view(-1, 2, 7)
        joints, fingers = arms[..., :6], arms[..., 6]
        closing = targets[..., 6] < CLOSED
        gripping = closing & (speeds[..., 6].abs() < STILL)
        place, hand = forward_kinematics(joints)
        place = self.bases + (self.turned @ place[..., None])[..., 0]
        hand = self.turned @ hand
        plan = self._insertion if cfg.task == "insertion" else self._transfer
        goal, axes, close = plan(qpos[:, 16:], fingers, closing, gripping, place, hand)

        goal = (self.turned.mT @ (goal - self.bases)[..., None])[..., 0]
        wanted = inverse_kinematics(goal, self.turned.mT @ axes)
        # A grip that leads to where the arm cannot go is given up for another.
        close = close & ((wanted > self.lowest) & (wanted < self.highest)).all(-1)
        step = BY_TARGET * (wanted - targets[..., :6]) + BY_JOINT * (wanted - joints)
        # The joints of an arm arrive together, so that the gripper moves in a line.
        step = step / (step.abs().amax(-1, keepdim=True) / cfg.joint_step).clamp(min=1)
        grip = torch.where(close, -cfg.gripper_step, cfg.gripper_step)
        change = torch.cat((step, grip[..., None]), -1).flatten(1)
        if cfg.action_mode == "delta":
            return (change / self.step_size).float()
        moved = (targets + change.view_as(targets)).clone()
        moved[..., 6] = moved[..., 6].clamp(0, 1)
        return moved.flatten(1).float()

    def _grasp(self, thing, along, fingers, closing, gripping, place, hand):
        """To take hold of objects at `thing` (k, 2, 3) across their horizontal axes `along`, which point away from the
        arms: where the tools go, with which axes, which grippers close, and which of them hold their object.
        """
        heading = torch.atan2(along[..., 1], along[..., 0])
        axes = rotation(2, heading) @ rotation(1, torch.full_like(heading, PITCH))
        goal = thing.clone()
        goal[..., 2] = goal[..., 2].clamp(min=FLOOR)
        askew = torch.linalg.vector_norm(axes[..., 1] - hand[..., 1], dim=-1)
        beside = torch.linalg.vector_norm((place - goal)[..., :2], dim=-1) + 0.05 * askew
        above = place[..., 2] - goal[..., 2]
        there = (beside < 0.015) & (above.abs() < 0.015)
        inside = (hand.mT @ (thing - place)[..., None])[..., 0].abs() < self._tensor((0.03, 0.015, 0.03))
        between = inside.all(-1) & closing
        holds = between & gripping
        too_narrow = (fingers < 0.05) & (above > 0.03) & ~holds
        # A funnel: the further beside the object, the higher above it.
        goal[..., 2] += torch.where(too_narrow, HOVER, (4 * (beside - 0.01)).clamp(0, HOVER))
        return goal, axes, there | between, holds

    def _insertion(self, pose, fingers, closing, gripping, place, hand):
        pose = torch.stack((pose[:, 7:], pose[:, :7]), 1)  # the left arm's socket, the right one's peg
        thing, along = pose[..., :3], matrix(pose[..., 3:])[..., 0]
        along = along * torch.where(along[..., :1] * self.facing[:, None] < 0, -1.0, 1.0)
        goal, axes, close, holds = self._grasp(thing, along, fingers, closing, gripping, place, hand)
        # What is held goes where it should be, and the tool with it: the peg onto the axis of the socket, then into it.
        along = along * self.facing[:, None]  # both to +x
        (socket, peg), axis = thing.unbind(1), along[:, 0]
        gap = ((peg - socket) * axis).sum(-1, keepdim=True)
        off = torch.linalg.vector_norm(peg - socket - gap * axis, dim=-1, keepdim=True)
        skew = torch.linalg.vector_norm(along[:, 1] - axis, dim=-1, keepdim=True)
        back = (TOUCHING + 0.05 - INSIDE) * ((off + 0.06 * skew - LOOSE) / 0.005).clamp(0, 1)
        entered = (gap < TOUCHING) & (off < 0.01)
        follow = socket + (INSIDE + torch.where(entered, 0.0, back)) * axis
        both = holds.all(1, keepdim=True)
        level = self._tensor((1.0, 0.0, 0.0)).expand_as(socket)
        there = torch.stack((self._tensor(MEET).expand_as(socket), torch.where(both, follow, self._tensor(REST))), 1)
        straight = torch.stack((level, torch.where(both, axis, level)), 1)
        turning = turn(torch.linalg.cross(along, straight))
        carried = there + (turning @ (place - thing)[..., None])[..., 0]
        goal = torch.where(holds[..., None], carried, goal)
        return goal, torch.where(holds[..., None, None], turning @ hand, axes), close

    def _transfer(self, pose, fingers, closing, gripping, place, hand):
        cube, sides = pose[:, None, :3].expand(-1, 2, 3), matrix(pose[:, 3:])
        side = torch.where(sides[:, 2:, 0].abs() < 0.7, sides[..., 0], sides[..., 1])  # one that lies level
        quarter = math.pi / 2
        heading = torch.atan2(side[:, 1], side[:, 0])
        heading = heading - quarter * torch.round(heading / quarter)  # of the four, the one along x
        along = torch.stack((torch.cos(heading), torch.sin(heading), torch.zeros_like(heading)), -1)
        along = along[:, None] * self.facing[:, None]
        goal, axes, close, holds = self._grasp(cube, along, fingers, closing, gripping, place, hand)
        # The right arm holds the cube up; the left one comes along x, with its fingers above and below it.
        held = holds[:, 1, None]
        raised = held & ((cube[:, 0] - self._tensor(HANDOVER)).norm(dim=-1, keepdim=True) < 0.02)
        lying = rotation(0, torch.full_like(heading, quarter))
        skew = (lying - hand[:, 0]).flatten(1).norm(dim=-1, keepdim=True)
        beside = (cube - place)[:, 0, 1:].norm(dim=-1, keepdim=True) + 0.05 * skew
        before = cube[:, 0] - self._tensor((1.0, 0.0, 0.0)) * (4 * (beside - 0.01)).clamp(0, 0.1)
        left = torch.where(raised, before, self._tensor(ASIDE))
        arrived = raised[:, 0] & ((cube - place)[:, 0].norm(dim=-1) < 0.015)
        right = torch.where(held, self._tensor(HANDOVER) + (place - cube)[:, 1], goal[:, 1])
        axes = torch.stack((lying, torch.where(held[..., None], hand[:, 1], axes[:, 1])), 1)
        return torch.stack((left, right), 1), axes, torch.stack((arrived, close[:, 1]), 1)
