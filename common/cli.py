"""The command line of every script: a dataclass read by tyro, presets, YAML files, aliases, one-sentence errors."""

import contextlib
import dataclasses
import difflib
import importlib
import io
import os
import re
import shutil
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path

import tyro
import yaml

# Names used elsewhere for the same setting; one applies where the script has the field on the right but not the left.
ALIASES = {
    "use_wandb": "track",
    "max_iterations": "num_iterations",
    "n_envs": "num_envs",
    "n_steps": "num_steps",
    "n_episodes": "eval_episodes",
    "checkpoint_freq": "checkpoint_interval",
    "agents": "num_agents",
    "envs_per_agent": "num_envs_per_agent",
}
RUN_INFO = "run_info"  # key under which `args.yaml` holds commit, versions and hardware, which are no settings


@dataclasses.dataclass
class RunArgs:
    """The flags that are the same in every script."""

    config: str = ""
    """YAML file of flags, below the command line in precedence"""
    exp_name: str = "experiment"
    """name of the experiment"""
    seed: int = 1
    """seed of everything random"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda where there is one"""
    log_dir: str = ""
    """where the run goes; empty: runs/{exp_name}/{env}__{seed}__{time}"""
    track: bool = False
    """log to Weights & Biases"""
    wandb_project: str = "cleanrl-robots"
    """Weights & Biases project"""
    wandb_entity: str = ""
    """Weights & Biases entity (team)"""
    wandb_group: str = ""
    """Weights & Biases group"""
    capture_video: bool = False
    """record the deterministic policy while training"""
    video_interval: int = 200
    """iterations between those videos"""
    log_interval: int = 10
    """iterations between log lines"""
    checkpoint_interval: int = 50
    """iterations between checkpoints"""
    eval_interval: int = 0
    """iterations between evaluations of the deterministic policy (0: at the end only)"""
    resume: str = ""
    """run folder or checkpoint to continue"""
    eval_only: bool = False
    """evaluate --model-path and stop"""
    model_path: str = ""
    """checkpoint for --eval-only"""
    eval_episodes: int = 128
    """fewest episodes of an evaluation; they are spread evenly over a grid of commands"""
    save_video: bool = True
    """write an mp4 at the final evaluation"""


def fail(message: str) -> typing.NoReturn:
    """Print one sentence on stderr (not one per rank) and exit with code 2."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def check(condition: bool, message: str) -> None:
    """`fail(message)` unless `condition` holds."""
    if not condition:
        fail(message)


def check_flag(args, condition: bool, name: str, takes: str) -> None:
    """Unless `condition` holds, one sentence that names the flag of `args.name`, what it got, and what it `takes`."""
    check(condition, f"{_flag(name)} got {getattr(args, name)}; it takes {takes}")


def check_compiler(args) -> None:
    """`args.compile` on a CPU needs the C++ compiler that torch calls."""
    compiler = os.environ.get("CXX", "g++")
    missing = args.compile and args.device == "cpu" and not shutil.which(compiler)
    check(not missing, f"--compile needs a C++ compiler; there is no {compiler}; install g++ or name one in CXX")


def require(module: str, package: str) -> types.ModuleType:
    """Import `module`, or fail with the command that installs `package`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        fail(f"{module} cannot be imported ({error}); install it with: pip install {package}")


def parse_args(
    Args: type,
    presets: dict[str, dict] | None = None,
    default_preset: str | Callable[[typing.Any], str] = "",
    aliases: dict[str, str] = ALIASES,
    saved: dict | None = None,
    argv: list[str] | None = None,
    unknown: list[str] | None = None,
):
    """Read `Args` from its defaults, then a preset, then `--config FILE.yaml`, then the command line (the last wins).

    Args: a dataclass; each field is a flag. Its field `preset`, if any, comes back holding the name of the preset used.
    presets: {name: {field: value}}. `--preset auto`, or none, takes `default_preset`.
    default_preset: a name, or a function of the args without a preset, which may look at `args.device`.
    saved: settings of an earlier run, which then stand in for preset and file; the command line still wins.
    argv: the words of the command line, by default those of the process.
    unknown: takes the flags that `Args` lacks, and their values, for another program; None: they are mistakes.

    Any mistake of the user ends the process with exit code 2 and one sentence that names the flag.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    hints = typing.get_type_hints(Args)
    hints = {field.name: hints[field.name] for field in dataclasses.fields(Args) if field.init}
    aliases = {name: field for name, field in aliases.items() if field in hints and name not in hints}
    help_wanted = any(word in ("-h", "--help") for word in argv)
    given = _read_flags([word for word in argv if word not in ("-h", "--help")], hints, aliases, unknown)
    source = dict.fromkeys(given, "")
    if "config" in hints and given.get("config") and saved is None:
        path = given["config"][0]
        from_file = _read_yaml(path, hints, aliases)
        source = dict.fromkeys(from_file, f" in {path}") | source
        given = from_file | given

    default = Args()
    if saved is not None:
        given.pop("preset", None)
        default = dataclasses.replace(default, **{name: value for name, value in saved.items() if name in hints})
    elif presets and "preset" in hints:
        name = " ".join(given.pop("preset", ["auto"]))
        if name == "auto":
            name = default_preset
            if callable(default_preset):
                name = default_preset(_parse(Args, default, given, hints, source))
        takes = ", ".join(["auto", *presets])
        check(not name or name in presets, f"--preset{source.get('preset', '')} got {name!r}; it takes one of {takes}")
        if name:
            default = dataclasses.replace(default, **presets[name], preset=name)
    args = _parse(Args, default, given, hints, source)
    if help_wanted:
        tyro.cli(Args, args=["--help"], default=args, description=sys.modules[Args.__module__].__doc__)
    return args


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def nearest(name: str, names: typing.Iterable[str]) -> str:
    """The most similar of `names`, of which there must be one."""
    return difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)[0]


def _read_flags(argv: list[str], hints: dict, aliases: dict, unknown: list[str] | None = None) -> dict[str, list[str]]:
    """{field: its values as text} from a command line such as `--num_envs=4 --command-vx -1 2 --no-track`."""
    given, field, foreign = {}, None, False
    for word in argv:
        if not re.match(r"--?[a-zA-Z]", word) or re.fullmatch(r"-(inf|nan)", word, re.IGNORECASE):
            if foreign:
                unknown.append(word)
                continue
            check(
                field is not None,
                f"got {word!r} on its own; every setting is a flag such as {_flag(next(iter(hints)))}",
            )
            given[field].append(word)
            continue
        flag, equals, value = word.partition("=")
        name = flag.lstrip("-").replace("-", "_")
        field, values = aliases.get(name, name), [value] if equals else []
        if name.startswith("no_") and name not in hints:
            positive = aliases.get(name[3:], name[3:])
            if hints.get(positive) is bool and not equals:
                field, values = positive, ["false"]
        foreign = field not in hints and unknown is not None
        if foreign:
            unknown.append(word)
            continue
        if field not in hints:
            similar = _flag(nearest(name, [*hints, *aliases]))
            fail(f"unknown flag {flag}; the nearest one is {similar}, and --help lists all")
        given[field] = values
    return given


def _read_yaml(path: str, hints: dict, aliases: dict) -> dict[str, list[str]]:
    """{field: its values as text} from a flat YAML mapping; `args.yaml` of an earlier run is one."""
    try:
        settings = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        fail(f"--config got {path!r}, which cannot be read as YAML ({' '.join(str(error).split())})")
    check(isinstance(settings, dict), f"--config got {path!r}; it takes a YAML file of lines such as `num_envs: 64`")
    given = {}
    for key, value in settings.items():
        if key == RUN_INFO:
            continue
        name = str(key).replace("-", "_")
        field = aliases.get(name, name)
        if field not in hints:
            fail(f"--config got {path!r} with the unknown key {key!r}; the nearest valid key is {nearest(name, hints)}")
        given[field] = [str(v) for v in value] if isinstance(value, list) else [str(value)]
    return given


def _words(field: str, values: list[str], hint) -> list[str]:
    """The words tyro reads for one field; booleans become `--track` or `--no-track`."""
    if hint is not bool:
        return [_flag(field), *values]
    yes = {(): True, ("true",): True, ("1",): True, ("false",): False, ("0",): False}
    value = yes.get(tuple(v.lower() for v in values))
    return [_flag(field), *values] if value is None else [_flag(field) if value else "--no-" + field.replace("_", "-")]


def _parse(Args: type, default, given: dict, hints: dict, source: dict):
    def read(words: list[str]):
        """The args, or None where tyro refuses, without the boxes in which it explains itself."""
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                return tyro.cli(Args, args=words, default=default, console_outputs=False)
        except SystemExit:
            return None

    words = {field: _words(field, values, hints[field]) for field, values in given.items()}
    args = read(sum(words.values(), []))
    if args is not None:
        return args
    for field, values in given.items():
        if read(words[field]) is None:
            got = repr(" ".join(values)) if values else "no value"
            fail(f"{_flag(field)}{source.get(field, '')} got {got}; it takes {_takes(hints[field])}")
    fail(f"cannot read the command line: {' '.join(sum(words.values(), []))}")


def _takes(hint) -> str:
    """A type in words: `tuple[float, float]` is "2 numbers"."""
    names = {
        int: "an integer",
        float: "a number",
        str: "text",
        bool: "true or false",
        Path: "a path",
        type(None): "None",
    }
    plurals = {int: "integers", float: "numbers", str: "words"}
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind is typing.Literal:
        return "one of " + ", ".join(str(value) for value in inner)
    if kind in (typing.Union, types.UnionType):
        return " or ".join(_takes(option) for option in inner)
    if kind is tuple and inner[-1] is not ...:
        return f"{len(inner)} {plurals.get(inner[0], 'values')}"
    if kind in (tuple, list):
        return plurals.get(inner[0], "values")
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def check_ranges(args):
    pass


def check_minibatches(args, per_rank, what):
    pass
