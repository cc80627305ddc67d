"""mp4 and GIF of a MuJoCo model without a display, through EGL or OSMesa."""

import contextlib
import functools
import importlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.files import atomic

INSTALL = "apt-get install -y --no-install-recommends libegl1 libgl1 libgl1-mesa-dri"  # the Makefile's command too
_TEST = """
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><geom type='plane' size='1 1 1'/></worldbody></mujoco>")
with mujoco.Renderer(model, 16, 16) as renderer:
    renderer.render()
"""


@functools.cache
def find_gl() -> str | None:
    """The way to render that works here ("egl", "osmesa", ...), also left in `MUJOCO_GL`; None where none does.

    The user's own `MUJOCO_GL` is the only candidate where it is set. Each is tried in a process of its own, because
    an OpenGL library that fails to load cannot be replaced in the process that tried it.
    """
    candidates = ("cgl",) if sys.platform == "darwin" else ("egl", "osmesa")
    if os.environ.get("MUJOCO_GL"):
        candidates = (os.environ["MUJOCO_GL"],)
    for gl in candidates:
        env = os.environ | {"MUJOCO_GL": gl}
        env.pop("PYOPENGL_PLATFORM", None)
        try:
            subprocess.run([sys.executable, "-c", _TEST], env=env, capture_output=True, check=True, timeout=60)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            continue
        os.environ["MUJOCO_GL"] = gl
        return gl
    return None


def use_gl() -> str | None:
    """`find_gl()`, and MuJoCo's renderer takes it; imported before, MuJoCo had picked an OpenGL for desktops."""
    gl = find_gl()
    if gl is not None:
        gl_context = importlib.import_module("mujoco.rendering.classic.gl_context")
        gl_context.GLContext = importlib.import_module(f"mujoco.{gl}").GLContext
    return gl


def missing_gl_message() -> str:
    """The sentence for a user who asks for a video where nothing can render."""
    if os.environ.get("MUJOCO_GL"):
        return (
            f"no video: MUJOCO_GL={os.environ['MUJOCO_GL']} does not work here; unset it to let egl and osmesa be tried"
        )
    return f"no video: neither EGL nor OSMesa loads; install one with: sudo {INSTALL}"


@contextlib.contextmanager
def mp4_writer(path: str | Path, width: int, height: int, fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields a function that takes frames, uint8 (height, width, 3), for an mp4 that appears whole after the block.

    Raises OSError with ffmpeg's own words where it cannot write.
    """
    even = "scale=trunc((iw+1)/2)*2:trunc((ih+1)/2)*2"  # yuv420p halves both sides
    with atomic(path) as temporary:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24"]
        command += ["-s", f"{width}x{height}", "-r", str(fps), "-i", "-", "-an", "-vf", even, "-c:v", "libx264"]
        command += ["-pix_fmt", "yuv420p", "-crf", "15", "-movflags", "+faststart", str(temporary)]
        # In a group of its own Ctrl-C does not reach it.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0)
        try:
            yield lambda frame: process.stdin.write(np.ascontiguousarray(frame))
        except BrokenPipeError:
            pass  # ffmpeg has ended, and says why
        finally:
            _, complaint = process.communicate()
        if process.returncode != 0:
            reason = complaint.decode(errors="replace").strip().partition("\n")[0]
            raise OSError(f"ffmpeg: {reason}")


class Recorder:
    """Draws frames of `model` and writes them to an mp4 that appears whole at the end of its `with` block.

    model: mujoco.MjModel; its offscreen buffer is enlarged to the size of the video if need be.
    fps: frames per second of the video; width, height: pixels, both even.
    fast: no smoothing of edges and coarser shadows, which without a GPU takes a third of the time.
    Raises RuntimeError(missing_gl_message()) where nothing can render; look at `find_gl()` first to go on without.
    """

    def __init__(self, model, path: str | Path, fps: int = 50, width: int = 640, height: int = 480, fast: bool = True):
        if use_gl() is None:
            raise RuntimeError(missing_gl_message())
        import mujoco  # here, as Isaac Lab's environment need not have it

        self.mujoco, self.model = mujoco, model
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, width)
        model.vis.global_.offheight = max(model.vis.global_.offheight, height)
        if fast:
            model.vis.quality.offsamples, model.vis.quality.shadowsize = 0, 1024
        self.data = mujoco.MjData(model)
        self.renderer = mujoco.Renderer(model, height, width)
        self.camera = mujoco.MjvCamera()
        self.camera.azimuth, self.camera.elevation, self.camera.distance = 125.0, -18.0, 2.2
        self.lookat = None
        self.font = ImageFont.load_default(size=max(12, height // 30))
        self.stack = contextlib.ExitStack()
        self.stack.callback(self.renderer.close)
        self.write = self.stack.enter_context(mp4_writer(path, width, height, fps))

    def frame(self, state, lines: Iterable = (), track_body: str = "base", arrows: Iterable = ()) -> np.ndarray:
        """Draw one frame, add it to the video and return it as uint8 (height, width, 3).

        state: an MjData of the model, or qpos (nq,) as an array or tensor.
        lines: text in the upper left corner; a line is a string, or (string, colour) for one that is not white. A tab
            ends a column.
        track_body: name of the body that the camera follows; "" leaves the camera where it is.
        arrows: (position (3,), vector (3,), rgba) each, in metres and world axes.
        """
        mujoco, data = self.mujoco, state
        if not isinstance(state, mujoco.MjData):
            data = self.data
            data.qpos[:] = np.asarray(state)
            mujoco.mj_kinematics(self.model, data)
            mujoco.mj_comPos(self.model, data)
            mujoco.mj_camlight(self.model, data)
        if track_body:
            target = data.body(track_body).xpos.copy()
            # The height follows slowly, so that a bounce of the body is seen and not taken out by the camera.
            if self.lookat is not None and np.linalg.norm(target - self.lookat) < 1.0:
                target[2] = 0.95 * self.lookat[2] + 0.05 * target[2]
            self.lookat = target
            self.camera.lookat[:] = target
        self.renderer.update_scene(data, self.camera)
        for position, vector, rgba in arrows:
            self._add_arrow(np.asarray(position, np.float64), np.asarray(vector, np.float64), rgba)
        image = self.renderer.render()
        if lines:
            canvas = Image.fromarray(image)
            draw = ImageDraw.Draw(canvas)
            for row, line in enumerate(lines):
                text, color = (line, "white") if isinstance(line, str) else line
                for column, cell in enumerate(text.split("\t")):
                    cell = cell.replace(" ", "  ")  # the font's own spaces vanish between outlined words
                    corner = (8 + round(column * 8 * self.font.size), 6 + round(row * 1.4 * self.font.size))
                    draw.text(corner, cell, color, self.font, stroke_width=2, stroke_fill="black")
            image = np.asarray(canvas)
        self.write(image)
        return image

    def _add_arrow(self, position: np.ndarray, vector: np.ndarray, rgba) -> None:
        scene, mujoco = self.renderer.scene, self.mujoco
        if scene.ngeom >= scene.maxgeom or np.linalg.norm(vector) < 1e-3:
            return
        geom = scene.geoms[scene.ngeom]
        rgba = np.asarray(rgba, np.float32)
        mujoco.mjv_initGeom(geom, mujoco.mjtGeom.mjGEOM_ARROW, np.zeros(3), np.zeros(3), np.eye(3).ravel(), rgba)
        mujoco.mjv_connector(geom, mujoco.mjtGeom.mjGEOM_ARROW, 0.015, position, position + vector)
        scene.ngeom += 1

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *exception) -> None:
        self.stack.__exit__(*exception)


def write_mp4(path: str | Path, frames: Iterable[np.ndarray], fps: float) -> Path:
    """Write frames, uint8 (height, width, 3) of one size, as an mp4 that appears whole at the end."""
    frames = iter(frames)
    first = next(frames)
    with mp4_writer(path, first.shape[1], first.shape[0], fps) as write:
        for frame in itertools.chain([first], frames):
            write(frame)
    return Path(path)


def save_gif(mp4_path: str | Path, gif_path: str | Path, width: int = 480, fps: int = 20, seconds: float | None = None):
    """Turn (the first `seconds` of) an mp4 into a GIF of `width` pixels with a palette of its own."""
    scale = f"fps={fps},scale={width}:-1:flags=lanczos"
    filters = f"{scale},split[a][b];[a]palettegen=max_colors=128[p];[b][p]paletteuse=dither=bayer:bayer_scale=4"
    limit = [] if seconds is None else ["-t", str(seconds)]
    with atomic(gif_path) as temporary:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *limit, "-i", mp4_path, "-vf", filters]
        subprocess.run([str(word) for word in (*command, temporary)], check=True, capture_output=True)


if __name__ == "__main__":  # what `make go2` asks first
    gl = find_gl()
    print(f"rendering works: MUJOCO_GL={gl}" if gl else missing_gl_message())
    sys.exit(not gl)
