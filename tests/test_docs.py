"""Links between the pages lead somewhere, and the map of a script leaves nothing out."""

import re
from pathlib import Path

import pytest

from docs import make_pictures

ROOT = Path(__file__).parents[1]
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
