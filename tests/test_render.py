"""common/render.py: the pictures are MuJoCo's own, the same from every thread, and differ where worlds do."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import mujoco
import numpy as np
import pytest
import torch

from common import render, video
from common.render import BatchedRenderer, decimate

N, H, W = 5, 48, 64
XML = """
<mujoco>
  <visual><headlight specular="0 0 0"/></visual>
  <asset><mesh name="ball" builtin="sphere" params="4" scale=".12 .12 .12"/></asset>
  <worldbody>
    <light pos="0 0 3" dir=".2 .3 -1" type="directional" diffuse=".6 .6 .6" specular="0 0 0"/>
    <geom type="plane" size="5 5 1" rgba=".3 .3 .3 1"/>
    <body name="base" pos="0 0 .3"><freejoint/><geom name="box" type="box" size=".2 .1 .05" rgba="0 0 1 1"/></body>
    <body name="target" mocap="true" pos="0 .6 .2"><geom name="red" type="sphere" size=".1" rgba="1 0 0 1"/></body>
    <body pos="0 -.6 .2"><geom type="mesh" mesh="ball" rgba="0 .8 0 1"/></body>
    <camera name="top" pos="0 0 2" fovy="60"/>
    <camera name="side" pos="2 0 .8" xyaxes="0 1 0 -.3 0 1"/>
  </worldbody>
</mujoco>
"""


@pytest.fixture(scope="module")
def model():
    if video.find_gl() is None:
        pytest.skip(video.missing_gl_message())
    return mujoco.MjModel.from_xml_string(XML)


@pytest.fixture
def make(model):
    made = []

    def make(*arguments, **config):
        made.append(BatchedRenderer(model, *(arguments or (N, ("top", "side"), H, W)), **config))
        return made[-1]

    yield make
    for renderer in made:
        renderer.close()


def states(num_envs: int = N) -> torch.Tensor:
    """Each world's box at a place and a heading of its own."""
    world = torch.arange(num_envs, dtype=torch.float64)
    qpos = torch.zeros(num_envs, 7, dtype=torch.float64)
    qpos[:, 0], qpos[:, 2] = 0.3 * torch.cos(world), 0.3
    qpos[:, 3], qpos[:, 6] = torch.cos(world / 2), torch.sin(world / 2)
    return qpos


def amount(pictures: torch.Tensor, colour: int) -> torch.Tensor:
    """How many pixels of each picture are of one colour: 0 red, 1 green, 2 blue."""
    rest = pictures[..., [c for c in range(3) if c != colour]].amax(-1)
    return (pictures[..., colour].int() > rest.int() + 40).sum((-1, -2))


def test_pictures_are_mujocos_own(model, make):
    pictures = make().render(states())
    assert pictures.shape == (N, 2, H, W, 3) and pictures.dtype == torch.uint8
    data = mujoco.MjData(model)
    video.use_gl()
    plain = mujoco.MjModel.from_xml_string(XML)
    plain.vis.quality.offsamples = plain.vis.quality.shadowsize = 0
    with mujoco.Renderer(plain, H, W) as renderer:
        for i, qpos in enumerate(states()):
            data.qpos[:] = qpos
            mujoco.mj_forward(model, data)
            for j, camera in enumerate(("top", "side")):
                renderer.update_scene(data, camera)
                renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
                np.testing.assert_array_equal(renderer.render(), pictures[i, j])
    assert (amount(pictures, 2) > 20).all() and (pictures[0] != pictures[1]).any()


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_every_thread_draws_the_same(make, threads):
    renderer = make(N, "top", H, W, num_threads=threads)
    order = torch.tensor([3, 0, 4, 1, 2])
    pictures = renderer.render(states())
    assert pictures.shape == (N, H, W, 3)
    assert torch.equal(renderer.render(states()), pictures)
    assert torch.equal(renderer.render(states(), order), pictures[order])
    assert torch.equal(make(N, "top", H, W, num_threads=1).render(states()), pictures)


def test_only_what_is_asked_for(make, monkeypatch):
    renderer, drawn, draw = make(), [], mujoco.mjr_render
    pictures = renderer.render(states())
    monkeypatch.setattr(mujoco, "mjr_render", lambda *arguments: (drawn.append(1), draw(*arguments)))
    mask = torch.tensor([True, False, False, True, False])
    assert torch.equal(renderer.render(states(), mask, "side"), pictures[mask, 1]) and len(drawn) == 2
    assert torch.equal(renderer.render(states(), mask, ["side", "top"]), pictures[mask].flip(1)) and len(drawn) == 6
    assert renderer.render(states(), torch.zeros(N, dtype=torch.bool)).shape == (0, 2, H, W, 3) and len(drawn) == 6


def test_a_picture_is_never_overwritten(make):
    renderer = make()
    pictures = renderer.render(states())
    kept = pictures.clone()
    renderer.render(states() + 0.1)
    assert torch.equal(pictures, kept)


def change(renderer: BatchedRenderer, name: str):
    """World 1 differs from the others in one field."""
    field, box = renderer.fields[name][1], renderer.model.geom("box").id
    if name == "geom_rgba":
        field[box] = torch.tensor([1.0, 1.0, 0.0, 1.0])
    elif name == "geom_size":
        field[box] *= 1.5
    elif name == "mocap_pos":
        field[0, 0] += 0.5
    elif name == "light_diffuse":
        field *= 0.3
    elif name == "cam_pos":
        field[1, 1] += 0.3


PER_WORLD = ("geom_rgba", "geom_size", "mocap_pos", "light_diffuse", "cam_pos")


@pytest.mark.parametrize("name", PER_WORLD)
def test_worlds_differ_where_their_fields_do(make, name):
    renderer, qpos = make(per_world=(name,), num_threads=2), states()[:1].repeat(N, 1)
    before = renderer.render(qpos)
    change(renderer, name)
    after = renderer.render(qpos)
    others = [0, 2, 3, 4]
    assert torch.equal(after[others], before[others]) and torch.equal(before[0], before[1])
    changed = (after[1] != before[1]).any(-1).flatten(1).sum(1)
    assert changed[1] > 20  # of the side's pixels
    assert (changed[0] > 20) == (name != "cam_pos")
    if name == "geom_size":
        assert amount(after, 2)[1, 0] > 1.5 * amount(before, 2)[1, 0]
    if name == "geom_rgba":
        assert amount(after, 2)[1].sum() == 0
    assert torch.equal(renderer.render(qpos), after)


def test_decimated_meshes_look_the_same(model):
    coarse = decimate(model, 0.02)
    assert 20 < coarse.mesh_facenum[0] < 0.5 * model.mesh_facenum[0]
    used = coarse.mesh_vert[np.unique(coarse.mesh_face[: coarse.mesh_facenum[0]])]
    np.testing.assert_allclose(np.linalg.norm(used, axis=1), 0.12, rtol=0.02)
    assert np.ptp(used, axis=0).min() > 0.24 - 0.02
    pictures = []
    for drawn in (model, coarse):
        renderer = BatchedRenderer(drawn, 1, "side", 4 * H, 4 * W)
        pictures.append(renderer.render(states(1)))
        renderer.close()
    full, coarse = pictures
    assert amount(full, 1).item() == pytest.approx(amount(coarse, 1).item(), rel=0.05) and amount(full, 1) > 400
    assert (full.float() - coarse.float()).abs().mean() < 0.5  # of 255


def test_warp_draws_the_same_scene(make):
    """In every field that may differ between worlds, too."""
    qpos = states(2)
    pictures = {}
    for backend in ("mujoco", "warp"):
        renderer = make(2, ("top", "side"), H, W, backend=backend, per_world=PER_WORLD)
        for name in PER_WORLD:
            change(renderer, name)
        pictures[backend] = renderer.render(qpos, torch.tensor([1, 0]), ["side", "top"])
        assert torch.equal(renderer.render(qpos, torch.tensor([1, 0]), ["side", "top"]), pictures[backend])
    assert pictures["warp"].shape == (2, 2, H, W, 3) and pictures["warp"].dtype == torch.uint8
    difference = (pictures["mujoco"].float() - pictures["warp"].float()).abs()
    for colour in range(3):
        seen, traced = (amount(pictures[backend], colour).double() for backend in pictures)
        torch.testing.assert_close(traced, seen, rtol=0.1, atol=8)
    assert (
        difference.mean((-1, -2, -3)).max() < 1.5
    )  # of 255, once nothing shines: OpenGL lights a plane at its corners


def test_mistakes_cost_one_sentence(model, make, monkeypatch):
    with pytest.raises(ValueError, match="no camera 'front'; its cameras are top, side"):
        make(N, ("front",), H, W)
    with pytest.raises(ValueError, match="no field 'geom_colour'"):
        make(per_world=("geom_colour",))
    with pytest.raises(ValueError, match="^no pictures of 100000 x 4 pixels: "):
        make(1, "top", 100_000, 4)
    with pytest.raises(ValueError, match="--backend got 'vulkan'"):
        make(backend="vulkan")
    with pytest.raises(ValueError, match="made for top, side"):
        make().render(states(), cameras="front")
    monkeypatch.setattr(render, "find_gl", lambda: None)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    with pytest.raises(ValueError, match="^no pictures: neither EGL nor OSMesa loads; install one with: sudo apt-get"):
        make()


def test_a_thread_that_fails(make, monkeypatch):
    renderer = make(num_threads=2)

    def crash(*arguments):
        raise mujoco.FatalError("GL error\n0x505")

    with monkeypatch.context() as patch:
        patch.setattr(mujoco, "mjr_render", crash)
        with pytest.raises(RuntimeError, match="^OpenGL cannot draw: GL error 0x505$"):
            renderer.render(states())
    assert (amount(renderer.render(states()), 2) > 20).all()


def test_close_frees_everything(make):
    before = threading.active_count()
    for _ in range(20):
        renderer = make(num_threads=3)
        renderer.render(states())
        assert threading.active_count() == before + 3
        renderer.close()
        assert threading.active_count() == before


def test_what_one_thread_reads_it_reads_alone(make, monkeypatch):
    """While it does, no other is in any call of OpenGL; see `_Gate`."""
    inside, together, most = [], [], []

    def watched(name, function):
        def call(*arguments):
            inside.append(name)
            most.append(len(inside))
            if "mjr_readPixels" in inside and len(inside) > 1:
                together.append(list(inside))
            time.sleep(0.002)
            function(*arguments)
            inside.remove(name)

        return call

    pictures = make(num_threads=1).render(states())
    monkeypatch.setattr(render, "BATCH", 3)  # divides no thread's share of the pictures
    renderer = make(num_threads=3)
    assert torch.equal(renderer.render(states()), pictures)
    for name in ("mjr_render", "mjr_readPixels"):
        monkeypatch.setattr(mujoco, name, watched(name, getattr(mujoco, name)))
    for _ in range(5):
        assert torch.equal(renderer.render(states()), pictures)
    assert not together and max(most) > 1


def test_renderers_that_come_and_go_leave_the_others_alone(model, make):
    other_model = decimate(model, 0.1)
    kinds = {
        "small": lambda: make(2, "side", 24, 32, num_threads=1),
        "large": lambda: make(4, "top", 2 * H, 2 * W, num_threads=3),
        "fine": lambda: make(3, "top", H, W, num_threads=2, shadows=True, samples=4),
        "other": lambda: BatchedRenderer(other_model, 3, "side", H, W, num_threads=2),
    }
    stays, first = make(num_threads=2), {}
    pictures = stays.render(states())
    for i in range(12):
        name = list(kinds)[i % 4]
        renderer = kinds[name]()
        drawn = renderer.render(states(renderer.num_envs))
        assert torch.equal(first.setdefault(name, drawn), drawn)
        if i % 3:
            assert torch.equal(stays.render(states()), pictures)
        renderer.close()
        assert torch.equal(stays.render(states()), pictures)
    assert (first["fine"] != make(3, "top", H, W).render(states(3))).any()


FORK = """
again = BatchedRenderer(model, 3, "top", 16, 16, num_threads=2)
pictures = again.render(torch.zeros(3, model.nq))
again.close()
renderer.close()
child = os.fork()
renderer = BatchedRenderer(model, 3, "top", 16, 16, num_threads=2)
same = torch.equal(renderer.render(torch.zeros(3, model.nq)), pictures)
if not child:
    os._exit(0 if same else 1)
if os.waitpid(child, 0)[1] or not same:
    print("other pictures", file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("end", "code"), [("", 0), ("os.kill(os.getpid(), 9)", -9), ("raise SystemExit(3)", 3), (FORK, 0)]
)
def test_a_process_ends_quietly(model, tmp_path, end, code):
    """Whether or not it closed the renderer."""
    program = f"""
import os, sys, mujoco, torch
from common.render import BatchedRenderer
model = mujoco.MjModel.from_xml_string('''{XML}''')
renderer = BatchedRenderer(model, 3, "top", 16, 16, num_threads=2)
renderer.render(torch.zeros(3, model.nq))
{end}
"""
    root = Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=dict(os.environ), capture_output=True, text=True, timeout=60
    )
    assert run.stderr == "" and run.returncode == code
