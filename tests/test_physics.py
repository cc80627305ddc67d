"""common/physics.py: the engines against plain `mj_step`, against each other, and through the Go2 environment.

Warp compiles its kernels the first time it meets them on a machine, which takes up to a minute on a CPU; so every test
that uses it is in this file, with the same sizes, and none of them looks at the clock.
"""

import copy
import math

import mujoco
import numpy as np
import pytest
import torch

from common.envs.go2 import DEFAULT_POSE, Go2Config, Go2Env, build_model
from common.physics import STATE, BatchedMujoco, resolve_backend

N = 3
BACKENDS = ("mujoco", "warp")
PER_WORLD = ("geom_friction", "body_mass", "body_inertia")
# Newton, with enough iterations that both engines solve the same problem to their precision.
SOLVER = {"solver": "newton", "solver_iterations": 20}


@pytest.fixture(autouse=True)
def log_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo leaves a MUJOCO_LOG.TXT behind when a state is not finite


@pytest.fixture(scope="module")
def model():
    return build_model(Go2Config(**SOLVER))


def stand(physics):
    """Every world on its feet, each in a pose of its own."""
    offset = torch.arange(physics.num_envs)[:, None]
    qpos = torch.zeros(physics.num_envs, 19)
    qpos[:, 2], qpos[:, 3] = 0.31, 1.0
    qpos[:, 7:] = torch.tensor(DEFAULT_POSE) + 0.02 * offset * torch.cos(torch.arange(12.0))
    physics.reset(torch.ones(physics.num_envs, dtype=torch.bool), qpos, torch.zeros(physics.num_envs, 18))
    return physics


def trot(step: int) -> torch.Tensor:
    """(12,) joint targets of a trot on the spot at 2 Hz that lifts the feet by some centimetres."""
    phase = torch.tensor([0.0, math.pi, math.pi, 0.0]).repeat_interleave(3)
    amplitude = torch.tensor([0.0, 0.2, -0.4] * 4)
    return torch.tensor(DEFAULT_POSE) + amplitude * torch.sin(2 * math.pi * 2 * 0.02 * step + phase).clamp(min=0)


def walk(physics, steps: int, start: int = 0):
    """State after every control step: (steps, num_envs, nq + nv)."""
    states = []
    for step in range(start, start + steps):
        physics.ctrl.copy_(trot(step).expand(physics.num_envs, 12))
        physics.step(2)
        states.append(torch.cat((physics.qpos, physics.qvel), 1).double())
    return torch.stack(states)


def make(model, backend="mujoco", per_world=(), num_envs=N):
    return stand(BatchedMujoco(model, num_envs, backend=backend, num_threads=1, per_world=per_world, nconmax=32))


def test_step_is_mj_step(model):
    """Bit for bit, whatever way the substeps are grouped; the outputs are those of the last `mj_step`."""
    physics = make(model)
    worlds = [mujoco.MjData(model) for _ in range(N)]
    for i, data in enumerate(worlds):
        data.qpos[:] = physics.qpos[i]
    for step, substeps in enumerate((1, 2, 5, 2, 10, 30)):
        physics.ctrl.copy_(trot(step).expand(N, 12))
        physics.step(substeps)
        for i, data in enumerate(worlds):
            data.ctrl[:] = trot(step).numpy()
            for _ in range(substeps):
                mujoco.mj_step(model, data)
            for name in (*STATE, "sensordata", "actuator_force"):
                np.testing.assert_array_equal(getattr(physics, name)[i].numpy(), getattr(data, name), err_msg=name)
    assert physics.qpos.dtype == torch.float64
    assert physics.sensordata[:, 12:].sum() > 0  # it stood on something


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_callers_model_is_left_alone(backend):
    fresh = build_model(Go2Config(**SOLVER))
    before = fresh.opt.disableflags
    BatchedMujoco(fresh, 1, backend=backend)
    assert fresh.opt.disableflags == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_reset_of_a_subset(model, backend):
    physics, twin = make(model, backend), make(model, backend)
    walk(physics, 5), walk(twin, 5)
    assert physics.qacc_warmstart.abs().amax(1).min() > 0
    qpos, qvel = torch.rand(N, 19), torch.rand(N, 18)
    physics.reset(torch.tensor([False, True, False]), qpos, qvel)
    for name in STATE:
        new, old = getattr(physics, name), getattr(twin, name)
        assert torch.equal(new[[0, 2]], old[[0, 2]]), name
    assert torch.equal(physics.qpos[1].float(), qpos[1]) and torch.equal(physics.qvel[1].float(), qvel[1])
    assert not physics.ctrl[1].any() and not physics.qacc_warmstart[1].any()
    assert torch.equal(walk(physics, 5, start=5)[:, [0, 2]], walk(twin, 5, start=5)[:, [0, 2]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_masses_and_friction_per_world(model, backend):
    """World 1 is heavy and slippery. It moves as one `MjModel` that is, and the others as if it were not there."""
    changed = copy.copy(model)
    factor = np.where(np.arange(model.nbody) % 2, 1.5, 0.7)
    changed.body_mass[:] *= factor
    changed.body_inertia[:] *= factor[:, None]
    changed.geom_friction[:, 0] = 0.15
    mujoco.mj_setConst(changed, mujoco.MjData(changed))

    physics = make(model, backend, PER_WORLD)
    for name in PER_WORLD:
        physics.fields[name][1] = torch.from_numpy(getattr(changed, name)).to(physics.fields[name].dtype)
    physics.set_const()
    lone = {i: make(m, "mujoco", num_envs=N) for i, m in ((0, model), (1, changed))}
    for p in (physics, *lone.values()):
        p.qvel[:, 1] = 0.5  # pushed sideways: it slides where it is slippery
    states = walk(physics, 25)
    # One engine is exact. Two precisions part at the rounding of float32 (6e-8), which contacts multiply.
    tolerance = 0 if backend == "mujoco" else 1e-3
    for i in range(N):
        difference = (states[:, i] - walk_copy(lone[int(i == 1)])[:, i]).abs().amax(0)
        assert difference.max() <= tolerance, (i, difference)
    assert (states[-1, 1, :19] - states[-1, 0, :19]).abs().max() > 0.02


def walk_copy(physics):
    """`walk` of a physics that several worlds are compared with."""
    if not hasattr(physics, "walked"):
        physics.walked = walk(physics, 25)
    return physics.walked


@pytest.mark.parametrize("backend", BACKENDS)
def test_set_const(model, backend):
    """What follows from the masses follows per world, as in an `MjModel` with those masses."""
    heavy = copy.copy(model)
    heavy.body_mass[:] *= 3
    heavy.body_inertia[:] *= 3
    mujoco.mj_setConst(heavy, mujoco.MjData(heavy))
    assert (heavy.body_invweight0 != model.body_invweight0).any()
    physics = make(model, backend, PER_WORLD)
    physics.fields["body_mass"][1] *= 3
    physics.fields["body_inertia"][1] *= 3
    state = physics.state_dict()
    physics.set_const()
    for name in ("body_subtreemass", "body_invweight0", "dof_invweight0"):
        for value, expected in zip(derived(physics, name), (model, heavy, model), strict=True):
            np.testing.assert_allclose(value, getattr(expected, name), rtol=1e-4)
    assert all(torch.equal(value, state[name]) for name, value in physics.state_dict().items())


def derived(physics, name: str) -> np.ndarray:
    if physics.backend == "mujoco":
        return np.stack([np.array(getattr(physics._batch.get_model(i), name)) for i in range(N)])
    value = getattr(physics._m, name).numpy()
    return np.broadcast_to(value, (N, *value.shape[1:]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_dict(model, backend):
    """Bit-equal, also in another instance with other masses and another past, and a copy that later steps leave."""
    physics, other = make(model, backend, PER_WORLD), make(model, backend, PER_WORLD)
    physics.fields["body_mass"][:, 1] += torch.arange(N)
    physics.fields["geom_friction"][..., 0] = 0.3
    physics.set_const()
    walk(physics, 10)
    state = physics.state_dict()
    kept = {name: value.clone() for name, value in state.items()}
    expected = walk(physics, 10, start=10)
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    walk(other, 3)
    for target in (physics, other):
        target.load_state_dict(state)
        assert torch.equal(walk(target, 10, start=10), expected)
    with pytest.raises(RuntimeError):
        make(model, backend, PER_WORLD, num_envs=N + 1).load_state_dict(state)


@pytest.mark.parametrize("bad", (math.nan, math.inf))
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_world_that_is_not_finite(model, backend, bad):
    """It stays so, visibly, until it is reset; then nothing of it is left. The others never notice."""
    physics, clean = make(model, backend), make(model, backend)
    walk(physics, 3), walk(clean, 3)
    physics.qvel[1, 7] = bad
    broken, intact = walk(physics, 5, start=3), walk(clean, 5, start=3)
    assert not broken[:, 1].isfinite().all(1).any()
    assert torch.equal(broken[:, [0, 2]], intact[:, [0, 2]])
    mask = torch.tensor([False, True, False])
    for p in (physics, clean):
        p.reset(mask, torch.tensor([0.0, 0, 0.31, 1, 0, 0, 0, *DEFAULT_POSE]).expand(N, 19), torch.zeros(N, 18))
    assert torch.equal(walk(physics, 10, start=8), walk(clean, 10, start=8))
    assert torch.equal(physics.sensordata, clean.sensordata)


@pytest.mark.parametrize(
    ("backend", "device", "word"),
    (
        ("brax", "cpu", "--backend"),
        ("mujoco", "cuda", "--"),
        ("auto", "gpu", "--device"),
        ("auto", "mps", "--device"),
        ("warp", "cuda:99", "--device"),
    ),
)
def test_bad_backend_or_device(model, backend, device, word):
    with pytest.raises(ValueError, match=word) as error:
        BatchedMujoco(model, 1, device, backend)
    assert "\n" not in str(error.value)


def test_auto_backend():
    assert resolve_backend("auto", "cpu") == (torch.device("cpu"), "mujoco")
    assert resolve_backend("warp", torch.device("cpu")) == (torch.device("cpu"), "warp")


def test_warp_says_what_it_cannot_run():
    with pytest.raises(ValueError, match="--backend warp.*PGS") as error:
        Go2Env(1, backend="warp", solver="pgs")
    assert "\n" not in str(error.value)


def test_warp_is_mujoco(model):
    """50 control steps of a trot. float32 resolves 6e-8 of a metre here and contacts multiply it; measured 1e-6 for
    qpos and 3e-5 for qvel, and the bounds are far above that and below what a wrong parameter does (centimetres).
    """
    a, b = make(model, "mujoco"), make(model, "warp")
    assert b.qpos.dtype == torch.float32
    ours, theirs, contacts = [], [], []
    for step in range(50):
        ours.append(walk(a, 1, start=step)[0])
        theirs.append(walk(b, 1, start=step)[0])
        contacts.append(torch.equal(a.sensordata[:, 12:].float(), b.sensordata[:, 12:]))
        torch.testing.assert_close(a.sensordata[:, :12].float(), b.sensordata[:, :12], atol=1e-4, rtol=0)
        torch.testing.assert_close(a.actuator_force.float(), b.actuator_force, atol=0.05, rtol=0)
    ours, theirs = torch.stack(ours), torch.stack(theirs)
    torch.testing.assert_close(ours[..., :19], theirs[..., :19], atol=5e-5, rtol=0)
    torch.testing.assert_close(ours[..., 19:], theirs[..., 19:], atol=5e-3, rtol=0)
    assert sum(contacts) >= 48  # a foot may land one substep earlier
    assert ours[..., 2].min() > 0.2 and (ours[1:, :, 7:] - ours[:-1, :, 7:]).abs().max() > 0.05  # it moved and stood


# Dry friction sticks or slips: a difference of 1e-4 is nothing in one step and a centimetre after fifty.
NO_STICTION = {"randomise": True, "frictionloss_range": (0.0, 0.0)}


@pytest.mark.parametrize("config", ({}, NO_STICTION, {"commands": "full", "history": 2}), ids=str)
def test_environment_on_warp_is_that_on_mujoco(config):
    envs = [Go2Env(N, backend=backend, physics_threads=1, **SOLVER, **config) for backend in BACKENDS]
    first = [env.reset(seed=3)[0] for env in envs]
    torch.testing.assert_close(*first, atol=1e-5, rtol=0)
    generator = torch.Generator().manual_seed(0)
    rewards, ends = 0.0, 0
    for step in range(50):
        actions = (trot(step) - torch.tensor(DEFAULT_POSE)) / 0.3 + 0.1 * torch.randn(N, 12, generator=generator)
        (obs, reward, ended, cut, info), (obs2, reward2, ended2, cut2, info2) = [env.step(actions) for env in envs]
        # As above; joint velocities, the coarsest entries, are scaled by .05.
        torch.testing.assert_close(obs, obs2, atol=1e-3, rtol=0)
        torch.testing.assert_close(info["final_obs"], info2["final_obs"], atol=1e-3, rtol=0)
        torch.testing.assert_close(reward, reward2, atol=1e-4, rtol=0)
        assert torch.equal(ended, ended2) and torch.equal(cut, cut2)
        rewards, ends = rewards + reward.sum(), ends + int(ended.sum())
    assert rewards > 0.1


def test_joint_friction_on_warp_is_that_on_mujoco():
    """Damping, dry friction and armature per world, step by step from one state. Warp's solver ends in float32 up to
    2.5e-4 rad/s away; without the fields, joints are off by several rad/s.
    """
    ours, theirs = (Go2Env(N, backend=backend, physics_threads=1, **SOLVER, randomise=True) for backend in BACKENDS)
    ours.reset(seed=3), theirs.reset(seed=3)
    for name in ("dof_damping", "dof_frictionloss", "dof_armature"):
        torch.testing.assert_close(ours.physics.fields[name].float(), theirs.physics.fields[name])
    plain = make(ours.model, "mujoco")
    differs = []
    for step in range(30):
        for physics in (ours.physics, theirs.physics, plain):
            physics.ctrl.copy_(trot(step))
        for physics in (theirs.physics, plain):
            physics.reset(torch.ones(N, dtype=torch.bool), ours.physics.qpos.clone(), ours.physics.qvel.clone())
            physics.ctrl.copy_(trot(step))
        ours.physics.qacc_warmstart.zero_()
        for physics in (ours.physics, theirs.physics, plain):
            physics.step(1)
        torch.testing.assert_close(ours.physics.qvel.float(), theirs.physics.qvel, atol=2e-3, rtol=0)
        differs.append((ours.physics.qvel - plain.qvel)[:, 6:].abs().max())
    assert min(differs[5:]) > 0.05


@pytest.mark.parametrize("config", ({}, {"randomise": True, "history": 2, "commands": "full"}), ids=("plain", "all"))
def test_environment_on_warp_recovers_and_resumes(config):
    """A non-finite robot is reset and behaves again; `state_dict` goes on bit for bit."""
    env = Go2Env(N, backend="warp", **config)
    env.reset(seed=1)
    zeros = torch.zeros(N, 12)
    env.step(zeros)
    env.physics.qvel[1, 7] = math.nan
    obs, reward, terminated, _, info = env.step(zeros)
    assert info["nan_resets"] == 1 and terminated.tolist() == [False, True, False]
    for _ in range(30):
        assert obs.isfinite().all() and reward.isfinite().all() and info["final_obs"].isfinite().all()
        obs, reward, _, _, info = env.step(zeros)
    assert info["nan_resets"] == 1 and 0.25 < env.height[1] < 0.35
    state = env.state_dict()
    expected = [env.step(zeros)[0] for _ in range(10)]
    other = Go2Env(N, backend="warp", seed=9, **config)
    other.reset()
    other.load_state_dict(state)
    assert all(torch.equal(other.step(zeros)[0], obs) for obs in expected)


# --- MJX, on a model that compiles in seconds

PENDULUM = """<mujoco><option timestep="0.005"/>
<worldbody><body name="ball" pos="0 0 1"><freejoint/><geom name="ball" size=".1"/></body>
<body><joint name="hinge" axis="0 1 0" damping=".1"/><geom size=".05" pos="0 0 -.5" contype="0" conaffinity="0"/></body>
<geom type="plane" size="1 1 1"/></worldbody><actuator><motor joint="hinge"/></actuator>
<sensor><jointvel joint="hinge"/></sensor></mujoco>"""


def test_mjx_is_the_same_interface():
    pytest.importorskip("jax")
    model = mujoco.MjModel.from_xml_string(PENDULUM)
    ours = BatchedMujoco(model, N, backend="mujoco", per_world=("dof_damping",))
    mjx = BatchedMujoco(model, N, backend="mjx", per_world=("dof_damping",))
    live = mjx.qpos
    for physics in (ours, mjx):
        physics.fields["dof_damping"][1] *= 5
        physics.qvel[:, 6] = torch.tensor([0.0, 2.0, 2.0])
        for step in range(12):
            physics.ctrl[:] = 0.1 * step
            physics.step(2)
        physics.forward()
    assert mjx.qpos is live and mjx.qpos.dtype == torch.float32
    for name in (*STATE[:2], "sensordata", "actuator_force"):
        torch.testing.assert_close(getattr(mjx, name).double(), getattr(ours, name), rtol=0, atol=2e-4)
    assert (mjx.qpos[1, 7] - mjx.qpos[2, 7]).abs() > 1e-2  # damped more
    state = mjx.state_dict()
    mjx.step(2)
    expected = mjx.qpos.clone()
    mjx.reset(torch.tensor([True, False, False]), torch.zeros(N, 8), torch.zeros(N, 7))
    assert mjx.qpos[0].abs().sum() == 0 and torch.equal(mjx.qpos[1:], expected[1:])
    mjx.load_state_dict(state)
    mjx.step(2)
    torch.testing.assert_close(mjx.qpos, expected)
    with pytest.raises(ValueError, match="mjx cannot derive what depends on masses"):
        mjx.set_const()
    with pytest.raises(ValueError, match="mjx holds geom_dataid once for all worlds"):
        BatchedMujoco(model, N, backend="mjx", per_world=("geom_dataid",))
