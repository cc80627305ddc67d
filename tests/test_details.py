"""docs/details.md leads to the tagged lines of the scripts, and each of the 37 details is there or has a reason."""

import re

import pytest

from docs import make_details

SCRIPTS = [path.name for path in make_details.scripts()]
TEXT = make_details.PAGE.read_text()


def rows() -> dict[int, list[str]]:
    """{detail: its title and the cells of all scripts} as the page has them."""
    found = {}
    for row in re.findall(r"^\| (\d+) \| (.+) \|$", TEXT, re.MULTILINE):
        found[int(row[0])] = row[1].split(" | ")
    return found


def test_the_page_is_up_to_date():
    assert make_details.page() == TEXT, "run: python docs/make_details.py"


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_detail_is_tagged_or_has_a_reason(script):
    tagged = set(make_details.tags((make_details.ROOT / script).read_text()))
    reasons = make_details.REASONS.get(script, {})
    everything = set(range(1, 38))
    assert tagged <= everything, "tags outside 1..37"
    assert not tagged & set(reasons), "these are implemented, so their reason for absence is stale"
    assert tagged | set(reasons) == everything, "these have neither a tag nor a reason"
    assert set(make_details.NOTES.get(script, {})) <= tagged, "notes on details that the script does not have"
    assert all(reasons.values())


def test_reasons_are_of_scripts_that_exist():
    assert set(make_details.REASONS) | set(make_details.NOTES) <= set(SCRIPTS)


@pytest.mark.parametrize("column", range(len(SCRIPTS)), ids=SCRIPTS)
def test_links_lead_to_the_tags(column):
    lines = (make_details.ROOT / SCRIPTS[column]).read_text().splitlines()
    linked = set()
    for number, (_, *cells) in rows().items():
        links = re.findall(r"\[L(\d+)\]\(\.\./(.+?)#L(\d+)\)", cells[column])
        assert links or cells[column].startswith("none[^"), f"the cell of detail {number} leads nowhere"
        for text, file, line in links:
            assert text == line and file == SCRIPTS[column]
            assert re.search(rf"# detail {number}\b", lines[int(line) - 1]), f"line {line} is not tagged {number}"
            linked.add((number, int(line)))
    tagged = make_details.tags("\n".join(lines))
    assert linked == {(number, line) for number, places in tagged.items() for line, _ in places}


def test_the_table_has_37_rows_and_no_cell_repeats_a_title():
    table = rows()
    assert sorted(table) == list(range(1, 38))
    for title, *cells in table.values():
        assert len(cells) == len(SCRIPTS)
        for cell in cells:
            assert title.lower() not in cell.lower()


def test_footnotes_are_defined_and_used():
    used, defined = re.findall(r"\[\^(\d+)\](?!:)", TEXT), re.findall(r"^\[\^(\d+)\]:", TEXT, re.MULTILINE)
    assert list(dict.fromkeys(used)) == defined  # in the order in which they are first used
    for text, path, line in re.findall(r"\[(\S+ L\d+)\]\(\.\./(common/\S+?)#L(\d+)\)", TEXT):
        assert text.split()[0] == path.rpartition("/")[2]
        assert (make_details.ROOT / path).read_text().splitlines()[int(line) - 1].strip()
    assert "{" not in TEXT and "missing" not in TEXT


def test_tags():
    source = "x = 1  # detail 5: GAE\n# detail 28\ny = 2  # detail 5: bootstrap at the end.\n# details of no interest\n"
    assert make_details.tags(source) == {5: [(1, "GAE"), (3, "bootstrap at the end")], 28: [(2, "")]}
    assert len(make_details.DETAILS) == 37


def test_what_a_tag_says_stands_in_the_cell_if_it_is_news():
    assert make_details.news("separate networks", "whether policy and value share a network") == "separate networks"
    assert make_details.news("observation clipping", "clipping of normalised observations") == ""
    assert make_details.news("words " * 6, "a title") == ""


def test_a_link_to_words_that_are_gone():
    with pytest.raises(ValueError, match="no line with"):
        make_details.with_links("{README.md|this sentence stands nowhere in that file}")
