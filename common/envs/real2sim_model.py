"""The MuJoCo models of real2sim.py: one per variant of an object, all of one layout, so that worlds can switch."""

from dataclasses import dataclass, replace
from pathlib import Path

import mujoco
import numpy as np
from mujoco.batch import MODEL_FIELDS
from scipy.spatial import ConvexHull
from scipy.spatial.transform import Rotation

from common.meshes import ScannedObject, prepare

ASSET = Path(__file__).parent.parent / "assets" / "real2sim.xml"
HOME = (0.0, 0.1963, 0.0, -2.2, 0.0, 2.3963, 0.7854)  # rad: the hand over the table's middle, pointing down
FINGER_MAX = 0.04  # m
CENTRE = (0.5, 0.0)  # m, the middle of the areas of object and goal
PALM_RADIUS, PALM_HEIGHT = 0.036, 0.03  # m; the palm's middle is so far along the hand's z
DEPTH = 0.037  # m between the pads and the palm: an object that stands higher must be grasped higher
WIDEST = 0.075  # m, what fits between the fingers
TALLEST = 0.16  # m, what fits under the hand where an episode begins
FRICTION = {"left_pad": 1.0, "right_pad": 1.0, "palm": 0.5, "table": 0.7}  # with an object
VARIANTS = 8  # of each object where its size or shape is randomised
SETTLING = 600  # physics steps in which an object comes to rest


@dataclass
class Variants:
    """Models of all objects, `VARIANTS` of each where size or shape is randomised, in the order of the objects."""

    models: list[mujoco.MjModel]
    objects: list[ScannedObject]
    """the variants' shapes"""
    object_index: np.ndarray
    """(variants,) which of `--objects` it is one of"""
    height: np.ndarray
    """(variants,) m: the centre of mass above the table when it rests"""
    quat: np.ndarray
    """(variants, 4) w, x, y, z, at rest"""
    grasp: np.ndarray
    """(variants, 3) m: the point to be grasped, in the object's axes, from its centre of mass"""

    def tables(self, names: tuple[str, ...] = tuple(sorted(MODEL_FIELDS))) -> dict[str, np.ndarray]:
        """{field: (variants, ...)} of those fields in which the models differ."""
        names = [name for name in names if not name.startswith("opt.")]
        stacks = {name: np.stack([getattr(model, name) for model in self.models]) for name in names}
        return {name: stack for name, stack in stacks.items() if (stack != stack[:1]).any()}


def build(cfg, visual: bool = False) -> Variants:
    """All variants of `cfg`. Raises ValueError, in one sentence, for objects that the hand cannot grasp."""
    objects, index = [], []
    for number, source in enumerate(cfg.objects):
        found = prepare(source, cfg.object_scale)
        for variant in _resized(found, cfg.object_size, cfg.object_stretch):
            objects.append(variant)
            index.append(number)
    for source in cfg.held_out:  # read when training begins, not after it
        try:
            prepare(source, cfg.object_scale)
        except ValueError as error:
            raise ValueError(str(error).replace("--objects", "--held-out", 1)) from None
    models = _compile(cfg, objects, visual)
    rests, grasps = [], []
    for found, model in zip(objects, models, strict=True):
        rests.append(_settle(found, model))
        grasps.append(_grasp_point(found, *rests[-1]))
    height, quat = (np.array(column) for column in zip(*rests, strict=True))
    return Variants(models, objects, np.array(index), height, quat, np.array(grasps))


def build_model(cfg, visual: bool = False) -> mujoco.MjModel:
    """The model of the first variant."""
    return build(cfg, visual).models[0]


def _resized(found: ScannedObject, size: tuple[float, float], stretch: float) -> list[ScannedObject]:
    """`found` alone, or VARIANTS of it: each side by a factor within `size` and another within 1 +- `stretch`."""
    if size[0] == size[1] and not stretch:
        return [_scaled(found, np.full(3, size[0]))]
    generator = np.random.default_rng(0)
    factors = np.linspace(*size, VARIANTS)[:, None] * generator.uniform(1 - stretch, 1 + stretch, (VARIANTS, 3))
    return [_scaled(found, factor) for factor in factors]


def _scaled(found: ScannedObject, factor: np.ndarray) -> ScannedObject:
    # Second moments of the density scale by the sides; the inertia is their trace less themselves.
    moments = 0.5 * np.trace(found.inertia) * np.eye(3) - found.inertia
    moments = moments * np.outer(factor, factor) * factor.prod()
    return replace(
        found,
        vertices=found.vertices * factor,
        hulls=[hull * factor for hull in found.hulls],
        volume=found.volume * factor.prod(),
        inertia=np.trace(moments) * np.eye(3) - moments,
    )


def is_box(cfg) -> bool:
    """Whether the one object is a box without a mesh, which all engines like best."""
    return tuple(cfg.objects) == ("box",)


def _compile(cfg, objects: list[ScannedObject], visual: bool) -> list[mujoco.MjModel]:
    spec = mujoco.MjSpec.from_file(str(ASSET))
    for flag in ("ISLAND", "MIDPHASE", "EQUALITY", "EULERDAMP"):
        spec.option.disableflags |= getattr(mujoco.mjtDisableBit, f"mjDSBL_{flag}")
    if not visual:
        for geom in [geom for geom in spec.geoms if geom.group == 2 and not geom.conaffinity]:
            spec.delete(geom)
    for name in ("finger_joint1", "finger_joint2"):
        spec.joint(name).armature = 0.5  # kg: with the 0.1 of the Panda's model the grip chatters at 5 ms
    palm = spec.body("hand").add_geom(name="palm", type=mujoco.mjtGeom.mjGEOM_CAPSULE, group=4)
    palm.fromto[:] = (0, -0.06, PALM_HEIGHT, 0, 0.06, PALM_HEIGHT)
    palm.size[0] = PALM_RADIUS
    body = spec.worldbody.add_body(name="object", pos=(*CENTRE, 0.1), explicitinertial=True)
    body.add_freejoint(name="object")
    slots = max(len(found.hulls) for found in objects)
    pieces = [body.add_geom(name=f"object{slot}", group=0 if is_box(cfg) else 4) for slot in range(slots)]
    look = None
    if is_box(cfg):
        pieces[0].material = "object"
    else:
        look = (
            body.add_geom(name="look", type=mujoco.mjtGeom.mjGEOM_MESH, material="object", group=2) if visual else None
        )
        _add_meshes(spec, objects, slots, visual)
    for geom in (palm, *pieces, *([look] if look else [])):
        geom.contype = geom.conaffinity = 0  # what may touch is listed below, so the solver looks at nothing else
        geom.mass = 0
    for part in ("left_pad", "right_pad", "palm"):
        # Without friction: fingers that the table could stop would pass for fingers that hold something.
        _add_pair(spec, part, "table", 0.0, condim=1)
    for part, friction in FRICTION.items():
        for piece in pieces:
            # A mesh touches a pad in a point or two, about which it would turn like a top.
            condim = 4 if part.endswith("pad") and not is_box(cfg) else 3
            _add_pair(spec, part, piece.name, friction, condim)

    models = []
    for index, found in enumerate(objects):
        mass = cfg.density * found.volume
        inertia = cfg.density * found.inertia
        if len(objects) > 1:
            # MuJoCo lays out the mass matrix of a body with diagonal inertia in another way; all worlds need the same.
            inertia = inertia + 1e-3 * np.trace(inertia) * (1 - np.eye(3)) * (
                np.abs(inertia) < 1e-3 * np.trace(inertia)
            )
        body.mass = mass
        body.ipos[:] = 0
        body.fullinertia[:] = inertia[[0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]]
        for slot, piece in enumerate(pieces):
            if is_box(cfg):
                piece.type = mujoco.mjtGeom.mjGEOM_BOX
                piece.size[:] = found.extents / 2
            else:
                piece.type = mujoco.mjtGeom.mjGEOM_MESH
                piece.meshname = f"hull{index}_{slot}"
        if look:
            look.meshname = f"look{index}"
        models.append(spec.compile())
    return models


def _add_meshes(spec: mujoco.MjSpec, objects: list[ScannedObject], slots: int, visual: bool):
    for index, found in enumerate(objects):
        # An object of fewer pieces than another has crumbs within its first one in their place, which nothing reaches.
        middle = found.hulls[0].mean(0)
        crumb = middle + 0.0005 * np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
        for slot, hull in enumerate(found.hulls + [crumb] * (slots - len(found.hulls))):
            spec.add_mesh(name=f"hull{index}_{slot}", uservert=hull.ravel())
        if visual:
            spec.add_mesh(name=f"look{index}", uservert=found.vertices.ravel(), userface=found.faces.ravel())


def _add_pair(spec: mujoco.MjSpec, first: str, second: str, friction: float, condim: int = 3):
    pair = spec.add_pair(geomname1=first, geomname2=second)
    pair.condim = condim
    pair.friction[:] = friction, friction, 0.01, 0.0001, 0.0001
    pair.solref[:] = 0.01, 1.0  # s: two physics steps, the stiffest that is stable
    pair.solimp[:3] = 0.8, 0.99, 0.001


def _settle(found: ScannedObject, model: mujoco.MjModel) -> tuple[float, np.ndarray]:
    """Height (m) and quaternion of the object where it comes to rest, set down as it was scanned."""
    data = mujoco.MjData(model)
    data.qpos[:9] = data.ctrl[:] = (*HOME, FINGER_MAX, FINGER_MAX)
    data.qpos[0] = data.ctrl[0] = 1.5  # rad: the hand out of its way
    data.qpos[9:12] = *CENTRE, 0.001 - np.concatenate(found.hulls)[:, 2].min()
    for _ in range(SETTLING):
        mujoco.mj_step(model, data)
    if not np.isfinite(data.qpos).all() or np.abs(data.qpos[9:11] - CENTRE).max() > 0.3:
        raise ValueError(f"--objects: {found.name} does not come to rest on the table")
    return float(data.qpos[11]), data.qpos[12:16].copy()


def _grasp_point(found: ScannedObject, height: float, quat: np.ndarray) -> np.ndarray:
    """(3,) in the object's axes: the middle of its section at the height of its centre of mass, or as far below its top
    as the fingers reach. Raises ValueError for what is too wide or too high.
    """
    rest = Rotation.from_quat(quat, scalar_first=True)
    hulls = [rest.apply(hull) for hull in found.hulls]
    corners = np.concatenate(hulls)
    top = corners[:, 2].max()
    if top + height > TALLEST:
        raise ValueError(
            f"--objects: {found.name} is {100 * (top + height):.1f} cm high as it stands; the hand has room for "
            f"{100 * TALLEST:.0f} cm"
        )
    level = max(0.0, top - DEPTH)
    axes = [np.linspace(corners[:, axis].min(), corners[:, axis].max(), 60) for axis in (0, 1)]
    grid = np.stack([*np.meshgrid(*axes, indexing="ij"), np.full((60, 60), level)], -1).reshape(-1, 3)
    inside = np.zeros(len(grid), bool)
    for hull in hulls:
        planes = ConvexHull(hull).equations
        inside |= (grid @ planes[:, :3].T + planes[:, 3] <= 1e-6).all(1)
    section = grid[inside] if inside.any() else corners
    angles = np.linspace(0, np.pi, 36, endpoint=False)
    widths = np.ptp(section[:, :2] @ np.stack((np.cos(angles), np.sin(angles))), axis=0)
    if widths.min() > WIDEST:
        raise ValueError(
            f"--objects: {found.name} is {100 * widths.min():.1f} cm wide where the hand would grasp it; the fingers "
            f"take {100 * WIDEST:.1f} cm"
        )
    middle = section.mean(0)
    return rest.inv().apply((middle[0], middle[1], level))
