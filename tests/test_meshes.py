"""From scans to objects: good, holed, tiny, huge and non-manifold meshes, point clouds, files that are none."""

import numpy as np
import pytest
import trimesh
from scipy.spatial import ConvexHull

from common import meshes
from common.meshes import MAX_HULLS, MAX_VERTICES, prepare, reduce_hull, write_examples

SIDES = np.array([0.04, 0.05, 0.06])  # m


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def box(sides=SIDES, subdivisions=2) -> trimesh.Trimesh:
    mesh = trimesh.creation.box(sides)
    for _ in range(subdivisions):
        mesh = mesh.subdivide()
    return mesh


@pytest.fixture
def saved(tmp_path):
    """A function that saves a mesh or a cloud, and gives the path."""

    def save(mesh, name="scan.stl") -> str:
        mesh.export(tmp_path / name)
        return str(tmp_path / name)

    return save


def check_box(found, tolerance=1e-4):
    assert found.volume == pytest.approx(SIDES.prod(), rel=30 * tolerance)
    np.testing.assert_allclose(found.extents, SIDES, atol=tolerance)
    assert all(len(hull) <= MAX_VERTICES for hull in found.hulls)
    mesh = trimesh.Trimesh(found.vertices, found.faces)
    np.testing.assert_allclose(mesh.bounds.mean(0), 0, atol=10 * tolerance)


# --- good meshes


@pytest.mark.parametrize("name", ("scan.stl", "scan.obj", "scan.ply"))
def test_a_good_mesh_keeps_its_volume_and_has_exact_inertia(saved, name):
    found = prepare(saved(box(), name))
    check_box(found)
    a, b, c = SIDES
    expected = SIDES.prod() / 12 * np.diag([b * b + c * c, a * a + c * c, a * a + b * b])
    np.testing.assert_allclose(found.inertia, expected, rtol=1e-4, atol=1e-12)
    assert len(found.hulls) == 1 and len(found.hulls[0]) == 8
    assert "closed as it is" in found.notes


def test_the_origin_is_the_centre_of_mass(saved):
    mesh = trimesh.creation.cone(0.02, 0.06).apply_translation((3.0, -1, 0.5))
    found = prepare(saved(mesh))
    assert found.vertices[:, 2].min() == pytest.approx(-0.015, abs=1e-4)  # a cone's is at a quarter of its height
    assert found.vertices[:, 2].max() == pytest.approx(0.045, abs=1e-4)


def test_the_inertia_is_the_mesh_s_and_not_its_hull_s(saved):
    """An L: its hull would be heavier and turn more slowly."""
    first = trimesh.creation.box((0.06, 0.02, 0.02))
    second = trimesh.creation.box((0.02, 0.02, 0.06)).apply_translation((-0.02, 0, 0.04))
    mesh = trimesh.boolean.union((first, second), engine="manifold")
    found = prepare(saved(mesh))
    assert found.volume == pytest.approx(mesh.volume, rel=1e-5)
    np.testing.assert_allclose(found.inertia, mesh.moment_inertia, rtol=1e-3, atol=1e-12)
    hull = mesh.convex_hull
    assert found.inertia[1, 1] < 0.8 * hull.moment_inertia[1, 1] and len(found.hulls) > 1


# --- broken meshes


def test_holes_are_filled(saved):
    mesh = box()
    top = mesh.triangles_center[:, 2] > 0.0299
    mesh.update_faces(~(top & (np.abs(mesh.triangles_center[:, :2]).max(1) < 0.012)))
    assert not mesh.is_watertight
    found = prepare(saved(mesh))
    check_box(found)
    assert any("fill its holes" in note for note in found.notes)


def test_normals_that_point_inwards_are_turned(saved):
    mesh = box()
    mesh.invert()
    found = prepare(saved(mesh))
    check_box(found)
    assert found.volume > 0


def test_crumbs_are_left_out(saved):
    crumb = trimesh.creation.icosphere(1, 0.001).apply_translation((0.1, 0, 0))
    found = prepare(saved(trimesh.util.concatenate((box(), crumb))))
    check_box(found)
    assert any("1 loose crumbs" in note for note in found.notes)


def test_edges_of_three_triangles(saved):
    """A box with a wall within, whose rim is edges of three triangles each."""
    mesh = box()
    wall = mesh.submesh([mesh.triangles_center[:, 2] < -0.0299], append=True).apply_translation((0, 0, 0.03))
    broken = trimesh.util.concatenate((mesh, wall))
    broken.merge_vertices()
    assert not broken.is_volume
    check_box(prepare(saved(broken)))


def test_loose_triangles_are_built_anew(saved):
    """No two of them share an edge, and some are missing."""
    corners = box(subdivisions=3).triangles
    generator = np.random.default_rng(0)
    corners = corners[generator.random(len(corners)) > 0.01]
    corners = corners + generator.normal(0, 0.0002, corners.shape)
    soup = trimesh.Trimesh(corners.reshape(-1, 3), np.arange(3 * len(corners)).reshape(-1, 3), process=False)
    found = prepare(saved(soup))
    check_box(found, 3e-3)
    assert any("built anew" in note for note in found.notes), found.notes


# --- sizes


@pytest.mark.parametrize(("factor", "words"), ((1.0, "metres"), (1000.0, "mm"), (1e-3, "neither"), (1e6, "neither")))
def test_units(saved, factor, words):
    """Metres, millimetres, and what can be neither: tiny and huge."""
    mesh = box().apply_scale(factor)
    found = prepare(saved(mesh))
    assert any(words in note for note in found.notes), found.notes
    longest = 0.1 if words == "neither" else 0.06
    np.testing.assert_allclose(found.extents, SIDES * longest / 0.06, rtol=1e-3)


def test_units_that_are_given_are_believed_or_refused(saved):
    path = saved(box().apply_scale(1000))
    np.testing.assert_allclose(prepare(path, "mm").extents, SIDES, rtol=1e-4)
    with pytest.raises(ValueError, match="60 m across; the hand takes"):
        prepare(path, "metres")


# --- point clouds


def cloud(mesh, count=20_000, noise=0.0003):
    points, _ = trimesh.sample.sample_surface(mesh, count, seed=0)
    return trimesh.PointCloud(points + np.random.default_rng(0).normal(0, noise, points.shape))


def test_a_noisy_cloud_of_a_box_is_a_box(saved):
    found = prepare(saved(cloud(box()), "scan.ply"))
    check_box(found, 2e-3)
    assert found.volume == pytest.approx(SIDES.prod(), rel=0.06)
    assert any("point cloud of 20000" in note for note in found.notes)


def test_stray_points_do_not_matter(saved):
    points = cloud(box()).vertices
    stray = np.random.default_rng(1).uniform(-0.05, 0.05, (20, 3))
    found = prepare(saved(trimesh.PointCloud(np.concatenate((points, stray))), "scan.ply"))
    check_box(found, 2e-3)


def test_a_cloud_of_a_cup_keeps_its_hollow():
    cup = trimesh.creation.annulus(0.026, 0.03, 0.05)
    floor = trimesh.creation.cylinder(0.029, 0.004).apply_translation((0, 0, -0.023))
    cup = trimesh.boolean.union((cup, floor), engine="manifold")
    found = meshes._surface(np.asarray(cloud(cup, 40_000, 1e-4).vertices), "cup", [])
    assert found.is_volume and found.volume == pytest.approx(cup.volume, rel=0.1)
    assert found.volume < 0.5 * found.convex_hull.volume


def test_too_few_points_are_refused(saved):
    with pytest.raises(ValueError, match="too few to tell") as error:
        prepare(saved(cloud(box(), 60), "scan.ply"))
    assert "\n" not in str(error.value)


# --- no scans at all


def test_files_that_are_none_are_one_sentence(tmp_path, saved):
    (tmp_path / "damaged.stl").write_bytes(b"solid nothing\nfacet normal what\n")
    (tmp_path / "empty.obj").write_text("")
    (tmp_path / "text.txt").write_text("x")
    flat = trimesh.Trimesh([[0, 0, 0], [0.1, 0, 0], [0.1, 0.1, 0], [0, 0.1, 0]], [[0, 1, 2], [0, 2, 3]])
    bad = {
        str(tmp_path / "missing.stl"): "cannot read .*missing.stl: No such file",
        str(tmp_path / "damaged.stl"): "damaged.stl",
        str(tmp_path / "empty.obj"): "empty.obj",
        str(tmp_path / "text.txt"): "takes STL, OBJ or PLY files, or the names box, mug, bunny, bottle",
        "teapot": "takes STL, OBJ or PLY files",
        saved(flat, "flat.stl"): "is flat; an object needs a volume",
    }
    for source, words in bad.items():
        with pytest.raises(ValueError, match=words) as error:
            prepare(source)
        assert "\n" not in str(error.value), error.value


# --- convex pieces


def test_reduce_hull_keeps_the_volume():
    sphere = trimesh.creation.icosphere(3, 0.03)
    corners = reduce_hull(np.asarray(sphere.vertices))
    assert len(corners) <= MAX_VERTICES
    assert ConvexHull(corners).volume == pytest.approx(sphere.volume, rel=1e-6)


def test_a_shape_that_is_not_convex_is_several(saved):
    found = prepare("bunny")
    assert 1 < len(found.hulls) <= MAX_HULLS and all(4 <= len(hull) <= MAX_VERTICES for hull in found.hulls)
    assert meshes._union_volume(found.hulls) / found.volume == pytest.approx(1, abs=0.2)
    assert len(found.faces) <= meshes.FACES


# --- cache, examples, pictures


def test_the_cache_knows_what_it_holds(saved, monkeypatch, tmp_path):
    path = saved(box())
    first = prepare(path)
    [kept] = meshes.cache_folder().glob("*.npz")

    def fail(*_):
        raise AssertionError("not from the cache")

    with monkeypatch.context() as patch:
        patch.setattr(meshes, "_mesh_of", fail)
        second = prepare(path)
        np.testing.assert_array_equal(first.vertices, second.vertices)
        np.testing.assert_array_equal(first.hulls[0], second.hulls[0])
        assert second.notes == first.notes and second.name == "scan" and second.volume == first.volume
        with pytest.raises(AssertionError, match="not from the cache"):
            prepare(path, "metres")
        saved(box((0.03, 0.03, 0.03)))  # the file has changed
        with pytest.raises(AssertionError, match="not from the cache"):
            prepare(path)
    saved(box())
    kept.write_bytes(b"damaged")
    np.testing.assert_array_equal(prepare(path).vertices, first.vertices)


def test_examples_are_written_and_drawn(tmp_path):
    paths = write_examples(tmp_path / "scans")
    assert sorted(p.name for p in paths) == ["bottle.stl", "box.stl", "box_points.ply", "bunny.stl", "mug.stl"]
    assert trimesh.load(tmp_path / "scans" / "mug.stl").is_watertight
    found = prepare(str(tmp_path / "scans" / "box.stl"))
    np.testing.assert_allclose(found.extents, (0.04, 0.04, 0.06), rtol=1e-5)
    meshes.picture(found, tmp_path / "hulls.png")
    from PIL import Image

    drawn = np.asarray(Image.open(tmp_path / "hulls.png").convert("RGB"))
    left, right = np.array_split(drawn, 2, 1)
    assert left.std() > 5 and right.std() > 5 and not np.array_equal(left, right)
