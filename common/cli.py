"""The command line of every script: a dataclass read by tyro, with presets, YAML files, aliases and ranges."""

import contextlib
import dataclasses
import difflib
import importlib
import io
import os
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
    "num_parallel_envs": "num_envs",
    "n_steps": "num_steps",
    "n_episodes": "eval_episodes",
    "checkpoint_freq": "checkpoint_interval",
    "agents": "num_agents",
    "envs_per_agent": "num_envs",
    "task_name": "env_id",
    "clip_param": "clip_coef",
    "entropy_coef": "ent_coef",
}
ABOVE_0 = ("num_envs", "num_steps", "num_minibatches", "update_epochs", "learning_rate", "clip_coef", "max_grad_norm")
ABOVE_0 += ("init_std", "min_std", "history", "lstm_size", "ranks", "log_interval", "checkpoint_interval")
ABOVE_0 += ("video_interval", "eval_episodes", "chunk_size", "embedding", "residual_std")
FROM_0 = ("num_iterations", "total_timesteps", "desired_kl", "final_kl", "target_kl", "vf_coef", "ent_coef")
FROM_0 += ("eval_interval", "critic_iterations", "micro_batch_size")
# Of the flags that mean the same in every script: what they take, in words and as a condition. NaN is never in range.
RANGES = (
    (ABOVE_0, "a number above 0", lambda value: value > 0),
    (FROM_0, "0 or a number above it", lambda value: value >= 0),
    (("seed",), "0 or a number above it, below 2**32", lambda value: 0 <= value < 2**32),
    (("gamma", "final_gamma"), "a number from 0 to below 1", lambda value: 0 <= value < 1),
    (("gae_lambda",), "a number from 0 to 1", lambda value: 0 <= value <= 1),
    (("hidden", "critic_hidden"), "numbers above 0", lambda value: min(value, default=0) > 0),
)
ALGORITHMS = ("ppo", "sac", "ddpg")  # sections of a YAML file that only the scripts of that algorithm read
RUN_INFO = "run_info"  # key under which `args.yaml` holds commit, versions and hardware, which are no settings


@dataclasses.dataclass
class RunArgs:
    """The flags that are the same in every script."""

    config: str = ""  # YAML file of flags, below the command line in precedence
    exp_name: str = "experiment"  # name of the experiment
    seed: int = 1  # seed of everything random
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: cuda where there is one
    log_dir: str = ""  # where the run goes; empty: runs/{exp_name}/{env}__{seed}__{time}
    track: bool = False  # log to Weights & Biases
    wandb_project: str = "cleanrl-robots"  # Weights & Biases project
    wandb_entity: str = ""  # Weights & Biases entity (team)
    wandb_group: str = ""  # Weights & Biases group
    capture_video: bool = False  # record the deterministic policy while training
    video_interval: int = 200  # iterations between those videos
    log_interval: int = 10  # iterations between log lines
    checkpoint_interval: int = 50  # iterations between checkpoints
    eval_interval: int = 0  # iterations between evaluations of the deterministic policy (0: at the end only)
    resume: str = ""  # run folder or checkpoint to continue
    eval_only: bool = False  # evaluate --model-path and stop
    model_path: str = ""  # checkpoint for --eval-only; in training the policy to begin with
    eval_episodes: int = 128  # fewest episodes of an evaluation
    save_video: bool = True  # write an mp4 at the final evaluation


def fail(message: str) -> typing.NoReturn:
    """Print one sentence on stderr (not one per rank) and exit with code 2."""
    if _is_rank_0():
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def check(condition: bool, message: str) -> None:
    """`fail(message)` unless `condition` holds."""
    if not condition:
        fail(message)


def check_flag(args, condition: bool, name: str, takes: str) -> None:
    """Unless `condition` holds, one sentence that names the flag of `args.name`, what it got, and what it `takes`."""
    check(condition, f"{_flag(name)} got {getattr(args, name)}; it takes {takes}")


def check_ranges(args) -> None:
    """The RANGES of the flags that `args` has; its `device` and `ranks` are those of the run, no longer auto or 0."""
    for names, takes, holds in RANGES:
        for name in names:
            if hasattr(args, name):
                check_flag(args, holds(getattr(args, name)), name, takes)
    if hasattr(args, "total_timesteps"):
        endless = args.num_iterations == args.total_timesteps == 0
        check(not endless, "--num-iterations and --total-timesteps got 0; one of them takes a number above 0")
    if hasattr(args, "ranks"):
        several = args.device == "cpu" or "WORLD_SIZE" in os.environ
        check_flag(args, several or args.ranks == 1, "ranks", "more than 1 only on a CPU or under torchrun")
        check_flag(args, args.num_envs % args.ranks == 0, "num_envs", f"a multiple of the {args.ranks} ranks")
    if hasattr(args, "num_minibatches"):
        rows, what = args.num_envs // args.ranks, "environments"  # an LSTM's sequences are shuffled whole
        if not getattr(args, "lstm", False):
            rows, what = rows * args.num_steps, "samples per iteration"
        fits = rows % args.num_minibatches == 0
        check_flag(args, fits, "num_minibatches", f"a divisor of the {rows} {what} per rank")


def check_image_size(args) -> None:
    """Three convolutions as in Mnih et al. 2015 (8 by 8 with stride 4, 4 with 2, 3 with 1) leave nothing below 36."""
    for name in ("image_size", "image_height", "image_width"):
        if hasattr(args, name):
            check_flag(args, getattr(args, name) >= 36, name, "36 or more, for the three convolutions")


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

    Of num_iterations and total_timesteps that counts which the highest of those layers names; the other becomes 0.
    Any mistake of the user ends the process with exit code 2 and a message that names the flag.
    """
    argv = sys.argv[1:] if argv is None else argv
    hints = typing.get_type_hints(Args)
    hints = {field.name: hints[field.name] for field in dataclasses.fields(Args) if field.init}
    aliases = {name: field for name, field in aliases.items() if field in hints and name not in hints}
    help_words = [word for word in argv if word in ("-h", "--help")]
    from_line = _read_flags([word for word in argv if word not in help_words], hints, aliases, unknown)

    def parse(flags: dict[str, list[str]], default, more=()):
        words = [*sum(flags.values(), []), *more]
        description = sys.modules[Args.__module__].__doc__
        with contextlib.nullcontext() if _is_rank_0() else contextlib.redirect_stderr(io.StringIO()):
            return tyro.cli(Args, args=words, default=default, description=description, console_outputs=_is_rank_0())

    args = parse(from_line, Args())
    from_file = {}
    if saved is None and getattr(args, "config", ""):
        algorithm = Args().exp_name.partition("_")[0] if "exp_name" in hints else ""
        from_file = _read_flags(_read_yaml(args.config, algorithm), hints, aliases, where=f" in {args.config}")
        try:
            parse(from_file, Args())
        except SystemExit:
            fail(f"--config got {args.config!r}, where this mistake is")
        args = parse(from_file | from_line, Args())

    base = saved or {}
    if saved is None and presets:
        name = default_preset if args.preset == "auto" else args.preset
        name = name(args) if callable(name) else name
        base = presets[name] | {"preset": name} if name else {}
    default = dataclasses.replace(Args(), **{name: value for name, value in base.items() if name in hints})
    args = parse(from_file | from_line, default, help_words)
    if "preset" in hints:
        args.preset = default.preset
    if "total_timesteps" in hints:
        _choose_length(args, (from_line, from_file, base))
    return args


def _choose_length(args, layers: tuple[dict, ...]) -> None:
    """Of num_iterations and total_timesteps the first layer that names one above 0 decides; the other becomes 0."""
    for layer in layers:
        named = [name for name in ("num_iterations", "total_timesteps") if name in layer and getattr(args, name) > 0]
        check(len(named) < 2, "--num-iterations and --total-timesteps are both above 0; give one of them")
        if named:
            other = "total_timesteps" if named == ["num_iterations"] else "num_iterations"
            setattr(args, other, min(0, getattr(args, other)))  # a negative number stays, to be refused
            return


def _read_flags(argv: list[str], hints: dict, aliases: dict, unknown=None, where: str = "") -> dict[str, list[str]]:
    """{field: the words that tyro reads for it}, the last ones where it is named twice; under "" words of no flag.

    Flags that are no fields go to `unknown`, with their values; those much like one are mistakes, as all are if it is
    None. `where` tells the user where the words stand.
    """
    words = []
    flags = {"": words}
    for word in argv:
        if not word.startswith("--"):
            words.append(word)
            continue
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_")
        field = aliases.get(name, name)
        positive = name.removeprefix("no_")
        positive = aliases.get(positive, positive)
        if field in hints:
            words = flags[field] = [_flag(field) + equals + value]
        elif name.startswith("no_") and hints.get(positive) is bool:
            words = flags[positive] = [_flag("no_" + positive) + equals + value]
        elif unknown is None or difflib.get_close_matches(name, [*hints, *aliases], cutoff=0.85):
            similar = _flag(nearest(name, [*hints, *aliases]))
            fail(f"unknown flag {flag}{where}; the nearest one is {similar}, and --help lists all")
        else:
            words = unknown
            words.append(word)
    switches = {"true": "--", "1": "--", "false": "--no-", "0": "--no-"}
    for field, words in flags.items():
        flag, _, value = "=".join(words).partition("=")
        if hints.get(field) is bool and value.lower() in switches:  # --track true, --track=0
            flags[field] = [switches[value.lower()] + flag[2:]]
    return flags


def _read_yaml(path: str, algorithm: str = "") -> list[str]:
    """The words of a command line for a YAML mapping such as `args.yaml` of an earlier run.

    A value that is a mapping is a section of settings, whatever its name, but one of ALGORITHMS is left out unless it
    is the script's own `algorithm`, if that is one of them. null stands for the default.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        fail(f"--config got {path!r}, which cannot be read as YAML ({' '.join(str(error).split())})")
    check(isinstance(settings, dict), f"--config got {path!r}; it takes a YAML file of lines such as `num_envs: 64`")
    settings.pop(RUN_INFO, None)
    if algorithm in ALGORITHMS:
        settings = {key: value for key, value in settings.items() if key == algorithm or key not in ALGORITHMS}
    flat = {}
    for key, value in settings.items():
        flat |= value if isinstance(value, dict) else {key: value}
    words = []
    for key, value in flat.items():
        if isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        elif value is not None:
            words.append(f"--{key}={value}")
    return words


def nearest(name: str, names: typing.Iterable[str]) -> str:
    """The most similar of `names`, of which there must be one."""
    return difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)[0]


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def _is_rank_0() -> bool:
    return os.environ.get("RANK", "0") == "0"
