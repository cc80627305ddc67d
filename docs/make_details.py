"""Writes docs/details.md: where each PPO script implements which of the 37 details, collected from tags such as

    advantages = ...  # detail 5: GAE

and, from the two tables below, why a script has none (REASONS) and where it departs from the original (NOTES). Line
numbers move whenever a script changes: `python docs/make_details.py` finds them again.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "details.md"
POST = "https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/"

DETAILS = (
    "vectorised architecture",
    "orthogonal initialisation of weights, constant biases",
    "Adam's epsilon of 1e-5",
    "learning-rate annealing",
    "generalised advantage estimation (GAE)",
    "minibatches of shuffled indices, without replacement",
    "normalisation of advantages",
    "clipped surrogate objective",
    "clipping of the value loss",
    "one overall loss, with an entropy bonus",
    "global gradient clipping",
    "debug variables",
    "whether policy and value share a network",
    "no-op reset",
    "max and skip",
    "episodic life",
    "fire reset",
    "warp frame",
    "clipping of rewards to their sign",
    "frame stack",
    "shared Nature-CNN",
    "scaling of images to [0, 1]",
    "Gaussian distribution of continuous actions",
    "state-independent log standard deviation",
    "independent action components",
    "separate MLPs for policy and value",
    "actions clipped for the environment, stored as sampled",
    "normalisation of observations",
    "clipping of normalised observations",
    "scaling of rewards",
    "scaled rewards are clipped",
    "initialisation of the LSTM layers",
    "LSTM states start from zero",
    "LSTM states reset where an episode ends",
    "sequential rollouts in minibatches",
    "LSTM states rebuilt during training",
    "independent MultiDiscrete components",
)
# {first detail: (title, anchor in the post)}
GROUPS = {
    1: ("Core", "13-core-implementation-details"),
    14: ("Atari", "9-atari-specific-implementation-details"),
    23: ("Continuous actions", "9-details-for-continuous-action-domains-eg-mujoco"),
    32: ("LSTM", "5-lstm-implementation-details"),
    37: ("MultiDiscrete", "1-multidiscrete-action-space-detail"),
}

# Texts of both tables. `{file|words}` becomes a link to the first line of that file that holds the words.
_NO_IMAGES = "No images."
_NO_BUTTON = "No game that waits for a button."
_NO_LSTM = "No recurrent network; `--history` stacks observations instead."
_RANKS = "The environments may be split over processes (`--ranks`, `torchrun`), whose gradients are averaged."
_LEARNING_RATE = (
    "With `--desired-kl` the rate follows the KL divergence (rsl_rl's rule); without, it falls linearly to zero as in "
    "the original."
)
_TIME_LIMIT = (
    "Where a time limit ends an episode, the value of the true last observation is added to the reward; the original "
    "and CleanRL take a time limit for a failure. Values are computed after the rollout, in one batch."
)
_ADVANTAGES = (
    "Moments over all ranks, with the population's standard deviation, as in the original (NumPy); CleanRL's "
    "(`torch.std`) is the sample's."
)
_VALUE_LOSS = (
    "The value loss has the original's factor 0.5. `--vf-coef` is 2 where the settings are rsl_rl's, which has no such "
    "factor and a coefficient of 1; the original has 0.5."
)
_GRADIENTS = (
    "The norm is that of the gradient averaged over ranks. One that is not finite is replaced by zeros and counted in "
    "`charts/nan_updates`. The original's limit is 0.5; 1 is usual in robotics."
)
_STATISTICS = (
    "Means over all minibatches since the last log line, where CleanRL has the last minibatch's losses; beside the "
    "original's also the exact KL divergence of the distributions, the explained variance and the norm of the gradient."
)
_OBSERVATIONS = (
    "The statistics stand still during a rollout and its update, so the first minibatch has a ratio of 1; the original "
    "moves them with every step. They are those of all ranks."
)
_SPLIT_LSTM = "Actor and critic have an LSTM each; in the original they share one."

# {script: {detail: why the script does not have it}}
REASONS = {
    "ppo_go2_mujoco.py": {
        14: "The environment's part: episodes of random ages and postures ({common/envs/go2.py|detail 14}).",
        15: "The environment's part: several physics steps per action ({common/envs/go2_config.py|substeps: int}), no "
        "pixels.",
        16: "A robot has no lives: a fall ends the episode ({common/envs/go2_config.py|termination_degrees: float}).",
        17: _NO_BUTTON,
        18: _NO_IMAGES,
        19: "The reward terms are weighted against each other, which a sign would undo.",
        20: "The environment's part: `--history` ({common/envs/go2_config.py|history: int}).",
        21: _NO_IMAGES,
        22: _NO_IMAGES,
        30: "The rewards' weights and their factor dt set the scale; a running one would move them during training.",
        31: "Rewards are not scaled by a running statistic, so none can explode.",
        **dict.fromkeys(range(32, 37), _NO_LSTM),
        37: "Actions are continuous.",
    },
    "ppo_multimodal_peginsert.py": {
        14: "The environment's part: episodes of random ages ({common/envs/peg_insert.py|detail 14}).",
        15: "The environment's part: eight control periods per action ({common/envs/peg_insert.py|DECIMATION = 8}).",
        16: "An arm has no lives: only the time limit ends an episode.",
        17: _NO_BUTTON,
        18: "The cameras draw in the size that is observed ({common/envs/peg_insert.py|image_size: int}), in colour.",
        19: "Rewards are scaled by a running statistic (detail 30), which keeps their sizes apart.",
        20: "No stack: velocities are observed, and actions are smoothed.",
        **dict.fromkeys(range(32, 37), "No recurrent network yet."),
        37: "Actions are continuous.",
    },
    "ppo_real2sim_mjx.py": {
        14: "The environment's part: episodes of random ages ({common/envs/real2sim.py|random_phase}).",
        15: "The environment's part: four physics steps per action ({common/envs/real2sim.py|SUBSTEPS = 4}).",
        16: "An arm has no lives: an object that falls off the table ends the episode.",
        17: _NO_BUTTON,
        18: _NO_IMAGES,
        19: "Rewards are scaled by a running statistic (detail 30), which keeps their sizes apart.",
        20: "No stack: `--observation full` has the velocities.",
        21: _NO_IMAGES,
        22: _NO_IMAGES,
        **dict.fromkeys(range(32, 37), "No recurrent network."),
        37: "Actions are continuous.",
    },
    "ppo_aloha_cnn.py": {
        14: "The environment's part: episodes of random ages ({common/envs/aloha.py|random_phase}); objects lie anew.",
        15: "The environment's part: ten physics steps per action, and one picture "
        "({common/envs/aloha.py|CONTROL_DT, SUBSTEPS}).",
        16: "An arm has no lives: success ends the episode, and a time limit is no failure.",
        17: _NO_BUTTON,
        **dict.fromkeys(range(32, 37), "No recurrent network; `--frame-stack` stacks pictures instead."),
        37: "Actions are continuous.",
    },
    "ppo_gr00t.py": {
        14: "The environment's part: episodes of random ages ({common/envs/pick.py|random_phase}).",
        15: "The environment's part: a chunk of actions per picture ({common/envs/pick.py|chunk: int}).",
        16: "An arm has no lives: success ends the episode, and a time limit is no failure.",
        17: _NO_BUTTON,
        18: "The cameras draw in the size that is observed ({common/envs/pick.py|image_size: int}), in colour.",
        19: "The reward is 1 for success and, with `--reward dense`, the rise of a potential, whose size counts.",
        20: "GR00T sees one picture of each camera, as it was trained to.",
        21: "GR00T's own vision model takes its place.",
        22: "The model's part, from -1 to 1 as it was trained ({common/gr00t.py|/ 127.5 - 1}).",
        30: "Returns of `Pick-v0` are small as they are: 1 for success, and with `--reward dense` at most about 2.",
        31: "Rewards are not scaled by a running statistic, so none can explode.",
        **dict.fromkeys(range(32, 37), "No recurrent network."),
        37: "Actions are continuous.",
    },
    "ppo_continuous_isaac.py": {
        14: "The adapter's part: first episodes of random ages ({common/envs/isaac.py|random_phase}).",
        15: "The task's part: its decimation or frame skip; no pixels.",
        16: "No lives: a fall ends the episode, and a time limit is no failure.",
        17: _NO_BUTTON,
        18: _NO_IMAGES,
        19: "Rewards are scaled by a running statistic (detail 30), which keeps their sizes apart.",
        20: "The adapter's part: `--history` ({common/envs/isaac.py|history: int}).",
        21: _NO_IMAGES,
        22: _NO_IMAGES,
    },
}

# {script: {detail: where its line departs from the post, or from CleanRL's files}}
NOTES = {
    "ppo_go2_mujoco.py": {
        1: _RANKS,
        2: "Hidden layers have the gain 3^-½ (as large as torch's default), the original √2; the outputs 0.01 and 1.",
        4: _LEARNING_RATE,
        5: _TIME_LIMIT,
        7: _ADVANTAGES,
        8: "With `--mirror`, half of the robots' samples are mirror images beside the log-probabilities of what was "
        "really sampled: their ratio is not 1 before the first update.",
        10: _VALUE_LOSS,
        11: _GRADIENTS,
        12: _STATISTICS,
        24: "A parameter held between `--min-std` and a limit that falls to `--final-std`; the original starts at a "
        "standard deviation of 1 and has no limits.",
        26: "ELU, and the widths of `--hidden`; the original has tanh and 64, 64.",
        27: "The Go2's actions have no bounds to be clipped at; its torques have.",
        28: _OBSERVATIONS,
    },
    "ppo_multimodal_peginsert.py": {
        1: _RANKS,
        4: _LEARNING_RATE,
        5: _TIME_LIMIT,
        7: _ADVANTAGES,
        10: _VALUE_LOSS,
        11: _GRADIENTS,
        12: _STATISTICS,
        21: "Three convolutions of Nature's sizes, with GroupNorm, and a LayerNorm after the linear layer.",
        24: "A parameter held between `--min-std` and 10, which starts at `--init-std`; the original starts at a "
        "standard deviation of 1 and has no limits.",
        26: "Of what the encoder gives, or of the state itself; ELU, and the widths of `--hidden`.",
        27: "The environment clips a copy at the bounds of its space.",
        28: _OBSERVATIONS,
        30: "The statistic takes in the whole rollout, of all ranks, before its rewards are scaled; the original's "
        "moves with every step.",
    },
    "ppo_real2sim_mjx.py": {
        1: _RANKS,
        4: _LEARNING_RATE,
        5: _TIME_LIMIT,
        7: _ADVANTAGES,
        10: _VALUE_LOSS,
        11: _GRADIENTS,
        12: _STATISTICS,
        24: "A parameter held between `--min-std` and 10, which starts at `--init-std`; the original starts at a "
        "standard deviation of 1 and has no limits.",
        26: "ELU, and the widths of `--hidden`; the original has tanh and 64, 64.",
        27: "The environment clips a copy at the bounds of its space.",
        28: _OBSERVATIONS,
        30: "The statistic takes in the whole rollout, of all ranks, before its rewards are scaled; the original's "
        "moves with every step.",
    },
    "ppo_aloha_cnn.py": {
        1: _RANKS,
        4: _LEARNING_RATE,
        5: _TIME_LIMIT,
        7: _ADVANTAGES,
        9: "Off in `--preset document`, as in Stable-Baselines3.",
        10: _VALUE_LOSS,
        11: _GRADIENTS,
        12: _STATISTICS,
        13: "The encoder is shared; `--critic state` gives the critic the true state and no encoder.",
        18: "Off by default: colour tells peg from socket. The environment draws in the size that is observed.",
        19: "Off by default (`--clip-reward`): the progress reward's sizes mean something.",
        20: "The environment's part (`--frame-stack`), one by default; the joints are observed beside the picture.",
        21: "The joints join the 512 features behind the linear layer; then actor and critic have an MLP each.",
        24: "A parameter held between `--min-std` and 10, which starts at `--init-std`; the original starts at a "
        "standard deviation of 1 and has no limits.",
        26: "Behind the shared encoder; ELU, and the widths of `--hidden`, which are the document's.",
        27: "With `delta` the environment clips a copy to [-1, 1] and the targets to their range; `absolute` is not "
        "clipped, as in the package.",
        28: _OBSERVATIONS,
        30: "The statistic takes in the whole rollout, of all ranks, before its rewards are scaled; the original's "
        "moves with every step.",
    },
    "ppo_gr00t.py": {
        1: _RANKS,
        2: "Of networks that are new: the critic, and the mlp's and the residual's. GR00T's weights are what they are.",
        4: _LEARNING_RATE + " The critic's own rate, if it has one, stands still.",
        5: _TIME_LIMIT + " A step of the rollout is a chunk of actions, and the discount is a chunk's.",
        7: _ADVANTAGES,
        10: "The value loss has the original's factor 0.5. GR00T's entropy is a constant, as its noise is not learned.",
        11: _GRADIENTS + " The critic's gradient is clipped for itself where it has an optimiser of its own.",
        12: _STATISTICS,
        13: "The critic of GR00T sees its features and the state, and does not shape them; the mlp's is separate.",
        23: "In GR00T each noisy step of the integration is a Gaussian of given standard deviation; the residual "
        "and the mlp have the original's.",
        24: "Of the residual and the mlp; GR00T's noise is that of the Flow-SDE (`--noise-level`), and no parameter.",
        25: "In GR00T also over the steps of the integration that have noise.",
        26: "Of the mlp and the residual; ELU, and the widths of `--hidden`.",
        27: "The environment clips a copy at the bounds of its space.",
        28: "Of the mlp. GR00T's states and actions are mapped to [-1, 1] by ranges that are saved with the model.",
    },
    "ppo_continuous_isaac.py": {
        1: _RANKS,
        4: _LEARNING_RATE,
        5: _TIME_LIMIT,
        7: _ADVANTAGES,
        9: "Off by default on Gymnasium's tasks, on with Isaac Lab's and mjlab's settings; on in the original.",
        10: _VALUE_LOSS,
        11: _GRADIENTS,
        12: _STATISTICS,
        24: "A parameter held between `--min-std` and 10, which starts at `--init-std`; the original starts at a "
        "standard deviation of 1 and has no limits.",
        26: "Tanh and 64, 64 as in the original; ELU and other widths with Isaac Lab's and mjlab's settings.",
        27: "Gymnasium's actions are clipped at the bounds of their space "
        "({common/envs/gym_loop.py|detail 27}), others at `--clip-actions`, if it is given.",
        28: _OBSERVATIONS,
        30: "The statistic takes in the whole rollout, of all ranks, before its rewards are scaled; the original's "
        "moves with every step.",
        32: _SPLIT_LSTM,
    },
}


def tags(source: str) -> dict[int, list[tuple[int, str]]]:
    """{number: [(line, what the tag says)]} for the comments `# detail 5: GAE` of a script."""
    found = {}
    for line, text in enumerate(source.splitlines(), 1):
        for number, words in re.findall(r"# detail (\d+)\b:?[ ]*(.*)", text):
            found.setdefault(int(number), []).append((line, words.strip().rstrip(".")))
    return found


def scripts() -> list[Path]:
    return sorted(ROOT.glob("ppo_*.py"))


def news(words: str, title: str) -> str:
    """What a tag says, if it is short and says more than the row's title."""

    def stems(text):
        return {word.rstrip("s") for word in re.findall(r"\w+", text.lower())}

    return words if len(words) <= 30 and stems(words) - stems(title) else ""


def with_links(text: str) -> str:
    """`text` with a link in place of each `{file|words}`. Raises ValueError if no line of the file holds the words."""

    def link(match):
        file, words = match.groups()
        for line, source in enumerate((ROOT / file).read_text().splitlines(), 1):
            if words in source:
                return f"[{Path(file).name} L{line}](../{file}#L{line})"
        raise ValueError(f"{file} has no line with {words!r}, to which docs/make_details.py links")

    return re.sub(r"\{([^|{}]+)\|([^{}]+)\}", link, text)


def page() -> str:
    tagged = {path.name: tags(path.read_text()) for path in scripts()}
    footnotes = []  # each text once, numbered as it comes up

    def footnote(text):
        if text not in footnotes:
            footnotes.append(text)
        return f"[^{footnotes.index(text) + 1}]"

    def cell(script, number):
        if number not in tagged[script]:
            return "none" + footnote(REASONS.get(script, {}).get(number, "Reason missing."))
        links = []
        for line, words in tagged[script][number]:
            more = news(words, DETAILS[number - 1])
            links.append(f"[L{line}](../{script}#L{line})" + (f" {more}" if more else ""))
        note = NOTES.get(script, {}).get(number)
        return ", ".join(links).replace("|", "\\|") + (footnote(note) if note else "")

    heads = (f"[`{name.removesuffix('.py').removeprefix('ppo_')}`](../{name})" for name in tagged)
    table_head = ["| # | detail | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(tagged)]
    lines = [
        "# The 37 implementation details of PPO, by script",
        "",
        f"Numbered as in [The 37 Implementation Details of Proximal Policy Optimization]({POST}).",
        "A cell leads to the line that does it; a footnote says where that departs from the original, or why a",
        "script has no such line.",
        "",
        "Written by `python docs/make_details.py` from the tags in the scripts: change those, not this page.",
    ]
    for number, title in enumerate(DETAILS, 1):
        if number in GROUPS:
            group, anchor = GROUPS[number]
            lines += ["", f"## {group}", "", f"In the post: [{group}]({POST}#{anchor}).", "", *table_head]
        lines.append(f"| {number} | {title} | " + " | ".join(cell(script, number) for script in tagged) + " |")
    lines += ["", *(f"[^{i}]: {with_links(text)}" for i, text in enumerate(footnotes, 1))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE.relative_to(ROOT)}")
