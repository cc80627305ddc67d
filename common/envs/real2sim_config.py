"""The flags of real2sim.py, what they take, and the user's own reward function."""

import importlib.util
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin

# What a reward function may ask for by the names of its parameters.
TENSORS = ("action", "tcp", "hand_rotation", "q", "qd", "target", "object", "object_quat", "object_velocity")
TENSORS += ("grasp_point", "to_object", "to_goal", "goal", "goal_distance", "held", "at_goal", "fallen", "rest_height")


@dataclass
class Real2SimConfig:
    """The environment's flags."""

    backend: Literal["auto", "mujoco", "warp", "mjx"] = "auto"
    """physics engine: C thread pool (mujoco), MuJoCo Warp, MJX (JAX), or auto: warp on CUDA, mujoco on a CPU"""
    mjx_impl: Literal["auto", "jax", "warp"] = "auto"
    """what MJX computes with; auto: JAX for the box, Warp's kernels for meshes, on which JAX is slow"""
    objects: tuple[str, ...] = ("box",)
    """scans (STL, OBJ, PLY), or box, mug, bunny, bottle, which need no file; each episode has one of them"""
    held_out: tuple[str, ...] = ()
    """objects of evaluations only"""
    object_scale: Literal["auto", "metres", "mm"] = "auto"
    """units of the scans; auto: metres or mm, whichever is a size for a hand, else 10 cm for the largest side"""
    density: float = 1000.0
    """of the objects (kg/m3)"""
    task: Literal["hold", "place"] = "hold"
    """hold: bring the object to a goal in the air; place: set it down at a goal on the table, and take the hand away"""
    observation: Literal["compact", "full", "rgb"] = "compact"
    """compact: 25 numbers, without the joints' state; full: 58, with it; rgb: a picture, and the robot's own state"""
    image_size: int = 64
    """height and width of the picture (pixels)"""
    reward: Literal["dense", "sparse"] = "dense"
    """dense: reach, grasp, lift, place and success by their weights, 1 in all; sparse: 1 at the goal, else -1"""
    reward_file: str = ""
    """a Python file whose function `reward` takes tensors by name and gives one number per environment"""
    lead: float = 0.2
    """how far a joint's target may run ahead of the joint (rad): what presses hard must first let go of that much"""
    object_area: tuple[float, float] = (0.1, 0.15)
    """half widths along x and y of the area where the object lies at first (m)"""
    object_yaw: float = 0.785
    """the object is turned by up to this about the vertical (rad)"""
    goal_area: tuple[float, float] = (0.1, 0.15)
    """half widths along x and y of the volume, or for place the area, of goals (m)"""
    goal_height: tuple[float, float] = (0.1, 0.25)
    """hold: lowest and highest goal of the object's centre above the table (m)"""
    object_size: tuple[float, float] = (1.0, 1.0)
    """range of the factor on the object's size, of which eight are made"""
    object_stretch: float = 0.0
    """each of the eight is stretched along its three sides by up to this share"""
    mass: tuple[float, float] = (1.0, 1.0)
    """range of the factor on the object's mass"""
    friction: tuple[float, float] = (1.0, 1.0)
    """range of the factor on the friction of fingers, table and object"""
    restitution: tuple[float, float] = (0.0, 0.0)
    """range of the share of its speed that a bouncing object keeps"""
    damping: tuple[float, float] = (1.0, 1.0)
    """range of the factor on the damping of the arm's servos"""
    pose_noise: float = 0.0
    """standard deviation of the observed position of the object (m) and, ten times that, of its quaternion"""
    delay: tuple[int, int] = (0, 0)
    """range of the age of the observed pose of the object, drawn for each episode (control steps)"""
    dropout: float = 0.0
    """probability that the object is not seen in a control step, whose observation then has its last pose"""
    light: tuple[float, float] = (1.0, 1.0)
    """rgb: range of the factor on the lamp's brightness; where it is a range, the lamp's direction varies as well"""
    colour: float = 0.0
    """rgb: each colour's channels vary by up to this"""
    camera: float = 0.0
    """rgb: the camera is moved by up to this along each axis (m) and turned by up to as many rad about each"""
    max_episode_steps: int = 200
    """time limit of an episode (control steps of 20 ms)"""


ENV_SETTINGS = tuple(field.name for field in fields(Real2SimConfig))


def check(cfg: Real2SimConfig, num_envs: int):
    """Raises ValueError, in one sentence, for a setting that no environment can have."""

    def require(valid: bool, name: str, takes: str, got=None):
        if not valid:
            got = getattr(cfg, name) if got is None else got
            raise ValueError(f"--{name.replace('_', '-')} takes {takes}, got {got!r}")

    for field in fields(cfg):
        value, choices = getattr(cfg, field.name), get_args(field.type)
        if get_origin(field.type) is Literal:
            require(value in choices, field.name, f"one of {', '.join(choices)}")
    require(num_envs >= 1, "num_envs", "1 or more", num_envs)
    require(len(cfg.objects) >= 1, "objects", "one object or more")
    for name in ("max_episode_steps", "image_size"):
        require(getattr(cfg, name) >= 1, name, "1 or more")
    require(0 < cfg.density < math.inf, "density", "a number above 0 (kg/m3)")
    for name in ("object_area", "goal_area"):
        require(all(0 <= x <= 0.25 for x in getattr(cfg, name)), name, "two numbers from 0 to 0.25 (m)")
    require(0.01 <= cfg.lead <= 1, "lead", "a number from 0.01 to 1 (rad)")
    require(0 <= cfg.object_yaw <= math.pi, "object_yaw", "a number from 0 to pi (rad)")
    ranges = {"goal_height": (0, 0.5), "object_size": (0.2, 5), "mass": (0.05, 20), "friction": (0.05, 20)}
    ranges |= {"restitution": (0, 0.95), "damping": (0.1, 2), "delay": (0, 20), "light": (0, 10)}
    for name, (least, most) in ranges.items():
        low, high = getattr(cfg, name)
        require(least <= low <= high <= most, name, f"two rising numbers from {least} to {most}")
    for name, most in (("object_stretch", 0.5), ("pose_noise", 0.1), ("dropout", 0.99), ("colour", 1), ("camera", 0.2)):
        require(0 <= getattr(cfg, name) <= most, name, f"a number from 0 to {most}")


def load_reward(path: str) -> tuple[Callable, tuple[str, ...]]:
    """The function `reward` of a Python file, and the names of the tensors it takes; ValueError where it has none."""
    spec = importlib.util.spec_from_file_location("reward_file", path)
    if spec is None:
        raise ValueError(f"--reward-file takes a Python file, which ends in .py, got {path}")
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        function = module.reward
    except Exception as error:  # a user's file may fail in any way
        raise ValueError(f"--reward-file {path} gives no function `reward`: {type(error).__name__}: {error}") from None
    names = tuple(inspect.signature(function).parameters)
    unknown = [name for name in names if name not in TENSORS]
    if unknown:
        raise ValueError(f"--reward-file {path} asks for {', '.join(unknown)}; there are {', '.join(TENSORS)}")
    return function, names
