"""Pruned against smaller dense networks: who is ahead, which dense network is as good, and what the page says."""

import json
import math
import re

import numpy as np
import pytest

from benchmarks import tables, timing, worth_it
from benchmarks.worth_it import CAPPED, DENSE, NARROW, RECOMMENDED, Measured


def measured(weights, *values):
    return Measured(weights, np.array(values))


def test_the_equal_dense_network_is_interpolated_against_the_logarithm():
    dense = [measured(1_000, 80.0), measured(100_000, 90.0), measured(10_000, 84.0)]
    assert worth_it.equal_dense(87.0, dense, False) == ("=", pytest.approx(10_000 * math.sqrt(10)))
    assert worth_it.equal_dense(84.0, dense, False) == ("=", pytest.approx(10_000))
    assert worth_it.equal_dense(79.9, dense, False) == ("<", pytest.approx(1_000))
    assert worth_it.equal_dense(90.1, dense, False) == (">", pytest.approx(100_000))
    lower = [measured(each.weights, -each.values[0]) for each in dense]
    assert worth_it.equal_dense(-87.0, lower, True) == ("=", pytest.approx(10_000 * math.sqrt(10)))
    worse = [*dense, measured(20_000, 82.0)]  # no better than the one of half its size, and not counted as worse
    assert worth_it.equal_dense(83.0, worse, False)[1] < 10_000
    assert worth_it.equal_dense(84.1, worse, False)[1] > 20_000


@pytest.mark.parametrize(
    ("pruned", "lower", "text"),
    [
        ([3.0, 4.0, 5.0], False, "**+2.00 ± 0.58, pruned**"),  # differences 1, 2, 3: deviation 1, error 1/√3
        ([3.0, 4.0, 5.0], True, "**+2.00 ± 0.58, narrow**"),
        ([1.0, 0.0, -1.0], True, "**-2.00 ± 0.58, pruned**"),
        ([2.0, 1.0, 3.0], False, "+0.00 ± 0.58, level"),
    ],
)
def test_differences_are_judged_by_two_standard_errors(pruned, lower, text):
    dense = np.array([2.0, 2.0, 2.0])
    assert worth_it.difference(np.array(pruned), dense, 2, lower) == text


def test_one_seed_decides_nothing():
    assert worth_it.difference(np.array([3.0]), np.array([2.0]), 2, False) == "+1.00, one seed"
    assert worth_it.summary([{"SA++ minus narrow": "+1.00, one seed"}]) == "One seed decides nothing."


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "RESULTS", tmp_path)

    def write(name, rows):
        keys = ("variant", "block", "sparsity", "weights", "values")
        rows = [{k: v for k, v in zip(keys, row, strict=True) if v is not None} for row in rows]
        (tmp_path / f"{name}_small.json").write_text(json.dumps({"name": name, "scale": "small", "rows": rows}))

    return write


def test_a_row_is_against_the_better_of_the_narrow_networks(results):
    results(
        "table1",
        [
            (DENSE, 0, 0.0, 100_000, [90.0, 90.0]),
            (RECOMMENDED, 8, 0.9, 10_000, [86.0, 88.0]),
            (RECOMMENDED, 8, 0.95, 5_000, [86.0, 86.0]),
            (NARROW, 8, 0.9, 9_900, [80.0, 81.0]),
            (CAPPED, 8, 0.9, 9_800, [85.0, 85.0]),
            (NARROW, 8, 0.95, 4_900, [None, 81.0]),  # a run that diverged: not shown
            ("random", 8, 0.9, None, [80.0, 80.0]),  # of a file from before weights were counted
        ],
    )
    (row,) = worth_it.rows_of(worth_it.NETWORKS["fashion"])
    assert row["blocks"] == "8 × 8, 90%"
    assert row["SA++ minus narrow"] == "+2.00 ± 1.00, level"
    assert row["narrow, capped"] == "85.00 ± 0.00"
    assert "gradual magnitude" not in row
    # From 85 with 9,800 weights to 90 with 100,000: 87 is two fifths of the way.
    assert row["dense needs"] == f"{9_800 * (100_000 / 9_800) ** 0.4 / 10_000:.1f} ×"
    assert worth_it.summary([row]) == "The pruned network is ahead in 0 of 1 cells, level in 1, behind in 0."
    assert worth_it.rows_of(worth_it.NETWORKS["cifar10"]) == []


def test_embedding_tables_are_not_counted(results):
    network = worth_it.NETWORKS["clicks"]
    assert network.aside == 78_000
    dense = (DENSE, 0, 0.0, 234_801, [0.4, 0.4])
    results("table2", [dense, (RECOMMENDED, 5, 0.9, 94_401, [0.4, 0.5]), (NARROW, 5, 0.9, 94_073, [0.3, 0.3])])
    (row,) = worth_it.rows_of(network)
    assert row["weights"] == "16,401"
    assert row["dense needs"].startswith("< 1.0")


def test_the_larger_network_keeps_as_many_weights():
    config, weights = worth_it.Job(8, 0.9).config()
    assert config.model_options.widths == (1024, 512)
    total, kept = 0, round(1000 * (1 - config.sparsifier.sparsity))
    for rows, columns in ((784, 1024), (1024, 512)):
        count = rows // 8 * columns // 8
        total += count * kept // 1000 * 64 + columns
    total += 512 * 10 + 10  # the last layer
    assert weights == total <= 27_881


def test_the_page_is_that_of_the_results():
    page = worth_it.PAGE.read_text()
    larger = json.loads((timing.RESULTS / "worth_it.json").read_text())["larger"]
    found = worth_it.tables(larger)
    assert set(found) == set(re.findall(r"<!-- end of (\w+) -->", page)) - {"resnet50"}
    for name, text in found.items():
        assert tables.filled(page, name, text) == page, f"{name}: run `python -m benchmarks.worth_it --report`"


def test_published_figures_are_on_the_page():
    page = worth_it.PAGE.read_text()
    for words in ("ResNet-18 | 69.8 | 11.7 | 1.81", "ResNet-34 | 73.3 | 21.8 | 3.66", "ResNet-50 | 76.1 | 25.6 | 4.09"):
        assert f"| dense {words} |" in page
    # 25.5 million kernel weights of which 89.63% are gone, as Table 1 has it, and 54,120 others.
    assert "| ResNet-50, 16 × 16, 90% | 69.9 | 2.7 | 0.80 |" in page
