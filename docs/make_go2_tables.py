"""Writes the tables of docs/go2.md and go2_data.md from the code they describe: python docs/make_go2_tables.py"""

import ast
import inspect
import re
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from common.envs import go2  # noqa: E402
from common.envs.go2_eval import observation_layout  # noqa: E402

MEANING = {
    "lin_vel": "linear velocity of the base, body frame (m/s)",
    "ang_vel": "angular velocity of the base, body frame (rad/s)",
    "gravity": "direction of gravity, body frame (unit vector)",
    "command_vx": "commanded forward velocity (m/s)",
    "command_vy": "commanded velocity to the left (m/s)",
    "command_yaw": "commanded yaw rate (rad/s)",
    "command_height": "commanded height of the base (m)",
    "command_jump": "height a jump is to reach (m), 0 when there is none",
    "dof_pos": "joint angle minus default pose (rad)",
    "dof_vel": "joint velocity (rad/s)",
    "last_action": "the action taken before this observation",
}
GENESIS, GYM = "Genesis `go2_env.py`", "legged_gym `legged_robot.py`"
# {term: (its code in Go2Env._rewards, the same in words, source)}. A test compares the code.
FORMULAS = {
    "lin_vel": ("torch.exp(-lin_error / 0.25)", "exp(-\\|v*<sub>xy</sub> - v<sub>xy</sub>\\|² / 0.25)", GENESIS),
    "ang_vel": ("torch.exp(-yaw_error / 0.25)", "exp(-(ω*<sub>z</sub> - ω<sub>z</sub>)² / 0.25)", GENESIS),
    "lin_vel_z": ("self.lin_vel[:, 2].square()", "v<sub>z</sub>²", GENESIS),
    "base_height": ("(self.height - target).square()", "(z - z*)²", GENESIS),
    "action_rate": ("(self.action - last_action).square().sum(1)", "Σ (a<sub>t</sub> - a<sub>t-1</sub>)²", GENESIS),
    "pose": ("self.dof_pos.abs().sum(1)", "Σ \\|q - q<sub>0</sub>\\|", GENESIS),
    "ang_vel_xy": ("self.ang_vel[:, :2].square().sum(1)", "ω<sub>x</sub>² + ω<sub>y</sub>²", GYM),
    "air_time": (
        "((self.air_time - 0.2).clamp(max=0.1) * contact * (self.air_time > 0)).sum(1) * moving",
        "Σ over feet that touch down: min(time in the air - 0.2 s, 0.1 s); only under a velocity command",
        f"{GYM}, with a shorter swing and a cap",
    ),
    "clearance": (
        "((foot_pos[..., 2] - SWING_HEIGHT).square() * foot_vel * ~contact).sum(1)",
        "Σ over feet in the air: (z<sub>foot</sub> - 0.1 m)² · \\|v<sub>foot, xy</sub>\\|",
        "Ji et al. 2022, arXiv 2202.05481, eq. 4",
    ),
    "slip": ("(foot_vel.square() * contact).sum(1)", "Σ over feet on the ground: \\|v<sub>foot, xy</sub>\\|²", GYM),
    "trot": (
        "((fr == rl) & (fl == rr) & (fr != fl)) * moving",
        "1 while one diagonal pair of feet stands and the other is in the air; only under a velocity command",
        "contact pattern of Margolis & Agrawal 2022, arXiv 2212.03238, without its clock",
    ),
    "stand": (
        "(self.dof_pos.abs().sum(1) + (~contact).sum(1)) * ~moving",
        "Σ \\|q - q<sub>0</sub>\\| + number of feet in the air; only without a velocity command",
        GYM,
    ),
    "power": (
        "(self.physics.actuator_force.float() * self.dof_vel).abs().sum(1)",
        "Σ \\|τ · q̇\\| (W)",
        "Fu et al. 2021, arXiv 2111.01674",
    ),
    "jump_height": (
        "gain.clamp(min=0) * rising / (command[:, 4] - self.cfg.base_height_target) / dt",
        "while rising: new height gained since the jump's command, as a share of the way from `--base-height-target` "
        "to the commanded height, per second; a whole jump from that height pays the weight once",
        "ours",
    ),
    "jump_land": (
        "torch.exp(-(self.height - target).square() / 0.01) * (jumping & ~rising)",
        "while landing: exp(-(z - z*)² / 0.01)",
        "ours",
    ),
}


def code_of_terms() -> dict[str, str]:
    """{term: expression} as they stand in Go2Env._rewards."""
    found = {}
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(go2.Go2Env._rewards)))):
        if isinstance(node, ast.Dict):
            found |= {k.value: ast.unparse(v) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("terms['"):
            found[node.targets[0].slice.value] = ast.unparse(node.value)
    return found


def observation_table() -> list[str]:
    configs = {
        "48-D": go2.Go2Config(),
        "50-D": go2.Go2Config(commands="full"),
        "45-D": go2.Go2Config(observation="proprioceptive"),
    }
    ranges = {}
    for name, cfg in configs.items():
        start = 0
        for part, size, _ in observation_layout(cfg):
            ranges[name, part] = f"{start}:{start + size}"
            start += size
    rows = [f"| part | scale | {' | '.join(configs)} |", "|---|---|" + "---|" * len(configs)]
    for part, _, scale in observation_layout(configs["50-D"]):
        cells = " | ".join(ranges.get((name, part), "-") for name in configs)
        rows.append(f"| `{part}`: {MEANING[part]} | {scale:g} | {cells} |")
    return rows


def reward_table() -> list[str]:
    rows = ["| term | value | source | `reference` | `natural` |", "|---|---|---|---|---|"]
    for name in go2.TERMS:
        _, formula, source = FORMULAS.get(name, ("", "not described", ""))
        reference, natural = (
            f"{weights[name]:g}" if name in weights else "-"
            for weights in (go2.REFERENCE | go2.JUMP, go2.NATURAL | go2.JUMP)
        )
        full = " (with `--commands full`)" if name in go2.JUMP else ""
        rows.append(f"| `{name}`{full} | {formula} | {source} | {reference} | {natural} |")
    return rows


def flag_table() -> list[str]:
    body = ast.parse(inspect.getsource(go2.Go2Config)).body[0].body
    help_of = {
        node.target.id: ast.literal_eval(text.value)
        for node, text in zip(body, body[1:], strict=False)
        if isinstance(node, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for field in fields(go2.Go2Config):
        default = field.default
        if isinstance(default, tuple):
            default = " ".join(f"{x:g}" if isinstance(x, (int, float)) else str(x) for x in default)
        default = f"`{default}`" if default != "" else ""
        rows.append(f"| `--{field.name.replace('_', '-')}` | {default} | {help_of[field.name]} |")
    return rows


# {page: its tables}
PAGES = {
    ROOT / "docs" / "go2.md": {"observation": observation_table, "rewards": reward_table},
    ROOT / "docs" / "go2_data.md": {"flags": flag_table},
}


def written(page: Path) -> str:
    """The text of a page, with every table between `<!-- table: name -->` and `<!-- end -->` written anew."""
    text = page.read_text()
    for name, table in PAGES[page].items():
        block = f"<!-- table: {name} -->\n" + "\n".join(table()) + "\n<!-- end -->"
        pattern = rf"<!-- table: {name} -->.*?<!-- end -->"
        text, count = re.subn(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
        assert count == 1, f"{page} holds {count} tables named {name}, not one"
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(written(page))
        print(f"wrote the tables of {page.relative_to(ROOT)}")
    for term, code in code_of_terms().items():
        if FORMULAS.get(term, ("",))[0] != code:
            print(f"FORMULAS[{term!r}] describes other code than: {code}")
