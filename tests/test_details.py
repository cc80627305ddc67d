"""docs/details.md matches the tags in the scripts, and each of the 37 details is there or has a reason."""

import pytest

from docs import make_details

SCRIPTS = [path.name for path in make_details.scripts()]


def test_the_page_is_up_to_date():
    assert make_details.PAGE.read_text() == make_details.page(), "run: python docs/make_details.py"


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_detail_is_tagged_or_has_a_reason(script):
    tagged = set(make_details.tags((make_details.ROOT / script).read_text()))
    reasons = make_details.REASONS.get(script, {})
    everything = set(range(1, 38))
    assert tagged <= everything, "tags outside 1..37"
    assert not tagged & set(reasons), "these are implemented, so their reason for absence is stale"
    assert tagged | set(reasons) == everything, "these have neither a tag nor a reason"
    assert all(reasons.values())


def test_reasons_are_of_scripts_that_exist():
    assert set(make_details.REASONS) <= set(SCRIPTS)


def test_tags():
    source = "x = 1  # detail 5: GAE\n# detail 28\ny = 2  # detail 5: bootstrap at the end.\n# details of no interest\n"
    assert make_details.tags(source) == {5: ["GAE", "bootstrap at the end"], 28: [""]}
    assert len(make_details.DETAILS) == 37
