"""Sweeps: their cells, that several processes do each once though one is killed, and what the pages say."""

import json
import os
import pathlib
import re
import signal
import time
import types

import commands
import numpy as np
import pytest
from rich.console import Console

from experiments import cli, reproduce
from experiments.outputs import hooks, workdir
from experiments.sweeps import page, work
from experiments.sweeps.cells import DENSE, SWEEPS, Cell, cells_of, check, sweep
from experiments.training import loop
from experiments.utils import files

RUNS = pathlib.Path("runs/reproduce")


def command(directory, *flags, what="table4"):
    return commands.Command("experiments.reproduce", what, "--scale=smoke", f"--directory={directory}", *flags)


def done_in(output):
    return re.findall(r"^(table4-smoke/\S+): test_accuracy", output, flags=re.M)


@pytest.mark.long
def test_three_processes_do_each_cell_once_though_two_are_stopped(tmp_path):
    cells = cells_of(sweep("table4", "smoke"))
    processes = [command(tmp_path) for _ in range(3)]
    deadline = time.monotonic() + 120
    while not any(work.state(cell, tmp_path) == "started" for cell in cells):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    lock = next(tmp_path / c.folder / workdir.LOCK for c in cells if work.state(c, tmp_path) == "started")
    holder = next(p for p in processes if str(p.pid) == lock.read_text().strip())
    holder.kill()
    other = next(p for p in processes if p is not holder)
    os.kill(other.pid, signal.SIGTERM)  # which saves the run at hand, if it is at one
    ended = [process.finish() for process in processes]
    statuses = sorted(one.returncode for one in ended)
    stopped = [code for code in statuses if code not in (-signal.SIGKILL, 0)]
    assert stopped in ([-signal.SIGTERM], [cli.PREEMPTED]), [one.output for one in ended]
    assert statuses.count(0) == 1, statuses
    assert all(work.state(cell, tmp_path) == "done" for cell in cells)
    told = [name for one in ended for name in done_in(one.stdout)]
    assert len(told) == len(set(told)) >= len(cells) - 2  # each that was stopped may have done one and not said so
    for cell in cells:  # each step's row is there once
        rows = (tmp_path / cell.folder / workdir.METRICS).read_text().splitlines()
        steps = [json.loads(row)["step"] for row in rows]
        assert steps == sorted(set(steps))
    text = (tmp_path / "table4-smoke" / "table4.md").read_text()
    values = [json.loads((tmp_path / c.folder / "result.json").read_text())["metric"] for c in cells if c.block == 0]
    assert f"Dense: {100 * np.mean(values):.2f} ± {100 * np.std(values, ddof=1):.2f}; in the paper 76.9." in text
    again = command(tmp_path).finish()  # nothing is left
    assert again.returncode == 0
    assert not done_in(again.stdout)


def test_sigterm_at_the_end_of_a_run_ends_the_sweep(tmp_path, monkeypatch):
    done = []

    def run(setup, folder, console, compiled):  # like one in its last evaluation, which does not check for signals
        with hooks.Observer(folder, "a run", total_steps=1, metric="accuracy", console=console):
            os.kill(os.getpid(), signal.SIGTERM)
        done.append(folder)
        return {}

    monkeypatch.setattr(work.runs, "run", run)
    monkeypatch.setattr(work, "prepare", lambda config, dataset: types.SimpleNamespace(fingerprint=dict))
    before, results = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(loop.Preempted):
        results.extend(work.work(cells_of(sweep("table4", "smoke")), tmp_path, Console(quiet=True)))
    assert len(done) == 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_cell_is_a_run_of_the_main_command():
    for name in SWEEPS:
        for scale in ("paper", "small", "smoke"):
            cells = cells_of(sweep(name, scale, local="somewhere" if scale == "paper" else ""))
            assert len({cell.folder for cell in cells}) == len(cells)
            config = cells[-1].config()
            last = cells[-1]
            assert (config.sparsifier.block, config.sparsifier.sparsity) == ((last.block,) * 2, last.sparsity)
    assert "--config=configs/criteo_block10.py" in cells_of(sweep("table2", "paper"))[0].command(RUNS)
    words = Cell(sweep("table1", "paper", "data"), "ACDC", 16, 0.9, 0).command(RUNS)
    assert "--config.data.local=data --config.sparsifier.name=acdc '--config.sparsifier.block=(16, 16)'" in words


def fill(directory, one, values, weights=None):
    """Results of some cells; by variant and block, what each seed gave, None for a run that diverged; and weights."""
    for cell in cells_of(one):
        given = values.get((cell.variant, cell.block, cell.sparsity))
        if given is not None:
            value = given[cell.seed]
            folder = directory / cell.folder
            folder.mkdir(parents=True)
            result = {"metric": value, "loss": 1.0, "diverged": value is None, "seconds": 1, "metric_name": "m"}
            if weights:
                result["kept_weights"] = weights[cell.variant]
            (folder / workdir.RESULT).write_text(json.dumps(result))


def test_pages_show_the_papers_figures_spread_and_what_is_missing(tmp_path):
    one = sweep("table1", "small", seeds=3)
    values = {(DENSE, 0, 0.0): [0.9, 0.91, 0.92], ("SA++", 8, 0.9): [0.85, 0.86, 0.87]}
    values |= {("ACDC", 8, 0.9): [0.83, 0.84, 0.86], ("magnitude", 8, 0.9): [0.85, 0.87, 0.86]}
    values |= {("random", 8, 0.9): [None, None, None]}
    fill(tmp_path, one, values)
    first = cells_of(one)[-1]
    (tmp_path / first.folder).mkdir(parents=True)
    (tmp_path / first.folder / work.FAILED).write_text("Traceback")
    paths = page.write(one, tmp_path)
    text = paths[0].read_text()
    assert "| SA++ | 86.00 ± 1.00 (-5.00) | not run |" in text
    assert "| SA++, the paper's | 69.56 (-7.34) | diverged |" in text
    assert "| ACDC | 84.33 ± 1.53 (-6.67) |" in text
    assert "| random | diverged (3) |" in text
    # Differences by seed: 2, 2, 1 points against ACDC; 0, -1, 1 against magnitude.
    assert "| ACDC | 1 | 0 | 0 | +1.67 |" in text
    assert "| magnitude | 0 | 1 | 0 | +0.00 |" in text
    assert "12 done, 3 diverged, 1 failed" in text
    html = paths[1].read_text()
    assert "<td>86.00 ± 1.00 (-5.00)</td>" in html
    assert paths[2].stat().st_size > 20_000
    saved = json.loads(paths[3].read_text())
    rows = {(row["variant"], row["block"], row["sparsity"]): row["values"] for row in saved["rows"]}
    assert rows[DENSE, 0, 0.0] == [90.0, 91.0, 92.0]
    assert rows["random", 8, 0.9] == [None] * 3
    listed = paths[4].read_text().splitlines()
    assert len(listed) == len(cells_of(one))
    assert listed[0].startswith("done      python -m experiments.main --config=configs/fashion_mnist.py")


def test_weights_are_shown_beside_those_of_narrow(tmp_path):
    one = sweep("table1", "smoke", seeds=2)
    values = {(DENSE, 0, 0.0): [0.9, 0.92], ("SA++", 4, 0.8): [0.85, 0.87], ("narrow", 4, 0.8): [0.84, 0.85]}
    fill(tmp_path, one, values, {DENSE: 266_610, "SA++": 54_000, "narrow": 53_100})
    text = page.write(one, tmp_path)[0].read_text()
    assert "Weights kept, of 266,610" in text
    assert "| 4 × 4 | 54,000 / 53,100 |" in text
    assert "| 8 × 8 | ? / ? |" in text
    assert "| narrow | 84.50 ± 0.71 (-6.50) |" in text
    assert "| SA++ | narrow | 1 | 0 | 0 | +1.50 |" in text  # differences 1 and 2, standard error 0.5
    content = json.loads((tmp_path / one.folder / "table1.json").read_text())
    again = page.markdown(page.parts(*page.of_json(content)))
    assert "| 4 × 4 | 54,000 / 53,100 |" in again
    content["rows"] = [row for row in content["rows"] if row["variant"] != "narrow"]  # of before there was `narrow`
    older = page.markdown(page.parts(*page.of_json(content)))
    assert "| narrow | not run |" in older
    assert "| 4 × 4 | 54,000 / ? |" in older


def test_the_papers_tables_are_whole():
    shapes = {"table1": (2, 4, 4), "table2": (4, 3, 5), "table3": (2, 4, 4), "table4": (3, 4, 1)}
    for name, shape in shapes.items():
        values = [list(blocks.values()) for blocks in page.PAPER[name]["values"].values()]
        assert np.array(values, float).shape == shape
        known = {*sweep(name, "paper").options["variants"]}
        assert known == {*page.PAPER[name]["values"]}


def test_other_settings_are_refused(tmp_path):
    one = sweep("table3", "smoke")
    cell = cells_of(one)[0]
    (tmp_path / cell.folder).mkdir(parents=True)
    workdir.record_config(tmp_path / cell.folder, cell.config())
    check(cells_of(one), tmp_path)
    changed = one._replace(options=one.options | {"changes": {**one.options["changes"], "steps": 50}})
    with pytest.raises(ValueError, match=r"holds a run with another config .*steps: 60 there, 50 now"):
        check(cells_of(changed), tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\0\0\xff", b'{"metric": 1}'])
def test_a_damaged_result_is_made_again_and_stops_nothing(tmp_path, content, monkeypatch, caplog):
    cells = cells_of(sweep("table4", "smoke"))[:3]
    for cell in cells:
        (tmp_path / cell.folder).mkdir(parents=True)
    workdir.record_config(tmp_path / cells[0].folder, cells[0].config())
    (tmp_path / cells[0].folder / workdir.RESULT).write_bytes(content)
    (tmp_path / cells[1].folder / workdir.CONFIG).write_bytes(content)
    check(cells, tmp_path)
    assert [work.state(cell, tmp_path) for cell in cells] == ["started", "started", "waiting"]
    done = {"metric": 1.0, "metric_name": "m", "loss": 0.0, "diverged": False, "seconds": 1.0}

    def run(setup, folder, console, compiled):
        files.write_json(folder / workdir.RESULT, done)
        return done

    monkeypatch.setattr(work.runs, "run", run)
    monkeypatch.setattr(work, "prepare", lambda config, dataset: types.SimpleNamespace(fingerprint=dict))
    told = list(work.work(cells, tmp_path, Console(quiet=True)))
    assert [cell for cell, _ in told] == [cells[0], cells[2]]
    assert [work.state(cell, tmp_path) for cell in cells] == ["done", "failed", "done"]
    assert f"{cells[0].folder / workdir.RESULT} is damaged" in caplog.text


@pytest.mark.parametrize(
    ("what", "flags", "match"),
    [
        ("table5", [], "what to reproduce='table5' is unknown; did you mean 'table4'"),
        ("table1", ["--scale=large"], "--scale='large' is unknown; did you mean 'paper'"),
        ("table1", ["--scale=small", "--local=nowhere"], "nowhere"),
        ("table1", ["--jobs=x"], "'x' is not a whole number"),
    ],
)
def test_what_cannot_be_reproduced_is_said(tmp_path, what, flags, match):
    done = command(tmp_path / "out", *flags, what=what).finish()
    assert done.returncode == 2
    assert match in done.stderr, done.output
    assert not (tmp_path / "out").exists()


def test_each_table_finds_its_own_data():
    local = reproduce._local(["pictures", "table2=clicks=1"])
    assert local == {"": "pictures", "table2": "clicks=1"}
    assert sweep("table2", "small", "pictures").local == ""  # planted features need no files
    assert sweep("table2", "paper", "clicks").local == "clicks"


def test_a_plan_is_told_and_a_figure_without_runs_is_drawn(tmp_path):
    done = command(tmp_path, "--plan", what="table4").finish()
    assert done.returncode == 0, done.output
    assert re.search(r"table4-smoke\s+│ 8\s+│ 8\s+│ 60\s+│ 0\.\d", done.stdout), done.stdout
    assert not any(tmp_path.iterdir())
    assert "No runs are needed" in command(tmp_path, "--plan", what="figure2").finish().stdout
    assert command(tmp_path, what="figure2").finish().returncode == 0
    assert (tmp_path / "figure2.png").stat().st_size > 20_000
