"""Search for hyperparameters: one search space, with Weights & Biases or, offline, with Optuna.

    python benchmark/sweep.py optuna --trials 50 --storage sqlite:///runs/sweep/peginsert.db
    python benchmark/sweep.py wandb --trials 50

--config is a sweep of Weights & Biases. Optuna takes from it: `parameters` (value, values, or min and max with the
distributions of DISTRIBUTIONS), `metric`, and of `early_terminate` min_iter and eta, counted in evaluations. Every
trial is a training of `program`; what it leaves in eval/ decides whether it goes on. Processes, also on other machines,
that name one --storage and --study share the study. The best parameters so far are in best.yaml, for --config of the
script.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # it is run as a file

from common.cli import check, fail, require
from common.files import write_text
from common.provenance import ROOT

# As Weights & Biases calls them, and what Optuna's suggest_* take beside min and max.
DISTRIBUTIONS = {
    "uniform": ("float", {}),
    "log_uniform_values": ("float", {"log": True}),
    "int_uniform": ("int", {}),
}


class Crashed(Exception):
    """A training that ended without a result."""


def read_config(path: Path) -> dict:
    try:
        config = yaml.safe_load(path.read_text())
        whole = {"program", "metric", "parameters"} <= config.keys() and {"name", "goal"} <= config["metric"].keys()
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
        whole = False
    check(whole, f"--config got {str(path)!r}; it takes a sweep such as benchmark/configs/sweep_peginsert.yaml")
    return config


def suggest(trial, parameters: dict) -> dict:
    """{flag: value}; `trial` is Optuna's."""
    flags = {}
    for name, space in parameters.items():
        if "value" in space:
            flags[name] = space["value"]
        elif "values" in space:
            try:
                flags[name] = trial.suggest_categorical(name, space["values"])
            except ValueError:
                fail(f"--study names a study in which {name} had other values; name a new one")
        else:
            whole = isinstance(space["min"], int) and isinstance(space["max"], int)
            distribution = space.get("distribution", "int_uniform" if whole else "uniform")
            takes = ", ".join(DISTRIBUTIONS)
            check(distribution in DISTRIBUTIONS, f"{name} has the distribution {distribution}; Optuna takes {takes}")
            kind, more = DISTRIBUTIONS[distribution]
            flags[name] = getattr(trial, f"suggest_{kind}")(name, space["min"], space["max"], **more)
    return flags


def train(trial, config: dict, flags: dict, more: list[str], folder: Path) -> float | None:
    """The metric after a training into `folder`; None if the pruner ended it."""
    # The metric's name is the one in the logs, eval/success_rate; that in the files is without the folder.
    metric = config["metric"]["name"].rpartition("/")[2]
    literal = [word for word in config.get("command", []) if not word.startswith("${") and word != "--track"]
    command = [sys.executable, ROOT / config["program"], *literal, *(f"--{k}={v}" for k, v in flags.items()), *more]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen([*command, "--log-dir", folder], stdout=log, stderr=subprocess.STDOUT)
    reported = set()
    try:
        while True:
            ended = process.poll() is not None  # asked first, so that no file comes after the last look
            for iteration, path in evaluations(folder):
                if iteration not in reported:
                    reported.add(iteration)
                    trial.report(read_metric(path, metric), len(reported))
                    if not ended and trial.should_prune():
                        return None
            if ended:
                break
            time.sleep(0.2)
    finally:
        process.terminate()  # it saves and ends
        process.wait()
    final = folder / "eval" / "final_model.json"
    if process.returncode or not final.exists():
        raise Crashed(f"exit code {process.returncode}, {folder / 'log.txt'}")
    return read_metric(final, metric)


def read_metric(path: Path, name: str) -> float:
    found = json.loads(path.read_text())
    check(name in found, f"--config has the metric {name}, and an evaluation has {', '.join(found)}")
    return found[name]


def evaluations(folder: Path) -> list[tuple[int, Path]]:
    """[(iteration, file)] in order."""
    found = (folder / "eval").glob("model_*.json")
    return sorted((int(path.stem.removeprefix("model_")), path) for path in found)


def run_optuna(args, config: dict, more: list[str]):
    optuna = require("optuna", "optuna")
    import sqlalchemy.exc

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = args.runs.resolve() / args.study
    folder.mkdir(parents=True, exist_ok=True)
    early = config.get("early_terminate", {})
    try:
        study = optuna.create_study(
            storage=args.storage or f"sqlite:///{folder}/study.db",
            sampler=optuna.samplers.TPESampler(constant_liar=True),  # other processes' unfinished trials count as bad
            pruner=optuna.pruners.HyperbandPruner(early.get("min_iter", 1), "auto", early.get("eta", 3)),
            study_name=args.study,
            direction=config["metric"]["goal"],
            load_if_exists=True,
        )
    except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        reason = " ".join(str(error).split())
        fail(f"--storage got {args.storage!r}; it takes an SQL URL such as sqlite:///sweep.db ({reason})")
    states = optuna.trial.TrialState
    crashed = 0
    for _ in range(args.trials):
        trial = study.ask()
        state, value = states.FAIL, None
        try:
            flags = suggest(trial, config["parameters"])
            value = train(trial, config, flags, more, folder / f"trial_{trial.number}")
            state = states.PRUNED if value is None else states.COMPLETE
            print(f"trial {trial.number}: {'pruned' if value is None else f'{value:.4g}'} with {flags}", flush=True)
        except Crashed as error:
            crashed += 1
            print(f"error: trial {trial.number} crashed: {error}", file=sys.stderr, flush=True)
        finally:
            study.tell(trial, value, state=state)
        if state == states.COMPLETE:
            write_best(study, config["parameters"], more, folder / "best.yaml")
    if not study.get_trials(deepcopy=False, states=(states.COMPLETE,)):
        print(f"error: no trial was finished; their logs are in {folder}", file=sys.stderr)
        raise SystemExit(1)
    print(f"best: {study.best_value:.4g} in trial {study.best_trial.number}; {folder / 'best.yaml'} is for --config")
    raise SystemExit(1 if crashed == args.trials else 0)


def write_best(study, parameters: dict, more: list[str], path: Path):
    fixed = {name: space["value"] for name, space in parameters.items() if "value" in space}
    text = f"# trial {study.best_trial.number} of the study {study.study_name}: {study.best_value:.6g}\n"
    text += f"# beside these settings it had {shlex.join(more)}\n" if more else ""
    write_text(path, text + yaml.safe_dump(fixed | study.best_params, sort_keys=False))


def run_wandb(args, config: dict, more: list[str]):
    wandb = require("wandb", "wandb")
    command = [word for part in config["command"] for word in ([part] if part != "${args}" else [part, *more])]
    os.chdir(ROOT)  # from where `program` is found
    # `${interpreter}` is the first Python of the path.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    try:
        sweep = wandb.sweep(config | {"command": command}, project=args.wandb_project, entity=args.wandb_entity)
        print(f"on other machines, from this repository's folder: wandb agent {args.wandb_project}/{sweep}", flush=True)
        wandb.agent(sweep, project=args.wandb_project, entity=args.wandb_entity, count=args.trials)
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split())
        fail(f"no sweep on Weights & Biases ({reason}); run `wandb login`, or search offline with optuna")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("engine", choices=("wandb", "optuna"))
    parser.add_argument("--config", type=Path, default=ROOT / "benchmark" / "configs" / "sweep_peginsert.yaml")
    parser.add_argument("--trials", type=int, default=30, help="trainings that this process starts")
    parser.add_argument("--study", default="peginsert", help="Optuna's name for the search")
    parser.add_argument("--storage", default="", help="SQL URL of the study; default: study.db in its folder")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "sweep", help="folder of the studies' folders")
    parser.add_argument("--wandb-project", default="cleanrl-robots")
    parser.add_argument("--wandb-entity")
    args, more = parser.parse_known_args(argv)
    check(args.trials > 0, f"--trials got {args.trials}; it takes a number above 0")
    try:
        {"wandb": run_wandb, "optuna": run_optuna}[args.engine](args, read_config(args.config), more)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on with the study", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
