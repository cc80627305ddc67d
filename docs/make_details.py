"""Writes docs/details.md: which PPO script implements which of the 37 details, collected from tags such as

    advantages = ...  # detail 5: GAE

and, where a script has none, why not, from REASONS below. `python docs/make_details.py`
"""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "details.md"

DETAILS = (
    "vectorised architecture",
    "orthogonal initialisation of weights, constant biases",
    "Adam's epsilon of 1e-5",
    "learning-rate annealing",
    "generalised advantage estimation",
    "minibatch updates over shuffled indices",
    "normalisation of advantages",
    "clipped surrogate objective",
    "clipping of the value loss",
    "overall loss and entropy bonus",
    "global gradient clipping",
    "debug variables",
    "shared or separate networks",
    "no-op reset",
    "max and skip",
    "episodic life",
    "fire reset",
    "warp frame",
    "clipping of rewards to their sign",
    "frame stack",
    "shared Nature-CNN",
    "scaling of images to [0, 1]",
    "normal distribution of continuous actions",
    "state-independent log standard deviation",
    "independent action components",
    "separate MLPs for policy and value",
    "clipping of actions for the environment, storage of the raw ones",
    "normalisation of observations",
    "clipping of observations",
    "scaling of rewards",
    "clipping of rewards",
    "initialisation of the LSTM layers",
    "LSTM states start from zero",
    "LSTM states reset at the end of an episode",
    "sequential rollouts in minibatches",
    "LSTM states rebuilt during training",
    "independent MultiDiscrete components",
)
GROUPS = {1: "core", 14: "Atari", 23: "continuous actions", 32: "LSTM", 37: "MultiDiscrete"}

# {script: {detail: why the script does not have it}}
_NO_LSTM = "no recurrent network; `--history` stacks observations instead"
REASONS = {
    "ppo_go2_mujoco.py": {
        14: "the environment's part: random phase and state at the start (`common/envs/go2.py`)",
        15: "the environment's part: several physics steps per action (`--substeps`); no pixels to take a maximum of",
        16: "a robot has no lives: a fall ends the episode (`--termination-degrees`)",
        17: "no game that waits for a button",
        18: "no images",
        19: "the reward terms are weighted against each other, which a sign would undo",
        20: "the environment's part: `--history`",
        21: "no images",
        22: "no images",
        30: "the reward's weights and its factor dt set the scale; a running one would move them during training",
        31: "rewards are not scaled by a running statistic, so none can explode",
        **dict.fromkeys(range(32, 37), _NO_LSTM),
        37: "actions are continuous",
    },
    "ppo_continuous_isaac.py": {
        14: "the adapter's part: a random phase of the first episodes (`common/envs/isaac.py`)",
        15: "the task's part: its decimation or frame skip; no pixels to take a maximum of",
        16: "no lives: a fall ends the episode, and a time limit is no failure",
        17: "no game that waits for a button",
        18: "no images",
        19: "rewards are scaled by a running statistic (detail 30), which keeps their sizes apart",
        20: "the adapter's part: `--history`",
        21: "no images",
        22: "no images",
    },
}


def tags(source: str) -> dict[int, list[str]]:
    """{number: what each tag says} for the comments `# detail 5: GAE` of a script."""
    found = {}
    for number, text in re.findall(r"# detail (\d+)\b:?[ ]*([^\n]*)", source):
        found.setdefault(int(number), []).append(text.strip().rstrip("."))
    return found


def scripts() -> list[Path]:
    return sorted(ROOT.glob("ppo_*.py"))


def page() -> str:
    paths = scripts()
    tagged = {path.name: tags(path.read_text()) for path in paths}
    lines = [
        "# The 37 implementation details of PPO, by script",
        "",
        "Numbered as in [The 37 Implementation Details of Proximal Policy Optimization]"
        "(https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/).",
        "A cell says how the script does it; the line is found with `grep -n 'detail 5' ppo_*.py`.",
        "A cell in *italics* says why the script has no such line.",
        "",
        "Written by `python docs/make_details.py` from the tags in the scripts: change those, not this page.",
        "",
        "| # | detail | " + " | ".join(f"`{name}`" for name in tagged) + " |",
        "|---|---|" + "---|" * len(tagged),
    ]
    for number, title in enumerate(DETAILS, 1):
        cells = []
        for name, found in tagged.items():
            if number in found:
                cells.append("; ".join(dict.fromkeys(filter(None, found[number]))) or "yes")
            else:
                cells.append(f"*{REASONS.get(name, {}).get(number, 'reason missing')}*")
        group = f"**{GROUPS[number]}**: " if number in GROUPS else ""
        lines.append(f"| {number} | {group}{title} | " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE.relative_to(ROOT)}")
