"""Draws the README's pictures into docs/media: python docs/make_pictures.py

learning_curve.png from benchmark/results/go2_time_to_walk.json; files.png, which script imports what of common/; and
map.png, a script from top to bottom with the details of PPO in each part, from the sources as they stand.
"""

import ast
import json
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import FancyBboxPatch, PathPatch  # noqa: E402
from matplotlib.path import Path as Curve  # noqa: E402

ROOT = Path(__file__).parents[1]
MEDIA = ROOT / "docs" / "media"
COLOURS = ("#2f6db3", "#d1702b", "#3c8d5a", "#8a5fb0", "#b8434e", "#8c6d46", "#4a9aa8", "#7a7a7a")
GREY = "#6b7280"
PAPER = {"facecolor": "white", "dpi": 150}


def learning_curve(path: Path):
    """Velocity error of the deterministic policy against steps, one line per seed, and where each first walks."""
    result = json.loads((ROOT / "benchmark" / "results" / "go2_time_to_walk.json").read_text())
    runs = result["figures"]["runs"]
    slowest = max(runs, key=lambda seed: runs[seed]["walk"]["steps"])
    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    axes.axhline(0.15, color=GREY, linewidth=1, linestyle="--")
    axes.text(7.4, 0.155, "walks: below 0.15 m/s, no fall", color=GREY, ha="right", va="bottom", fontsize=9)
    for colour, (seed, run) in zip(COLOURS, runs.items(), strict=False):
        points = [(p["steps"] / 1e6, p["lin_vel_error"]) for p in run["curve"] if p["lin_vel_error"] is not None]
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.8, label=f"seed {seed}")
        first = next(p for p in run["curve"] if p["steps"] == run["walk"]["steps"])
        axes.plot(first["steps"] / 1e6, first["lin_vel_error"], "o", color=colour, markersize=7)
        if seed == slowest:
            where = f"{first['steps'] / 1e6:.2f} M steps, {run['walk']['seconds']:.0f} s"
            spot = (first["steps"] / 1e6 + 0.5, 0.3)
            arrow = {"arrowstyle": "-", "color": GREY}
            point = (first["steps"] / 1e6, first["lin_vel_error"])
            style = {"fontsize": 9, "color": GREY, "arrowprops": arrow}
            axes.annotate(f"the slowest seed walks: {where}", point, spot, **style)
    axes.set(xlabel="environment steps (million)", ylabel="velocity error (m/s)", xlim=(0, 7.5), ylim=(0, 0.7))
    axes.set_title("Unitree Go2, laptop preset, two CPU cores", fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    figure.savefig(path, **PAPER)
    plt.close(figure)


def imports(path: Path) -> set[Path]:
    """The modules of common/ that a file imports, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("common"):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("common.")]
        else:
            continue
        found |= {ROOT / f"{name.replace('.', '/')}.py" for name in names}
    return {path for path in found if path.exists()}


def length(path: Path) -> int:
    return len(path.read_text().splitlines())


def files(path: Path):
    """Scripts on the left, common/ on the right, one colour per script. What most of them import needs no lines."""
    scripts = sorted(ROOT.glob("*.py"))
    direct = {script: imports(script) for script in scripts}
    users = {module: sum(module in found for found in direct.values()) for module in set().union(*direct.values())}
    common = {module for module, count in users.items() if count > len(scripts) / 2}
    shared = [p for p in sorted(ROOT.glob("common/*.py")) if length(p)]
    shared.sort(key=lambda module: module not in common)
    environments = [p for p in sorted(ROOT.glob("common/envs/*.py")) if length(p)]
    names, lengths = 5.6, 8.7  # the columns on the right
    place = {module: row + 1 for row, module in enumerate(shared)}
    place |= {module: row + len(shared) + 2.2 for row, module in enumerate(environments)}
    bottom = max(place.values())
    figure, axes = plt.subplots(figsize=(7, 0.28 * (bottom + 2)), layout="constrained")
    for heading, y in (("common/", 0), ("common/envs/", len(shared) + 1.2)):
        axes.text(names, y, heading, va="center", fontsize=9, weight="bold")
    axes.text(lengths, 0, "lines", va="center", ha="right", fontsize=8, color=GREY)
    for module, y in place.items():
        weight = "bold" if module in common else "normal"
        axes.text(names, y, module.name, va="center", fontsize=9, family="monospace", weight=weight)
        axes.text(lengths, y, f"{length(module)}", va="center", ha="right", fontsize=8, color=GREY)
    for index, script in enumerate(scripts):
        colour = COLOURS[index % len(COLOURS)]
        y = (index + 0.5) * (bottom + 1) / len(scripts) - 0.5
        box = FancyBboxPatch((0, y - 0.75), 3.2, 1.5, boxstyle="round,pad=0.05", facecolor=colour, edgecolor="none")
        axes.add_patch(box)
        style = {"color": "white", "ha": "center", "va": "center"}
        axes.text(1.6, y - 0.3, script.name, fontsize=8, family="monospace", **style)
        axes.text(1.6, y + 0.35, f"{length(script)} lines", fontsize=8, **style)
        for module in direct[script] - common:
            points = [(3.25, y), (4.6, y), (4.2, place[module]), (names - 0.1, place[module])]
            curve = Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])
            axes.add_patch(PathPatch(curve, facecolor="none", edgecolor=colour, linewidth=1.4))
    note = "bold: imported by most scripts; without a line: by other modules"
    axes.text(0, bottom + 0.6, note, fontsize=7.5, color=GREY, va="center")
    axes.set(xlim=(-0.1, lengths + 0.1), ylim=(bottom + 1, -0.6))
    axes.axis("off")
    figure.savefig(path, **PAPER)
    plt.close(figure)


def parts(source: str) -> list[tuple[int, int, str, str]]:
    """(first line, last line, name, kind) of a script's parts, top to bottom; kind is one of KINDS."""
    lines = source.splitlines()
    found = []  # (first line, name, kind)
    for node in ast.parse(source).body:
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        if isinstance(node, ast.Expr):
            found.append((first, "docstring: what it trains, what was measured", "settings"))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append((first, "imports", "settings"))
        elif isinstance(node, ast.Assign) and not any(kind == "network" for *_, kind in found):
            found.append((first, "constants and presets", "settings"))
        elif isinstance(node, ast.ClassDef):
            found.append((first, f"class {node.name}", "settings" if node.name == "Args" else "network"))
        elif isinstance(node, ast.FunctionDef) and node.name == "main":
            loop = next(inner for inner in node.body if isinstance(inner, ast.While))
            for line in range(node.lineno, node.end_lineno + 1):
                marker = re.fullmatch(r" +# --- ([^:]+)(:.*)?", lines[line - 1])
                if marker:
                    kind = "loop" if loop.lineno <= line <= loop.end_lineno else "main"
                    # The lines with `def main` and `while` belong to the part that they open.
                    begin = {"function": node.lineno, "main": loop.lineno}
                    start = line if found[-1][2] == kind else begin.get(found[-1][2], line)
                    found.append((start, marker[1], kind))
        elif isinstance(node, ast.FunctionDef):
            found.append((first, f"{node.name}()", "network" if node.name == "layer_init" else "function"))
        elif isinstance(node, ast.If):
            found.append((first, "__main__: flags, ranks", "settings"))
    found = [part for i, part in enumerate(found) if i == 0 or found[i - 1][1] != part[1]]
    starts = []
    for first, *_ in found:
        while lines[first - 2].startswith("#") and first > 1:  # what stands right above belongs to it
            first -= 1
        starts.append(first)
    spans = []
    for start, end, (_, name, kind) in zip(starts, [*starts[1:], len(lines) + 1], found, strict=True):
        last = max(line for line in range(start, end) if lines[line - 1].strip() and "# === end" not in lines[line - 1])
        tagged = "# detail" in "\n".join(lines[start - 1 : last])
        small = kind == "function" and last - start < 12 and not tagged
        if small and spans and spans[-1][4] and len(spans[-1][2]) < 50:  # short helpers in a row are one part
            first, _, names, *_ = spans.pop()
            start, name = first, f"{names}, {name}"
        spans.append((start, last, name, kind, small))
    return [span[:4] for span in spans]


KINDS = {
    "settings": "#e5e7eb",
    "network": "#cfe0f3",
    "function": "#dcead9",
    "main": "#fbe3cf",
    "loop": "#f6bf92",
}


def script_map(path: Path, script: Path):
    """Each part a box as wide as the page, its line range on the left, the details of PPO in it on the right."""
    source = script.read_text()
    lines = source.splitlines()
    drawn = parts(source)
    heights = [0.62 + (last - first) / 90 for first, last, *_ in drawn]
    figure, axes = plt.subplots(figsize=(7, 0.3 * sum(heights) + 0.5), layout="constrained")
    y, loop = 0.0, []
    for (first, last, name, kind), height in zip(drawn, heights, strict=True):
        axes.add_patch(plt.Rectangle((1.1, y + 0.03), 5.6, height - 0.06, facecolor=KINDS[kind], edgecolor="none"))
        middle = y + height / 2
        axes.text(1.0, middle, f"{first}–{last}", ha="right", va="center", fontsize=8, color=GREY)
        axes.text(1.25, middle, name, va="center", fontsize=9)
        details = sorted({int(n) for n in re.findall(r"# detail (\d+)\b", "\n".join(lines[first - 1 : last]))})
        if details:
            axes.text(6.6, middle, ", ".join(map(str, details)), ha="right", va="center", fontsize=8, color="#374151")
        if kind == "loop":
            loop += [y, y + height]
        y += height
    axes.plot([6.85, 6.95, 6.95, 6.85], [loop[0], loop[0], loop[-1], loop[-1]], color=GREY, linewidth=1.2)
    axes.text(7.05, (loop[0] + loop[-1]) / 2, "every iteration", rotation=270, va="center", fontsize=9, color=GREY)
    axes.text(1.1, -0.45, script.name, va="center", fontsize=10, family="monospace", weight="bold")
    axes.text(1.0, -0.45, "lines", ha="right", va="center", fontsize=8, color=GREY)
    axes.text(6.6, -0.45, "details of PPO (docs/details.md)", ha="right", va="center", fontsize=8, color=GREY)
    axes.set(xlim=(0.1, 7.4), ylim=(y + 0.1, -0.9))
    axes.axis("off")
    figure.savefig(path, **PAPER)
    plt.close(figure)


if __name__ == "__main__":
    learning_curve(MEDIA / "learning_curve.png")
    files(MEDIA / "files.png")
    script_map(MEDIA / "map.png", ROOT / "ppo_go2_mujoco.py")
