"""Batched MuJoCo: many worlds of one model behind one interface, two engines.

`mujoco` is the C library's own thread pool (`mujoco.batch`, MuJoCo >= 3.17): float64 state on the CPU.
`warp` is MuJoCo Warp: float32 state on `device`, every substep of every world in one captured CUDA graph on a GPU.
Both show their state as torch tensors that share memory with the simulator, so writing one is setting the state.
"""

import copy
import warnings

import mujoco
import torch

from common.distributed import check_device

STATE = ("qpos", "qvel", "ctrl", "qacc_warmstart")
MOCAP = ("mocap_pos", "mocap_quat")
OUTPUTS = ("sensordata", "actuator_force")
BACKENDS = ("auto", "mujoco", "warp")
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
    ):
        """`num_threads` (0: all cores) is for `mujoco`; `nconmax` contacts and `njmax` constraint rows per world are
        `warp`'s buffer sizes (None: its own estimate). Raises ValueError for a backend that does not fit the device.
        """
        self.model, self.num_envs = copy.copy(model), num_envs
        self.device, self.backend = resolve_backend(backend, device)
        self._state = STATE + MOCAP if model.nmocap else STATE
        if self.backend == "mujoco":
            self._init_mujoco(num_threads, per_world)
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

    def step(self, nsubsteps: int = 1):
        """Advances every world by `nsubsteps` of `model.opt.timestep` seconds, in one call."""
        if self.backend == "mujoco":
            self._batch.step(None, nsubsteps)
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
        """Recomputes what MuJoCo derives from masses and inertias; call it after writing those in `fields`."""
        if self.backend == "mujoco":
            self._batch.set_const()
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
        if {"body_mass", "body_inertia"} & self.fields.keys():
            self.set_const()
