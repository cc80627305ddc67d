"""mp4 and GIF of a MuJoCo model without a display, through EGL or OSMesa."""

import functools
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw, ImageFont

APT_PACKAGES = ("libegl1", "libgl1", "libgl1-mesa-dri")
ENCODING = {"codec": "libx264", "pix_fmt_out": "yuv420p", "macro_block_size": 2, "quality": 7}
ENCODING["output_params"] = ["-movflags", "+faststart"]
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


def install_command() -> list[str]:
    return ["apt-get", "install", "-y", "--no-install-recommends", *APT_PACKAGES]


def missing_gl_message() -> str:
    """The sentence for a user who asks for a video where nothing can render."""
    if os.environ.get("MUJOCO_GL"):
        return (
            f"no video: MUJOCO_GL={os.environ['MUJOCO_GL']} does not work here; unset it to let egl and osmesa be tried"
        )
    return f"no video: neither EGL nor OSMesa loads; install one with: sudo {' '.join(install_command())}"


class Recorder:
    """Draws frames of `model` and writes them to an mp4 that appears whole at `close()`.

    model: mujoco.MjModel; its offscreen buffer is enlarged to the size of the video if need be.
    fps: frames per second of the video; width, height: pixels, both even.
    fast: no smoothing of edges and coarser shadows, which without a GPU takes a third of the time.
    Raises RuntimeError(missing_gl_message()) where nothing can render; look at `find_gl()` first to go on without.
    """

    def __init__(self, model, path: str | Path, fps: int = 50, width: int = 640, height: int = 480, fast: bool = True):
        if use_gl() is None:
            raise RuntimeError(missing_gl_message())
        import mujoco  # here, as Isaac Lab's environment need not have it

        self.mujoco, self.model, self.path = mujoco, model, Path(path)
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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = self.path.with_name(f".{self.path.stem}.{os.getpid()}.tmp.mp4")
        self.writer = imageio_ffmpeg.write_frames(
            str(self.temporary),
            (width, height),
            fps=fps,
            **ENCODING,
        )
        self.writer.send(None)

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
        self.writer.send(np.ascontiguousarray(image))
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

    def close(self) -> None:
        """Finish the file and free the renderer."""
        if self.writer is None:
            return
        self.writer.close()
        self.renderer.close()
        self.writer = None
        os.replace(self.temporary, self.path)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind, *exception) -> None:
        if kind is None:
            self.close()
        elif self.writer is not None:
            self.writer.close()
            self.renderer.close()
            self.writer = None
            self.temporary.unlink(missing_ok=True)


def write_mp4(path: str | Path, frames: Iterable[np.ndarray], fps: float) -> Path:
    """Write frames, uint8 (height, width, 3) of one size, as an mp4 that appears whole at the end."""
    path, frames = Path(path), iter(frames)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.mp4")
    first = next(frames)
    writer = imageio_ffmpeg.write_frames(str(temporary), first.shape[1::-1], fps=fps, **ENCODING)
    try:
        writer.send(None)
        writer.send(np.ascontiguousarray(first))
        for frame in frames:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
        os.replace(temporary, path)
    finally:
        writer.close()  # else ffmpeg would write the file after it was removed
        temporary.unlink(missing_ok=True)
    return path


def save_gif(mp4_path: str | Path, gif_path: str | Path, width: int = 480, fps: int = 20, seconds: float | None = None):
    """Turn (the first `seconds` of) an mp4 into a GIF of `width` pixels with a palette of its own."""
    gif_path = Path(gif_path)
    gif_path.parent.mkdir(parents=True, exist_ok=True)
    temporary = gif_path.with_name(f".{gif_path.stem}.{os.getpid()}.tmp.gif")
    scale = f"fps={fps},scale={width}:-1:flags=lanczos"
    filters = f"{scale},split[a][b];[a]palettegen=max_colors=128[p];[b][p]paletteuse=dither=bayer:bayer_scale=4"
    limit = [] if seconds is None else ["-t", str(seconds)]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *limit, "-i", mp4_path, "-vf", filters, temporary]
    try:
        subprocess.run([str(word) for word in command], check=True, capture_output=True)
        os.replace(temporary, gif_path)
    finally:
        temporary.unlink(missing_ok=True)


def _make_rendering_work() -> None:
    """What `make` does once: nothing where rendering works, else install the packages as root or say how."""
    if find_gl() is None and not os.environ.get("MUJOCO_GL") and os.geteuid() == 0 and shutil.which("apt-get"):
        env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (["apt-get", "update", "-qq"], install_command()):
            subprocess.run(command, env=env, stdout=subprocess.DEVNULL, check=False)
        find_gl.cache_clear()
    gl = find_gl()
    print(f"rendering works: MUJOCO_GL={gl}" if gl else missing_gl_message())


if __name__ == "__main__":
    _make_rendering_work()
