"""The three diffs of docs/fork.md apply to a copy of the repository, and each changes what is learned."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from docs import make_details

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "fork.md").read_text()
# {heading: its diff}
DIFFS = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?```diff\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL))
FLAGS = "--preset laptop --device cpu --ranks 1 --precision float32 --num-envs 8 --num-steps 8 --num-iterations 2"
FLAGS += " --episode-seconds 0.5 --eval-episodes 1 --log-interval 1 --no-save-video"


def train(folder: Path) -> tuple[torch.Tensor, str]:
    """All weights after two iterations of the script in `folder`, and what it printed."""
    command = [sys.executable, "ppo_go2_mujoco.py", *FLAGS.split(), "--log-dir", "run"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    state = torch.load(folder / "run" / "checkpoints" / "final_model.pt", weights_only=True)
    return torch.cat([x.flatten().double() for x in state["agent"].values()]), done.stdout


def copy(folder: Path):
    shutil.copy(ROOT / "ppo_go2_mujoco.py", folder)
    shutil.copytree(ROOT / "common", folder / "common", ignore=shutil.ignore_patterns("__pycache__"))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    copy(folder)
    return train(folder)[0]


def test_the_page_has_three_diffs():
    assert list(DIFFS) == ["A reward term", "A task", "A loss"]


@pytest.mark.parametrize("name", DIFFS)
def test_diff(name, original, tmp_path):
    copy(tmp_path)
    # Outside of any repository, `git apply` is a strict patch: no fuzz, context has to match.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    applied = subprocess.run(
        ["git", "apply", "-"], input=DIFFS[name], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert applied.returncode == 0, f"the diff {name!r} of docs/fork.md does not apply any more: {applied.stderr}"
    weights, printed = train(tmp_path)
    assert weights.isfinite().all() and weights.shape == original.shape
    assert not torch.equal(weights, original), "the diff changes nothing that is learned"
    assert ("reward_hips" in printed) == (name == "A reward term")


def test_the_loss_replaces_the_tagged_line():
    """As the page says, detail 8 is what the diff takes out."""
    removed = "\n".join(line[1:] for line in DIFFS["A loss"].splitlines() if line.startswith("-"))
    assert 8 in make_details.tags(removed)
