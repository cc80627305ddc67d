"""The command line: precedence, aliases, ranges, and a message with exit code 2 for every mistake of a user."""

import dataclasses
import importlib
import math
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

    preset: Literal["auto", "small", "large"] = "auto"  # which preset is on
    config: str | None = None  # a YAML file
    seed: int = 1  # seed of everything
    device: str = "cpu"  # where to train
    num_envs: int = 4  # environments in parallel
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
    total_timesteps: int = 0
    """environment steps"""
    env_id: str = "Go2-v0"
    """task"""
    resume: str | None = None
    """checkpoint"""


PRESETS = {"small": {"num_envs": 16, "seed": 7, "rewards": "reference"}, "large": {"num_envs": 4096}}
PRESETS["large"] |= {"num_iterations": 0, "total_timesteps": 900}


def parse(*argv, **kwargs):
    return cli.parse_args(Args, PRESETS, kwargs.pop("default_preset", "small"), argv=[str(a) for a in argv], **kwargs)


def refusal(capsys, *argv, **kwargs) -> str:
    """The one line on stderr of a command line that must be refused."""
    err = complaint(capsys, *argv, **kwargs)
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def complaint(capsys, *argv, **kwargs) -> str:
    """What a command line that must be refused puts on stderr, by us or by tyro."""
    with pytest.raises(SystemExit) as stop:
        parse(*argv, **kwargs)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and "Traceback" not in err, (out, err)
    return err


def text(box: str) -> str:
    """What tyro says, without the lines that it draws round it."""
    return " ".join(re.sub("[│─╭╮╰╯]", " ", box).split())


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
        (["--no-trac"], ["--no-trac;", "--track"]),
        (["--config", "absent.yaml"], ["--config got 'absent.yaml'"]),
    ],
)
def test_mistakes(capsys, argv, words):
    message = refusal(capsys, *argv)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--num-envs", "many"], ["--num-envs", "'many'"]),
        (["--num-envs=many"], ["--num-envs", "'many'"]),
        (["--num-envs"], ["--num-envs", "Expected 1 value"]),
        (["--num-envs", "1", "2"], ["options: 2"]),
        (["--command-vx", "1"], ["--command-vx", "Expected 2 values"]),
        (["--rewards", "nice"], ["--rewards", "'nice'", "'reference', 'natural'"]),
        (["--track", "perhaps"], ["options: perhaps"]),
        (["--preset", "huge"], ["--preset", "'huge'", "'auto', 'small', 'large'"]),
        (["train"], ["options: train"]),
    ],
)
def test_mistakes_of_syntax(capsys, argv, words):
    message = text(complaint(capsys, *argv))
    assert all(word in message for word in words), message


def test_only_rank_0_complains(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert complaint(capsys, "--num-envs", "many") == complaint(capsys, "--num-env", "3") == ""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("num_env: 3", ["--num_env in", "c.yaml", "--num-envs"]),
        ("ppo:\n  num_env: 3", ["--num_env in", "c.yaml", "--num-envs"]),
        ("1: 2", ["--1 in", "c.yaml"]),
        ("[1, 2]", ["num_envs: 64"]),
        ("a: [", ["cannot be read"]),
    ],
)
def test_mistakes_in_the_config(capsys, tmp_path, content, words):
    (tmp_path / "c.yaml").write_text(content)
    message = refusal(capsys, "--config", tmp_path / "c.yaml")
    assert all(word in message for word in words), message


@pytest.mark.parametrize("content", ["num_envs: many", "num_envs: [1, 2]", "ppo: {learning_rate: {of: adam}}"])
def test_a_value_of_the_config_is_checked_and_the_file_is_named(capsys, tmp_path, content):
    (tmp_path / "c.yaml").write_text(content)
    *_, last = complaint(capsys, "--num-envs", 3, "--config", tmp_path / "c.yaml").splitlines()
    assert last.startswith("error: --config got ") and "c.yaml" in last


def test_sections_and_names_of_other_programs(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(
        "task_name: Peg-v0\nenvironment:\n  num_parallel_envs: 6\n  command_vx: [0, 1]\n"
        "logging: {use_wandb: true, wandb_entity: null}\nppo:\n  learning_rate: 2e-4\nrun_info: {commit: abc}\n"
    )

    @dataclass
    class More(Args):
        wandb_entity: str = ""
        clip_coef: float = 0.2
        ent_coef: float = 0.0

    args = cli.parse_args(More, argv=["--config", str(config), "--clip-param", "0.3", "--entropy_coef=0.1"])
    assert (args.env_id, args.num_envs, args.command_vx, args.track) == ("Peg-v0", 6, (0.0, 1.0), True)
    assert (args.learning_rate, args.wandb_entity, args.clip_coef, args.ent_coef) == (2e-4, "", 0.3, 0.1)


def test_a_section_of_another_algorithm_is_left_out(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("num_envs: 6\nsac:\n  learning_rate: 2e-4\n  tau: 0.1\nppo:\n  learning_rate: 3e-4\n")

    @dataclass
    class Ppo(Args):
        exp_name: str = "ppo_something"

    args = cli.parse_args(Ppo, argv=["--config", str(config)])
    assert (args.num_envs, args.learning_rate) == (6, 3e-4)
    with pytest.raises(SystemExit):  # of a script of no such algorithm every section is read, and tau is unknown
        cli.parse_args(Args, argv=["--config", str(config)])


def length(*argv, **kwargs):
    args = parse(*argv, **kwargs)
    return args.num_iterations, args.total_timesteps


def test_the_highest_layer_decides_how_long_a_run_is(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("total_timesteps: 500")
    assert length() == (10, 0) and length("--preset", "large") == (0, 900)
    assert length("--config", config) == length("--config", config, "--preset", "large") == (0, 500)
    assert length("--config", config, "--max-iterations", 3) == (3, 0)
    assert length("--preset", "large", "--num-iterations", 3) == (3, 0)
    assert length("--total-timesteps", 70) == length("--total-timesteps", 70, "--num-iterations", 0) == (0, 70)
    assert length("--preset", "large", "--total-timesteps", 0) == (0, 0)
    assert length("--preset", "large", "--num-iterations", -3) == (-3, 900), "for check_ranges to refuse"


def test_a_resumed_run_is_as_long_as_the_command_line_says(capsys):
    by_steps = {"num_iterations": 0, "total_timesteps": 800}
    by_iterations = {"num_iterations": 20, "total_timesteps": 0}
    assert length(saved=by_steps) == (0, 800) and length(saved=by_iterations) == (20, 0)
    assert length("--num-iterations", 30, saved=by_steps) == length("--num-iterations", 30, saved=by_iterations)
    assert length("--num-iterations", 30, saved=by_steps) == (30, 0)
    assert length("--total-timesteps", 900, saved=by_iterations) == (0, 900)
    both = refusal(capsys, "--num-iterations", 3, "--total-timesteps", 4)
    assert "--num-iterations and --total-timesteps" in both


def test_saved_settings_stand_in_for_preset_and_file(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("seed: 9")
    saved = {"preset": "large", "seed": 5, "num_envs": 32, "gone": 1}
    args = parse("--preset", "small", "--config", config, "--num-envs", 2, saved=saved)
    assert (args.preset, args.seed, args.num_envs, args.rewards) == ("large", 5, 2, "natural")


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
    assert "options: train" in complaint(capsys, "train", unknown=[])
    assert "options: 2" in complaint(capsys, "--headless", "--num-envs", 1, 2, unknown=[])
    assert "'many'" in complaint(capsys, "--headless", "--num-envs", "many", unknown=[])
    near = refusal(capsys, "--headless", "--num-env", 16, unknown=[])
    assert "unknown flag --num-env; the nearest one is --num-envs" in near


def test_help_shows_the_preset(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--preset", "large", "--help")
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "a message with exit code 2" in " ".join(out.split())
    assert re.search(r"--num-envs INT\s[^-]*default: 4096", out) and "environments in parallel" in out
    assert "linear schedule" in out  # a docstring; the other help is a comment behind its field


def test_the_flags_of_every_script_have_help(capsys):
    @dataclass
    class Script(cli.RunArgs):
        num_envs: int = 4  # parallel environments

    with pytest.raises(SystemExit):
        cli.parse_args(Script, argv=["--help"])
    out = text(capsys.readouterr().out)
    source = Path(cli.__file__).read_text().partition("class RunArgs")[2].partition("\ndef ")[0]
    helps = re.findall(r"\n    (\w+): \w+ = [^#\n]+  # (.+)", source)
    assert len(helps) == len(dataclasses.fields(cli.RunArgs))
    missing = [name for name, words in [*helps, ("num_envs", "parallel environments")] if f"{words} (" not in out]
    assert not missing and "commands" not in out


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


@dataclass
class Ranges(Args):
    ranks: int = 1
    gamma: float = 0.99
    gae_lambda: float = 1.0
    target_kl: float = 0.0
    max_grad_norm: float = math.inf
    hidden: tuple[int, ...] = (64,)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_envs": 0}, "--num-envs got 0; it takes a number above 0"),
        ({"learning_rate": math.nan}, "--learning-rate got nan; it takes a number above 0"),
        ({"target_kl": -0.1}, "--target-kl got -0.1; it takes 0 or a number above it"),
        ({"target_kl": math.nan}, "--target-kl got nan; it takes 0 or a number above it"),
        ({"gamma": 1.0}, "--gamma got 1.0; it takes a number from 0 to below 1"),
        ({"gamma": math.nan}, "--gamma got nan; it takes a number from 0 to below 1"),
        ({"gae_lambda": 1.1}, "--gae-lambda got 1.1; it takes a number from 0 to 1"),
        ({"hidden": (64, 0)}, "--hidden got (64, 0); it takes numbers above 0"),
        ({"hidden": ()}, "--hidden got (); it takes numbers above 0"),
        ({"num_iterations": 0}, "--num-iterations and --total-timesteps got 0; one of them takes a number above 0"),
        ({"num_iterations": -3}, "--num-iterations got -3; it takes 0 or a number above it"),
        ({"ranks": 0}, "--ranks got 0; it takes a number above 0"),
        ({"ranks": 3}, "--num-envs got 4; it takes a multiple of the 3 ranks"),
        ({"ranks": 2, "device": "cuda"}, "--ranks got 2; it takes more than 1 only on a CPU or under torchrun"),
    ],
)
def test_ranges(capsys, monkeypatch, changes, sentence):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    cli.check_ranges(Ranges())
    cli.check_ranges(Ranges(ranks=2))
    cli.check_ranges(Args())  # which lacks most of them
    with pytest.raises(SystemExit) as stop:
        cli.check_ranges(Ranges(**changes))
    assert stop.value.code == 2 and capsys.readouterr().err == f"error: {sentence}\n"


def test_torchrun_may_have_several_ranks_on_gpus(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    cli.check_ranges(Ranges(ranks=2, device="cuda"))


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
    assert (bad.returncode, bad.stdout) == (2, "") and "Traceback" not in bad.stderr
    assert "--num-envs" in bad.stderr and "'x'" in bad.stderr


@pytest.mark.parametrize("name", ["sac_real2sim_mjx", "ddpg_real2sim_mjx", "ppo_real2sim_mjx"])
def test_one_file_configures_three_algorithms(name):
    script = importlib.import_module(name)
    path = Path(__file__).parents[1] / "benchmark" / "configs" / "real2sim.yaml"
    args = cli.parse_args(script.Args, script.PRESETS, "laptop", argv=["--config", str(path)])
    assert (args.env_id, args.observation, args.max_episode_steps) == ("Real2Sim-v0", "full", 200)
    own = (args.num_envs, args.gamma)
    sections = {"ppo_real2sim_mjx": (512, 0.9), "sac_real2sim_mjx": (64, 0.9), "ddpg_real2sim_mjx": (64, 0.97)}
    assert own == sections[name], "the section of its own algorithm"
