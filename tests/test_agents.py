"""Several agents of one command: their folders, a crash, signals, resume, and how cores and GPUs are shared."""

import json
import os
import re
import signal
import time

import pytest
import torch
import yaml
from harness import SCRIPTS
from helpers import check_sentence, finish, run, start, wait_for

from common import agents, checkpoint

SCRIPT = SCRIPTS["ppo_multimodal_peginsert"]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def flags(folder, iterations, *more):
    size = ["--envs-per-agent", 4, "--num-steps", 16, "--update-epochs", 1, "--num-minibatches", 2]
    size += ["--eval-episodes", 4, "--max-episode-steps", 10, "--no-save-video", "--device", "cpu"]
    return ["--agents", 2, *size, "--num-iterations", iterations, "--log-dir", folder, *more]


def processes(line_source, count) -> dict[str, int]:
    """{agent: process id}, once the first iteration of `count` of them is done."""
    pids, learning = {}, set()
    while len(learning) < count:
        line = line_source.readline()
        assert line, "the run ended"
        if match := re.match(r"(agent_\d+) \| process (\d+)", line):
            pids[match[1]] = int(match[2])
        if match := re.match(r"(agent_\d+) \| step ", line):
            learning.add(match[1])
    return pids


def gone(pid) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def saved(folder, number) -> dict:
    return checkpoint.load(folder / f"agent_{number}", SCRIPT.name)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder and stdout of two agents, tracked offline by Weights & Biases."""
    folder = tmp_path_factory.mktemp("agents")
    wandb = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CACHE_DIR": str(folder / "cache")}
    process = start(SCRIPT, *flags(folder / "run", 2, "--seed", 5, "--track"), environment=wandb)
    return folder / "run", *finish(process)


def test_two_agents_leave_two_folders(trained):
    folder, out, err = trained
    assert {path.name for path in folder.iterdir()} == {"args.yaml", "summary.json", "agent_0", "agent_1"}
    states = [saved(folder, number) for number in range(2)]
    assert [state["args"]["seed"] for state in states] == [5, 6]
    assert all(state["iteration"] == 2 and state["args"]["num_envs"] == 4 for state in states)
    assert all(len(state["ranks"]) == 1 for state in states)
    assert not torch.equal(states[0]["agent"]["actor.0.weight"], states[1]["agent"]["actor.0.weight"])
    for number in range(2):
        left = {path.name for path in (folder / f"agent_{number}").iterdir()}
        assert {"args.yaml", "checkpoints", "eval", "policy.onnx", "summary.json"} <= left
    assert "agent_0 | ended" in out and "agent_1 | ended" in out and "Traceback" not in err


def test_their_summary(trained):
    folder, out, _ = trained
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["agents"] == 2 and summary["finished"] == ["agent_0", "agent_1"] and summary["crashed"] == {}
    own = [json.loads((folder / f"agent_{i}" / "summary.json").read_text())["mean_return"] for i in range(2)]
    figure = summary["figures"]["mean_return"]
    assert figure["values"] == {"agent_0": own[0], "agent_1": own[1]}
    assert figure["mean"] == pytest.approx(sum(own) / 2) and figure["ci95"][0] < figure["mean"] < figure["ci95"][1]
    assert 0 <= summary["figures"]["success_rate"]["mean"] <= 1 and "success_rate: " in out


def test_one_group_of_weights_and_biases(trained):
    folder, *_ = trained
    for number in range(2):
        [record] = (folder / f"agent_{number}" / "wandb").glob("offline-run-*/*.wandb")
        text = record.read_bytes()
        assert f"multimodal_peginsert_agent_{number}".encode() in text
        assert saved(folder, number)["args"]["wandb_group"] == folder.name and folder.name.encode() in text


def test_a_crashed_agent_is_reported_and_stops_no_other(tmp_path):
    (tmp_path / "agent_0" / "args.yaml").mkdir(parents=True)  # which the agent cannot write
    out, err = finish(start(SCRIPT, *flags(tmp_path, 1)), code=1)
    assert "error: agent_0 ended with exit code 2; the end of its stderr:\n    error: --log-dir got" in err
    assert saved(tmp_path, 1)["iteration"] == 1 and "1 of 2 agents finished, 1 crashed" in out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["crashed"] == {"agent_0": 2} and list(summary["figures"]["success_rate"]["values"]) == ["agent_1"]


@pytest.mark.skipif(CORES < 2, reason="one core trains one agent at a time")
def test_a_killed_agent_stops_no_other(tmp_path):
    process = start(SCRIPT, *flags(tmp_path, 10**6, "--log-interval", 1))
    try:
        pids = processes(process.stdout, 2)
        os.kill(pids["agent_1"], signal.SIGKILL)
        while "agent_1 was killed by signal 9" not in process.stderr.readline():
            assert process.poll() is None
        while not process.stdout.readline().startswith("agent_0 | step"):
            assert process.poll() is None
        process.terminate()
        out, _ = finish(process, code=1, timeout=60)
    finally:
        process.kill()
    assert saved(tmp_path, 0)["iteration"] >= 1 and f"--resume {tmp_path}" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_all_agents_and_resume_continues_all(tmp_path, number):
    often = ["--log-interval", 1, "--checkpoint-interval", 10**6, "--agents", CORES + 1]
    process = start(SCRIPT, *flags(tmp_path, 10**6, *often))
    try:
        pids = processes(process.stdout, CORES)
        assert len(pids) == CORES  # one more waits for its turn
        os.killpg(process.pid, number)  # as a terminal does
        out, err = finish(process, 0, 60)
    finally:
        process.kill()
    assert all(gone(pid) for pid in pids.values()) and "Traceback" not in err
    assert f"--resume {tmp_path}" in out
    before = [saved(tmp_path, i)["iteration"] for i in range(CORES)]
    assert min(before) >= 1 and not any((tmp_path / f"agent_{CORES}").iterdir())
    if number == signal.SIGINT:
        last = max(before) + 1
        finish(start(SCRIPT, "--resume", tmp_path, "--num-iterations", last, "--no-save-video", "--device", "cpu"))
        assert [saved(tmp_path, i)["iteration"] for i in range(CORES + 1)] == [last] * (CORES + 1)
        assert [saved(tmp_path, i)["args"]["seed"] for i in range(CORES + 1)] == [*range(1, CORES + 2)]
        assert len(json.loads((tmp_path / "summary.json").read_text())["finished"]) == CORES + 1


@pytest.mark.skipif(CORES < 2, reason="one core trains one agent at a time")
def test_ctrl_c_again_stops_at_once(tmp_path):
    # An iteration of these takes minutes.
    process = start(SCRIPT, *flags(tmp_path, 10**6), "--num-steps", 200_000)
    try:
        lines = [process.stdout.readline() for _ in range(5)]
        pids = [int(pid) for pid in re.findall(r"process (\d+)", "".join(lines))]
        assert len(pids) == 2, lines
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, err = finish(process, 130, 30)
    finally:
        process.kill()
    assert "stopped; what was saved is whole" in err and "Traceback" not in err
    wait_for(lambda: all(gone(pid) for pid in pids), 10)


@pytest.mark.skipif(CORES < 2, reason="one core trains one agent at a time")
@pytest.mark.parametrize("script_agents", [2, 3])
def test_agents_share_no_core_and_the_rest_take_turns(tmp_path, monkeypatch, script_agents):
    """A stand-in for a script writes when it ran and on which cores."""
    stand_in = tmp_path / "script.py"
    stand_in.write_text(
        "import json, os, sys, time\nfrom pathlib import Path\n"
        "folder = next(w.partition('=')[2] for w in sys.argv if w.startswith('--log-dir'))\n"
        "began = time.time(); time.sleep(.5)\n"
        "found = dict(began=began, ended=time.time(), cores=sorted(os.sched_getaffinity(0)), flags=sys.argv[1:])\n"
        "Path(folder, 'found.json').write_text(json.dumps(found))\n"
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr("sys.argv", [str(stand_in)])
    settings = {"num_agents": script_agents, "seed": 3, "exp_name": "x", "wandb_group": "", "ranks": 1}
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit) as end:
        agents.train(tmp_path, "cpu")
    assert end.value.code == 0
    found = [json.loads((tmp_path / f"agent_{i}" / "found.json").read_text()) for i in range(script_agents)]
    for i, one in enumerate(found):
        assert f"--seed={3 + i}" in one["flags"] and len(one["cores"]) == 1
        together = [o for o in found if o["began"] < one["ended"] and one["began"] < o["ended"]]
        assert len(together) <= 2 and len({tuple(o["cores"]) for o in together}) == len(together)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not say which cores there are")
def test_every_core_has_one_agent(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3, 5, 7, 8})
    assert agents._shares(2) == [[2, 3], [5, 7, 8]] and agents._shares(9) == [[2], [3], [5], [7], [8]]


def test_gpus_in_turn(monkeypatch):
    assert agents._gpus("cpu") == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert agents._gpus("cuda") == agents._gpus("auto") == ["0", "1", "2"] and agents._gpus("cuda:1") == ["1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert agents._gpus("cuda") == ["4", "6"] and agents._gpus("cuda:1") == ["6"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--agents 0", ["--num-agents", "above 0"]),
        ("--env-id Isaac-Factory-PegInsert-Direct-v0", ["--env-id", "Isaac Lab cannot be imported"]),
        ("--task-name Go2-v0", ["--env-id", "Go2-v0", "PegInsert-v0"]),
        ("--agents 2 --log-dir {tmp}", ["agent_1", "--log-dir"]),
    ],
)
def test_mistakes(argv, words, tmp_path, monkeypatch, capfd):
    (tmp_path / "agent_1").write_text("a file")
    monkeypatch.chdir(tmp_path)
    code = run(SCRIPT, *argv.format(tmp=tmp_path).split(), "--device", "cpu")
    check_sentence(code, capfd.readouterr().err, words)


def test_a_device_that_is_not_there_when_resuming(trained, capfd):
    code = run(SCRIPT, "--resume", trained[0], "--device", "cuda:99")
    check_sentence(code, capfd.readouterr().err, ["--device", "cuda:99"])


def test_several_agents_need_a_launcher_of_their_own(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        agents.check(SCRIPT.args(num_agents=2))
    assert "--num-agents got 2; it takes 1 under torchrun" in capsys.readouterr().err
