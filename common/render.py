"""Batched cameras: pictures of many worlds of one MuJoCo model behind one interface, two engines.

`mujoco` is MuJoCo's OpenGL renderer through EGL or OSMesa, with one context per thread. Drawing leaves Python's lock,
so threads do for it what processes would. `warp` is MuJoCo Warp's ray tracer: all worlds in one launch, on any device.
"""

import atexit
import contextlib
import copy
import importlib
import itertools
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import mujoco
import numpy as np
import torch

from common.distributed import num_cores
from common.physics import resolve_backend
from common.video import find_gl, missing_gl_message

BATCH = 8  # pictures that a thread renders before it reads them, where it has to wait for other threads to do so
BATCH_PIXELS = 2**18  # of them together, at most
DATA_FIELDS = ("mocap_pos", "mocap_quat")  # entries of `fields` that belong to MjData; all others are MjModel's


def decimate(model: mujoco.MjModel, cell: float) -> mujoco.MjModel:
    """A copy of `model`, for OpenGL to draw only, whose meshes have lost the detail finer than `cell` metres.

    Vertices in one cube of a grid become the one nearest to their mean, and triangles with two corners in one cube go
    (vertex clustering: Rossignac and Borrel 1993). Software OpenGL spends its time on vertices, hardly any on pixels.
    Meshes with a texture are left alone.
    """
    model = copy.copy(model)
    for mesh in np.flatnonzero(model.mesh_texcoordadr < 0):
        first_vertex, first_face = model.mesh_vertadr[mesh], model.mesh_faceadr[mesh]
        vertices = model.mesh_vert[first_vertex : first_vertex + model.mesh_vertnum[mesh]].astype(np.float64)
        faces = model.mesh_face[first_face : first_face + model.mesh_facenum[mesh]]
        normals = model.mesh_facenormal[first_face : first_face + model.mesh_facenum[mesh]]
        cube = np.unique(np.floor(vertices / cell).astype(int), axis=0, return_inverse=True)[1].ravel()
        mean = np.stack([np.bincount(cube, vertices[:, axis]) for axis in range(3)], 1) / np.bincount(cube)[:, None]
        order = np.lexsort((np.linalg.norm(vertices - mean[cube], axis=1), cube))
        nearest = order[np.unique(cube[order], return_index=True)[1]]  # (cubes,), a vertex each
        merged = nearest[cube][faces]
        corners = np.sort(merged, 1)
        kept = np.flatnonzero((corners[:, 0] != corners[:, 1]) & (corners[:, 1] != corners[:, 2]))
        faces[: len(kept)] = merged[kept]
        normals[: len(kept)] = normals[kept]
        model.mesh_facenum[mesh] = len(kept)
    return model


class BatchedRenderer:
    """Cameras on `num_envs` worlds of `model`.

    `fields[name]` is the per-world copy of a field of MjModel (`geom_size`, `geom_rgba`, `light_diffuse`, `cam_pos`) or
    MjData (`mocap_pos`, `mocap_quat`) named in `per_world`: a tensor (num_envs, ...) on `device`, to write in place
    before `render`. The same state gives the same picture, whichever thread draws it.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        num_envs: int,
        cameras: str | Sequence[str],
        height: int,
        width: int,
        device: str | torch.device = "cpu",
        backend: str = "auto",
        num_threads: int = 0,
        per_world: tuple[str, ...] = (),
        shadows: bool = False,
        samples: int = 0,
    ):
        """cameras: names; a single string leaves the axis of cameras out of the pictures. height, width: pixels.
        num_threads (0: all cores divided by the ranks on this machine), shadows and samples (per pixel, of MSAA) are
        for `mujoco`.

        Raises ValueError, in one sentence, for an unknown camera or field, where no OpenGL loads, for pictures that it
        cannot hold, and for a backend that does not fit the device.
        """
        self._painters = []
        self.model, self.num_envs, self.height, self.width = copy.copy(model), num_envs, height, width
        self.device, self.backend = resolve_backend(backend, device)
        self.squeeze = isinstance(cameras, str)
        self.cameras = (cameras,) if self.squeeze else tuple(cameras)
        known = [model.camera(i).name for i in range(model.ncam)]
        for name in self.cameras:
            if name not in known:
                raise ValueError(f"the model has no camera {name!r}; its cameras are {', '.join(known)}")
        for name in per_world:
            if name not in DATA_FIELDS and not isinstance(getattr(model, name, None), np.ndarray):
                raise ValueError(f"per_world: MuJoCo's model has no field {name!r}")
        if self.backend == "mujoco":
            self._init_mujoco(num_threads, per_world, shadows, samples)
        else:
            self._init_warp(per_world)

    def render(self, qpos: torch.Tensor, rows: torch.Tensor | None = None, cameras: str | Sequence[str] | None = None):
        """Pictures, uint8 (rows, [cameras,] height, width, 3) on `device`; no later call overwrites them.

        qpos: (num_envs, nq). rows: the worlds to draw, as indices or as a mask (num_envs,); None: all. cameras: some of
        those named at the start, in the order wanted; None: all of them. Raises RuntimeError, in one sentence, where
        drawing fails.
        """
        squeeze = self.squeeze if cameras is None else isinstance(cameras, str)
        names = self.cameras if cameras is None else (cameras,) if squeeze else tuple(cameras)
        if not set(names) <= set(self.cameras):
            raise ValueError(f"render got cameras {names}; this renderer was made for {', '.join(self.cameras)}")
        if rows is None:
            rows = torch.arange(self.num_envs, device=self.device)
        elif rows.dtype == torch.bool:
            rows = rows.nonzero().flatten()
        draw = self._draw if self.backend == "mujoco" else self._trace
        pictures = draw(qpos, rows, names)
        return pictures[:, 0] if squeeze else pictures

    def close(self):
        """Frees contexts and threads."""
        for painter in self._painters:
            painter.close()
        self._painters = []

    def __del__(self):
        self.close()

    # --- OpenGL

    def _init_mujoco(self, num_threads: int, per_world: tuple[str, ...], shadows: bool, samples: int):
        # Mesa's own threads only get in the way of ours; it reads this once, when it is loaded.
        os.environ.setdefault("LP_NUM_THREADS", "0")
        if find_gl() is None:
            raise ValueError(f"no pictures: {missing_gl_message().removeprefix('no video: ')}")
        count = num_threads or max(1, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        quality = self.model.vis.quality
        quality.offsamples, quality.shadowsize = samples, quality.shadowsize if shadows else 0
        self.model.vis.global_.offheight, self.model.vis.global_.offwidth = self.height, self.width
        example = mujoco.MjData(self.model)
        self.fields = {}
        for name in per_world:
            value = getattr(example if name in DATA_FIELDS else self.model, name)
            self.fields[name] = torch.from_numpy(np.repeat(value[None], self.num_envs, axis=0))
        count = min(count, self.num_envs)
        batch = 1 if count == 1 else max(1, min(BATCH, BATCH_PIXELS // (self.height * self.width)))
        for _ in range(count):
            try:
                self._painters.append(_Painter(self.model, self.fields, self.height, self.width, shadows, batch))
            except mujoco.FatalError as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"no pictures of {self.height} x {self.width} pixels: {reason}") from None

    def _draw(self, qpos: torch.Tensor, rows: torch.Tensor, cameras: tuple[str, ...]) -> torch.Tensor:
        qpos, rows = np.asarray(qpos, np.float64), rows.numpy()
        pictures = np.empty((len(rows), len(cameras), self.height, self.width, 3), np.uint8)
        ids = [self.model.camera(name).id for name in cameras]
        shares = np.array_split(np.arange(len(rows)), len(self._painters))
        jobs = [
            painter.start(qpos[rows[share]], rows[share], ids, pictures[share[0] : share[-1] + 1])
            for painter, share in zip(self._painters, shares, strict=True)
            if len(share)
        ]
        for job in jobs:
            try:
                job.result()
            except mujoco.FatalError as error:
                raise RuntimeError(f"OpenGL cannot draw: {' '.join(str(error).split())}") from None
        return torch.from_numpy(pictures)

    # --- MuJoCo Warp

    def _init_warp(self, per_world: tuple[str, ...]):
        import mujoco_warp as mjw
        import warp as wp

        wp.config.log_level = wp.LOG_WARNING
        self._wp, self._mjw = wp, mjw
        self.model.opt.disableflags &= ~(mujoco.mjtDisableBit.mjDSBL_MIDPHASE | mujoco.mjtDisableBit.mjDSBL_AUTORESET)
        batched = {name: self.num_envs for name in per_world if name not in DATA_FIELDS}
        with wp.ScopedDevice(str(self.device)):
            try:
                self._m = mjw.put_model(self.model, batch_sizes=batched)
            except NotImplementedError as error:
                raise ValueError(f"--backend warp cannot draw this model: {error}") from None
            self._d = mjw.make_data(self.model, nworld=self.num_envs, nconmax=1, njmax=1)
            # A field of view that differs between worlds cannot share its rays.
            shared_rays = not {"cam_fovy", "cam_intrinsic", "cam_sensorsize"} & set(per_world)
            self._context = mjw.create_render_context(
                self.model,
                nworld=self.num_envs,
                cam_res=(self.width, self.height),
                render_rgb=True,
                use_precomputed_rays=shared_rays,
                enable_specular=False,  # OpenGL computes it at the corners of a plane only, where it is seldom seen
                cam_active=list(self.cameras),
            )
            self._rgb = wp.zeros((self.num_envs, self.height, self.width), dtype=wp.vec3)
        self._qpos = wp.to_torch(self._d.qpos)
        self.fields = {name: wp.to_torch(getattr(self._m, name)) for name in batched}
        for field in self.fields.values():
            field.copy_(field[:1].clone().expand_as(field))
        self.fields |= {name: wp.to_torch(getattr(self._d, name)) for name in per_world if name in DATA_FIELDS}

    def _trace(self, qpos: torch.Tensor, rows: torch.Tensor, cameras: tuple[str, ...]) -> torch.Tensor:
        self._qpos.copy_(qpos)
        pictures = []
        with self._wp.ScopedDevice(str(self.device)):
            for stage in (self._mjw.kinematics, self._mjw.com_pos, self._mjw.camlight):
                stage(self._m, self._d)
            self._mjw.refit_bvh(self._m, self._d, self._context)
            self._mjw.render(self._m, self._d, self._context)
            for name in cameras:
                self._mjw.get_rgb(self._context, self.cameras.index(name), self._rgb)
                rgb = self._wp.to_torch(self._rgb)[rows]
                pictures.append((255 * rgb).round().clamp(0, 255).to(torch.uint8))
        return torch.stack(pictures, 1)


class _Gate:
    """Many threads may render at a time, but what one reads it reads while no other does anything in OpenGL.

    Mesa's software OpenGL, to find out whether a picture that is read has been drawn, looks through the lists of what
    every other context of the process is drawing, and takes no lock on them (22.3: llvmpipe_flush_resource). Runs
    crashed there, seldom, when a list was freed under it.
    """

    def __init__(self):
        self.changed = threading.Condition()
        self.rendering = self.waiting = 0  # threads

    @contextlib.contextmanager
    def render(self) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: not self.waiting)
            self.rendering += 1
        try:
            yield
        finally:
            with self.changed:
                self.rendering -= 1
                self.changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self.changed:
            self.waiting += 1
            self.changed.wait_for(lambda: not self.rendering)
            try:
                yield
            finally:
                self.waiting -= 1
                self.changed.notify_all()


_gate = _Gate()


class _Painter:
    """An OpenGL context, and the one thread that makes all its calls, from the first to the one that frees it.

    `batch` pictures are rendered, each into a buffer of its own, before they are read.
    """

    def __init__(self, model, fields: dict[str, torch.Tensor], height: int, width: int, shadows: bool, batch: int):
        self.fields = {name: field.numpy() for name, field in fields.items()}
        self.model, self.data = copy.copy(model), mujoco.MjData(model)
        self.scene, self.option, self.camera = mujoco.MjvScene(model, 10_000), mujoco.MjvOption(), mujoco.MjvCamera()
        self.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = shadows
        self.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        self.camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self.window = mujoco.MjrRect(0, 0, width, height)
        self.upside_down = np.empty((batch, height, width, 3), np.uint8)
        self.jobs = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, daemon=True)  # so that it lives until `close` at the exit
        self.thread.start()
        try:
            self._call(self._open).result()
        except BaseException:
            self.jobs.put(None)
            raise
        atexit.register(self.close)  # comes before the end of EGL, which the first context has registered

    def _call(self, function, *arguments) -> Future:
        future = Future()
        self.jobs.put((future, function, arguments))
        return future

    def _work(self):
        while self._do(self.jobs.get()):
            pass

    def _do(self, job) -> bool:
        """Does a job, of which nothing is kept; whether to go on."""
        if job is None:
            return False
        future, function, arguments = job
        try:
            future.set_result(function(*arguments))
        except BaseException as error:  # for the one who waits for the result
            future.set_exception(error)
        return True

    def _open(self):
        gl = importlib.import_module(f"mujoco.{os.environ['MUJOCO_GL']}").GLContext
        # MuJoCo's own frees the context from whatever thread and at whatever time; see `close`.
        self.gl = type(gl.__name__, (gl,), {"__del__": lambda self: None})(self.window.width, self.window.height)
        self.gl.make_current()
        with _gate.alone():
            font = mujoco.mjtFontScale.mjFONTSCALE_50
            self.contexts = [mujoco.MjrContext(self.model, font) for _ in self.upside_down]

    def start(self, qpos: np.ndarray, rows: np.ndarray, cameras: list[int], out: np.ndarray) -> Future:
        """Draws worlds `rows` in states `qpos` (rows, nq) into `out`; the future of it."""
        return self._call(self._draw, qpos, rows, cameras, out)

    def _draw(self, qpos: np.ndarray, rows: np.ndarray, cameras: list[int], out: np.ndarray):
        views = list(itertools.product(range(len(rows)), range(len(cameras))))
        for first in range(0, len(views), len(self.contexts)):
            batch = views[first : first + len(self.contexts)]
            with _gate.render():
                for (i, j), context in zip(batch, self.contexts, strict=False):
                    if j == 0:
                        self._place(rows[i], qpos[i])
                    self._render(cameras[j], context)
            with _gate.alone():
                for picture, context in zip(self.upside_down[: len(batch)], self.contexts, strict=False):
                    mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, context)
                    mujoco.mjr_readPixels(picture, None, self.window, context)
            for view, picture in zip(batch, self.upside_down, strict=False):
                out[view] = picture[::-1]

    def _place(self, row: int, state: np.ndarray):
        """Brings the data up to date with a world."""
        for name, field in self.fields.items():
            getattr(self.data if name in DATA_FIELDS else self.model, name)[:] = field[row]
        self.data.qpos[:] = state
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_comPos(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)

    def _render(self, camera: int, context: mujoco.MjrContext):
        self.camera.fixedcamid = camera
        every = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self.model, self.data, self.option, None, self.camera, every, self.scene)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, context)
        mujoco.mjr_render(self.window, self.scene, context)

    def close(self):
        atexit.unregister(self.close)
        if self.thread.is_alive():  # in a forked child it is not
            self._call(self._free).result()
            self.jobs.put(None)
            self.thread.join()

    def _free(self):
        with _gate.alone():
            for context in self.contexts:
                context.free()
            self.gl.free()
