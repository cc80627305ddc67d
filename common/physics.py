"""Batched MuJoCo: many worlds of one model behind one interface, three engines.

`mujoco` is the C library's own thread pool (`mujoco.batch`, MuJoCo >= 3.17): float64 state on the CPU.
`warp` is MuJoCo Warp: float32 state on `device`, every substep of every world in one captured CUDA graph on a GPU.
Both show their state as torch tensors that share memory with the simulator, so writing one is setting the state.
`mjx` is MuJoCo XLA: float32 state on `device`, all substeps in one compiled program, which reads the same torch tensors
through DLPack without a copy; its arrays cannot be written to, so what it returns is copied into them.
"""

import copy
import os
import warnings
from pathlib import Path

import mujoco
import torch

from common.distributed import check_device

STATE = ("qpos", "qvel", "ctrl", "qacc_warmstart")
MOCAP = ("mocap_pos", "mocap_quat")
OUTPUTS = ("sensordata", "actuator_force")
BACKENDS = ("auto", "mujoco", "warp", "mjx")
# What `set_const` computes, all of it per world where masses or inertias are.
DERIVED = ("body_subtreemass", "body_invweight0", "dof_invweight0", "actuator_acc0")


def resolve_backend(backend: str, device: str | torch.device) -> tuple[torch.device, str]:
    """The device and the backend on it; `auto` is warp on CUDA and mujoco on a CPU. Raises ValueError, in one
    sentence, for a device that is not there and a backend that does not fit it.
    """
    if backend not in BACKENDS:
        raise ValueError(f"--backend got {backend!r}; it takes one of {', '.join(BACKENDS)}")
    device = check_device(str(device))
    if backend == "mujoco" and device.type != "cpu":
        raise ValueError(f"--backend mujoco runs on the CPU, got --device {device}; use --backend warp")
    return device, ("warp" if device.type == "cuda" else "mujoco") if backend == "auto" else backend


class BatchedMujoco:
    """`num_envs` worlds of `model`.

    Attributes, each a live tensor of shape (num_envs, n): `qpos`, `qvel`, `ctrl`, `qacc_warmstart` are state, to read
    and to write in place, and so are `mocap_pos` (num_envs, nmocap, 3) and `mocap_quat` (num_envs, nmocap, 4) where the
    model has mocap bodies; `sensordata` and `actuator_force` are outputs of the last `step` and, as with `mj_step`,
    describe the state before its last substep. `fields[name]` is the per-world copy of a model field named in
    `per_world`, of shape (num_envs, ...), to write in place.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        num_envs: int,
        device: str | torch.device = "cpu",
        backend: str = "auto",
        num_threads: int = 0,
        per_world: tuple[str, ...] = (),
        nconmax: int | None = None,
        njmax: int | None = None,
        mjx_impl: str = "jax",
    ):
        """`num_threads` (0: all cores) is for `mujoco`; `nconmax` contacts and `njmax` constraint rows per world are
        `warp`'s buffer sizes (None: its own estimate); `mjx_impl` is what MJX computes with: "jax", good for few
        contacts of simple shapes, or "warp", whose kernels it then calls. Raises ValueError for a backend that does not
        fit the device, and for a field that it holds once for all worlds.
        """
        self.model, self.num_envs = copy.copy(model), num_envs
        self.device, self.backend = resolve_backend(backend, device)
        self._state = STATE + MOCAP if model.nmocap else STATE
        if self.backend == "mujoco":
            self._init_mujoco(num_threads, per_world)
        elif self.backend == "mjx":
            self._init_mjx(per_world, mjx_impl, nconmax, njmax)
        else:
            self._init_warp(per_world, nconmax, njmax)

    def _init_mujoco(self, num_threads: int, per_world: tuple[str, ...]):
        from mujoco import batch

        # A world that diverges must stay visibly non-finite: MuJoCo would silently put it back at qpos0.
        self.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET
        self._batch = batch.Batch(self.model, self.num_envs, num_threads)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            for name in self._state + OUTPUTS:
                setattr(self, name, torch.from_numpy(self._batch.bind(name)))
        self.fields = {name: torch.from_numpy(self._batch.expand(name)) for name in per_world}

    def _init_warp(self, per_world: tuple[str, ...], nconmax: int | None, njmax: int | None):
        import mujoco_warp as mjw
        import warp as wp

        wp.config.log_level = wp.LOG_WARNING
        self._wp, self._mjw, self._graphs = wp, mjw, {}
        # Warp has neither of the two to switch off, and refuses a model that asks for it.
        self.model.opt.disableflags &= ~(mujoco.mjtDisableBit.mjDSBL_MIDPHASE | mujoco.mjtDisableBit.mjDSBL_AUTORESET)
        batched = (*per_world, *DERIVED) if {"body_mass", "body_inertia"} & set(per_world) else per_world
        with wp.ScopedDevice(str(self.device)):
            try:
                self._m = mjw.put_model(self.model, batch_sizes={name: self.num_envs for name in batched})
            except NotImplementedError as error:
                raise ValueError(f"--backend warp cannot run this model: {error}") from None
            # The few iterations of the solver are meant; without this, every step that uses them all prints.
            self._m.opt.warn_overflow &= ~(mjw.OverflowType.ITERATIONS | mjw.OverflowType.LS_ITERATIONS)
            self._d = mjw.make_data(self.model, nworld=self.num_envs, nconmax=nconmax, njmax=njmax)
        for name in self._state + OUTPUTS:
            setattr(self, name, wp.to_torch(getattr(self._d, name)))
        self.fields = {name: wp.to_torch(getattr(self._m, name)) for name in per_world}
        for field in self.fields.values():
            field.copy_(field[:1].clone().expand_as(field))

    def _init_mjx(self, per_world: tuple[str, ...], impl: str, nconmax: int | None, njmax: int | None):
        self._jax, self._mjx = jax, mjx = import_mjx(self.device)
        self._programs = {}
        if impl == "warp":
            import warp

            warp.config.log_level = warp.LOG_WARNING
            self.model.opt.disableflags &= ~int(mujoco.mjtDisableBit.mjDSBL_MIDPHASE)
        where = jax.devices("cpu" if self.device.type == "cpu" else "cuda")[self.device.index or 0]
        try:
            self._m = mjx.put_model(self.model, device=where, impl=impl)
            sizes = {"naconmax": self.num_envs * (nconmax or 64), "njmax": njmax or 256} if impl == "warp" else {}
            example = mjx.make_data(self.model, device=where, impl=impl, **sizes)
        except NotImplementedError as error:
            raise ValueError(f"--backend mjx cannot run this model: {error}") from None
        for name in per_world:
            if not isinstance(getattr(self._m, name, None), jax.Array):
                raise ValueError(f"--backend mjx holds {name} once for all worlds; use --backend warp or mujoco")
        repeat = lambda x: jax.numpy.repeat(x[None], self.num_envs, axis=0)  # noqa: E731
        self._d = jax.vmap(lambda _: example)(jax.numpy.arange(self.num_envs))
        for name in self._state + OUTPUTS:
            setattr(self, name, torch.from_dlpack(getattr(self._d, name)).clone())
        self.fields = {name: torch.from_dlpack(repeat(getattr(self._m, name))).clone() for name in per_world}

    def _run_mjx(self, advance: int):
        """`advance` steps, or with 0 the outputs alone."""
        jax, mjx = self._jax, self._mjx
        if advance not in self._programs:
            axes = jax.tree.map(lambda _: None, self._m).tree_replace(dict.fromkeys(self.fields, 0))

            def substeps(m, d):
                if not advance:
                    return mjx.forward(m, d)
                return jax.lax.scan(lambda d, _: (mjx.step(m, d), None), d, length=advance)[0]

            def program(fields, state, d):
                return jax.vmap(substeps, (axes, 0))(self._m.tree_replace(fields), d.replace(**state))

            self._programs[advance] = jax.jit(program)
        view = jax.dlpack.from_dlpack
        fields = {name: view(field.contiguous()) for name, field in self.fields.items()}
        state = {name: view(getattr(self, name)) for name in self._state}
        result = jax.block_until_ready(self._programs[advance](fields, state, self._d))
        if advance:  # the state of `forward` is the one that went in
            for name in self._state:
                getattr(self, name).copy_(torch.from_dlpack(getattr(result, name)))
        for name in OUTPUTS:
            getattr(self, name).copy_(torch.from_dlpack(getattr(result, name)))
        self._d = result

    def step(self, nsubsteps: int = 1):
        """Advances every world by `nsubsteps` of `model.opt.timestep` seconds, in one call."""
        if self.backend == "mujoco":
            self._batch.step(None, nsubsteps)
            return
        if self.backend == "mjx":
            self._run_mjx(nsubsteps)
            return
        with self._wp.ScopedDevice(str(self.device)):
            if self.device.type != "cuda":
                self._substeps(nsubsteps)
            elif nsubsteps in self._graphs:
                self._wp.capture_launch(self._graphs[nsubsteps])
            else:
                self._substeps(nsubsteps)  # eager once: loads the kernels, and is this call's step
                with self._wp.ScopedCapture() as capture:
                    self._substeps(nsubsteps)
                self._graphs[nsubsteps] = capture.graph

    def forward(self):
        """Brings the outputs up to the present state, as `mj_forward` does; the state is left as it is."""
        if self.backend == "mujoco":
            self._batch.forward()
        elif self.backend == "mjx":
            self._run_mjx(0)
        else:
            with self._wp.ScopedDevice(str(self.device)):
                self._mjw.forward(self._m, self._d)

    def _substeps(self, n: int):
        for _ in range(n):
            self._mjw.step(self._m, self._d)

    def reset(self, mask: torch.Tensor, qpos: torch.Tensor, qvel: torch.Tensor):
        """Puts the worlds where `mask` (num_envs,) bool is set at rows of `qpos` (num_envs, nq) and `qvel`
        (num_envs, nv), and clears their controls and the solver's warm start. The other worlds are untouched.
        """
        zero = torch.zeros((), dtype=self.qpos.dtype, device=self.device)
        for target, source in ((self.qpos, qpos), (self.qvel, qvel), (self.ctrl, zero), (self.qacc_warmstart, zero)):
            target.copy_(torch.where(mask[:, None], source.to(target.dtype), target))

    def set_const(self):
        """Recomputes what MuJoCo derives from masses and inertias; call it after writing those in `fields`, unless you
        write what is derived as well. ValueError on `mjx`, which cannot.
        """
        if self.backend == "mujoco":
            self._batch.set_const()
        elif self.backend == "mjx":
            raise ValueError("--backend mjx cannot derive what depends on masses; use --backend warp or mujoco")
        else:
            with self._wp.ScopedDevice(str(self.device)):
                self._mjw.set_const(self._m, self._d)
            self._graphs.clear()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """A copy of all that the next `step` depends on."""
        state = {name: getattr(self, name).clone() for name in self._state}
        return state | {f"fields.{name}": field.clone() for name, field in self.fields.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]):
        """Restores `state_dict()` of the same model and number of worlds (RuntimeError on other shapes)."""
        for name in self._state:
            getattr(self, name).copy_(state[name])
        for name, field in self.fields.items():
            field.copy_(state[f"fields.{name}"])
        if {"body_mass", "body_inertia"} & self.fields.keys() and not set(DERIVED[:3]) <= self.fields.keys():
            self.set_const()


def import_mjx(device: torch.device):
    """JAX and MJX, set up for `device`: ValueError, with the command that installs them, where they are missing."""
    flags = os.environ.get("XLA_FLAGS", "")
    if device.type == "cpu" and "fusion_emitters" not in flags:
        # Without it a step takes hundreds of times longer (jax issue 33761, mujoco issue 2957).
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false".strip()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or JAX takes the memory that torch needs
    try:
        import jax
        from mujoco import mjx
    except ImportError:
        raise ValueError("--backend mjx needs JAX: pip install mujoco-mjx jax (jax[cuda13] on a GPU)") from None
    if jax.config.jax_compilation_cache_dir is None:  # compiling takes half a minute, reading it again a few seconds
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "real2sim" / "jax"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    return jax, mjx
