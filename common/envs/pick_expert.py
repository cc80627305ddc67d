"""A scripted expert for picking and placing: a function of the present state alone, so that it can label any state.

The hand goes above the cube of the instruction, down, closes, lifts, and where a pad is named carries the cube there,
sets it down and lets it go. What to do next is read off the geometry and not remembered. The later actions of a chunk
follow from a forecast: the hand goes where it is sent, the gripper closes at once, and a cube that is held moves along.
"""

import math

import torch

from common.envs.pick import CUBE, FINGER_OPEN, ON_PAD, POSITION_STEP, YAW_STEP, PickEnv

HOVER = 0.07  # m above the cube, where the hand comes from
FUNNEL, RIM = 3.0, 0.008  # the hand is FUNNEL times as high above the cube as it is further beside it than RIM (m)
AT = 0.01  # m between hand and cube, at which the gripper closes
SKEW = 0.12  # rad, the most that the hand is turned against the cube when it goes down
LIFT = 0.12  # m, where the hand goes with a cube that was to be picked up
CARRY = 0.11  # m, where it goes over the table with one that is to be put down
DOWN, LOW = CUBE / 2, CUBE / 2 + 0.01  # m, the height that a cube is lowered to, and from which it may be let go
SLOPE, ROOM = 2.0, 0.02  # the same funnel, over the pad
FOLLOW = 0.6  # share of its way to the target that the hand goes in a control step


class Expert:
    """`expert(env)`: the actions (num_envs, chunk, 7) for the present states; (num_envs, 7) where the chunk is 1."""

    def __call__(self, env: PickEnv) -> torch.Tensor:
        state = {"target": env.target[:, :3], "yaw": env.target[:, 3], "tcp": env.tcp, "width": env.width}
        state |= {"cube": env.cubes[:, 0], "cube_yaw": env.cube_yaw[:, 0], "put": env.put, "pad": env.pads[:, 0]}
        actions = []
        for _ in range(env.cfg.chunk):
            action = self.action(state)
            actions.append(action)
            state = self.forecast(state, action)
        return actions[0] if env.cfg.chunk == 1 else torch.stack(actions, 1)

    def action(self, state: dict[str, torch.Tensor]) -> torch.Tensor:
        """(N, 7) of a state: the hand's `target` (N, 3) and its `yaw` (N,), the hand itself `tcp` (N, 3), the gap
        between the fingers `width` (N,), `cube` (N, 3) and its `cube_yaw` (N,), whether it is to be
        `put` (N,) on `pad` (N, 2).
        """
        cube, tcp, pad, put = state["cube"], state["tcp"], state["pad"], state["put"]
        quarter = math.pi / 2
        # Of the cube's four sides one that is near to how the hand is turned, and not far from the middle of its range.
        wanted_yaw = state["cube_yaw"] - quarter * torch.round((state["cube_yaw"] - state["yaw"] / 2) / quarter)
        skew = (wanted_yaw - state["yaw"]).abs()
        held = self.held(state)

        # To the cube, down a funnel.
        beside = (cube - tcp)[:, :2].norm(dim=1)
        above = (FUNNEL * (beside - RIM)).clamp(0, HOVER)
        above = torch.where((skew > SKEW) & (beside > RIM), HOVER, above)
        too_narrow = (state["width"] < CUBE + 0.015) & (tcp[:, 2] - cube[:, 2] > 0.02)
        above = torch.where(too_narrow, HOVER, above)
        grasp = torch.cat((cube[:, :2], (cube[:, 2] + above)[:, None]), 1)
        close = ((cube - tcp).norm(dim=1) < AT) & (skew < SKEW)

        # With the cube: up, and over the pad down a funnel.
        to_pad = pad - cube[:, :2]
        off = to_pad.norm(dim=1)
        height = (DOWN + SLOPE * (off - ROOM).clamp(min=0)).clamp(max=CARRY)
        # Sideways only as far as it is high enough.
        risen = ((cube[:, 2] - height + 0.05) / 0.02).clamp(0, 1)
        sideways = tcp[:, :2] + risen[:, None] * to_pad
        carry = torch.cat((sideways, (height + tcp[:, 2] - cube[:, 2])[:, None]), 1)
        lift = torch.cat((cube[:, :2], torch.full_like(off, LIFT)[:, None]), 1)
        with_cube = torch.where(put[:, None], carry, lift)

        # The cube lies where it should: open, and up.
        arrived = put & ((cube[:, :2] - pad).abs().amax(1) < 0.7 * ON_PAD) & (cube[:, 2] < LOW)
        leave = torch.cat((tcp[:, :2], torch.full_like(off, CARRY)[:, None]), 1)
        leave = torch.where((state["width"] > CUBE + 0.01)[:, None], leave, state["target"])

        goal = torch.where(arrived[:, None], leave, torch.where(held[:, None], with_cube, grasp))
        move = (goal - state["target"]) / POSITION_STEP
        move = move / move.norm(dim=1, keepdim=True).clamp(min=1)  # in a straight line
        turn = ((wanted_yaw - state["yaw"]) / YAW_STEP).clamp(-1, 1)
        turn = torch.where(held | arrived, 0.0, turn)
        grip = torch.where((close | held) & ~arrived, -1.0, 1.0)
        zero = torch.zeros_like(turn)
        return torch.cat((move, torch.stack((zero, zero, turn, grip), 1)), 1)

    def held(self, state: dict[str, torch.Tensor]) -> torch.Tensor:
        return ((state["cube"] - state["tcp"]).norm(dim=1) < 2 * AT) & ((state["width"] - CUBE).abs() < 0.003)

    def forecast(self, state: dict[str, torch.Tensor], action: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state a control step after `action` (N, 7)."""
        held = self.held(state) & (action[:, 6] < 0)
        target = state["target"] + POSITION_STEP * action[:, :3]
        moved = FOLLOW * (target - state["tcp"])
        between = (state["cube"] - state["tcp"]).norm(dim=1) < 2 * AT
        gap = FINGER_OPEN * (1 + action[:, 6])
        width = torch.where(between, gap.clamp(min=CUBE), gap)
        cube = torch.where(held[:, None], state["cube"] + moved, state["cube"])
        yaw = state["yaw"] + YAW_STEP * action[:, 5]
        return state | {"target": target, "tcp": state["tcp"] + moved, "width": width, "cube": cube, "yaw": yaw}
