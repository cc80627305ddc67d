"""Whole runs of every script as its users start them: what they leave, resume, signals, full disks, mistakes."""

import contextlib
import dataclasses
import importlib
import json
import os
import runpy
import signal
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from full_disk import fill, small_disk
from harness import SCRIPTS
from helpers import ALWAYS, alive, check_sentence, differences, finish, learned, run, start, tiny, wait_for

from common import checkpoint, cli, distributed

# All four for the first script; what handles them is the same code in the others.
SIGNALS = [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, False)]
SIGNALS = [(name, *each) for name in SCRIPTS for each in SIGNALS[: 4 if name == next(iter(SCRIPTS)) else 2]]
EXACT = [(name, flags) for name, script in SCRIPTS.items() for flags in script.exact]


@pytest.fixture(params=SCRIPTS)
def script(request):
    reason = SCRIPTS[request.param].without.get(request.function.__name__)
    if reason:
        pytest.skip(reason)
    return SCRIPTS[request.param]


def newest(run_dir) -> int:
    """The iteration of the newest checkpoint, 0 without one."""
    files = (run_dir / "checkpoints").glob("model_*.pt")
    return max((int(file.stem.removeprefix("model_")) for file in files), default=0)


# --- what a run leaves


def test_a_run_leaves_its_settings(script, finished):
    run_dir, out, err = finished
    assert run_dir.name.startswith(f"{script.task}__5__20")
    settings = yaml.safe_load((run_dir / "args.yaml").read_text())
    info = settings.pop("run_info")
    assert settings.keys() == {field.name for field in dataclasses.fields(script.ppo.Args) if field.init}
    shown = settings["num_envs"], settings["seed"], settings["ranks"], settings["preset"]
    assert shown == (script.num_envs, 5, 2, script.preset)
    assert info["versions"]["torch"].startswith(torch.__version__.split("+")[0]) and "mujoco" in info["versions"]
    assert len(info["commit"]) >= 7 and info["hardware"]["cores"] >= 1
    assert f"preset {script.preset}: {script.num_envs} environments" in out and str(run_dir.name) in out
    assert out.count("preset") == 1 and "Traceback" not in err


def test_the_settings_of_a_run_are_a_file_for_config(script, finished):
    path = finished[0] / "args.yaml"
    args = cli.parse_args(script.ppo.Args, script.ppo.PRESETS, script.ppo.default_preset, argv=["--config", str(path)])
    settings = {name: value for name, value in yaml.safe_load(path.read_text()).items() if name != "run_info"}
    again = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(args).items()}
    assert {name: again[name] for name in settings} == settings | {"config": str(path)}


def test_a_run_leaves_metrics(script, finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[0])).Reload()
    tags = {"charts/SPS", "charts/episodic_return", "charts/learning_rate", "charts/nan_resets", script.loss}
    if script.name.startswith("ppo_"):
        tags |= {f"losses/{name}" for name in ("value_loss", "approx_kl", "clipfrac", "explained_variance")}
    assert tags | script.metrics <= set(events.Tags()["scalars"])
    points = events.Scalars(script.loss)
    assert [point.step for point in points] == [3 * script.batch, 6 * script.batch]
    assert all(np.isfinite(point.value) for point in points)
    assert events.Scalars("charts/episodic_return")


def test_a_run_leaves_checkpoints(script, finished):
    folder = finished[0] / "checkpoints"
    names = {"model_3.pt", "model_4.pt", "model_6.pt", "final_model.pt", "best_model.pt"}  # what is evaluated is kept
    assert {file.name for file in folder.iterdir()} == names
    states = {file.name: checkpoint.load(file, script.name) for file in folder.iterdir()}
    assert states["model_3.pt"]["iteration"] == 3 and states["final_model.pt"]["iteration"] == 6
    assert states["best_model.pt"]["iteration"] in (4, 6)
    assert states["final_model.pt"]["global_step"] == 6 * script.batch and len(states["final_model.pt"]["ranks"]) == 2


def test_a_run_leaves_evaluations_and_a_summary(script, finished):
    run_dir, *_ = finished
    names = {"model_4.json", "final_model.json"} | script.files
    assert {file.name for file in (run_dir / "eval").iterdir()} == names
    result = json.loads((run_dir / "eval" / "final_model.json").read_text())
    assert {"mean_return", "return_ci95"} | script.results <= set(result)
    assert result["episodes"] >= script.flags[script.flags.index("--eval-episodes") + 1]
    assert len(result["return_ci95"]) == 2
    summary = json.loads((run_dir / "summary.json").read_text())
    assert {"SPS", "wall_seconds", "peak_memory_mb", "commit", "versions", "hardware"} <= set(summary)
    assert summary["global_step"] == 6 * script.batch
    assert all(summary[key] == result[key] for key in script.results | {"mean_return"})
    assert (run_dir / "policy.onnx").stat().st_size > 1000 and not (run_dir / "videos").exists()  # --no-save-video


def test_eval_only(script, finished, tmp_path, capsys):
    model = finished[0] / "checkpoints" / "final_model.pt"
    flags = ["--eval-only", "--model-path", model, "--log-dir", tmp_path, "--eval-episodes", 6, *ALWAYS]
    assert run(script, *flags) == 0
    result = json.loads((tmp_path / "eval" / "final_model.json").read_text())
    assert result["episodes"] >= 6 and f"everything is in {tmp_path}" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["eval"]
    assert run(script, *flags, "--seed", 5) == 0  # the same policy on the same seeds
    assert json.loads((tmp_path / "eval" / "final_model.json").read_text())["mean_return"] == result["mean_return"]


# --- other ways to run it


def test_training_may_begin_with_a_policy(script, finished, tmp_path):
    """The finished run's networks, after an iteration whose step size changes nothing."""
    if script.name == "ppo_gr00t":
        pytest.skip("its --model-path is a folder of weights; see test_run_gr00t.py")
    still = {"learning_rate": 1e-20, "critic_learning_rate": 1e-20, "alpha_learning_rate": 1e-20, "desired_kl": 0}
    names = still.keys() & script.ppo.Args.__dataclass_fields__.keys()
    flags = [word for name in names for word in (f"--{name.replace('_', '-')}", still[name])]
    flags = [*tiny(script, 1), *script.finished, *flags, "--model-path", finished[0], "--log-dir", tmp_path]
    assert run(script, *flags) == 0
    old = checkpoint.load(finished[0], script.name)
    begun = checkpoint.load(tmp_path / "checkpoints" / "final_model.pt", script.name)
    assert begun["iteration"] == 1 and begun["args"]["seed"] != old["args"]["seed"]
    weights = [name for name in old["agent"] if name.startswith("actor") and name.endswith("weight")]
    assert len(weights) >= 2
    for name in weights:
        torch.testing.assert_close(begun["agent"][name], old["agent"][name], rtol=0, atol=1e-9)


def test_yaml_aliases_and_tracking(script, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("n_envs: 16\nmax-iterations: 9\nhidden: [32, 16]\nexp_name: named\n")
    flags = ["--config", config, "--max-iterations", 2, "--checkpoint-freq", 1, "--n_steps", 8, "--use-wandb"]
    flags += ["--log-dir", tmp_path / "run", "--ranks", 1, *script.flags, *ALWAYS]
    wandb = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CACHE_DIR": str(tmp_path / "cache")}
    out, err = finish(start(script, *flags, environment=wandb))
    args = checkpoint.load(tmp_path / "run" / "checkpoints" / "model_1.pt", script.name)["args"]
    assert (args["num_envs"], args["num_iterations"], args["num_steps"], args["track"]) == (16, 2, 8, True)
    assert tuple(args["hidden"]) == (32, 16) and args["exp_name"] == "named"
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*")) and "losses" not in out + err  # quiet


def test_torchrun(script, tmp_path):
    program = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    out, _ = finish(start(script, *tiny(script, 2), "--exp-name", "t", program=program, cwd=tmp_path))
    [run_dir] = (tmp_path / "runs" / "t").iterdir()  # one folder, not one per rank
    state = checkpoint.load(run_dir / "checkpoints" / "final_model.pt", script.name)
    assert len(state["ranks"]) == 2 and state["global_step"] == 2 * script.batch and out.count("preset") == 1
    assert (run_dir / "summary.json").exists()


# --- resume


@pytest.mark.parametrize(("script", "name"), EXACT, indirect=["script"], ids=[" ".join(pair) for pair in EXACT])
def test_a_resumed_run_equals_an_uninterrupted_one(script, name, tmp_path):
    assert run(script, *tiny(script, 6), *script.exact[name], "--log-dir", tmp_path / "a") == 0
    begin = tmp_path / "a" / "checkpoints" / "model_3.pt"
    assert run(script, "--resume", begin, "--log-dir", tmp_path / "b", *ALWAYS) == 0
    end, again = (learned(script, tmp_path / name / "checkpoints" / "model_6.pt") for name in "ab")
    assert differences(end, again) == []
    moved = differences(learned(script, begin), end)
    assert (
        any(".agent.actor" in name for name in moved) and f".agent.{script.statistics}.var" in moved
    )  # it went on learning
    assert any(".ranks.0.envs" in name for name in moved)


def test_a_run_of_two_ranks_resumes_exactly(script, finished, tmp_path):
    begin = finished[0] / "checkpoints" / "model_3.pt"
    finish(start(script, "--resume", begin, "--log-dir", tmp_path, "--ranks", 2, *ALWAYS))
    a, b = (learned(script, folder / "checkpoints" / "model_6.pt") for folder in (finished[0], tmp_path))
    assert len(a["ranks"]) == 2 and differences(a, b) == []


def test_resume_goes_on_in_the_same_folder_to_more_iterations(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(script, *tiny(script, 2), "--hidden", 9, "--log-dir", "old") == 0
    (tmp_path / "old").rename(tmp_path / "new")  # to where it goes on, whatever folder it is started from
    assert (tmp_path / "new" / "checkpoints" / "model_2.pt").exists()
    capsys.readouterr()
    more = ["--num-iterations", 4, "--num-envs", 2 * script.num_envs]
    assert run(script, "--resume", tmp_path / "new", *more, *ALWAYS) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    state = checkpoint.load(tmp_path / "new" / "checkpoints" / "model_4.pt", script.name)
    assert tuple(state["args"]["hidden"]) == (9,)
    assert state["iteration"] == 4 and state["global_step"] == (2 + 2 * 2) * script.batch
    out = capsys.readouterr().out
    assert out.count("warning") == 1 and "--num-envs" in out  # the episodes could not be restored


@pytest.mark.parametrize("first", ["--num-iterations", "--total-timesteps"])
def test_either_way_to_say_how_long_replaces_the_other_in_a_resumed_run(script, tmp_path, first):
    lengths = {"--num-iterations": lambda n: n, "--total-timesteps": lambda n: n * script.batch}
    [second] = lengths.keys() - {first}
    flags = [*script.flags, *script.size, *ALWAYS]
    assert run(script, *flags, first, lengths[first](2), "--log-dir", tmp_path) == 0
    assert run(script, "--resume", tmp_path, second, lengths[second](3), *ALWAYS) == 0
    state = checkpoint.load(tmp_path / "checkpoints" / "final_model.pt", script.name)
    assert state["iteration"] == 3 and state["args"][first[2:].replace("-", "_")] == 0


# --- signals


@pytest.mark.parametrize(
    ("script", "number", "to_all"),
    SIGNALS,
    indirect=["script"],
    ids=[f"{name} {number.name} {'group' if to_all else 'parent'}" for name, number, to_all in SIGNALS],
)
def test_a_signal_finishes_the_iteration_and_saves(script, tmp_path, number, to_all):
    often = ["--checkpoint-interval", 10**6, "--log-interval", 1]
    process = start(script, *tiny(script, 10**7), *often, "--log-dir", tmp_path, "--ranks", 2)
    try:
        while not process.stdout.readline().startswith("step"):  # until the first iteration is done
            assert process.poll() is None
        assert len(alive(process.pid)) == 2
        (os.killpg if to_all else os.kill)(process.pid, number)
        out, err = finish(process, 0, 60)
        wait_for(lambda: alive(process.pid) == [], 10)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert "Traceback" not in err and "stopping" in err and f"--resume {tmp_path}" in out
    [saved] = (tmp_path / "checkpoints").iterdir()
    assert checkpoint.load(saved, script.name)["iteration"] == int(saved.stem.removeprefix("model_")) >= 1
    assert not (tmp_path / "summary.json").exists()


def test_ctrl_c_in_the_final_evaluation_ends_all_at_once(script, tmp_path):
    flags = [*tiny(script, 2), *script.long_evaluation, "--log-dir", tmp_path, "--ranks", 2]
    process = start(script, *flags)
    try:
        wait_for(lambda: (tmp_path / "policy.onnx").exists() or process.poll() is not None)  # evaluated next
        time.sleep(0.5)
        began = time.time()
        os.killpg(process.pid, signal.SIGINT)
        _, err = finish(process, 130, 60)
        assert time.time() - began < 30  # the evaluation would go on for a minute or more; a busy machine took 11 s
        wait_for(lambda: alive(process.pid) == [], 10)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert err.count("stopped; what was saved is whole") == 1 and "Traceback" not in err
    assert checkpoint.load(tmp_path / "checkpoints" / "final_model.pt", script.name)["iteration"] == 2
    assert not (tmp_path / "summary.json").exists()


def test_sigterm_in_the_final_evaluation_does_what_it_did_before_training(script, tmp_path, monkeypatch):
    class Terminated(Exception):
        pass

    def end(number, frame):
        raise Terminated

    def evaluate(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal was swallowed")

    monkeypatch.setattr(script.evaluate, evaluate)
    before = signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(Terminated):
            run(script, *tiny(script, 2), "--log-dir", tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert checkpoint.load(tmp_path / "checkpoints" / "final_model.pt", script.name)["iteration"] == 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no parent-death signal")
def test_killed_again_and_again_a_run_loses_at_most_one_interval(script, tmp_path):
    rng, flags = np.random.default_rng(0), [*tiny(script, 10**7), "--checkpoint-interval", 1, "--log-dir", tmp_path]
    for attempt in range(4):
        before = newest(tmp_path)
        process = start(script, *(["--resume", tmp_path] if attempt else flags), "--ranks", 2)
        wait_for(lambda: newest(tmp_path) > before or process.poll() is not None)  # noqa: B023
        time.sleep(rng.uniform(0, 0.2))
        [child] = set(alive(process.pid)) - {process.pid}
        seen = newest(tmp_path)
        if attempt == 2:  # so that it cannot notice by itself that its peer is gone
            os.kill(child, signal.SIGSTOP)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        try:
            wait_for(lambda: alive(process.pid) == [], 20)  # noqa: B023
        finally:
            for pid in alive(process.pid):
                os.kill(pid, signal.SIGKILL)
        found = checkpoint.latest(tmp_path)
        assert int(found.stem.removeprefix("model_")) >= seen > before
        assert checkpoint.load(found, script.name)["iteration"] >= seen
    (tmp_path / "checkpoints" / ".model_7.123.pt").write_bytes(b"half")  # as a kill while it is written leaves it
    finish(start(script, "--resume", tmp_path, "--num-iterations", newest(tmp_path) + 2, "--ranks", 2))
    assert (tmp_path / "summary.json").exists() and not list((tmp_path / "checkpoints").glob(".*"))


# --- a full disk


def test_on_a_full_disk_training_goes_on_and_saves_when_there_is_room(script, tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        often = ["--checkpoint-interval", 1, "--log-interval", 1, "--eval-interval", 5]
        process = start(script, *tiny(script, 10**7), *often, *script.big, "--log-dir", disk / "run", "--ranks", 1)
        try:
            while not process.stdout.readline().startswith("step"):
                assert process.poll() is None
            filler = fill(disk)
            warning = process.stderr.readline()
            while "cannot be written" not in warning or "model_" not in warning:
                assert process.poll() is None
                warning = process.stderr.readline()
            for path in (disk / "run" / "checkpoints").glob("model_*.pt"):
                path.unlink()
            filler.unlink()
            wait_for(lambda: newest(disk / "run") > 0)
            time.sleep(0.5)
            for path in (disk / "run" / "checkpoints").glob("*.pt"):
                path.unlink()
            os.kill(process.pid, signal.SIGTERM)
            out, err = finish(process, 0, 60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        assert f"cannot be written in {disk / 'run' / 'checkpoints'} (No space left on device)" in warning
        assert "the newest whole checkpoint is " in warning and "Traceback" not in err


def test_a_disk_too_small_for_the_final_model_ends_the_run_with_one_sentence(script, tmp_path, capfd):
    with small_disk(tmp_path / "disk") as disk:
        flags = [*tiny(script, 3), *script.big, "--checkpoint-interval", 1, "--log-dir", disk / "run"]
        assert run(script, *flags) == 1
        err = capfd.readouterr().err
        assert "Traceback" not in err and err.count("error: ") == 1
        assert f"error: the final model is not saved; make room and --resume {disk / 'run'}" in err
        warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
        assert warnings and all("No space left on device" in line for line in warnings)
        assert checkpoint.latest(disk / "run").name in warnings[-1]


def test_results_that_a_full_disk_refuses_cost_a_sentence_each(script, tmp_path, monkeypatch, capfd):
    module, name = script.evaluate.rsplit(".", 1)
    evaluate = getattr(importlib.import_module(module), name)
    with small_disk(tmp_path / "disk", 8) as disk:

        def fill_and_evaluate(*args, **kwargs):
            fill(disk)
            return evaluate(*args, **kwargs)

        monkeypatch.setattr(script.evaluate, fill_and_evaluate)
        assert run(script, *tiny(script, 2), "--log-dir", disk / "run") == 0
        err = capfd.readouterr().err
        assert f"the final evaluation cannot be written in {disk / 'run'}" in err and "the final model is saved" in err
        assert checkpoint.load(disk / "run" / "checkpoints" / "final_model.pt", script.name)["iteration"] == 2
        (disk / "filler").unlink()
        assert run(script, *tiny(script, 3), "--eval-interval", 1, "--log-dir", disk / "again") == 1
        err = capfd.readouterr().err
        assert f"warning: the evaluation cannot be written in {disk / 'again'}" in err
        assert "error: the final model is not saved" in err and "Traceback" not in err


# --- mistakes

MISTAKES = [
    ("--num-envs 0", "--num-envs", "above 0"),
    ("--num-steps 0", "--num-steps", "above 0"),
    ("--ranks -1", "--ranks"),
    ("--gamma 1.5", "--gamma", "1.5", "from 0 to below 1"),
    ("--learning-rate nan", "--learning-rate", "nan"),
    ("--hidden 64 0", "--hidden", "above 0"),
    ("--seed -1", "--seed", "0 or a number above it"),
    ("--seed 99999999999999999999", "--seed", "below 2**32"),
    ("--num-env 3", "--num-env;", "--num-envs"),
    ("--device cuda", "--device", "cuda"),
    ("--device gpu", "--device", "gpu", "cuda"),
    ("--device cuda:99", "--device", "cuda:99"),
    ("--config {tmp}/config.yaml", "num_robots", "config.yaml"),
    ("--resume {tmp}/absent", "--resume", "absent"),
    ("--resume {tmp}/other.pt", "--resume", "sac_other"),
    ("--eval-only", "--eval-only", "--model-path"),
    ("--eval-only --model-path {tmp}/damaged.pt", "--model-path", "damaged"),
    ("--log-dir {tmp}/damaged.pt", "--log-dir", "a folder"),
]
MISTAKES = [(name, mistake) for name, script in SCRIPTS.items() for mistake in (*MISTAKES, *script.mistakes)]
SYNTAX_ERRORS = [("--num-envs many", "--num-envs"), ("--hidden wide", "--hidden")]
SYNTAX_ERRORS = [(name, e) for name, script in SCRIPTS.items() for e in (*SYNTAX_ERRORS, *script.syntax_errors)]


@pytest.mark.parametrize(
    ("script", "mistake"), MISTAKES, indirect=["script"], ids=[f"{name} {mistake[0]}" for name, mistake in MISTAKES]
)
def test_a_mistake_ends_with_one_sentence_before_anything_is_written(script, mistake, mistakes, monkeypatch, capfd):
    flags, *words = mistake
    if flags == "--device cuda" and torch.cuda.is_available():
        pytest.skip("no mistake here")
    monkeypatch.setattr(distributed, "launch", lambda *args: None)  # where training would begin
    monkeypatch.chdir(mistakes / "cwd")
    argv = flags.format(tmp=mistakes).split()
    code = run(script, *argv, *([] if "--device" in flags else ["--device", "cpu"]))
    check_sentence(code, capfd.readouterr().err, words)
    assert not list((mistakes / "cwd").iterdir())


@pytest.mark.parametrize(
    ("script", "error"), SYNTAX_ERRORS, indirect=["script"], ids=[f"{name} {error[0]}" for name, error in SYNTAX_ERRORS]
)
def test_a_syntax_error_names_the_flag_or_what_it_takes(script, error, monkeypatch, tmp_path, capfd):
    flags, word = error
    monkeypatch.chdir(tmp_path)
    code = run(script, *flags.split(), "--device", "cpu")
    err = capfd.readouterr().err
    assert code == 2 and flags.split()[0] in err and word in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_policy_that_does_not_fit_ends_all_ranks_with_one_sentence(script, finished, tmp_path):
    flags = ["--resume", finished[0], "--hidden", 32, "--log-dir", tmp_path, "--device", "cpu", "--ranks", 2]
    _, err = finish(start(script, *flags), code=2)
    check_sentence(2, err, ["--resume", "networks", "--hidden"])


@pytest.mark.parametrize("cores", [1, 2, 6, 14, 96])
def test_the_ranks_of_a_run_without_flags_share_its_environments_on_any_machine(script, cores, tmp_path, monkeypatch):
    launched = []
    monkeypatch.setattr(distributed, "launch", lambda main, args, ranks: launched.append((args, ranks)))
    monkeypatch.setattr(distributed, "num_cores", lambda: cores)
    monkeypatch.setattr(sys, "argv", [str(script.path), "--device", "cpu", "--log-dir", str(tmp_path)])
    runpy.run_path(str(script.path), run_name="__main__")
    [(args, ranks)] = launched
    assert 1 <= ranks <= cores and args.num_envs % ranks == 0


def test_several_ranks_share_no_gpu(script, capsys):
    with pytest.raises(SystemExit) as end:
        script.ppo.check_args(script.ppo.Args(device="cuda", ranks=2))
    check_sentence(end.value.code, capsys.readouterr().err, ["--ranks got 2", "only on a CPU or under torchrun"])
