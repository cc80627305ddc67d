"""The sweep of benchmark/: one space for both engines, pruning, crashes, a shared study; and its other configs."""

import json
import os
import signal
import subprocess
import sys
import time

import optuna
import pytest
import wandb
import yaml
from harness import ROOT, SCRIPTS
from helpers import check_sentence, finish, wait_for

from common import checkpoint, cli

sys.path.insert(0, str(ROOT / "benchmark"))

import sweep

SCRIPT = SCRIPTS["ppo_multimodal_peginsert"]
CONFIGS = ROOT / "benchmark" / "configs"
TINY = ["--num-envs", 4, "--num-steps", 16, "--update-epochs", 1, "--num-minibatches", 2, "--max-episode-steps", 10]
TINY += ["--eval-episodes", 4, "--difficulty", 0, "--device", "cpu", "--no-save-video", "--no-capture-video"]
TINY += ["--observation", "state"]
STATES = optuna.trial.TrialState
# A stand-in for a training: nine evaluations of a value that the environment gives for the trial's number.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
flags = dict(word[2:].split("=") for word in sys.argv[1:] if "=" in word)
folder = Path(sys.argv[sys.argv.index("--log-dir") + 1])
value = json.loads(os.environ["VALUES"])[int(folder.name.removeprefix("trial_"))]
if value is None:
    sys.exit("it broke")
def write(name):
    (folder / "eval").mkdir(exist_ok=True)
    (folder / "eval" / "new").write_text(json.dumps({"success_rate": value}))
    (folder / "eval" / "new").rename(folder / "eval" / name)
def stop(*_):
    (folder / "stopped").touch()
    sys.exit()
signal.signal(signal.SIGTERM, stop)
for i in range(1, 10):
    write(f"model_{5 * i}.json")
    time.sleep(float(os.environ.get("PAUSE", 0)))
write("final_model.json")
"""


def shell(name, *argv, environment=None):
    """A finished run of a shell script: (stdout, stderr)."""
    command = [str(word) for word in (ROOT / "benchmark" / name, *argv)]
    more = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"} | (environment or {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    return finish(subprocess.Popen(command, env=os.environ | more, start_new_session=True, **pipes))


def parse(*argv):
    args = cli.parse_args(SCRIPT.ppo.Args, SCRIPT.ppo.PRESETS, "laptop", argv=[str(word) for word in argv])
    args.device, args.ranks = "cpu", 1
    SCRIPT.ppo.check_args(args)
    return args


@pytest.fixture
def stand_in(tmp_path):
    """A config whose trainings take a moment; its values are by trial."""
    (tmp_path / "train.py").write_text(STAND_IN)
    config = {"program": str(tmp_path / "train.py"), "metric": {"name": "eval/success_rate", "goal": "maximize"}}
    config |= {"early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 3}}
    config |= {"parameters": {"gamma": {"min": 0.9, "max": 0.99}, "seed": {"value": 4}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def search(folder, trials, *argv, code=0):
    flags = ["--config", folder / "config.yaml", "--runs", folder / "runs", "--study", "s", "--trials", trials, *argv]
    with pytest.raises(SystemExit) as end:
        sweep.main(["optuna", *map(str, flags)])
    assert end.value.code == code


def load(folder, url=None):
    return optuna.load_study(study_name="s", storage=url or f"sqlite:///{folder}/runs/s/study.db")


# --- configs


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*peginsert*.yaml")), ids=lambda path: path.name)
def test_the_script_takes_every_config(path):
    if path.name.startswith("sweep_"):
        config = sweep.read_config(path)
        assert config["program"] == SCRIPT.path.name
        for name, space in config["parameters"].items():
            ends = [space["value"]] if "value" in space else space.get("values") or [space["min"], space["max"]]
            for value in ends:
                args = parse(f"--{name}={value}")
                assert getattr(args, name) == value
        literal = [word for word in config["command"] if not word.startswith("${")]
        assert parse(*literal).eval_interval > 0 and parse(*literal).track
    else:
        settings = {k: v for section in yaml.safe_load(path.read_text()).values() for k, v in section.items()}
        args = parse("--config", path)
        for name, value in settings.items():
            value = tuple(value) if isinstance(value, list) else value
            assert getattr(args, name if hasattr(args, name) else cli.ALIASES[name]) == value, name


def test_the_config_learns_as_the_preset_does():
    algorithm = yaml.safe_load((CONFIGS / "peginsert.yaml").read_text())["ppo"]
    config, preset = parse("--config", CONFIGS / "peginsert.yaml"), parse("--preset", "multimodal")
    for name in [cli.ALIASES.get(name, name) for name in algorithm] + ["num_envs", "observation", "modalities"]:
        assert getattr(config, name) == getattr(preset, name), name


def test_the_names_of_other_programs(tmp_path):
    names = {"environment": {"task_name": "PegInsert-v0", "num_agents": 3, "max_episode_steps": 99}}
    names |= {"logging": {"use_wandb": True}, "ppo": {"clip_param": 0.3, "entropy_coef": 0.1, "desired_kl": 0.5}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(names))
    args = parse("--config", tmp_path / "a.yaml")
    assert (args.env_id, args.num_agents, args.max_episode_steps) == ("PegInsert-v0", 3, 99)
    assert (args.track, args.clip_coef, args.ent_coef, args.desired_kl) == (True, 0.3, 0.1, 0.5)
    for name in ("envs_per_agent", "num_parallel_envs"):
        (tmp_path / "b.yaml").write_text(f"environment:\n  {name}: 12\n")
        assert parse("--config", tmp_path / "b.yaml").num_envs == 12


# --- shell scripts


@pytest.mark.parametrize("name", ["train_local.sh", "train_wandb.sh"])
def test_agents_by_shell_script(name, tmp_path):
    more = ["--agents", 1] if name == "train_wandb.sh" else []
    more += ["--num-iterations", 1, "--log-dir", tmp_path / "run", *TINY]
    shell(name, *more, environment={"WANDB_MODE": "offline", "WANDB_CACHE_DIR": str(tmp_path)})
    folders = [tmp_path / "run"] if more[0] == "--agents" else [tmp_path / "run" / f"agent_{i}" for i in range(2)]
    for folder in folders:
        args = checkpoint.load(folder / "checkpoints" / "final_model.pt", SCRIPT.name)["args"]
        assert args["num_envs"] == 4 and args["track"] == (name == "train_wandb.sh")
        assert args["config"].endswith(".yaml") and tuple(args["hidden"]) == (256, 128)
        assert any(folder.glob("wandb/offline-run-*")) == args["track"]


def test_several_gpus_by_shell_script(tmp_path):
    more = ["--num-iterations", 1, "--log-dir", tmp_path, *TINY]
    shell("train_multigpu.sh", *more, environment={"GPUS": "2"})
    assert len(checkpoint.load(tmp_path / "checkpoints" / "final_model.pt", SCRIPT.name)["ranks"]) == 2


# --- Optuna


def test_three_trials(tmp_path):
    flags = [*TINY, "--num-iterations", 3, "--eval-interval", 1, "--ranks", 1]
    out, _ = shell("run_sweep.sh", "optuna", "--trials", 3, "--runs", tmp_path, *flags)
    study = optuna.load_study(study_name="peginsert", storage=f"sqlite:///{tmp_path}/peginsert/study.db")
    assert len(study.trials) == 3 and all(len(trial.intermediate_values) >= 1 for trial in study.trials)
    assert any(trial.state == STATES.COMPLETE for trial in study.trials) and "best: " in out
    for trial in study.trials:
        args = yaml.safe_load((tmp_path / "peginsert" / f"trial_{trial.number}" / "args.yaml").read_text())
        assert args["gamma"] == trial.params["gamma"] and not args["track"] and args["num_envs"] == 4
    best = tmp_path / "peginsert" / "best.yaml"
    args = parse("--config", best)
    assert args.gamma == study.best_params["gamma"] and args.num_envs == 128
    assert "--num-iterations 3" in best.read_text()


def test_a_bad_trial_is_pruned(stand_in, monkeypatch):
    monkeypatch.setenv("VALUES", json.dumps([0.9, 0.8, 0.7, 0.6, 0.5, 0.4]))
    monkeypatch.setenv("PAUSE", "0.25")
    search(stand_in, 6)
    trials = load(stand_in).trials
    assert trials[0].state == STATES.COMPLETE and trials[0].value == 0.9
    assert list(trials[0].intermediate_values) == [*range(1, 10)]
    pruned = [trial for trial in trials if trial.state == STATES.PRUNED]
    assert pruned and len(pruned) + sum(trial.state == STATES.COMPLETE for trial in trials) == 6
    for trial in trials:
        folder = stand_in / "runs" / "s" / f"trial_{trial.number}"
        assert (folder / "stopped").exists() == (trial in pruned)
        assert (folder / "eval" / "final_model.json").exists() == (trial not in pruned)
    assert yaml.safe_load((stand_in / "runs" / "s" / "best.yaml").read_text()) == {"seed": 4} | trials[0].params


def test_a_crashed_trial_stops_no_other(stand_in, monkeypatch, capsys):
    monkeypatch.setenv("VALUES", "[null, 0.5]")
    search(stand_in, 2)
    assert [trial.state for trial in load(stand_in).trials] == [STATES.FAIL, STATES.COMPLETE]
    err = capsys.readouterr().err
    assert "error: trial 0 crashed: exit code 1" in err and "log.txt" in err
    assert "it broke" in (stand_in / "runs" / "s" / "trial_0" / "log.txt").read_text()
    monkeypatch.setenv("VALUES", "[null, null, null]")
    search(stand_in, 1, code=1)  # all of its own


def test_processes_share_a_study(stand_in, monkeypatch):
    monkeypatch.setenv("VALUES", json.dumps([0.1 * i for i in range(10)]))
    url = f"sqlite:///{stand_in}/shared.db"
    flags = ["optuna", "--config", stand_in / "config.yaml", "--study", "s", "--storage", url, "--trials", 2]
    command = [sys.executable, ROOT / "benchmark" / "sweep.py", *flags, "--runs", stand_in / "runs"]
    first = subprocess.Popen([str(word) for word in command], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: (stand_in / "runs" / "s" / "trial_0").exists() or first.poll() is not None)
    search(stand_in, 2, "--storage", url)
    finish(first)
    trials = load(stand_in, url).trials
    assert sorted(trial.number for trial in trials) == [0, 1, 2, 3]
    assert all(trial.state.is_finished() and trial.state != STATES.FAIL for trial in trials)


def test_ctrl_c_ends_the_training(stand_in):
    flags = ["optuna", "--config", stand_in / "config.yaml", "--study", "s", "--runs", stand_in / "runs"]
    command = [str(word) for word in (sys.executable, ROOT / "benchmark" / "sweep.py", *flags)]
    slow = os.environ | {"VALUES": "[0.5]", "PAUSE": "60"}
    process = subprocess.Popen(command, env=slow, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    folder = stand_in / "runs" / "s" / "trial_0"
    wait_for(lambda: (folder / "eval" / "model_5.json").exists() or process.poll() is not None)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = finish(process, 130, 30)
    assert (folder / "stopped").exists() and "stopped" in err and "Traceback" not in err
    assert load(stand_in).trials[0].state == STATES.FAIL


def test_both_engines_read_one_space():
    trial = optuna.trial.FixedTrial({"a": 1e-3, "b": 5, "c": "x", "d": 0.5, "e": 7})
    space = {"a": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}, "b": {"min": 2, "max": 8}}
    space |= {"c": {"values": ["x", "y"]}, "d": {"min": 0.0, "max": 1.0}, "f": {"value": "fixed"}}
    space |= {"e": {"distribution": "int_uniform", "min": 1, "max": 9}}
    assert sweep.suggest(trial, space) == {"a": 1e-3, "b": 5, "c": "x", "d": 0.5, "f": "fixed", "e": 7}
    assert trial.distributions["a"].log and not trial.distributions["d"].log
    assert isinstance(trial.distributions["b"], optuna.distributions.IntDistribution)


@pytest.mark.parametrize(
    ("change", "argv", "words"),
    [
        ({}, ["--trials", "0"], ["--trials", "above 0"]),
        ({}, ["--storage", "nonsense"], ["--storage", "nonsense", "sqlite:///"]),
        ({}, ["--config", "absent.yaml"], ["--config", "absent.yaml"]),
        ({"parameters": {"a": {"distribution": "beta", "min": 0, "max": 1}}}, [], ["beta", "log_uniform_values"]),
        ({"metric": {"name": "eval/speed", "goal": "maximize"}}, [], ["speed", "success_rate"]),
        ({"metric": "speed"}, [], ["--config"]),
    ],
)
def test_mistakes(stand_in, monkeypatch, capsys, change, argv, words):
    monkeypatch.setenv("VALUES", "[0.5]")
    config = yaml.safe_load((stand_in / "config.yaml").read_text()) | change
    (stand_in / "config.yaml").write_text(yaml.safe_dump(config))
    search(stand_in, 1, *argv, code=2)
    check_sentence(2, capsys.readouterr().err, words)


def test_a_study_of_another_space(stand_in, monkeypatch, capsys):
    monkeypatch.setenv("VALUES", "[0.5, 0.5]")
    for values in ([1, 2], [1, 3]):
        config = yaml.safe_load((stand_in / "config.yaml").read_text()) | {"parameters": {"seed": {"values": values}}}
        (stand_in / "config.yaml").write_text(yaml.safe_dump(config))
        search(stand_in, 1, code=0 if values == [1, 2] else 2)
    check_sentence(2, capsys.readouterr().err, ["--study", "seed"])


# --- Weights & Biases


def test_weights_and_biases_gets_the_sweep(monkeypatch, capsys):
    calls = {}
    monkeypatch.setattr(wandb, "sweep", lambda config, **more: calls.update(config=config, **more) or "abc")
    monkeypatch.setattr(wandb, "agent", lambda *args, **more: calls.update(agent=(args, more)))
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.chdir(ROOT)
    sweep.main(["wandb", "--trials", "7", "--num-envs", "8"])
    config = calls["config"]
    assert config["method"] == "bayes" and config["early_terminate"]["type"] == "hyperband"
    assert config["command"][-3:] == ["${args}", "--num-envs", "8"] and "--track" in config["command"]
    assert config["metric"] == {"name": "eval/success_rate", "goal": "maximize"}
    assert calls["agent"] == (("abc",), {"project": "cleanrl-robots", "entity": None, "count": 7})
    assert "wandb agent cleanrl-robots/abc" in capsys.readouterr().out


def test_without_a_login(monkeypatch, capsys):
    def refuse(*args, **more):
        raise wandb.errors.UsageError("No API key configured")

    monkeypatch.setattr(wandb, "sweep", refuse)
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        sweep.main(["wandb"])
    check_sentence(end.value.code, capsys.readouterr().err, ["wandb login", "optuna"])
