"""What the camera of real2sim.py sees: objects as they were scanned, under lamps and cameras that vary."""

import math

import torch

from common.envs.real2sim_model import build
from common.render import BatchedRenderer

NUMBERS = 25  # uniform numbers in -1 to 1 from which one world's looks follow
CAMERA = "close"
SHAPE_FIELDS = ("geom_dataid", "geom_pos", "geom_quat", "geom_size", "geom_rbound")


def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product (N, 4) of quaternions, w first: the rotation `b`, then `a`."""
    w = a[:, :1] * b[:, :1] - (a[:, 1:] * b[:, 1:]).sum(1, keepdim=True)
    axis = a[:, :1] * b[:, 1:] + b[:, :1] * a[:, 1:] + torch.linalg.cross(a[:, 1:], b[:, 1:])
    return torch.cat((w, axis), 1)


class Looks:
    """A `renderer` of `num_envs` worlds, each with the looks of its object and its own lamp, colours and camera.

    cfg: Real2SimConfig, of which light, colour, camera and image_size are read. Raises ValueError where nothing can
    render.
    """

    def __init__(self, cfg, num_envs: int, device: torch.device, backend: str, num_threads: int, camera: str = CAMERA):
        self.cfg, self.num_envs = cfg, num_envs
        if backend == "mjx":  # which does not draw
            backend = "warp" if device.type == "cuda" else "mujoco"
        variants = build(cfg, visual=True)
        model = variants.models[0]
        tables = variants.tables(SHAPE_FIELDS)
        varying = ["light_diffuse", "light_dir"] if cfg.light != (1, 1) else []
        varying += ["mat_rgba"] if cfg.colour else []
        varying += ["cam_pos", "cam_quat"] if cfg.camera else []
        per_world = ("mocap_pos", *tables, *varying)
        size = cfg.image_size
        self.renderer = BatchedRenderer(
            model, num_envs, camera, size, size, device, backend, num_threads, per_world=per_world
        )
        self.tables = {name: torch.as_tensor(table, device=device) for name, table in tables.items()}
        self.usual = {name: torch.as_tensor(getattr(model, name), device=device).float() for name in varying}
        self.camera = model.camera(camera).id

    def set(self, goal: torch.Tensor, variant: torch.Tensor, numbers: torch.Tensor):
        """goal (num_envs, 3) m, variant (num_envs,) of the object, numbers (num_envs, NUMBERS) in -1 to 1."""
        fields, cfg = self.renderer.fields, self.cfg
        fields["mocap_pos"][:, 0].copy_(goal)
        for name, table in self.tables.items():
            fields[name].copy_(table[variant])
        lamp, direction, colours, shift, turn = numbers.split((1, 3, 15, 3, 3), 1)
        if "light_dir" in self.usual:
            low, high = cfg.light
            brightness = low + (high - low) * 0.5 * (lamp + 1)
            fields["light_diffuse"].copy_(self.usual["light_diffuse"] * brightness[..., None])
            directions = self.usual["light_dir"] + 0.5 * direction[:, None]
            fields["light_dir"].copy_(torch.nn.functional.normalize(directions, dim=-1))
        if "mat_rgba" in self.usual:
            rgba = self.usual["mat_rgba"].repeat(self.num_envs, 1, 1)
            count = rgba.shape[1]
            offsets = colours.view(-1, 5, 3).repeat(1, math.ceil(count / 5), 1)[:, :count]
            rgba[..., :3] = (rgba[..., :3] + cfg.colour * offsets).clamp(0, 1)
            fields["mat_rgba"].copy_(rgba)
        if "cam_pos" in self.usual:
            fields["cam_pos"][:, self.camera].copy_(self.usual["cam_pos"][self.camera] + cfg.camera * shift)
            turn = torch.cat((torch.ones_like(lamp), 0.5 * cfg.camera * turn), 1)
            turn = torch.nn.functional.normalize(turn, dim=1)
            quat = self.usual["cam_quat"][self.camera].expand(self.num_envs, 4)
            fields["cam_quat"][:, self.camera].copy_(multiply(quat, turn))

    def close(self):
        """Frees the cameras."""
        self.renderer.close()
