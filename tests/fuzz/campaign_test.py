"""The campaign of random inputs: it goes on where it was stopped, and counts what it did."""

import itertools
import json
import sys
import types

import pytest


@pytest.fixture
def campaign(monkeypatch):
    """The script, with readers that pass or fail as a test wants."""
    monkeypatch.setitem(sys.modules, "file_fuzz", types.SimpleNamespace(run=lambda seed, count: {"refused": count}))
    monkeypatch.delitem(sys.modules, "campaign_fuzz", raising=False)
    import campaign_fuzz  # noqa: PLC0415 - after its readers

    yield campaign_fuzz
    sys.modules.pop("campaign_fuzz", None)


def parts(campaign):
    """Three kinds of inputs, of which one fails in round 1."""
    return {
        "calls": lambda seed: ({"pooling checked": 10 + seed, "pooling accepted": 5, "pooling computed": 2}, ""),
        "products": lambda seed: ({"failed": 1}, "a wrong number") if seed == 1 else ({"computed": 3}, ""),
        "files": campaign.read,
    }


@pytest.mark.parametrize("stopped", [1, 2, 3, 4, 7])
def test_it_goes_on_where_it_was_stopped(campaign, stopped):
    whole, first = campaign.empty(), campaign.empty()
    said = list(itertools.islice(campaign.rounds(whole, parts(campaign)), 9))
    before = list(itertools.islice(campaign.rounds(first, parts(campaign)), stopped))
    again = json.loads(json.dumps(first))  # as it is stored after each part
    after = list(itertools.islice(campaign.rounds(again, parts(campaign)), 9 - stopped))
    assert again == whole
    assert before + after == said
    assert whole["rounds"] == 3
    assert whole["failures"] == [{"part": "products", "seed": 1, "output": "a wrong number"}]
    assert campaign.inputs(whole["counts"]) == {"calls": 33, "products": 7, "files": 3 * campaign.FILES}


def test_states_are_added_up(campaign, tmp_path, monkeypatch):
    saved = {}
    monkeypatch.setattr(campaign.timing, "save", lambda name, content: saved.update(content))
    paths = [tmp_path / "one.json", tmp_path / "two.json"]
    for path, count in zip(paths, (3, 6), strict=True):
        state = campaign.empty()
        list(itertools.islice(campaign.rounds(state, parts(campaign)), count))
        path.write_text(json.dumps(state))
    campaign.save(paths)
    assert saved["inputs"] == sum(saved["inputs_by_kind"].values()) == 10 + 10 + 11 + 3 + 4 + 3 * campaign.FILES
    assert saved["rounds"] == 3
    assert len(saved["failures"]) == 1


def test_a_failure_of_the_readers_names_how_to_repeat_it(campaign, monkeypatch):
    def run(seed, count):
        raise AssertionError("KeyError: 'view'")

    monkeypatch.setattr(campaign.file_fuzz, "run", run)
    counts, failure = campaign.read(5)
    assert counts == {"failed": 1}
    assert failure == f"file_fuzz.run(5, {campaign.FILES})\nKeyError: 'view'"
