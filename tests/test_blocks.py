"""Blocks that stand in several scripts, fenced by `# === name ===` and `# === end name ===`, are identical.

`python tests/test_blocks.py --copy-from X.py` rewrites the blocks of X.py in the other scripts.
"""

import argparse
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = {path.name: path for path in sorted(ROOT.glob("*.py"))}
PPO_BLOCKS = ("layer init", "running mean std", "gae", "advantage normalisation", "ppo loss", "learning rate", "update")
SHARED = 0.7  # of a PPO script's lines that are not blank stand in another one too; of CleanRL's, 75%
# {(block, script): why it deliberately differs there, or why the script does without it}
ALLOWED: dict[tuple[str, str], str] = {
    ("update", "ppo_gr00t.py"): "gradients add up over micro-batches, and the critic may have an optimiser of its own",
}

FENCE = re.compile(r"^ *(?P<mark># === (?P<end>end )?(?P<name>.+?) ===)$", re.MULTILINE)


def blocks(source: str) -> dict[str, str]:
    """{name: text between its fences}. Raises ValueError for a fence that is unclosed, unopened, nested or repeated."""
    found, name, start = {}, None, 0
    for fence in FENCE.finditer(source):
        label = fence["name"]
        if fence["end"]:
            if label != name:
                raise ValueError(f"'end {label}' closes no block")
            found[name] = source[start : fence.start("mark")]
            name = None
        else:
            if name is not None:
                raise ValueError(f"block '{label}' begins inside block '{name}'")
            if label in found:
                raise ValueError(f"block '{label}' stands twice")
            name, start = label, fence.end()
    if name is not None:
        raise ValueError(f"block '{name}' is not closed")
    return found


def replace_block(source: str, name: str, text: str) -> str:
    old = blocks(source)[name]
    head, tail = f"# === {name} ===", f"# === end {name} ==="
    return source.replace(head + old + tail, head + text + tail)


def differences(sources: dict[str, str], allowed: dict[tuple[str, str], str]) -> list[str]:
    """One line per block that is not the same in two scripts, leaving out those allowed to deviate."""
    first, found = {}, []
    for script, source in sources.items():
        for name, text in blocks(source).items():
            if (name, script) in allowed:
                continue
            other, expected = first.setdefault(name, (script, text))
            if text != expected:
                found.append(f"block '{name}' differs between {other} and {script}")
    return found


def copy_from(script: str) -> list[str]:
    """Rewrite the blocks of `script` in the others; returns the names of the scripts changed."""
    changed = []
    for other, path in SCRIPTS.items():
        source = new = path.read_text()
        for name, text in blocks(SCRIPTS[script].read_text()).items():
            if name in blocks(new) and (name, other) not in ALLOWED:
                new = replace_block(new, name, text)
        if new != source:
            path.write_text(new)
            changed.append(other)
    return changed


@pytest.mark.parametrize("script", SCRIPTS)
def test_fences_are_closed(script):
    blocks(SCRIPTS[script].read_text())


def test_blocks_are_identical():
    assert not differences({name: path.read_text() for name, path in SCRIPTS.items()}, ALLOWED)


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name.startswith("ppo_")])
def test_ppo_scripts_have_the_blocks(script):
    present = blocks(SCRIPTS[script].read_text())
    missing = [name for name in PPO_BLOCKS if name not in present and (name, script) not in ALLOWED]
    assert not missing


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name.startswith("ppo_")])
def test_a_diff_of_two_ppo_scripts_shows_the_idea(script):
    lines = {
        name: [line.rstrip() for line in path.read_text().splitlines() if line.strip()]
        for name, path in SCRIPTS.items()
    }
    shares = {}
    for other in lines.keys() - {script}:
        known = set(lines[other])
        shares[other] = sum(line in known for line in lines[script]) / len(lines[script])
    # Of the one, LSTM, three action spaces and presets for every task are its own; of the other, a flow's
    # probabilities, what is frozen, and the warm start.
    if script not in ("ppo_continuous_isaac.py", "ppo_gr00t.py"):
        assert max(shares.values()) >= SHARED, shares


def test_allowed_deviations_are_real():
    for (name, script), reason in ALLOWED.items():
        assert reason and script in SCRIPTS
        texts = {other: blocks(path.read_text()).get(name) for other, path in SCRIPTS.items()}
        own = texts.pop(script)
        assert own is None or any(text not in (None, own) for text in texts.values()), f"{name} in {script}: stale"


ONE = "a = 1\n# === gae ===\nx\n# === end gae ===\nb = 2\n"


def test_a_difference_is_found_and_repaired():
    two = ONE.replace("x\n", "y\n")
    assert blocks(ONE) == {"gae": "\nx\n"}
    assert differences({"1.py": ONE, "2.py": two}, {}) == ["block 'gae' differs between 1.py and 2.py"]
    assert not differences({"1.py": ONE, "2.py": two}, {("gae", "2.py"): "on purpose"})
    assert replace_block(two, "gae", blocks(ONE)["gae"]) == ONE
    one, two = (source.replace("# ===", "    # ===") for source in (ONE, two))
    assert replace_block(two, "gae", blocks(one)["gae"]) == one


def test_copy_from(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "SCRIPTS", {name: tmp_path / name for name in ("1.py", "2.py", "3.py")})
    for name, text in {"1.py": ONE, "2.py": ONE.replace("x\n", "y\n"), "3.py": "c = 3\n"}.items():
        (tmp_path / name).write_text(text)
    assert copy_from("1.py") == ["2.py"]
    assert (tmp_path / "2.py").read_text() == ONE and (tmp_path / "3.py").read_text() == "c = 3\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (ONE.replace("# === end gae ===\n", ""), "not closed"),
        (ONE.replace("# === gae ===\n", ""), "closes no block"),
        (ONE + ONE, "stands twice"),
        (ONE.replace("x\n", "# === b ===\n"), "inside block"),
    ],
)
def test_bad_fences(source, message):
    with pytest.raises(ValueError, match=message):
        blocks(source)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--copy-from", required=True, choices=list(SCRIPTS), help="the script whose blocks are right")
    print("rewritten:", ", ".join(copy_from(parser.parse_args().copy_from)) or "nothing")
