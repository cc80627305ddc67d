"""The pages about the Go2 say what the code does."""

import re
import sys
from pathlib import Path

import pytest
import torch

from common import checkpoint
from common.envs import go2
from common.envs.go2_eval import evaluate

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))
import make_go2_tables  # noqa: E402

TEXT, DATA = ((DOCS / name).read_text() for name in ("go2.md", "go2_data.md"))


@pytest.mark.parametrize("page", make_go2_tables.PAGES, ids=lambda page: page.name)
def test_tables_are_current(page):
    assert make_go2_tables.written(page) == page.read_text(), "run: python docs/make_go2_tables.py"


def test_weights():
    """Read back from the page: every term with both of its weights."""
    rows = re.findall(r"^\| `(\w+)`[^\n]*\| ([-\d.e]+) \| ([-\d.e]+) \|$", TEXT, re.MULTILINE)
    weights = {name: (reference, natural) for name, reference, natural in rows if name in go2.TERMS}
    assert weights.keys() == set(go2.TERMS)
    for column, expected in enumerate((go2.REFERENCE | go2.JUMP, go2.NATURAL | go2.JUMP)):
        assert {n: float(w[column]) for n, w in weights.items() if w[column] != "-"} == pytest.approx(expected)


def test_formulas_describe_the_code():
    code = make_go2_tables.code_of_terms()
    assert code.keys() == set(go2.TERMS)
    for name in go2.TERMS:
        described = make_go2_tables.FORMULAS.get(name, ("nothing",))[0]
        assert described == code[name], f"FORMULAS[{name!r}] in docs/make_go2_tables.py describes other code"


def test_jumps():
    section = TEXT.partition("### Jumps")[2].partition("\n## ")[0]
    for name in go2.OFF_IN_JUMP:
        assert f"`{name}`" in section
    for value, unit in ((go2.JUMP_TOLERANCE, "m"), (go2.JUMP_WINDOW, "s"), (go2.JUMP_LANDING, "s")):
        assert f"{value:g} {unit}" in section


def test_keys_of_the_evaluation():
    cfg = go2.Go2Config(episode_seconds=0.1)
    result = evaluate(lambda obs: torch.zeros(len(obs), 12), cfg, "cpu", episodes=1)
    for key in (*result, *result["grid"]):
        assert f"`{key}`" in DATA


def test_onnx_example(tmp_path, monkeypatch):
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", DATA, re.DOTALL) if "onnxruntime" in block]
    monkeypatch.chdir(tmp_path)
    checkpoint.export_onnx(torch.nn.Linear(48, 12), torch.zeros(1, 48), "policy.onnx")
    namespace = {}
    exec(example, namespace)
    assert namespace["actions"].shape == (4, 12) and namespace["obs"].shape == (4, 48)
