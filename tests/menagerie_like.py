"""MJCF of a Go2 with the habits of mujoco_menagerie's two, for tests of `--xml-path`. Written here, without meshes.

What differs from common/assets/go2.xml and can trip code that assumes too much:
- bodies and qpos in the order FL FR RL RR; the motors in another order, FR FL RR RL;
- no floor, no light; the robot's geoms collide with each other; `option` of its own; time step 0.002;
- `motors`: torque motors, elliptic cones, impratio 100, dry friction, and yet angles for ctrl in the keyframe. As
  unitree_go2/go2.xml;
- `servos`: position servos written as `general` with affine bias, kp 50 and force +-24, a control range narrower than
  the joint's, one thigh range for front and rear, smaller feet, foot sites, a camera, and sensors with common names. As
  unitree_go2/go2_mjx.xml.
"""

from pathlib import Path

from go2_figures import ABDUCTION_OFFSET, BASE, CALF, HIP, HIP_AT, LINK_LENGTH, RANGE, THIGH, calf_parts, inertial, side

MOTOR_ORDER = {"motors": ("FR", "FL", "RR", "RL"), "servos": ("FL", "FR", "RL", "RR")}
OPTION = {
    "motors": '<option cone="elliptic" impratio="100"/>',
    "servos": '<option impratio="100" iterations="1" ls_iterations="5"><flag eulerdamp="disable"/></option>',
}
JOINT = {"motors": 'damping="2" armature="0.01" frictionloss="0.2"', "servos": 'damping="2" armature="0.01"'}
ACTUATOR = {
    "motors": {
        part: f'ctrlrange="-{limit} {limit}"' for part, limit in (("hip", 23.7), ("thigh", 23.7), ("calf", 45.43))
    },
    "servos": {
        part: f'ctrlrange="{low} {high}" biastype="affine" gainprm="50 0 0" biasprm="0 -50 -0.5" forcerange="-24 24"'
        for part, low, high in (("hip", -0.9472, 0.9472), ("thigh", -1.4, 2.5), ("calf", -2.6227, -0.84776))
    },
}
SENSORS = """
  <sensor>
    <jointpos joint="FL_hip_joint" name="abduction_front_left_pos"/>
    <gyro site="imu" name="gyro"/>
    <accelerometer site="imu" name="accelerometer"/>
    <framequat objtype="site" objname="imu" name="orientation"/>
    <framelinvel objtype="site" objname="imu" name="global_linvel"/>
  </sensor>"""


def leg_mjcf(leg: str, kind: str) -> str:
    (x, y), servos = side(leg), kind == "servos"
    thigh = RANGE["front_thigh" if x > 0 or servos else "rear_thigh"]
    site = f'<site name="{leg}_foot" class="foot_site"/>' if servos else ""
    return f"""
      <body name="{leg}_hip" pos="{x * HIP_AT[0]} {y * HIP_AT[1]} 0">
        {inertial(HIP, x, y)}
        <joint name="{leg}_hip_joint" axis="1 0 0" range="{RANGE["hip"][0]} {RANGE["hip"][1]}"/>
        <geom class="collision" type="cylinder" size="0.046 0.02" pos="0 {0.08 * y} 0" quat="1 1 0 0"/>
        <body name="{leg}_thigh" pos="0 {y * ABDUCTION_OFFSET} 0">
          {inertial(THIGH, 1, y)}
          <joint name="{leg}_thigh_joint" range="{thigh[0]} {thigh[1]}"/>
          <geom class="collision" type="box" size="0.017 0.01225 0.1065" pos="0 0 -0.1065"/>
          <body name="{leg}_calf" pos="0 0 -{LINK_LENGTH}">
            {inertial(CALF, 1, y)}
            <joint name="{leg}_calf_joint" range="{RANGE["calf"][0]} {RANGE["calf"][1]}"/>
            <geom class="collision" type="cylinder" size="0.012 0.06" pos="0.008 0 -0.06" quat="0.9945 0 -0.1048 0"/>
            <geom name="{leg}" class="foot"/>{site}{calf_parts(y)}
          </body>
        </body>
      </body>"""


def mjcf(kind: str) -> str:
    """`kind` is "motors" or "servos"."""
    servos = kind == "servos"
    legs = "".join(leg_mjcf(leg, kind) for leg in ("FL", "FR", "RL", "RR"))
    actuators = "".join(
        f'\n    <{"general" if servos else "motor"} name="{leg}_{part}" joint="{leg}_{part}_joint" {attributes}/>'
        for leg in MOTOR_ORDER[kind]
        for part, attributes in ACTUATOR[kind].items()
    )
    pose = "0 0.9 -1.8 " * 4
    return f"""<mujoco model="go2">
  <compiler angle="radian" autolimits="true" fusestatic="true"/>
  {OPTION[kind]}
  <default>
    <default class="go2">
      <geom friction="0.6" margin="0.001" condim="1"/>
      <joint axis="0 1 0" {JOINT[kind]}/>
      <default class="foot_site"><site group="1" pos="-0.002 0 -0.213"/></default>
      <default class="collision">
        <geom group="3"/>
        <default class="foot">
          <geom size="{0.0175 if servos else 0.022}" pos="-0.002 0 -0.213" priority="1"
            solimp="0.015 1 0.031" condim="6" friction="0.8 0.02 0.01"/>
        </default>
      </default>
    </default>
  </default>
  <worldbody>
    <body name="base" pos="0 0 0.445" childclass="go2">
      {'<camera name="track" pos="0.8 -1.5 0.9" mode="trackcom"/>' if servos else ""}
      {inertial(BASE)}
      <freejoint/>
      <geom class="collision" type="box" size="0.1881 0.04675 0.057"/>
      <geom class="collision" type="cylinder" size="0.05 0.045" pos="0.285 0 0.01"/>
      <site name="imu" pos="-0.02557 0 0.04232"/>{legs}
    </body>
  </worldbody>
  <actuator>{actuators}
  </actuator>{SENSORS if servos else ""}
  <keyframe><key name="home" qpos="0 0 0.27 1 0 0 0 {pose}" ctrl="{pose}"/></keyframe>
</mujoco>
"""


def write(folder, kind: str) -> str:
    """Path of a new file in `folder`."""
    path = Path(folder) / f"{kind}.xml"
    path.write_text(mjcf(kind))
    return str(path)
