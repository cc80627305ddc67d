"""Warp and MJX against the C engine through Real2SimEnv, on a CPU.

Compiling takes most of the time, the first time on a machine a minute or two.
"""

import pytest
import torch

from common import meshes
from common.envs import real2sim
from common.envs.real2sim import Real2SimEnv

TWO = ("box", "bottle")  # one convex piece each


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(meshes, "cache_folder", lambda: tmp_path / "cache")  # of scans; kernels stay where they are


def make(num_envs, **config) -> Real2SimEnv:
    env = Real2SimEnv(num_envs, **({"physics_threads": 1} | config))
    env.reset()
    return env


SIZES = {"object_size": (0.9, 1.1)}
ENGINES = {
    "warp": (dict(backend="warp", **SIZES), 1e-4),
    "warp-meshes": (dict(backend="warp", objects=TWO), 1e-4),
    "mjx-jax": (dict(backend="mjx", **SIZES), 5e-3),
    "mjx-warp": (dict(backend="mjx", objects=("bottle",)), 2e-3),
}


@pytest.mark.parametrize(("theirs", "tolerance"), ENGINES.values(), ids=ENGINES)
def test_engines_agree(theirs, tolerance):
    """Worlds of their own mass, friction and size or shape, on a CPU. MJX by JAX does not see where a servo is at its
    limit while it integrates, which is worth a milliradian.
    """
    pytest.importorskip("jax" if theirs["backend"] == "mjx" else "mujoco_warp")
    random = dict(mass=(0.5, 2.0), friction=(0.5, 1.5))
    ours, theirs = make(2, **(theirs | random | {"backend": "mujoco"})), make(2, **theirs, **random)
    starts = ours.reset(seed=4)[0], theirs.reset(seed=4)[0]
    torch.testing.assert_close(*starts, rtol=0, atol=1e-6)
    for world in (ours, theirs):
        world.physics.qpos[:, 11] += 0.02  # the object falls and comes to rest
    for action in 0.5 * torch.randn(12, 2, 9, generator=torch.Generator().manual_seed(0)):
        a, b = ours.step(action), theirs.step(action)
        torch.testing.assert_close(a[0], b[0], rtol=0, atol=tolerance)
        torch.testing.assert_close(a[1], b[1], rtol=0, atol=tolerance)
    assert ours.physics.fields.keys() - real2sim.C_ONLY == theirs.physics.fields.keys()


def test_what_mjx_cannot_do_is_one_sentence():
    pytest.importorskip("jax")
    with pytest.raises(ValueError, match="--backend mjx holds geom_dataid once for all worlds") as error:
        make(2, backend="mjx", objects=TWO)
    assert "\n" not in str(error.value)
