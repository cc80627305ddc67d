"""Links between the pages lead somewhere, commands have the flags they name, the map of a script leaves nothing out."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from common.cli import ALIASES
from docs import make_pictures

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "benchmark" / "README.md"]


def anchor(heading: str) -> str:
    """What GitHub makes of a heading: lower case, no punctuation, hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository(page):
    """Each leads to a file, and to a heading where it names one."""
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        file, _, fragment = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.name} links to {target}, which is not there"
        if fragment and path.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            assert fragment in map(anchor, headings), f"{page.name} links to {target}, which has no such heading"


def commands(page: Path) -> list[list[str]]:
    """The words of every command of ours on a page, in a fence or between backticks, without comments."""
    text = page.read_text().replace("\\\n", " ")
    fences = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for fence in fences for line in fence.splitlines()]
    lines += [" ".join(inline.split()) for inline in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    words = [shlex.split(line, comments=True) for line in lines if re.match(r"\s*(python|torchrun) ", line)]
    return [command for command in words if program(command)]


def program(command: list[str]) -> str:
    """The file that a command runs, relative to the root; "" for what is not ours."""
    for before, word in zip(command, command[1:], strict=False):
        path = f"{word.replace('.', '/')}.py" if before == "-m" else word
        if path.endswith(".py") or before == "-m":
            return path if (ROOT / path).exists() else ""
    return ""


def flags_of(script: str) -> set[str]:
    fields = importlib.import_module(script).Args.__dataclass_fields__.keys()
    fields |= {alias for alias, field in ALIASES.items() if field in fields}
    return {name.replace("_", "-") for name in fields}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_the_flags_they_name(page):
    for command in commands(page):
        path = program(command)
        words = [word for word in command if word.startswith("--") and not word.startswith("--nproc_per_node")]
        flags = [word[2:].partition("=")[0] for word in words]
        known = {"help", "headless"}  # the second one is of Isaac Lab's launcher
        if Path(path).stem in SCRIPTS:
            known |= flags_of(Path(path).stem)
        elif flags:  # a benchmark hands what it does not know to the training it starts
            source = (ROOT / path).read_text() + (ROOT / "benchmark" / "tools.py").read_text()
            known |= set(re.findall(r'"--([\w-]+)"', source))
            known |= set.union(*(flags_of(name) for name in SCRIPTS if name in source))
        unknown = [flag for flag in flags if flag not in known and flag.removeprefix("no-") not in known]
        assert not unknown, f"{page.name}: {' '.join(command)}"


def test_flags_that_pages_mention_exist():
    """Those of our scripts and tools, or of pip, torchrun and diff."""
    foreign = {"nproc_per_node", "no-deps", "target", "extra-index-url", "ignore-requires-python", "git"}
    known = set.union(foreign, *(flags_of(name) for name in SCRIPTS))
    for path in [*ROOT.glob("benchmark/*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("*.py")]:
        known |= set(re.findall(r"--([a-z][\w-]+)", path.read_text()))
    flag = r"(?<![\w-])--([a-z][\w-]+)"
    mentioned = {(page.name, found) for page in PAGES for found in re.findall(flag, page.read_text())}
    assert {(page, flag) for page, flag in mentioned if not {flag, flag.removeprefix("no-")} & known} == set()


@pytest.mark.parametrize("script", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_map_of_a_script(script):
    """Parts follow one another, and between them stand only blank lines, comments and fences."""
    source = script.read_text()
    lines, drawn, before = source.splitlines(), make_pictures.parts(source), 0
    for first, last, name, kind in drawn:
        assert before < first <= last, name
        assert all(not line.strip() or line.strip().startswith("#") for line in lines[before : first - 1]), name
        assert kind in make_pictures.KINDS
        before = last
    assert before == len(lines)
    assert {"rollout", "update"} <= {name for *_, name, kind in drawn if kind == "loop"}


def test_what_a_script_imports():
    names = {path.name for path in make_pictures.imports(ROOT / "ppo_go2_mujoco.py")}
    assert {"checkpoint.py", "go2.py"} <= names and not {"isaac.py", "physics.py"} & names
