"""The settings of the Unitree Go2's environment, checked, and the MuJoCo model they ask for."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args, get_origin

import mujoco

ASSET = Path(__file__).parent.parent / "assets" / "go2.xml"
LEGS = ("FR", "FL", "RR", "RL")
JOINTS = tuple(f"{leg}_{part}_joint" for leg in LEGS for part in ("hip", "thigh", "calf"))
TORQUE_LIMITS = (23.7, 23.7, 45.43) * 4  # Nm, Unitree's published Go2 description
CONTROL_DT = 0.02  # s
MAX_LATENCY = 4  # control steps


@dataclass
class Go2Config:
    """The environment's flags."""

    xml_path: str = ""
    """MJCF of the robot, found by joint names; empty: common/assets/go2.xml"""
    backend: Literal["auto", "mujoco", "warp"] = "auto"
    """physics engine: C thread pool (mujoco), MuJoCo Warp, or auto: warp on CUDA, mujoco on a CPU"""
    substeps: int = 2
    """physics steps per 0.02 s control step"""
    solver: Literal["auto", "pgs", "newton", "cg"] = "auto"
    """MuJoCo's constraint solver; auto: pgs for the mujoco backend, newton for warp, which has no pgs"""
    solver_iterations: int = 4
    """most iterations of the constraint solver"""
    cone: Literal["pyramidal", "elliptic"] = "pyramidal"
    """friction cone of the contacts"""
    impratio: float = 1.0
    """ratio of frictional to normal impedance of the contacts"""
    commands: Literal["velocity", "full"] = "velocity"
    """velocity: vx, vy, yaw rate; full: also base height and jump"""
    command_vx: tuple[float, float] = (-1.0, 2.0)
    """range of the forward velocity command (m/s)"""
    command_vy: tuple[float, float] = (-0.5, 0.5)
    """range of the lateral velocity command (m/s)"""
    command_yaw: tuple[float, float] = (-0.6, 0.6)
    """range of the yaw rate command (rad/s)"""
    command_height: tuple[float, float] = (0.2, 0.4)
    """range of the base height command (m); full commands only"""
    command_jump: tuple[float, float] = (0.5, 0.7)
    """range of the base height a jump is to reach (m); full commands only"""
    jump_interval: float = 5.0
    """mean time between jump commands (s; inf: never); full commands only"""
    jump_tracking: float = 0.3
    """jumps are commanded only to robots whose mean velocity error in this episode is below this (m/s)"""
    resample_seconds: float = 4.0
    """time between new commands (s)"""
    command_ends: float = 0.15
    """share of each command's draws that are at one of the two ends of its range, the rest uniform"""
    standing_fraction: float = 0.1
    """share of velocity commands that are zero"""
    observation: Literal["full", "proprioceptive"] = "full"
    """proprioceptive leaves out the base's linear velocity, which the real robot cannot measure"""
    history: int = 1
    """stacked observations, newest last"""
    rewards: Literal["reference", "natural"] = "natural"
    """reference: the six terms of Genesis' Go2 example; natural: with gait terms"""
    reward_weights: tuple[str, ...] = ()
    """overrides, such as --reward-weights air_time=0.5 slip=-0.2 (see docs/go2.md for the terms)"""
    base_height_target: float = 0.3
    """base height to keep (m), where no height is commanded"""
    action_scale: float = 0.3
    """joint target = default pose + action_scale * action (rad)"""
    kp: float = 40.0
    """proportional gain (Nm/rad)"""
    kd: float = 1.0
    """derivative gain (Nm s/rad)"""
    action_latency: int = 0
    """control steps between an action and its execution (at most 3)"""
    episode_seconds: float = 20.0
    """time limit of an episode (s)"""
    termination_degrees: float = 10.0
    """roll or pitch beyond which an episode ends (degrees)"""
    spawn_height: float = 0.34
    """height of the base at reset (m)"""
    spawn_noise: float = 0.1
    """half width of the uniform noise on joint angles at reset (rad)"""
    randomise: bool = False
    """randomise the robot and disturb it, by the ranges below"""
    friction_range: tuple[float, float] = (0.4, 1.2)
    """sliding friction of feet and floor"""
    mass_range: tuple[float, float] = (0.85, 1.15)
    """factor on every body's mass and inertia, one draw per body"""
    payload_range: tuple[float, float] = (-0.5, 2.0)
    """mass added to the base (kg)"""
    strength_range: tuple[float, float] = (0.85, 1.15)
    """factor on each motor's torque and torque limit"""
    gain_range: tuple[float, float] = (0.9, 1.1)
    """factor on each motor's kp and, drawn apart, kd"""
    latency_range: tuple[int, int] = (0, 1)
    """control steps added to action_latency, drawn per episode"""
    damping_range: tuple[float, float] = (0.1, 2.0)
    """viscous friction of each joint (Nm s/rad), drawn per episode"""
    frictionloss_range: tuple[float, float] = (0.0, 1.4)
    """dry friction of each joint (Nm), drawn per episode"""
    armature_range: tuple[float, float] = (0.005, 0.05)
    """inertia of each joint's rotor and gears (kg m2)"""
    push_interval: float = 6.0
    """mean time between pushes (s; inf: never)"""
    push_velocity: float = 0.5
    """largest change of horizontal base velocity by a push (m/s)"""
    observation_noise: float = 1.0
    """factor on the observation noise of legged_gym"""


ENV_SETTINGS = tuple(field.name for field in fields(Go2Config))


def build_model(cfg: Go2Config, backend: str = "mujoco", visual: bool = False) -> mujoco.MjModel:
    """The MJCF of `cfg` with position actuators on the twelve joints (in the order of JOINTS), foot sensors, a floor
    if it has none, and the physics options of `cfg`. Raises ValueError, in one sentence, for an unusable file.
    """
    path = Path(cfg.xml_path) if cfg.xml_path else ASSET
    if not path.is_file():
        raise ValueError(f"--xml-path: there is no file {path}")
    try:
        spec = mujoco.MjSpec.from_file(str(path))
    except ValueError as error:
        raise ValueError(f"--xml-path: MuJoCo cannot read {path}: {' '.join(str(error).split())}") from None
    spec.compiler.discardvisual = not visual  # geoms that only look good cost a fifth of the physics' time
    missing = [name for name in JOINTS if spec.joint(name) is None]
    if missing:
        raise ValueError(f"--xml-path: {path} lacks the Go2 joints {', '.join(missing)}")
    for actuator in spec.actuators:
        spec.delete(actuator)
    for key in spec.keys:
        spec.delete(key)
    for name, limit in zip(JOINTS, TORQUE_LIMITS, strict=True):
        actuator = spec.add_actuator(name=name.removesuffix("_joint"), target=name)
        actuator.trntype = mujoco.mjtTrn.mjTRN_JOINT
        actuator.gaintype, actuator.biastype = mujoco.mjtGain.mjGAIN_FIXED, mujoco.mjtBias.mjBIAS_AFFINE
        actuator.gainprm[0] = cfg.kp
        actuator.biasprm[:3] = 0, -cfg.kp, -cfg.kd
        actuator.forcelimited, actuator.forcerange = True, (-limit, limit)
    geoms = {geom.name: geom for geom in spec.geoms}
    feet = [geoms.get(leg) or geoms.get(f"{leg}_foot") for leg in LEGS]
    if None in feet:
        raise ValueError(f"--xml-path: {path} has no foot geoms named {', '.join(LEGS)}")
    if not any(geom.type == mujoco.mjtGeom.mjGEOM_PLANE for geom in spec.geoms):
        spec.worldbody.add_geom(name="floor", type=mujoco.mjtGeom.mjGEOM_PLANE, size=(0, 0, 1), condim=3)
        spec.worldbody.add_light(pos=(0, 0, 4), dir=(0, 0, -1), type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL)
    floor = next(geom for geom in spec.geoms if geom.type == mujoco.mjtGeom.mjGEOM_PLANE)
    for sensor in spec.sensors:
        spec.delete(sensor)
    for foot in feet:
        spec.add_sensor(type=mujoco.mjtSensor.mjSENS_FRAMEPOS, objtype=mujoco.mjtObj.mjOBJ_GEOM, objname=foot.name)
    for foot in feet:  # 1 = found: how many contacts the foot has with the floor
        sensor = spec.add_sensor(type=mujoco.mjtSensor.mjSENS_CONTACT)
        sensor.objtype, sensor.objname = mujoco.mjtObj.mjOBJ_GEOM, foot.name
        sensor.reftype, sensor.refname = mujoco.mjtObj.mjOBJ_GEOM, floor.name
        sensor.intprm[:3] = 1, 0, 1
    option = spec.option
    option.timestep = CONTROL_DT / cfg.substeps
    option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    option.cone = getattr(mujoco.mjtCone, f"mjCONE_{cfg.cone.upper()}")
    option.impratio = cfg.impratio
    solver = cfg.solver if cfg.solver != "auto" else "newton" if backend == "warp" else "pgs"
    option.solver = getattr(mujoco.mjtSolver, f"mjSOL_{solver.upper()}")
    option.iterations, option.ls_iterations = cfg.solver_iterations, 20
    option.jacobian = mujoco.mjtJacobian.mjJAC_DENSE
    for flag in ("ISLAND", "MIDPHASE", "EQUALITY"):
        option.disableflags |= getattr(mujoco.mjtDisableBit, f"mjDSBL_{flag}")
    try:
        model = spec.compile()
    except ValueError as error:
        raise ValueError(f"--xml-path: MuJoCo cannot compile {path}: {' '.join(str(error).split())}") from None
    expected = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_JOINT, JOINTS[0])
    if model.nq != 19 or model.jnt_type[0] != mujoco.mjtJoint.mjJNT_FREE or expected < 1:
        raise ValueError(f"--xml-path: {path} is not one free-floating Go2 with twelve hinges (nq {model.nq}, not 19)")
    return model


def foot_names(model) -> list[str]:
    """The four foot geoms, in the order of LEGS."""
    return [leg if mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_GEOM, leg) >= 0 else f"{leg}_foot" for leg in LEGS]


def check(cfg: Go2Config, num_envs: int):
    """Raises ValueError, in one sentence, for a setting that no environment can have."""

    def require(valid: bool, name: str, takes: str, got):
        if not valid:
            raise ValueError(f"--{name.replace('_', '-')} takes {takes}, got {got!r}")

    def within(names: str, low: float, high: float, takes: str):
        for name in names.split():
            value = getattr(cfg, name)
            numbers = value if isinstance(value, tuple | list) else (value,)
            require(all(low <= x <= high for x in numbers), name, takes, value)

    for field in fields(cfg):
        value, choices = getattr(cfg, field.name), get_args(field.type)
        if get_origin(field.type) is Literal:
            require(value in choices, field.name, f"one of {', '.join(choices)}", value)
        elif choices == (float, float):
            rising = math.isfinite(value[1] - value[0]) and value[0] <= value[1]
            require(rising, field.name, "two finite numbers, the smaller one first", value)
    require(num_envs >= 1, "num_envs", "1 or more", num_envs)
    within("substeps solver_iterations history", 1, math.inf, "1 or more")
    within("resample_seconds episode_seconds", CONTROL_DT, 1e9, f"{CONTROL_DT} s or more")
    within("jump_interval push_interval", 1e-9, math.inf, "a time above 0 s, or inf for never")
    within("mass_range strength_range gain_range", 1e-9, math.inf, "factors above 0")
    within("kp action_scale impratio spawn_height termination_degrees", 1e-9, 1e9, "a number above 0")
    within("friction_range damping_range frictionloss_range armature_range", 0, math.inf, "numbers from 0")
    within("kd spawn_noise push_velocity observation_noise", 0, 1e9, "0 or a number above it")
    within("standing_fraction", 0, 1, "a number from 0 to 1")
    if cfg.commands == "full":
        above = f"heights above --base-height-target {cfg.base_height_target}"
        require(cfg.command_jump[0] > cfg.base_height_target, "command_jump", above, cfg.command_jump)
    require(0 <= cfg.action_latency <= 3, "action_latency", "0 to 3 control steps", cfg.action_latency)
    require(0 <= cfg.command_ends < 1, "command_ends", "a number from 0 to below 1", cfg.command_ends)
    low, high = cfg.latency_range
    room = MAX_LATENCY - cfg.action_latency
    require(0 <= low <= high <= room, "latency_range", f"two rising numbers within 0 to {room}", cfg.latency_range)
