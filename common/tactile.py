"""Touch of a gripper's pads: contact forces from MuJoCo's contact sensors, spread over taxels as an elastomer would.

The layout, two fingers x (normal, two shears) x rows x columns, is that of TacSL (Akinola et al. 2024, arXiv
2408.06506). There, forces come from a penalty on penetration depths per taxel; here, from MuJoCo's solved contacts.
"""

import mujoco
import torch


def add_sensors(spec: mujoco.MjSpec, site: str, pads: tuple[str, ...], points: tuple[str, ...]):
    """Adds what `read` needs: position, x and z axis of `site`, and for each pad and each of the geoms `points`, which
    it touches in one point at most, the contact's force, position, normal and tangent.
    """
    kinds = mujoco.mjtSensor
    for kind in (kinds.mjSENS_FRAMEPOS, kinds.mjSENS_FRAMEXAXIS, kinds.mjSENS_FRAMEZAXIS):
        spec.add_sensor(type=kind, objtype=mujoco.mjtObj.mjOBJ_SITE, objname=site)
    data = mujoco.mjtConDataField
    wanted = (data.mjCONDATA_FORCE, data.mjCONDATA_POS, data.mjCONDATA_NORMAL, data.mjCONDATA_TANGENT)
    for pad in pads:
        for point in points:
            sensor = spec.add_sensor(type=kinds.mjSENS_CONTACT)
            sensor.objtype, sensor.objname = mujoco.mjtObj.mjOBJ_GEOM, pad
            sensor.reftype, sensor.refname = mujoco.mjtObj.mjOBJ_GEOM, point
            sensor.intprm[:3] = sum(1 << int(field) for field in wanted), 0, 1


def read(sensordata: torch.Tensor, pads: int, points: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Forces (N, pads, points, 3) on the pads in N: normal, and shear along the site's x and z; and where they act,
    (N, pads, points, 2) in m along the site's x and z from it. All zero where nothing touches.
    """
    sensors = sensordata.float()
    origin, x_axis, z_axis = sensors[:, :9].view(-1, 3, 3).unbind(1)
    force, position, normal, tangent = sensors[:, 9:].view(-1, pads, points, 4, 3).unbind(3)
    axes = torch.stack((x_axis, z_axis), 2)[:, None, None]
    # The sensor gives what the pad does to the other geom, in the contact's frame, whose normal leaves the pad.
    shear = -force[..., 1:2] * tangent - force[..., 2:] * torch.linalg.cross(normal, tangent)
    shear = (shear[..., None, :] @ axes)[..., 0, :]
    touches = (normal != 0).any(-1, keepdim=True)
    position = ((position - origin[:, None, None])[..., None, :] @ axes)[..., 0, :] * touches
    return torch.cat((force[..., :1], shear), 3), position


def image(force: torch.Tensor, position: torch.Tensor, taxels: torch.Tensor, spread: float) -> torch.Tensor:
    """(N, 3 * pads, n, n) in N per taxel: for each pad its normal force and its two shears; rows along z, columns along
    x. The sum over a channel is the pad's force.

    force, position: as `read` returns them. taxels: (2, n) the taxels' centres along x and z in m. spread: standard
    deviation in m of the Gaussian print that a point force leaves on an elastomer over a rigid core.
    """
    weights = torch.exp(-0.5 * ((taxels - position[..., None]) / spread).square())
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)
    columns, rows = weights.unbind(3)  # (N, pads, points, n)
    values = (force[..., None] * rows[..., None, :]).flatten(3)  # (N, pads, points, 3 * n)
    n = taxels.shape[1]
    return (values.transpose(2, 3) @ columns).view(len(force), -1, n, n)
