"""A scripted expert for the ALOHA tasks: a function of the present state alone, so that it can label any state.

Each arm goes above its object, down, closes, lifts; then the peg follows the axis of the socket into it, wherever the
socket is, or the left arm reaches for the cube that the right one holds up. What to do next is read off the geometry and
not remembered, so whatever is dropped or pushed is picked up again. Batched over worlds in torch.
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
PITCH = math.radians(60)  # of the grippers, downwards
GAIN = 0.35  # share of a joint's error by which its target moves in a step; friction leaves a steady error at any target
FORESIGHT = 0.6
LOOSE = 0.004  # m, how far off the socket's axis the peg may enter; the clearance is .008
STILL = 0.03  # m/s, a finger that has stopped


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
    """Tool point (..., 3) and axes (..., 3, 3), x out of the gripper, y across its fingers, in the base's frame, of joints
    (..., 6).
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


def axes(quaternion: torch.Tensor) -> torch.Tensor:
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
    """`expert(env)` is the action (num_envs, 14), in the units of `env.cfg.action_mode`, for the present states."""

    def __init__(self, cfg: AlohaConfig, device: str | torch.device = "cpu"):
        self.cfg, tensor = cfg, lambda values: torch.tensor(values, dtype=torch.float64, device=device)  # noqa: E731
        self.bases = tensor(BASES)
        self.facing = tensor((1.0, -1.0))  # along x
        self.turned = rotation(2, tensor((0.0, math.pi)))  # (2, 3, 3), the bases' axes

    def __call__(self, env: AlohaEnv) -> torch.Tensor:
        return self.action(env.physics.qpos, env.physics.qvel, env.target)

    def action(self, qpos: torch.Tensor, qvel: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Of states (k, nq) and (k, nv), and the joints' targets in them (k, 14)."""
        qpos = qpos.double()
        arms, speeds = qpos[:, :16].view(-1, 2, 8), qvel[:, :16].double().view(-1, 2, 8)
        joints = arms[..., :6]
        grip = target.view(-1, 2, 7)[..., 6]
        still = (grip < 0.3) & (speeds[..., 6].abs() < STILL)  # closed on something, or on nothing
        place, hand = forward_kinematics(joints)
        place = self.bases + (self.turned @ place[..., None])[..., 0]
        hand = self.turned @ hand
        plan = self._insertion if self.cfg.task == "insertion" else self._transfer
        new_place, new_hand, closed = plan(qpos, arms[..., 6], grip, still, place, hand)
        local = (self.turned.mT @ (new_place - self.bases)[..., None])[..., 0]
        wanted = inverse_kinematics(local, self.turned.mT @ new_hand)
        step = FORESIGHT * (wanted - target.view(-1, 2, 7)[..., :6]) + GAIN * (wanted - joints)
        # The joints of an arm arrive together, so that the gripper moves in a line.
        step = step / (step.abs().amax(-1, keepdim=True) / self.cfg.joint_step).clamp(min=1)
        grip = torch.where(closed, -self.cfg.gripper_step, self.cfg.gripper_step)
        change = torch.cat((step, grip[..., None]), -1).flatten(1)
        if self.cfg.action_mode == "absolute":
            moved = target + change
            moved[:, [6, 13]] = moved[:, [6, 13]].clamp(0, 1)
            return moved.float()
        sizes = torch.tensor(((self.cfg.joint_step,) * 6 + (self.cfg.gripper_step,)) * 2).to(change)
        return (change / sizes).float()

    def _grasp(self, thing, along, fingers, grip, still, place, hand):
        """Where the tools go to take hold of objects at `thing` (k, 2, 3) with long axes `along`, how they are turned,
        which close (k, 2), and which hold."""
        heading = torch.atan2(along[..., 1], along[..., 0])
        wanted = rotation(2, heading) @ rotation(1, torch.full_like(heading, PITCH))
        turned = torch.linalg.vector_norm(wanted[..., 1] - hand[..., 1], dim=-1)
        goal = thing.clone()
        goal[..., 2] = goal[..., 2].clamp(min=0.02)
        beside = torch.linalg.vector_norm((place - goal)[..., :2], dim=-1) + 0.05 * turned
        above = place[..., 2] - goal[..., 2]
        there = (beside < 0.015) & (above.abs() < 0.015)
        inside = (hand.mT @ (thing - place)[..., None])[..., 0].abs()
        around = (inside < torch.tensor((0.03, 0.015, 0.03)).to(inside)).all(-1)
        holds = around & still
        opening = (fingers < 0.05) & (above > 0.03) & ~holds
        goal[..., 2] += torch.where(opening, 0.08, (4 * (beside - 0.01)).clamp(0, 0.08))
        return goal, wanted, there | (around & (grip < 0.3)), holds

    def _insertion(self, qpos, fingers, grip, still, place, hand):
        pose = torch.stack((qpos[:, 23:30], qpos[:, 16:23]), 1)  # the left arm's socket, the right one's peg
        thing, along = pose[..., :3], axes(pose[..., 3:])[..., 0]
        outwards = along * torch.sign(along[..., :1] * self.facing[:, None])
        goal, wanted, closed, holds = self._grasp(thing, outwards, fingers, grip, still, place, hand)
        # Once held, an object goes where it should be, and the tool goes with it.
        axis = outwards.clone()
        axis[:, 1] = -axis[:, 1]  # both point to +x now
        meet = torch.tensor((-0.07, 0.5, 0.2)).to(thing)
        socket, peg = thing[:, 0], thing[:, 1]
        between = peg - socket
        gap = (between * axis[:, 0]).sum(-1)
        aside = torch.linalg.vector_norm(between - gap[:, None] * axis[:, 0], dim=-1)
        askew = torch.linalg.vector_norm(axis[:, 1] - axis[:, 0], dim=-1)
        off = aside + 0.06 * askew
        inserting = (gap < 0.118) & (aside < 0.008)
        next_gap = torch.where(inserting, 0.09, 0.09 + 0.08 * ((off - LOOSE) / 0.004).clamp(0, 1))
        both = holds.all(1)
        follow = socket + next_gap[:, None] * axis[:, 0]
        rest = torch.tensor((0.13, 0.5, 0.2)).to(thing)
        there = torch.stack((meet.expand_as(socket), torch.where(both[:, None], follow, rest)), 1)
        level = torch.tensor((1.0, 0.0, 0.0)).to(thing).expand_as(socket)
        straight = torch.stack((level, torch.where(both[:, None], axis[:, 0], level)), 1)
        correction = turn(torch.linalg.cross(axis, straight))
        carried = there + (correction @ (place - thing)[..., None])[..., 0]
        goal = torch.where(holds[..., None], carried, goal)
        wanted = torch.where(holds[..., None, None], correction @ hand, wanted)
        return goal, wanted, closed

    def _transfer(self, qpos, fingers, grip, still, place, hand):
        thing = qpos[:, None, 16:19].expand(-1, 2, 3)
        sides = axes(qpos[:, 19:23])
        side = torch.where(sides[:, 2:, 0].abs() < 0.7, sides[..., 0], sides[..., 1])  # one that lies level
        quarter = math.pi / 2
        heading = torch.atan2(side[:, 1], side[:, 0])
        heading = heading - quarter * torch.round(heading / quarter)
        along = torch.stack((torch.cos(heading), torch.sin(heading), torch.zeros_like(heading)), -1)
        outwards = along[:, None] * self.facing[:, None]
        goal, wanted, closed, holds = self._grasp(thing, outwards, fingers, grip, still, place, hand)
        # The right arm holds the cube up, a little to its own side; the left one comes along x, fingers above and below.
        held = holds[:, 1]
        meet = torch.tensor((0.03, 0.5, 0.25)).to(thing)
        carried = meet + place[:, 1] - thing[:, 1]
        sideways = rotation(0, torch.full_like(heading, quarter))
        aside = (thing - place)[:, 0, 1:].norm(dim=-1) + 0.05 * (sideways - hand[:, 0]).flatten(1).norm(dim=-1)
        away = torch.tensor((1.0, 0.0, 0.0)).to(thing) * (4 * (aside - 0.01)).clamp(0, 0.1)[:, None]
        raised = held & ((thing[:, 0] - meet).norm(dim=-1) < 0.02)
        waiting = torch.tensor((-0.2, 0.5, 0.25)).to(thing)
        left = torch.where(raised[:, None], thing[:, 0] - away, waiting)
        near = raised & ((thing - place)[:, 0].norm(dim=-1) < 0.015)
        goal = torch.stack((left, torch.where(held[:, None], carried, goal[:, 1])), 1)
        wanted = torch.stack((sideways, torch.where(held[:, None, None], hand[:, 1], wanted[:, 1])), 1)
        return goal, wanted, torch.stack((near, closed[:, 1]), 1)
