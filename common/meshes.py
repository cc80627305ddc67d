"""From a scan to an object that MuJoCo can hold: one closed surface in metres, its mass distribution and convex hulls.

`prepare` does it all and keeps the result in a cache; its notes say what was done. A file that cannot become an object
ends with one sentence (ValueError). `EXAMPLES` are shapes of our own, made on the spot: they need no file.
"""

import contextlib
import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from common.files import atomic

VERSION = 5  # of what this file makes of a scan; part of the cache's key
SUFFIXES = (".stl", ".obj", ".ply")
SIZES = (0.01, 0.5)  # m, the largest side of what a hand can be asked to hold
AUTO_SIZE = 0.1  # m, the largest side that a scan of unknown units is given
MAX_HULLS, MAX_VERTICES = 16, 32
CONVEX = 0.93  # of its hull's volume: such a shape is its hull
CONCAVITIES = (0.1, 0.05)  # CoACD's threshold, coarse to fine
SEARCH = dict(mcts_iterations=60, mcts_nodes=12, resolution=1000)  # CoACD's, at half its usual expense
VOLUME_RATIOS = (0.8, 1.3)  # of the hulls' union to the mesh; the first threshold that comes into these is taken
VOLUME_LIMITS = (0.5, 2.0)  # beyond these no object comes of it
FACES = 4000  # of a mesh, once its volume and inertia are known
CELLS = 64  # along the longest side, of the grid that makes a surface of points
THICKENING = (1.0, 1.5, 2.2, 3.3)  # of the shell of cells round points, until it closes
SURFACE_SAMPLES = 60_000  # points on a surface that is built anew


@dataclass
class ScannedObject:
    """A scan, ready to be simulated. Lengths are metres; the origin is the centre of mass, the axes are the scan's."""

    name: str
    vertices: np.ndarray
    """(V, 3), of what is drawn"""
    faces: np.ndarray
    """(F, 3)"""
    hulls: list[np.ndarray]
    """(at most 32, 3) each: corners of the convex pieces that collide"""
    volume: float
    """m3, of the mesh"""
    inertia: np.ndarray
    """(3, 3) m5: of the mesh filled with density 1"""
    notes: list[str] = field(default_factory=list)
    """what was done to it, in words"""

    @property
    def extents(self) -> np.ndarray:
        """(3,) m: the sides of the box round the hulls."""
        corners = np.concatenate(self.hulls)
        return np.ptp(corners, axis=0)


def prepare(source: str, scale: str = "auto") -> ScannedObject:
    """The object of a file (STL, OBJ, PLY) or of one of EXAMPLES by its name.

    scale: "metres", "mm", or "auto": metres if the size is one that a hand could hold, else mm, else the largest side
    is made 10 cm. Raises ValueError, in one sentence, for a scan that cannot become an object.
    """
    data = _read_bytes(source)
    key = hashlib.sha256(data + f"{VERSION} {scale} {Path(source).suffix}".encode()).hexdigest()[:24]
    path = cache_folder() / f"{key}.npz"
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError):
        return replace(_load(path), name=Path(source).stem)
    notes = []
    mesh = _mesh_of(source, notes)
    mesh = _rescale(mesh, source, scale, notes)
    found = _decompose(Path(source).stem, source, mesh, notes)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
        _save(path, found)
    return found


def cache_folder() -> Path:
    """Where prepared scans are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "real2sim"


# --- reading and repair


def _read_bytes(source: str) -> bytes:
    path = Path(source)
    if source in EXAMPLES:
        return f"example {source}".encode()
    if path.suffix.lower() not in SUFFIXES:
        known = ", ".join(EXAMPLES)
        raise ValueError(f"--objects got {source!r}; it takes STL, OBJ or PLY files, or the names {known}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"--objects: cannot read {source}: {error.strerror or error}") from None


def _mesh_of(source: str, notes: list[str]):
    """A closed trimesh.Trimesh in the file's units."""
    import trimesh

    if source in EXAMPLES:
        notes.append("made on the spot, in metres")
        return EXAMPLES[source]()
    try:
        loaded = trimesh.load(source, process=False)
        if isinstance(loaded, trimesh.Scene):
            loaded = loaded.to_mesh()
        points = np.asarray(loaded.vertices, float)
        faces = np.asarray(getattr(loaded, "faces", np.zeros((0, 3), int)))
    except Exception as error:  # each reader has its own kinds of complaint
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"--objects: {source} is damaged or of no kind that can be read: {reason[:120]}") from None
    if len(points) < 4 or not np.isfinite(points).all():
        raise ValueError(f"--objects: {source} has no four points with finite coordinates")
    if np.ptp(points, axis=0).min() <= 1e-6 * np.ptp(points, axis=0).max():
        raise ValueError(f"--objects: {source} is flat; an object needs a volume")
    if len(faces) == 0:
        notes.append(f"a point cloud of {len(points)} points: a surface was laid through them")
        return _surface(points, source, notes)
    return repair(trimesh.Trimesh(points, faces, process=False), source, notes)


def repair(mesh, source: str, notes: list[str]):
    """A closed, consistently wound trimesh.Trimesh: as it is if it is one, else with holes filled, else by manifold3d,
    else built anew through points on its surface.
    """
    import trimesh

    count = len(mesh.vertices)
    mesh = mesh.copy()
    mesh.merge_vertices(digits_vertex=max(0, math.ceil(6 - math.log10(mesh.extents.max()))))
    mesh.update_faces(mesh.nondegenerate_faces())
    mesh.update_faces(mesh.unique_faces())
    mesh.remove_unreferenced_vertices()
    notes.append(f"{count} corners merged to {len(mesh.vertices)}, {len(mesh.faces)} triangles")
    mesh = _without_crumbs(mesh, notes)
    if mesh.is_volume:
        notes.append("closed as it is")
        return mesh
    trimesh.repair.fix_normals(mesh)
    if mesh.is_volume:
        notes.append("its normals were turned outwards")
        return mesh
    capped = _capped(mesh)
    trimesh.repair.fix_normals(capped)
    # Where most edges are rims the triangles are loose, and closing each would make nothing of them.
    if capped.is_volume and len(capped.faces) < 1.5 * len(mesh.faces):
        notes.append(f"not closed: {len(capped.faces) - len(mesh.faces)} triangles fill its holes")
        return capped
    solid = _manifold(capped)
    if solid is not None:
        notes.append("not a closed surface: repaired by manifold3d")
        return solid
    notes.append(f"not a closed surface: built anew through {SURFACE_SAMPLES} points on it")
    points, _ = trimesh.sample.sample_surface(mesh, SURFACE_SAMPLES, seed=0)
    return _surface(np.asarray(points), source, notes)


def _capped(mesh):
    """`mesh` with a fan of triangles round the middle of each hole."""
    import trimesh
    from scipy import sparse

    _, first, count = np.unique(mesh.edges_sorted, axis=0, return_index=True, return_counts=True)
    rim = mesh.edges[first[count == 1]]  # (n, 2), as the one triangle at each edge goes along it
    total = len(mesh.vertices)
    links = sparse.coo_array((np.ones(len(rim)), rim.T), (total, total))
    _, hole = sparse.csgraph.connected_components(links, directed=False)
    _, hole = np.unique(hole[rim[:, 0]], return_inverse=True)
    middles = [mesh.vertices[rim[hole == index, 0]].mean(0) for index in range(hole.max(initial=-1) + 1)]
    fans = np.stack((rim[:, 1], rim[:, 0], total + hole), 1)
    vertices = np.concatenate((mesh.vertices, np.reshape(middles, (-1, 3))))
    return trimesh.Trimesh(vertices, np.concatenate((mesh.faces, fans)), process=False)


def _without_crumbs(mesh, notes: list[str]):
    """Without the pieces that have less than a hundredth of the surface, as scanners leave them."""
    parts = mesh.split(only_watertight=False)
    if len(parts) < 2:
        return mesh
    import trimesh

    kept = [part for part in parts if part.area >= 0.01 * mesh.area]
    if sum(part.area for part in kept) < 0.9 * mesh.area:
        return mesh
    if len(kept) < len(parts):
        notes.append(f"{len(parts) - len(kept)} loose crumbs left out")
    return trimesh.util.concatenate(kept)


def _manifold(mesh, tolerance: float = 0.0):
    """manifold3d's reading of `mesh` as a trimesh.Trimesh, or None where it finds no solid. With a tolerance, triangles
    go whose loss moves the surface by no more.
    """
    import manifold3d

    given = manifold3d.Mesh(np.asarray(mesh.vertices, np.float32), np.asarray(mesh.faces, np.uint32))
    given.merge()
    solid = manifold3d.Manifold(given)
    if solid.status() != manifold3d.Error.NoError or solid.volume() <= 0:
        return None
    return _trimesh(solid.simplify(tolerance) if tolerance else solid)


def _trimesh(solid):
    import trimesh

    mesh = solid.to_mesh()
    return trimesh.Trimesh(np.asarray(mesh.vert_properties[:, :3], float), np.asarray(mesh.tri_verts))


def _surface(points: np.ndarray, source: str, notes: list[str]):
    """The closed surface through `points` (n, 3): zero of the distance halfway between what is inside and outside.

    Cells near a point are a shell; what the shell cuts off from the edge of the grid is inside. Where nothing is cut
    off, the walls are too thin or the cloud has gaps, and the shell itself, thicker, is the object.
    """
    import trimesh
    from scipy import ndimage, spatial
    from skimage import measure

    cell = np.ptp(points, axis=0).max() / CELLS
    tree = spatial.cKDTree(points)
    spacing = tree.query(points, 9)[0].mean(1)
    points = points[spacing <= np.median(spacing) * 4]  # stray points
    spacing = float(np.quantile(spacing, 0.95))
    if spacing > 4 * cell:
        raise ValueError(f"--objects: {source} has {len(points)} points, too few to tell where its surface is")
    thinnest = max(1.6 * cell, 1.2 * spacing)
    pad = 3 + math.ceil(max(THICKENING) * thinnest / cell)
    low = points.min(0) - pad * cell
    shape = np.ceil(np.ptp(points, axis=0) / cell).astype(int) + 2 * pad
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1) * cell + low
    distance = spatial.cKDTree(points).query(grid.reshape(-1, 3))[0].reshape(shape)
    for thickening in THICKENING:
        shell = distance < thickening * thinnest
        solid = ndimage.binary_fill_holes(shell)
        inside = solid & ~shell
        closed = inside.sum() * cell**3 > 0.05 * np.prod(np.ptp(points, axis=0))
        if closed:
            break
    if not closed:
        wall = 1.4 * thinnest
        field, level = ndimage.gaussian_filter(distance, 0.7), wall / 2
        notes.append(f"its points close no volume: a wall {wall:.2g} units thick stands for them")
    else:
        field = ndimage.distance_transform_edt(~inside) - ndimage.distance_transform_edt(solid)
        field, level = ndimage.gaussian_filter(field, 1.0), 0.0
    vertices, faces, *_ = measure.marching_cubes(field, level)
    mesh = trimesh.Trimesh(vertices * cell + low, faces)
    if mesh.volume < 0:
        mesh.invert()
    mesh = _without_crumbs(mesh, notes)
    if not mesh.is_volume:
        raise ValueError(
            f"--objects: {source} could not be made a closed surface; fill its gaps in the scanner's software"
        )
    return mesh


def _rescale(mesh, source: str, scale: str, notes: list[str]):
    """`mesh` in metres."""
    size = float(mesh.extents.max())
    if scale == "auto":
        if SIZES[0] <= size <= SIZES[1]:
            scale = "metres"
        elif SIZES[0] <= size / 1000 <= SIZES[1]:
            scale = "mm"
        else:
            mesh.apply_scale(AUTO_SIZE / size)
            notes.append(f"{size:.3g} units across, neither metres nor mm: its largest side was made {AUTO_SIZE} m")
            return mesh
    if scale == "mm":
        mesh.apply_scale(0.001)
    size = float(mesh.extents.max())
    if not SIZES[0] <= size <= SIZES[1]:
        raise ValueError(
            f"--objects: {source} is {size:.3g} m across; the hand takes {SIZES[0]} to {SIZES[1]} m "
            "(--object-scale auto, metres or mm says what its units are)"
        )
    notes.append(f"read as {scale}: {size:.3g} m across")
    return mesh


# --- convex pieces


def _decompose(name: str, source: str, mesh, notes: list[str]) -> ScannedObject:
    volume, centre = float(mesh.volume), np.array(mesh.center_mass)
    if volume <= 0:
        raise ValueError(f"--objects: {source} has no volume")
    mesh.apply_translation(-centre)
    inertia = np.array(mesh.moment_inertia)  # exact integrals over the polyhedron, density 1, about the centre of mass
    drawn = _simplified(mesh)
    if len(drawn.faces) < len(mesh.faces):
        notes.append(f"{len(drawn.faces)} of its {len(mesh.faces)} triangles suffice to draw and to split it")
    found = _hulls(drawn, notes)
    ratio = _union_volume(found) / volume
    low, high = VOLUME_LIMITS
    if not low <= ratio <= high:
        raise ValueError(
            f"--objects: {len(found)} convex pieces are {ratio:.2f} of the volume of {source}, which is too far off"
        )
    notes.append(f"{len(found)} convex pieces of at most {max(map(len, found))} corners, {ratio:.2f} of its volume")
    return ScannedObject(name, np.array(drawn.vertices), np.array(drawn.faces), found, volume, inertia, notes)


def _hulls(mesh, notes: list[str]) -> list[np.ndarray]:
    if mesh.volume > CONVEX * mesh.convex_hull.volume:
        return [reduce_hull(np.asarray(mesh.convex_hull.vertices))]
    import coacd

    coacd.set_log_level("off")
    given = coacd.Mesh(np.asarray(mesh.vertices), np.asarray(mesh.faces))
    best, error = None, math.inf
    for threshold in CONCAVITIES:
        # Without `decimate`, CoACD ignores the limit of corners.
        pieces = coacd.run_coacd(
            given,
            threshold=threshold,
            max_convex_hull=MAX_HULLS,
            preprocess_mode="off",
            decimate=True,
            max_ch_vertex=MAX_VERTICES,
            seed=0,
            **SEARCH,
        )
        pieces = [np.asarray(points, float) for points, _ in pieces]
        ratio = _union_volume(pieces) / mesh.volume
        if abs(math.log(ratio)) < error:
            best, error = pieces, abs(math.log(ratio))
        if VOLUME_RATIOS[0] <= ratio <= VOLUME_RATIOS[1]:
            break
    else:
        notes.append("the pieces' volume is off: thin walls come out thicker, or hollows shallower")
    return best


def reduce_hull(points: np.ndarray, limit: int = MAX_VERTICES) -> np.ndarray:
    """(at most `limit`, 3) corners of a convex shape of the same volume as the hull of `points` (n, 3).

    The corners that stick out most in evenly spread directions, moved away from their centre until the volume is right.
    """
    from scipy.spatial import ConvexHull

    hull = ConvexHull(points)
    corners = points[hull.vertices]
    if len(corners) <= limit:
        return corners
    index = np.arange(limit) + 0.5
    polar, turn = np.arccos(1 - 2 * index / limit), math.pi * (1 + 5**0.5) * index
    directions = np.stack((np.cos(turn) * np.sin(polar), np.sin(turn) * np.sin(polar), np.cos(polar)), 1)
    kept = corners[np.unique((corners @ directions.T).argmax(0))]
    centre = kept.mean(0)
    return centre + (kept - centre) * (hull.volume / ConvexHull(kept).volume) ** (1 / 3)


def _union_volume(hulls: list[np.ndarray]) -> float:
    import manifold3d

    solids = [manifold3d.Manifold.hull_points(np.asarray(points, np.float64)) for points in hulls]
    return manifold3d.Manifold.batch_boolean(solids, manifold3d.OpType.Add).volume()


def _simplified(mesh):
    """`mesh` with about FACES triangles at most, closed as before: all that convex pieces and pictures need."""
    found = mesh
    for tolerance in (0.002, 0.004, 0.008, 0.016):
        if len(found.faces) > FACES:
            found = _manifold(mesh, tolerance * mesh.extents.max()) or found
    return found


# --- the cache


def _save(path: Path, found: ScannedObject):
    arrays = {f"hull{i}": hull for i, hull in enumerate(found.hulls)}
    arrays |= {"vertices": found.vertices, "faces": found.faces, "inertia": found.inertia, "volume": found.volume}
    with atomic(path) as temporary:
        np.savez_compressed(temporary, notes=np.array(found.notes), **arrays)


def _load(path: Path) -> ScannedObject:
    with np.load(path) as file:
        hulls = [file[f"hull{i}"] for i in range(sum(name.startswith("hull") for name in file.files))]
        volume, notes = float(file["volume"]), [str(note) for note in file["notes"]]
        return ScannedObject("", file["vertices"], file["faces"], hulls, volume, file["inertia"], notes)


# --- shapes of our own


def _box():
    import manifold3d

    return _trimesh(manifold3d.Manifold.cube((0.04, 0.04, 0.06), True))


def _mug():
    """7 cm high, walls of 4 mm, a handle."""
    import manifold3d

    solid, ring = manifold3d.Manifold, manifold3d.CrossSection.circle(0.005, 12).translate((0.019, 0))
    cup = solid.cylinder(0.07, 0.03, 0.03, 40) - solid.cylinder(0.07, 0.026, 0.026, 40).translate((0, 0, 0.006))
    handle = solid.revolve(ring, 24).rotate((90, 0, 0)).translate((0.03, 0, 0.035))
    return _trimesh(cup + (handle - solid.cylinder(0.07, 0.028, 0.028, 40)))


def _bottle():
    """9.5 cm high, 4.4 cm wide, with a neck."""
    import manifold3d

    profile = [(0, 0), (20, 0), (22, 4), (22, 62), (17, 73), (9, 79), (9, 95), (0, 95)]  # radius and height, mm
    return _trimesh(manifold3d.Manifold.revolve(manifold3d.CrossSection([profile]), 40).scale((0.001,) * 3))


def _bunny():
    """A sitting animal of seven ellipsoids, 9 cm high to the tips of its ears."""
    import manifold3d

    parts = (  # radii and centre, m
        ((0.030, 0.024, 0.024), (0.000, 0.000, 0.023)),
        ((0.020, 0.021, 0.022), (-0.012, 0.000, 0.024)),
        ((0.017, 0.016, 0.016), (0.026, 0.000, 0.051)),
        ((0.006, 0.004, 0.020), (0.020, 0.009, 0.073)),
        ((0.006, 0.004, 0.020), (0.020, -0.009, 0.073)),
        ((0.008, 0.008, 0.008), (-0.034, 0.000, 0.024)),
        ((0.014, 0.019, 0.007), (0.018, 0.000, 0.007)),
    )
    ball = manifold3d.Manifold.sphere(1.0, 24)
    solids = [ball.scale(radii).translate(centre) for radii, centre in parts]
    union = manifold3d.Manifold.batch_boolean(solids, manifold3d.OpType.Add)
    return _trimesh(union.trim_by_plane((0, 0, 1), 0.002))


EXAMPLES: dict[str, Callable] = {"box": _box, "mug": _mug, "bunny": _bunny, "bottle": _bottle}


def write_examples(folder: str | Path) -> list[Path]:
    """The examples as a scanner would leave them: STL in millimetres, and the box as a PLY cloud of 20,000 points with
    0.3 mm of noise as well. Their paths.
    """
    import trimesh

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, make in EXAMPLES.items():
        mesh = make()
        mesh.apply_scale(1000)
        paths.append(folder / f"{name}.stl")
        mesh.export(paths[-1])
    points, _ = trimesh.sample.sample_surface(_box(), 20_000, seed=0)
    noise = np.random.default_rng(0).normal(0, 0.0003, points.shape)
    paths.append(folder / "box_points.ply")
    trimesh.PointCloud(points + noise).export(paths[-1])
    return paths


def picture(found: ScannedObject, path: str | Path):
    """Writes a PNG: the mesh, and beside it the convex pieces that collide, each in a colour of its own."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from mpl_toolkits.mplot3d.art3d import Poly3DCollection
    from scipy.spatial import ConvexHull

    figure = plt.figure(figsize=(10, 5))
    colours = plt.colormaps["tab20"].colors
    pieces = [(hull, ConvexHull(hull).simplices) for hull in found.hulls]
    views = (("mesh", [(found.vertices, found.faces)], 1.0), (f"{len(pieces)} convex pieces", pieces, 0.6))
    for place, (title, surfaces, alpha) in enumerate(views):
        axes = figure.add_subplot(1, 2, place + 1, projection="3d")
        for index, (vertices, faces) in enumerate(surfaces):
            colour = colours[index % len(colours)] if place else (0.8, 0.7, 0.6)
            axes.add_collection3d(
                Poly3DCollection(1000 * vertices[faces], facecolors=colour, alpha=alpha, shade=True, linewidths=0)
            )
        half = 500 * found.extents.max()
        middle = 500 * (found.vertices.min(0) + found.vertices.max(0))
        for set_limit, value in zip((axes.set_xlim, axes.set_ylim, axes.set_zlim), middle, strict=True):
            set_limit(value - half, value + half)
        axes.set_box_aspect((1, 1, 1))
        axes.set_title(f"{found.name}: {title} (mm)")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
