"""Published figures of the Unitree Go2, for tests that need a second opinion on common/assets/go2.xml.

Source: Unitree's URDF, github.com/unitreerobotics/unitree_ros, robots/go2_description/urdf/go2_description.urdf
(BSD-3-Clause). It is not the file that go2.xml takes its inertials from, and has full tensors, not principal axes.
Torque limits: github.com/google-deepmind/mujoco_menagerie, unitree_go2/go2.xml (BSD-3-Clause).
"""

LEGS = ("FR", "FL", "RR", "RL")
JOINTS = tuple(f"{leg}_{part}_joint" for leg in LEGS for part in ("hip", "thigh", "calf"))
DEFAULT_POSE = (0, 0.8, -1.5, 0, 0.8, -1.5, 0, 1.0, -1.5, 0, 1.0, -1.5)

HIP_AT = (0.1934, 0.0465, 0.0)  # m, mirrored to the four corners
ABDUCTION_OFFSET, LINK_LENGTH = 0.0955, 0.213  # m: hip to thigh, thigh to knee and knee to foot
FOOT_AT, FOOT_RADIUS = (-0.002, 0.0, -0.213), 0.022
IMU_AT = (-0.02557, 0.0, 0.04232)
RANGE = {  # rad
    "hip": (-1.0472, 1.0472),
    "front_thigh": (-1.5708, 3.4907),
    "rear_thigh": (-0.5236, 4.5379),
    "calf": (-2.7227, -0.83776),
}
TORQUE = {"hip": 23.7, "thigh": 23.7, "calf": 45.43}  # Nm

# mass in kg, centre of mass in m, inertia about it (xx yy zz xy xz yz) in kg m2; legs as on the front left
BASE = (6.921, (0.021112, 0, -0.005366), (0.02448, 0.098077, 0.107, 0.00012166, 0.0014849, -3.12e-5))
HIP = (0.678, (-0.0054, 0.00194, -0.000105), (0.00048, 0.000884, 0.000596, -3.01e-6, 1.11e-6, -1.42e-6))
THIGH = (1.152, (-0.00374, -0.0223, -0.0327), (0.00584, 0.0058, 0.00103, 8.72e-5, -0.000289, 0.000808))
CALF = (0.154, (0.00548, -0.000975, -0.115), (0.00108, 0.0011, 3.29e-5, 3.4e-7, 1.72e-5, 8.28e-6))
FOOT = (0.04, (0, 0, 0), (9.6e-6, 9.6e-6, 9.6e-6, 0, 0, 0))
# Two shin cylinders without inertial in the URDF. MuJoCo's importer gives them its default density, 1000 kg/m3, and the
# calf of 0.241352 kg in menagerie is the sum of all four: radius, half length, position and pitch in the frame before.
SHIN = ((0.011, 0.0325, (0.02, 0, -0.148), 0.05), (0.0155, 0.015, (-0.01, 0, -0.04), 0.48))


def side(leg: str) -> tuple[int, int]:
    """(+1 front or -1 rear, +1 left or -1 right)."""
    return (1 if leg[0] == "F" else -1), (1 if leg[1] == "L" else -1)


def inertial(figures, x: int = 1, y: int = 1) -> str:
    """An <inertial>, reflected in the planes x = 0 and y = 0 where `x` and `y` are -1."""
    mass, (px, py, pz), (xx, yy, zz, xy, xz, yz) = figures
    tensor = f"{xx} {yy} {zz} {xy * x * y} {xz * x} {yz * y}"
    return f'<inertial mass="{mass}" pos="{px * x} {py * y} {pz}" fullinertia="{tensor}"/>'


def calf_parts(y: int) -> str:
    """What hangs rigidly on the calf; `fusestatic` adds it to the calf's own inertial."""
    (r1, h1, p1, a1), (r2, h2, p2, a2) = SHIN
    cylinder = '<geom type="cylinder" size="{} {}" contype="0" conaffinity="0"/>'
    at = "{} {} {}".format
    return f"""
      <body pos="{at(*(0, 0, -LINK_LENGTH))}">{inertial(FOOT, 1, y)}</body>
      <body pos="{at(*p1)}" euler="0 {a1} 0">{cylinder.format(r1, h1)}
        <body pos="{at(*p2)}" euler="0 {a2} 0">{cylinder.format(r2, h2)}</body>
      </body>"""


def reference_mjcf(armature: float) -> str:
    """The bare mechanism: bodies, inertials, joints."""
    legs = ""
    for leg in LEGS:
        x, y = side(leg)
        ranges = {part: "{} {}".format(*RANGE[part]) for part in RANGE}
        thigh_range = ranges["front_thigh" if x > 0 else "rear_thigh"]
        legs += f"""
    <body name="{leg}_hip" pos="{x * HIP_AT[0]} {y * HIP_AT[1]} {HIP_AT[2]}">{inertial(HIP, x, y)}
      <joint name="{leg}_hip_joint" axis="1 0 0" range="{ranges["hip"]}"/>
      <body name="{leg}_thigh" pos="0 {y * ABDUCTION_OFFSET} 0">{inertial(THIGH, 1, y)}
        <joint name="{leg}_thigh_joint" axis="0 1 0" range="{thigh_range}"/>
        <body name="{leg}_calf" pos="0 0 -{LINK_LENGTH}">{inertial(CALF, 1, y)}
          <joint name="{leg}_calf_joint" axis="0 1 0" range="{ranges["calf"]}"/>{calf_parts(y)}
        </body>
      </body>
    </body>"""
    return f"""<mujoco>
  <compiler angle="radian" autolimits="true" fusestatic="true"/>
  <default><joint armature="{armature}"/></default>
  <worldbody><body name="base" pos="0 0 0.42">{inertial(BASE)}<freejoint/>{legs}</body></worldbody>
</mujoco>"""
