"""The search over recipes: what is chosen, and who does what."""

import json

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from benchmarks import recipes, tables
from experiments.data.from_text import Windows
from experiments.data.sources import Arrays, Dataset
from experiments.outputs import workdir


def rows(stage, values):
    """A row a job, by the variant's values for the cells in their order."""
    return [
        {**job.cell._asdict(), "variant": job.variant, "values": [values[job.variant][i]] * 2}
        for i, cell in enumerate(recipes.CHOOSING)
        for job in recipes.jobs(stage)
        if job.cell == cell
    ]


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    monkeypatch.setattr(recipes.timing, "RESULTS", tmp_path)  # without earlier results
    recipes.earlier.cache_clear()
    with flagsaver.flagsaver(directory=str(tmp_path), data=["fashion_mnist", "planted"]):
        yield tmp_path
    recipes.earlier.cache_clear()


def test_the_best_of_each_family_by_its_mean_share_is_chosen():
    values = {job.variant: [0.5, 0.5, 0.5, 0.5] for job in recipes.jobs("choose")}
    values |= {"random": [0.0, 0.4, 0.0, 0.4], "dense": [1.0, 0.6, 1.0, 0.6]}
    values["rise 0-50"] = [0.4, 0.58, 0.4, 0.58]  # shares 0.4 and 0.9, where the others have 0.5
    values["effective, paper, 1"] = [0.7, 0.5, 0.7, 0.5]
    found = recipes.chosen(rows("choose", values))
    assert found == {"SA++": "effective, paper, 1", "gradual magnitude": "rise 0-50"}
    lines = {line["variant"]: line for line in recipes.table(rows("choose", values), "rise 0-50")}
    assert lines["rise 0-50"]["share"] == "0.650"
    assert lines["effective, paper, 1"]["planted 20 × 20 98%"] == "50.00 ± 0.00 (-8.00 ± 0.00)"


def test_without_a_random_mask_there_are_no_shares_and_nothing_is_chosen():
    values = {job.variant: [0.5, 0.5, 0.5, 0.5] for job in recipes.jobs("choose")}
    some = [row for row in rows("choose", values) if row["variant"] != "random"]
    assert recipes.chosen(some) == {}
    with flagsaver.flagsaver(name="without_shares"):  # a name that has no tables on the page
        recipes.summarise(some, [])
    found = json.loads((recipes.timing.RESULTS / "without_shares.json").read_text())
    assert (found["chosen"], found["choosing"]) == ({}, some)


def test_choosing_and_confirming_share_neither_cells_nor_seeds_nor_files():
    assert not set(recipes.CHOOSING) & set(recipes.CONFIRMING)
    assert not set(recipes.SEEDS["choose"]) & set(recipes.SEEDS["confirm"])
    found = {family: next(iter(own)) for family, own in recipes.variants().items()}
    both = [*recipes.jobs("choose"), *recipes.jobs("confirm", found)]
    assert len({job.file for job in both}) == len(both)


def test_variants_are_confirmed_by_their_names():
    found = recipes.named(["rise 0-50", "rigl"])
    assert {job.cell for job in found} == {cell for cell in recipes.CONFIRMING if cell.data != "bytes"}
    assert {(job.stage, job.variant) for job in found} == {("confirm", "rise 0-50"), ("confirm", "rigl")}
    with pytest.raises(recipes.app.UsageError, match=r"--confirm=luck: no such variant.*rise 0-50; "):
        recipes.named(["luck"])


def test_a_job_is_done_once_and_taken_over_from_the_dead(monkeypatch):
    job, _ = recipes.jobs("choose")[:2]
    monkeypatch.setattr(recipes, "measure", lambda job: {"variant": job.variant})
    with workdir.claim(job.file.parent):  # as another process would; the lock ends with the process
        assert recipes.done(job) is None
    assert recipes.done(job) == {"variant": job.variant}
    monkeypatch.setattr(recipes, "measure", lambda job: pytest.fail("done twice"))
    assert recipes.done(job) is None


def test_work_ends_when_all_is_done_and_a_failure_leaves_no_claim(monkeypatch):
    jobs = recipes.jobs("choose")[:3]
    monkeypatch.setattr(recipes, "measure", lambda job: {"variant": job.variant})
    assert len(list(recipes.work(jobs))) == 3
    assert [json.loads(job.file.read_text()) for job in jobs] == recipes.results(jobs)
    assert list(recipes.work(jobs)) == []

    def fails(job):
        raise FloatingPointError

    monkeypatch.setattr(recipes, "measure", fails)
    other = recipes.jobs("choose")[5:6]
    with pytest.raises(FloatingPointError):
        list(recipes.work(other))
    monkeypatch.setattr(recipes, "measure", lambda job: {"variant": job.variant})
    assert recipes.done(other[0])


def test_examples_to_choose_on_are_not_trained_on(monkeypatch):
    numbers = np.arange(110_000)
    whole = Dataset(Arrays({"n": numbers}), Arrays({"n": -numbers[1:9]}), classes=2)
    monkeypatch.setattr(recipes.tasks, "dataset_of", lambda config: whole)
    recipes.dataset.cache_clear()
    choosing = recipes.dataset("planted", "choose")
    np.testing.assert_array_equal(choosing.train.arrays["n"], numbers[:10_000])
    np.testing.assert_array_equal(choosing.test.arrays["n"], numbers[10_000:])
    assert recipes.dataset("planted", "confirm") is whole
    text = (numbers[:100_000] % 251).astype(np.uint8).tobytes()
    whole = Dataset(Windows(text, 40, varied=True), Windows(b"test" * 10, 40), classes=256)
    choosing = recipes.dataset("bytes", "choose")
    cut = 40 * recipes.HELD_OUT["bytes"]
    assert (len(choosing.train), len(choosing.test)) == (500, 2000)
    rows = np.arange(2000)
    targets = [
        part.gather(rows[: len(part)])["targets"].reshape(-1).tolist() for part in (choosing.train, choosing.test)
    ]
    assert targets == [list(text[:-cut]), list(text[-cut:])]
    assert (choosing.train.draws, choosing.test.draws) == (1, 0)
    recipes.dataset.cache_clear()


def test_runs_in_the_results_are_not_trained_again(monkeypatch, tmp_path):
    monkeypatch.setattr(recipes, "measure", lambda job: {"variant": job.variant})
    first, second, third = recipes.jobs("choose")[:3]
    kept = {"stage": "choose", **first.cell._asdict(), "variant": first.variant, "changes": dict(first.changes)}
    kept["steps"] = 4000
    other = kept | {"variant": second.variant, "changes": {"name": "other options"}}
    (tmp_path / "recipes.json").write_text(json.dumps({"choosing": [kept, other], "confirming": []}))
    with flagsaver.flagsaver(only=[second.file.parent.name, first.file.parent.name]):
        assert list(recipes.work([first, second, third])) == [{"variant": second.variant}]
    assert recipes.results([first, second, third]) == [kept, {"variant": second.variant}]
    with flagsaver.flagsaver(fashion_steps=100):
        assert recipes.result(first) is None


def test_tables_are_put_between_their_marks():
    page = "a\n<!-- x -->\nold\n<!-- end of x -->\nb\n"
    table = tables.markdown([{"variant": "v", "share": "1"}])
    assert tables.filled(page, "x", table) == page.replace("old", "| variant | share |\n| --- | --- |\n| v | 1 |")
    with pytest.raises(ValueError, match="no marks for the table 'y'"):
        tables.filled(page, "y", table)
