"""Tables from CSV files, and runs that keep exactly so many of their columns."""

import csv
import gzip
import json

import jax
import numpy as np
import pytest
from rich.console import Console

from configs import feature_selection
from experiments import runs
from experiments.data import Arrays, Dataset, catalog
from experiments.outputs import workdir
from experiments.training import sharding
from experiments.training.setup import prepare
from sa_plus_plus import select

pytestmark = pytest.mark.usefixtures("standard_promotion")
ROWS, COLUMNS, PLANTED = 600, 20, ("c3", "c11", "c17")


def write(path, names, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    return str(path)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Labels depend on three of twenty columns, of very different scales."""
    x = np.random.default_rng(0).normal(size=(ROWS, COLUMNS))
    names = [f"c{i}" for i in range(COLUMNS)]
    positive = sum(x[:, names.index(name)] for name in PLANTED) > 0
    scaled = x * 10.0 ** np.arange(-3, 3).repeat(4)[:COLUMNS] + 5
    rows = [[*values, "yes" if label else "no"] for values, label in zip(scaled.tolist(), positive, strict=True)]
    return write(tmp_path_factory.mktemp("planted") / "table.csv", [*names, "bought"], rows)


def config_of(path, features=3, name="sequential_attention", changes=()):
    config = feature_selection.get_config()
    config.data.local, config.features, config.sparsifier.name = path, features, name
    config.dense_twin = False
    config.epochs, config.steps, config.batch_size = 0.0, 150, 96
    config.optimizer.learning_rate = 0.02
    config.update_from_flattened_dict(dict(changes))
    return config


def test_the_planted_columns_are_kept_and_named(planted, tmp_path):
    one_device = sharding.make_mesh(devices=jax.devices()[:1])
    setup = prepare(config_of(planted), one_device)
    result = runs.run(setup, tmp_path, Console(quiet=True))
    chosen = json.loads((tmp_path / workdir.FEATURES).read_text())
    assert {row["name"] for row in chosen} == set(PLANTED)
    assert [row["name"] for row in chosen] == [f"c{row['index']}" for row in chosen]
    norms = [row["norm"] for row in chosen]
    assert norms == sorted(norms, reverse=True)
    assert min(norms) > 0
    assert result["metric"] > 0.9
    assert result["target_sparsity"] == 17 / 20


@pytest.mark.parametrize("features", [1, 7, 20])
@pytest.mark.parametrize("name", ["acdc", "gradual_magnitude", "magnitude", "random", "sequential_attention"])
def test_exactly_so_many_features_are_planned(planted, features, name):
    (layer,) = prepare(config_of(planted, features, name)).plan.pruned.values()
    assert (layer.path, layer.grid, layer.kept) == ("Dense_0/kernel", (COLUMNS, 1), features)


def test_the_sparsity_nearest_to_a_share_keeps_exactly_so_many():
    rng = np.random.default_rng(0)
    for count in (3, 49, 784, 999, 10_007, 100_003):
        for features in {1, count, *rng.integers(1, count, 200).tolist()}:
            assert select.kept_blocks(count, (count - features) / count) == features


def test_pixels_are_features_too():
    image = np.random.default_rng(0).integers(0, 256, (200, 4, 5, 1), np.uint8)
    part = Arrays({"image": image, "label": (image[:, 1, 2, 0] > 127).astype(np.int32)})
    config = config_of("", 2)
    setup = prepare(config, dataset=Dataset(part, part, 2))
    assert setup.task.dataset.features[7] == "1,2,0"
    assert setup.plan.pruned["Dense_0/kernel"].kept == 2


def test_rows_are_standardised_by_the_training_rows_and_missing_values_are_their_mean(tmp_path):
    rng = np.random.default_rng(1)
    x = rng.normal(3, 2, (50, 2))
    text = x.astype(str)
    missing = rng.random((50, 2)) < 0.2
    text[missing] = rng.choice(["", "nan", "NA"], missing.sum())
    rows = [[*values, 7, label] for values, label in zip(text, rng.choice(["a", "b", "c"], 50), strict=True)]
    dataset = catalog.table(write(tmp_path / "t.csv", ["u", "v", "constant", "y"], rows))
    assert dataset.columns == dataset.features == ("u", "v", "constant")
    assert (len(dataset.train), len(dataset.test), dataset.classes) == (40, 10, 3)
    train, test = dataset.train.arrays, dataset.test.arrays
    assert train["row"].dtype == np.float32
    np.testing.assert_allclose(train["row"].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(train["row"].std(0), [1, 1, 0], atol=1e-6)
    assert np.isfinite(test["row"]).all()
    both = np.concatenate([train["row"], test["row"]])
    assert (both[:, :2] == 0).sum() == missing.sum()  # filled with the mean, which is 0 now
    again = catalog.table(str(tmp_path / "t.csv")).test.arrays["row"]
    np.testing.assert_array_equal(again, test["row"])
    assert np.any(catalog.table(str(tmp_path / "t.csv"), seed=1).test.arrays["row"] != test["row"])


def test_no_group_is_on_both_sides_and_named_columns_are_no_features(tmp_path):
    rng = np.random.default_rng(2)
    groups = rng.integers(0, 12, 200)
    rows = [[f"patient {g}", g, rng.choice(["no", "yes"]), f"2020-01-{g + 1:02}"] for g in groups]
    path = write(tmp_path / "t.csv", ["who", "number", "ill", "day"], rows)
    dataset = catalog.table(path, target="ill", group="who", ignore="day")
    assert dataset.columns == ("number",)
    train, test = (set(part.arrays["row"][:, 0].tolist()) for part in (dataset.train, dataset.test))
    assert len(train | test) == 12
    assert not train & test


def test_labels_are_text_whatever_they_look_like(tmp_path):
    rows = [[i, ["1", "1.0", "nan"][i % 3]] for i in range(30)]
    dataset = catalog.table(write(tmp_path / "t.csv", ["x", "y"], rows), target="y")
    assert dataset.classes == 3


def test_a_column_may_turn_out_to_be_fractional_late_in_a_long_file(tmp_path):
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(("x,y\n" + "1000000,a\n" * 150_000 + "0.5,b\n" * 10).encode(), 1))
    dataset = catalog.table(str(path))
    assert len(np.unique(dataset.train.arrays["row"])) == 2


GOOD = [["1", "2", "a"], ["2", "1", "b"], ["3", "5", "a"], ["4", "4", "b"], ["5", "0", "a"]]


def with_column(values):
    return [[value, *row[1:]] for value, row in zip(values, GOOD, strict=True)]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (GOOD, {"target": "z"}, "has no column 'z'; did you mean"),
        (GOOD, {"group": "ww"}, "has no column 'ww'; did you mean 'w'"),
        (GOOD, {"target": "y", "group": "y"}, "column 'y' is the target"),
        (GOOD, {"ignore": "w,x"}, "there is no feature"),
        (GOOD, {"held_out": 1.5}, "must be in \\(0, 1\\), got 1.5"),
        (with_column(["1", "2", "red", "4", "5"]), {}, "column 'w' of .* is not numeric, it has 'red'"),
        (with_column(["1", "2", "inf", "4", "5"]), {}, "column 'w' of .* is infinite in row 3"),
        (with_column(["", "nan", "NA", "", ""]), {}, "column 'w' of .* has no value in any training row"),
        ([[*row[:2], "a"] for row in GOOD], {}, "target 'y' of .* has one class only, 'a'"),
        ([[*row[:2], row[0]] for row in GOOD], {}, "target 'y' of .* has another label in each row"),
        ([*GOOD, ["1", "1", ""]], {}, "row 6 of .* has no label"),
        ([[*row[:1], "3", *row[2:]] for row in GOOD], {"group": "x"}, "all rows of .* are of one group, '3'"),
        ([], {}, "has a header but no rows"),
        ([["1", "2", "a"]], {}, "one class only"),
        ([*GOOD, ["1", "2"]], {}, "cannot be read as a CSV file"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=message):
        catalog.table(write(tmp_path / "t.csv", ["w", "x", "y"], rows), **options)


def test_what_is_wrong_with_a_file_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="should be a CSV file with a header"):
        catalog.table(str(tmp_path / "none.csv"))
    with pytest.raises(ValueError, match=r"say where it is, `local`"):
        catalog.table()
    with pytest.raises(ValueError, match="two columns 'w'"):
        catalog.table(write(tmp_path / "t.csv", ["w", "w", "y"], GOOD))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": 21}, "config.features=21 must be from 1 to the 20 features"),
        ({"features": 0}, "config.features=0 must be from 1 to the 20 features"),
        ({"sparsifier.block": (1, 4)}, "rows of the first kernel alone"),
        ({"sparsifier.include": ""}, "rows of the first kernel alone"),
    ],
)
def test_what_is_wrong_with_the_number_of_features_is_said(planted, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(config_of(planted, changes=changes))
