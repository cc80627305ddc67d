"""The command line: precedence, aliases, and one sentence with exit code 2 for every mistake of a user."""

import dataclasses
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from common import cli
from common.logger import write_args


@dataclass
class Args:
    """Settings."""

    preset: str = "auto"
    """which preset is on"""
    config: str | None = None
    """a YAML file"""
    seed: int = 1
    """seed of everything"""
    device: str = "cpu"
    """where to train"""
    num_envs: int = 4
    """environments in parallel"""
    learning_rate: float = 1e-3
    """of Adam"""
    command_vx: tuple[float, float] = (-1.0, 2.0)
    """m/s"""
    rewards: Literal["reference", "natural"] = "natural"
    """which reward"""
    track: bool = False
    """log to Weights & Biases"""
    anneal_lr: bool = True
    """linear schedule"""
    num_iterations: int = 10
    """iterations"""
    resume: str | None = None
    """checkpoint"""


PRESETS = {"small": {"num_envs": 16, "seed": 7, "rewards": "reference"}, "large": {"num_envs": 4096}}


def parse(*argv, **kwargs):
    return cli.parse_args(Args, PRESETS, kwargs.pop("default_preset", "small"), argv=[str(a) for a in argv], **kwargs)


def refusal(capsys, *argv) -> str:
    """The one line on stderr of a command line that must be refused."""
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, (out, err)
    return err


def test_precedence(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("num_envs: 32\nlearning-rate: 1e-4\n")
    args = parse("--config", config, "--learning-rate", "0.5")
    assert (args.seed, args.num_envs, args.learning_rate, args.num_iterations) == (7, 32, 0.5, 10)


def test_preset_choice(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("preset: large")
    assert parse().preset == "small"
    assert parse("--preset", "large").num_envs == 4096
    assert parse("--config", config).preset == "large"
    assert parse("--config", config, "--preset", "small").preset == "small"

    def by_device(args):
        return "large" if args.device == "cuda" else "small"

    assert parse("--device", "cuda", default_preset=by_device).preset == "large"
    assert parse(default_preset=by_device).preset == "small"


def test_hyphens_underscores_equals_and_aliases():
    assert parse("--num_envs=3").num_envs == parse("--n-envs", 3).num_envs == parse("--num-envs", "3").num_envs == 3
    assert parse("--use-wandb", "--max-iterations", 5) == parse("--track", "--num_iterations", 5)
    assert parse("--seed", 2, "--seed", 3).seed == 3


def test_booleans():
    assert parse("--track").track and parse("--track=true").track and parse("--use_wandb").track
    assert not parse("--track", "--no-track").track and not parse("--no-use-wandb").track
    assert not parse("--no-anneal-lr").anneal_lr and not parse("--anneal_lr", "False").anneal_lr


def test_negative_numbers_in_tuples(tmp_path):
    assert parse("--command-vx", "-1", "2").command_vx == (-1.0, 2.0)
    assert parse("--command-vx", "-1e-3", "-.5").command_vx == (-1e-3, -0.5)
    config = tmp_path / "c.yaml"
    config.write_text("command_vx: [-3, 1]\ntrack: true\nresume: null")
    args = parse("--config", config)
    assert args.command_vx == (-3.0, 1.0) and args.track is True and args.resume is None


def test_alias_only_where_its_field_exists(capsys):
    assert "unknown flag --n-steps" in refusal(capsys, "--n-steps", 3)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--num-env", "3"], ["--num-env;", "--num-envs"]),
        (["--num-envs", "many"], ["--num-envs got 'many'", "an integer"]),
        (["--num-envs"], ["--num-envs got no value", "an integer"]),
        (["--num-envs", "1", "2"], ["--num-envs got '1 2'", "an integer"]),
        (["--command-vx", "1"], ["--command-vx got '1'", "2 numbers"]),
        (["--rewards", "nice"], ["--rewards got 'nice'", "one of reference, natural"]),
        (["--track", "perhaps"], ["--track got 'perhaps'", "true or false"]),
        (["--preset", "huge"], ["--preset got 'huge'", "auto, small, large"]),
        (["train"], ["'train'"]),
        (["--config", "absent.yaml"], ["--config got 'absent.yaml'"]),
    ],
)
def test_mistakes(capsys, argv, words):
    message = refusal(capsys, *argv)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("num_env: 3", ["'num_env'", "num_envs"]),
        ("num_envs: many", ["--num-envs in ", "c.yaml got 'many'", "an integer"]),
        ("[1, 2]", ["num_envs: 64"]),
        ("a: [", ["cannot be read"]),
    ],
)
def test_mistakes_in_the_config(capsys, tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text)
    message = refusal(capsys, "--config", tmp_path / "c.yaml")
    assert all(word in message for word in words), message


def test_unknown_flags_go_to_another_program(capsys):
    unknown = []
    words = [
        "--headless",
        "--num-envs",
        3,
        "--kit_args",
        "--ext",
        "-1",
        "2.5",
        "--viz=newton",
        "--track",
        "--no-cameras",
    ]
    args = parse(*words, "--command-vx", -1, 2, unknown=unknown)
    assert (args.num_envs, args.track, args.command_vx) == (3, True, (-1.0, 2.0))
    assert unknown == ["--headless", "--kit_args", "--ext", "-1", "2.5", "--viz=newton", "--no-cameras"]
    unknown = []
    assert parse("--use-wandb", "--no-anneal-lr", "--n-envs=5", unknown=unknown).num_envs == 5 and unknown == []
    assert "unknown flag --headless; the nearest one is" in refusal(capsys, "--headless")  # without a taker


def test_with_a_taker_for_unknown_flags_other_mistakes_are_still_told(capsys):
    for argv, words in ((["train"], "'train'"), (["--headless", "--num-envs", "many"], "--num-envs got 'many'")):
        with pytest.raises(SystemExit) as stop:
            parse(*argv, unknown=[])
        assert stop.value.code == 2 and words in capsys.readouterr().err


def test_help_shows_the_preset(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--preset", "large", "--help")
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "one sentence with exit code 2" in " ".join(out.split())
    assert re.search(r"--num-envs INT\s[^-]*default: 4096", out) and "environments in parallel" in out


def test_args_yaml_of_a_run_is_a_config(tmp_path):
    args = parse("--num-envs", 5, "--command-vx", 0, 1, "--track")
    write_args(tmp_path, args)
    again = parse("--config", tmp_path / "args.yaml")
    assert dataclasses.replace(again, config=None) == args


def test_check_and_require(capsys):
    cli.check(True, "no")
    for call in (lambda: cli.check(False, "no"), lambda: cli.require("no_such_module", "no-such-package==1.0")):
        with pytest.raises(SystemExit) as stop:
            call()
        assert stop.value.code == 2
    assert "pip install no-such-package==1.0" in capsys.readouterr().err
    assert cli.require("json", "json").dumps([]) == "[]"


def test_a_script_ends_with_code_2(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from dataclasses import dataclass\nfrom common.cli import parse_args\n"
        "@dataclass\nclass Args:\n    num_envs: int = 4\n    '''envs'''\nprint(parse_args(Args).num_envs)\n"
    )

    def run(*argv):
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
        return subprocess.run([sys.executable, script, *argv], capture_output=True, text=True, env=env)

    assert run("--num_envs", "8").stdout == "8\n"
    bad = run("--num-envs", "x")
    assert (bad.returncode, bad.stdout, bad.stderr) == (2, "", "error: --num-envs got 'x'; it takes an integer\n")
