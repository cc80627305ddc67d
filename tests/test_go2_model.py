"""common/assets/go2.xml against published figures, through a second model built from another source."""

import xml.etree.ElementTree as ET
from pathlib import Path

import go2_figures as fig
import menagerie_like
import mujoco
import numpy as np
import pytest

GO2 = Path(__file__).parents[1] / "common/assets/go2.xml"
BODIES = ["base"] + [f"{leg}_{part}" for leg in fig.LEGS for part in ("hip", "thigh", "calf")]


@pytest.fixture(scope="module")
def go2():
    return mujoco.MjModel.from_xml_path(str(GO2))


@pytest.fixture(scope="module")
def reference():
    return mujoco.MjModel.from_xml_string(fig.reference_mjcf(armature=0.02))


def inertia(model, body):
    """3x3 tensor about the centre of mass, in the axes of the body."""
    rotation = np.zeros(9)
    mujoco.mju_quat2Mat(rotation, model.body(body).iquat)
    rotation = rotation.reshape(3, 3)
    return rotation @ np.diag(model.body(body).inertia) @ rotation.T


def mass_matrix(model, pose=fig.DEFAULT_POSE):
    """18x18, base first, then the joints in the order of `fig.JOINTS`."""
    data = mujoco.MjData(model)
    for name, angle in zip(fig.JOINTS, pose, strict=True):
        data.joint(name).qpos[0] = angle
    mujoco.mj_forward(model, data)
    full = np.zeros((model.nv, model.nv))
    mujoco.mj_fullM(model, data, full)
    order = list(range(6)) + [model.joint(name).dofadr[0] for name in fig.JOINTS]
    return full[np.ix_(order, order)]


def test_reference_is_independent(reference):
    """The second model has the bodies of the first but none of its file: the calf is put together from four parts."""
    assert [reference.body(i).name for i in range(1, reference.nbody)] == BODIES
    assert reference.body("FL_calf").mass[0] == pytest.approx(0.241352, abs=1e-6)


def test_mass(go2, reference):
    assert go2.body_mass.sum() == pytest.approx(15.206408, abs=1e-6)
    assert go2.body_mass.sum() == pytest.approx(reference.body_mass.sum(), abs=2e-6)


@pytest.mark.parametrize("body", BODIES)
def test_link_inertial(go2, reference, body):
    assert go2.body(body).mass[0] == pytest.approx(reference.body(body).mass[0], abs=1e-6)
    np.testing.assert_allclose(go2.body(body).ipos, reference.body(body).ipos, atol=1e-6)
    ours, theirs = inertia(go2, body), inertia(reference, body)
    np.testing.assert_allclose(ours, theirs, atol=3e-6 * np.trace(theirs))  # the figures have six digits


def test_geometry(go2):
    assert go2.body("base").pos[2] == 0.42
    np.testing.assert_array_equal(go2.site("imu").pos, fig.IMU_AT)
    for leg in fig.LEGS:
        x, y = fig.side(leg)
        np.testing.assert_array_equal(go2.body(f"{leg}_hip").pos, [x * fig.HIP_AT[0], y * fig.HIP_AT[1], 0])
        np.testing.assert_array_equal(go2.body(f"{leg}_thigh").pos, [0, y * fig.ABDUCTION_OFFSET, 0])
        np.testing.assert_array_equal(go2.body(f"{leg}_calf").pos, [0, 0, -fig.LINK_LENGTH])
        foot = go2.geom(leg)
        assert foot.type[0] == mujoco.mjtGeom.mjGEOM_SPHERE and foot.size[0] == fig.FOOT_RADIUS
        np.testing.assert_array_equal(foot.pos, fig.FOOT_AT)
        np.testing.assert_array_equal(foot.friction, [0.8, 0.02, 0.01])
        assert foot.condim[0] == 3
        assert [go2.body(go2.body(f"{leg}_{part}").parentid[0]).name for part in ("hip", "thigh", "calf")] == [
            "base",
            f"{leg}_hip",
            f"{leg}_thigh",
        ]


def test_joints(go2, reference):
    hinges = [go2.joint(i) for i in range(go2.njnt) if go2.jnt_type[i] == mujoco.mjtJoint.mjJNT_HINGE]
    assert [joint.name for joint in hinges] == list(fig.JOINTS)
    for joint in hinges:
        np.testing.assert_array_equal(joint.range, reference.joint(joint.name).range)
        np.testing.assert_array_equal(joint.axis, reference.joint(joint.name).axis)
        assert go2.jnt_limited[joint.id]
        assert joint.armature[0] == 0.02 and joint.damping[0] == 0.1 and joint.frictionloss[0] == 0


def test_torque(go2):
    assert [go2.actuator(i).name for i in range(go2.nu)] == [name.removesuffix("_joint") for name in fig.JOINTS]
    for i, name in enumerate(fig.JOINTS):
        motor, limit = go2.actuator(i), fig.TORQUE[name.split("_")[1]]
        assert motor.trnid[0] == go2.joint(name).id
        assert go2.actuator_ctrllimited[i] and motor.ctrlrange.tolist() == [-limit, limit]
        assert motor.gainprm[0] == 1 and motor.biastype[0] == mujoco.mjtBias.mjBIAS_NONE and motor.gear[0] == 1


@pytest.mark.parametrize("armature", (0.0, 0.02))
def test_mass_matrix(go2, armature):
    """Every element within 3e-6 of the geometric mean of its two diagonal elements."""
    spec = mujoco.MjSpec.from_file(str(GO2))
    for joint in spec.joints:
        joint.armature = 0 if joint.type == mujoco.mjtJoint.mjJNT_FREE else armature
    ours = mass_matrix(spec.compile())
    theirs = mass_matrix(mujoco.MjModel.from_xml_string(fig.reference_mjcf(armature)))
    scale = np.sqrt(np.outer(theirs.diagonal(), theirs.diagonal()))
    assert np.abs(theirs[:6, 6:]).max() > 0.1  # the legs pull on the base: not a comparison of zeros
    np.testing.assert_allclose(ours / scale, theirs / scale, atol=3e-6)


def test_mirror(go2):
    """Left and right are mirror images, but for the base: its published products of inertia xy and yz are not zero."""
    legs = [fig.LEGS.index(leg[0] + ("R" if leg[1] == "L" else "L")) for leg in fig.LEGS]
    order = list(range(6)) + [6 + 3 * leg + part for leg in legs for part in range(3)]
    # A reflection in y = 0 turns round y, the rotations about x and z, and with them the abduction joints.
    sign = np.array([1, -1, 1, -1, 1, -1] + [-1, 1, 1] * 4)
    full = mass_matrix(go2)
    difference = full - sign[:, None] * sign * full[np.ix_(order, order)]
    base, (xy, yz) = inertia(go2, "base"), (1.2166e-4, -3.12e-5)
    assert (base[0, 1], base[1, 2]) == pytest.approx((xy, yz), abs=1e-7)
    expected = np.zeros((18, 18))
    expected[3, 4] = expected[4, 3] = 2 * base[0, 1]
    expected[4, 5] = expected[5, 4] = 2 * base[1, 2]
    # The base's centre of mass is published at y = 0, so all else is equal to the rounding of the quaternions.
    np.testing.assert_allclose(difference, expected, atol=2e-7)


def test_only_the_floor_is_touched(go2):
    floor = go2.geom("floor")
    assert floor.type[0] == mujoco.mjtGeom.mjGEOM_PLANE
    touching = [i for i in range(go2.ngeom) if go2.geom_group[i] == 3]
    assert {"FR", "FL", "RR", "RL", "trunk", "head"} <= {go2.geom(i).name for i in touching}
    assert {go2.body(go2.geom_bodyid[i]).name for i in touching} == set(BODIES)
    for i in range(go2.ngeom):
        meets = bool(floor.contype[0] & go2.geom_conaffinity[i] | go2.geom_contype[i] & floor.conaffinity[0])
        assert meets == (i in touching)
        assert go2.geom_contype[i] == 0 or i == floor.id  # so no two geoms of the robot can meet
        assert go2.geom_group[i] in (2, 3) or i == floor.id


def test_stands(go2):
    """The home pose rests on the feet alone, and a PD law within the torque limits holds it there for two seconds."""
    data = mujoco.MjData(go2)
    mujoco.mj_resetDataKeyframe(go2, data, go2.key("home").id)
    np.testing.assert_array_equal(data.qpos[7:], fig.DEFAULT_POSE)
    mujoco.mj_forward(go2, data)
    bottoms = [data.geom(leg).xpos[2] - fig.FOOT_RADIUS for leg in fig.LEGS]
    assert -1e-3 < min(bottoms) < 1e-3
    for _ in range(round(2 / go2.opt.timestep)):
        data.ctrl = 40 * (np.array(fig.DEFAULT_POSE) - data.qpos[7:]) - data.qvel[6:]
        mujoco.mj_step(go2, data)
    assert {go2.geom(contact.geom2).name for contact in data.contact} == set(fig.LEGS)
    assert data.qpos[2] > 0.28 and data.body("base").xmat[8] > 0.99
    weight = 9.81 * go2.body_mass.sum()
    assert data.qfrc_constraint[2] == pytest.approx(weight, rel=0.02)


def test_no_files():
    """Nothing is loaded from another file: no meshes, textures, height fields, includes."""
    tags = list(ET.parse(GO2).iter())
    assert not [tag.tag for tag in tags if tag.tag in ("mesh", "hfield", "skin", "include", "model")]
    assert not [tag.attrib for tag in tags if "file" in tag.attrib or "mesh" in tag.attrib.values()]
    assert mujoco.MjModel.from_xml_string(GO2.read_text()).nmesh == 0


@pytest.mark.parametrize("kind", ("motors", "servos"))
def test_menagerie_like(kind):
    """The stand-ins for other people's Go2 are the same mechanism in another order."""
    model = mujoco.MjModel.from_xml_string(menagerie_like.mjcf(kind))
    assert (model.nq, model.nv, model.nu, model.nmesh) == (19, 18, 12, 0)
    assert [model.joint(i).name for i in range(1, 13)] != list(fig.JOINTS)
    bare = mujoco.MjModel.from_xml_string(fig.reference_mjcf(armature=0.01))
    np.testing.assert_allclose(mass_matrix(model), mass_matrix(bare), atol=1e-12)
