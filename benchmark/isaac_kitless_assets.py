"""Stand-ins for the robots of Isaac Lab's Cartpole, Ant and Humanoid, for a machine that cannot reach its asset server.

    python benchmark/isaac_kitless_assets.py ~/isaac-assets

Run it with the Python of the environment that Isaac Lab 3.x is in. It edits copies of the examples that the installed
newton package ships, adds a bare ground plane, and prints the setting that makes Isaac Lab look there. Masses, inertias
and contacts are not those of the official robots: good for checking an API and that a policy learns, not for scores.
"""

import argparse
import importlib.util
import re
import sys
from pathlib import Path

# Where Isaac Lab looks, below its asset root -> the example that takes that place.
ROBOTS = {
    "Isaac/IsaacLab/Robots/Classic/Cartpole/cartpole.usd": "cartpole_single_pendulum.usda",
    "Isaac/Robots/IsaacSim/Ant/ant_instanceable.usd": "ant.usda",
    "Isaac/Robots/IsaacSim/Humanoid/humanoid_instanceable.usd": "humanoid.usda",
}
GROUNDS = (
    "Isaac/Environments/Grid/default_environment.usd",  # up to the 3.0 beta
    "Isaac/IsaacLab/Environments/Grid/default_ground_plane_checker_v1/default_ground_plane.usda",  # 3.0
)
# Solid boxes of 1 kg with the sizes of the cart's and the pole's collision shapes: (width, depth, height) in m.
BOXES = {"slider": (0.03, 8.0, 0.03), "cart": (0.2, 0.25, 0.2), "pole": (0.04, 0.06, 1.0)}
# Joints of newton's humanoid that Isaac Lab knows by another name.
JOINTS = {
    "abdomen_x": "pelvis",
    "left_elbow": "left_lower_arm",
    "right_elbow": "right_lower_arm",
    "left_knee": "left_shin",
    "right_knee": "right_shin",
}

GROUND_USDA = """#usda 1.0
(
    defaultPrim = "Ground"
    metersPerUnit = 1
    upAxis = "Z"
)

def Xform "Ground"
{
    def Plane "CollisionPlane" (
        prepend apiSchemas = ["PhysicsCollisionAPI"]
    )
    {
        uniform token axis = "Z"
        uniform token purpose = "guide"
    }

    def Scope "Looks"
    {
        def Material "theGrid"
        {
            def Shader "Shader"
            {
                color3f inputs:diffuse_tint = (0, 0, 0)
            }
        }
    }
}
"""


def with_inertias(usda: str) -> str:
    """The cartpole with a mass and an inertia in each body and its default prim named as it is defined."""
    usda = usda.replace('defaultPrim = "cartPole"', 'defaultPrim = "cartpole"')
    for name, (x, y, z) in BOXES.items():
        inertia = ", ".join(f"{s / 12:.6g}" for s in (y * y + z * z, x * x + z * z, x * x + y * y))
        lines = f"        float physics:mass = 1\n        float3 physics:diagonalInertia = ({inertia})\n"
        body = re.compile(rf'(    def Xform "{name}" \(.*?\)\n    {{\n)(.*?\n    }}\n)', re.DOTALL)
        found = body.search(usda)
        if found is None:
            sys.exit(f"error: newton's cartpole has no body {name!r}; this script knows the file of newton 1.2")
        rest = found[2].replace("        float physics:mass = 1\n", "", 1)
        usda = usda[: found.start()] + found[1] + lines + rest + usda[found.end() :]
    return usda


def for_isaac_lab(usda: str) -> str:
    """The humanoid with Isaac Lab's names of its joints, and without its collision groups: the ground is in none of
    them, so the robot would fall through it.
    """
    group = r'\n    def PhysicsCollisionGroup "\w+" \(\n.*?\n    \)\n    \{\n.*?\n    \}\n'
    usda, count = re.subn(group, "", usda, flags=re.DOTALL)
    if "PhysicsCollisionGroup" in usda or not count:
        sys.exit("error: newton's humanoid has other collision groups; this script knows the file of newton 1.2")
    for old, new in JOINTS.items():
        usda, count = re.subn(rf'(def PhysicsRevoluteJoint )"{old}"', rf'\1"{new}"', usda)
        if count != 1:
            sys.exit(f"error: newton's humanoid has {count} joints {old!r}; this script knows the file of newton 1.2")
    return usda


EDITS = {"cartpole_single_pendulum.usda": with_inertias, "humanoid.usda": for_isaac_lab}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the assets go; it is made if need be")
    folder = parser.parse_args().folder.expanduser().resolve()
    newton = importlib.util.find_spec("newton")  # found, not imported: that takes seconds
    if newton is None:
        sys.exit("error: the package newton is not installed here; run this with the Python of Isaac Lab's environment")
    examples = Path(newton.origin).parent / "examples" / "assets"
    for target, source in ROBOTS.items():
        if not (examples / source).is_file():
            sys.exit(f"error: {examples} has no {source}; newton 1.2 ships it")
        usda = (examples / source).read_text()
        path = folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(EDITS[source](usda) if source in EDITS else usda)
        print(path)
    for target in GROUNDS:
        path = folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(GROUND_USDA)
        print(path)
    print(f"\nMake Isaac Lab 3.0 look there with\nexport ISAACSIM_ASSET_ROOT={folder}")
    print("and the 3.0 beta with this as the last line of apps/isaaclab.python.kit in your copy of it:")
    print(f'persistent.isaac.asset_root.cloud = "{folder}"')


if __name__ == "__main__":
    main()
