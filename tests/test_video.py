"""Videos: the frames hold what was asked for, and a file appears whole or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from full_disk import small_disk

from common import video

XML = """
<mujoco>
  <worldbody>
    <light pos="0 0 3"/>
    <geom type="plane" size="50 50 1" rgba=".2 .2 .2 1"/>
    <body name="base" pos="0 0 .3"><freejoint/><geom type="box" size=".2 .1 .05" rgba="0 0 1 1"/></body>
  </worldbody>
</mujoco>
"""


@pytest.fixture(scope="module")
def model():
    if video.find_gl() is None:
        pytest.skip(video.missing_gl_message())
    import mujoco

    return mujoco.MjModel.from_xml_string(XML)


def qpos(x: float) -> np.ndarray:
    return np.array([x, 0, 0.3, 1, 0, 0, 0])


def blue(image: np.ndarray) -> int:
    """How many pixels show the body."""
    image = image.astype(int)
    return int((image[..., 2] > image[..., 0] + 40).sum())


def red(image: np.ndarray) -> int:
    image = image.astype(int)
    return int(((image[..., 0] > image[..., 1] + 60) & (image[..., 0] > image[..., 2] + 60)).sum())


def test_mp4_and_gif(model, tmp_path):
    path, arrow = tmp_path / "videos" / "a.mp4", ((0, 0, 0.6), (0.5, 0, 0), (1, 0, 0, 1))
    with video.Recorder(model, path, fps=25, width=320, height=240) as recorder:
        plain = recorder.frame(qpos(0.0))
        far = recorder.frame(qpos(30.0))
        lost = recorder.frame(qpos(60.0), track_body="")
        pointed = recorder.frame(qpos(0.0), arrows=[arrow])
        written = recorder.frame(qpos(0.0), lines=["commanded 1.0 m/s", "measured .9 m/s"])
        assert not path.exists()
    assert plain.shape == (240, 320, 3) and plain.dtype == np.uint8
    assert blue(plain) > 300 and blue(far) == pytest.approx(blue(plain), rel=0.1) and blue(lost) == 0
    assert red(pointed) > 50 and red(plain) == 0
    assert (written[:60] > 250).sum() > (plain[:60] > 250).sum() + 100
    assert [p.name for p in path.parent.iterdir()] == ["a.mp4"]
    frames = imageio_ffmpeg.read_frames(str(path))
    meta = next(frames)
    assert meta["size"] == (320, 240) and meta["fps"] == 25 and len(list(frames)) == 5
    assert meta["codec"] == "h264" and meta["pix_fmt"].startswith("yuv420p")

    video.save_gif(path, tmp_path / "a.gif", width=160, fps=25)
    from PIL import Image

    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.size == (160, 120) and gif.n_frames >= 4


def test_mjdata_and_large_frames(model, tmp_path):
    import mujoco

    data = mujoco.MjData(model)
    data.qpos[:] = qpos(1.0)
    mujoco.mj_forward(model, data)
    with video.Recorder(model, tmp_path / "a.mp4", width=1280, height=720) as recorder:
        assert blue(recorder.frame(data)) > 300


def test_a_crash_leaves_the_old_video(model, tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="boom"), video.Recorder(model, path, width=64, height=64) as recorder:
        recorder.frame(qpos(0.0))
        raise ValueError("boom")
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_mujoco_may_be_imported_first(model, tmp_path):
    code = f"""
import mujoco, sys
from common.video import Recorder
model = mujoco.MjModel.from_xml_string({json.dumps(XML)})
with Recorder(model, sys.argv[1] + "/a.mp4", width=64, height=64) as recorder:
    assert recorder.frame([0, 0, .3, 1, 0, 0, 0]).max() > 0
"""
    env = {
        name: value for name, value in os.environ.items() if name not in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "DISPLAY")
    }
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", code, tmp_path], env=env, cwd=root, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "") and (tmp_path / "a.mp4").stat().st_size > 0


def painted(count, height=48, width=64):
    """Frames that grow brighter, each as a view with a stride, as a renderer may give them."""
    for i in range(count):
        yield np.full((height, 2 * width, 3), 40 * i, np.uint8)[:, ::2]


def test_frames_become_an_mp4(tmp_path):
    path = video.write_mp4(tmp_path / "videos" / "a.mp4", painted(6), fps=20)
    assert [p.name for p in path.parent.iterdir()] == ["a.mp4"]
    frames = imageio_ffmpeg.read_frames(str(path))
    meta = next(frames)
    assert meta["size"] == (64, 48) and meta["fps"] == 20 and meta["codec"] == "h264"
    assert meta["pix_fmt"].startswith("yuv420p")
    brightness = [np.frombuffer(frame, np.uint8).mean() for frame in frames]
    assert brightness == pytest.approx([40 * i for i in range(6)], abs=6)


def test_a_crash_between_frames_leaves_the_old_mp4(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")

    def frames():
        yield from painted(2)
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        video.write_mp4(path, frames(), fps=20)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_an_odd_size_is_rounded_up(tmp_path):
    path = video.write_mp4(tmp_path / "a.mp4", painted(2, height=47, width=63), fps=20)
    assert next(imageio_ffmpeg.read_frames(str(path)))["size"] == (64, 48)


def noise(count):
    generator = np.random.default_rng(0)
    for _ in range(count):
        yield generator.integers(0, 255, (240, 320, 3), dtype=np.uint8)


def test_a_full_disk_leaves_the_old_mp4_and_says_so(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        path = video.write_mp4(disk / "a.mp4", painted(2), fps=20)
        old = path.read_bytes()
        with pytest.raises(OSError, match="ffmpeg: .*No space left on device"):
            video.write_mp4(path, noise(200), fps=20)
        assert path.read_bytes() == old and list(disk.iterdir()) == [path]


def test_ffmpeg_that_fails_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: "false")
    with pytest.raises(OSError, match="ffmpeg"):
        video.write_mp4(tmp_path / "a.mp4", noise(20), fps=20)
    assert not list(tmp_path.iterdir())


def test_make_installs_what_the_sentence_names():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    assert video.INSTALL in makefile


def test_without_opengl(monkeypatch, tmp_path):
    def crash(command, **kwargs):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", crash)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    video.find_gl.cache_clear()
    try:
        assert video.find_gl() is None and "MUJOCO_GL" not in os.environ
        with pytest.raises(RuntimeError, match="apt-get install -y .*libegl1"):
            video.Recorder(None, tmp_path / "a.mp4")
        monkeypatch.setenv("MUJOCO_GL", "egl")
        assert "MUJOCO_GL=egl" in video.missing_gl_message()
    finally:
        video.find_gl.cache_clear()


def test_the_users_choice_comes_first(monkeypatch):
    tried = []
    monkeypatch.setattr(subprocess, "run", lambda command, env, **kwargs: tried.append(env["MUJOCO_GL"]))
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    video.find_gl.cache_clear()
    try:
        assert video.find_gl() == video.find_gl() == "osmesa" and tried == ["osmesa"]
    finally:
        video.find_gl.cache_clear()


def test_the_command_that_make_asks():
    program = [sys.executable, "-m", "common.video"]
    root = Path(__file__).parent.parent
    env = os.environ | {"MUJOCO_GL": "nothing"}
    run = subprocess.run(program, cwd=root, env=env, capture_output=True, text=True)
    assert run.returncode == 1 and "no video: MUJOCO_GL=nothing does not work here" in run.stdout
