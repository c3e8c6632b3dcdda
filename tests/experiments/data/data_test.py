"""Data sets against independent readings, and batches: who sees which example when, and going on from a checkpoint."""

import functools
import gzip
import io
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
import tarfile

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from commands import ROOT
from PIL import Image
from real_data import FILES, needs

from configs import cifar10, fashion_mnist
from experiments import data, tasks
from experiments.data import catalog
from experiments.training.setup import prepare

CLOTHES, DIGITS = FILES / "fashion_mnist", FILES / "mnist"
CIFAR10 = FILES / "cifar10_jpeg" / "cifar10_jpeg.tar.xz"


class Reads:
    """Numbered records read one by one, with a count of the readings."""

    def __init__(self, n):
        self.n, self.count = n, 0

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.count += 1
        return {"x": i, "y": [i, -i]}


def numbers(n):
    """The same as arrays."""
    x = np.arange(n)
    return data.Arrays({"x": x, "y": np.stack([x, -x], axis=1)})


def assert_same(a, b):
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name])


def take(iterator, steps):
    return [next(iterator) for _ in range(steps)]


@st.composite
def streams(draw):
    """Number of examples, hosts, batch size that they can share."""
    hosts = draw(st.integers(1, 4))
    each = draw(st.integers(1, 10))
    return draw(st.integers(hosts * each, 60)), hosts, hosts * each


seeds = st.integers(0, 2**31 - 1)


@hypothesis.given(stream=streams(), seed=seeds, steps=st.integers(1, 30))
def test_every_example_once_an_epoch_in_the_order_of_seed_and_epoch(stream, seed, steps):
    n, _, batch_size = stream
    batches = take(data.train_iterator(numbers(n), batch_size, seed), steps)
    seen = np.concatenate([batch["x"] for batch in batches])
    np.testing.assert_array_equal(np.concatenate([batch["y"] for batch in batches]), np.stack([seen, -seen], axis=1))
    assert all(len(batch["x"]) == batch_size for batch in batches)
    for epoch in range(math.ceil(len(seen) / n)):
        expected = np.random.default_rng((seed, epoch)).permutation(n)
        part = seen[epoch * n : (epoch + 1) * n]
        np.testing.assert_array_equal(part, expected[: len(part)])
        assert len(part) < n or set(part) == set(range(n))


@hypothesis.given(stream=streams(), seed=seeds)
def test_hosts_share_the_global_batch_in_order(stream, seed):
    n, hosts, batch_size = stream
    alone = take(data.train_iterator(numbers(n), batch_size, seed), 9)
    together = [take(data.train_iterator(numbers(n), batch_size, seed, host, hosts), 9) for host in range(hosts)]
    for step, expected in enumerate(alone):
        parts = [batches[step]["x"] for batches in together]
        assert {len(part) for part in parts} == {batch_size // hosts}
        np.testing.assert_array_equal(np.concatenate(parts), expected["x"])


@hypothesis.given(stream=streams(), seed=seeds, at=st.integers(0, 12), elsewhere=st.integers(0, 12), lazy=st.booleans())
def test_goes_on_from_any_state_on_any_number_of_hosts(stream, seed, at, elsewhere, lazy):
    n, hosts, batch_size = stream
    source = data.Records(Reads(n)) if lazy else numbers(n)
    original = data.train_iterator(source, batch_size, seed)
    take(original, at)
    state = json.loads(json.dumps(original.get_state()))
    expected = take(original, 5)
    assert original.get_state()["step"] == at + 5
    for host in range(hosts):
        resumed = data.train_iterator(source, batch_size, seed, host, hosts)
        take(resumed, elsewhere)
        resumed.set_state(state)
        assert resumed.get_state() == state
        part = slice(host * batch_size // hosts, (host + 1) * batch_size // hosts)
        for batch in expected:
            assert_same(next(resumed), {name: values[part] for name, values in batch.items()})


@pytest.mark.parametrize("changed", [{"seed": 1}, {"batch_size": 4}, {"n": 11}])
def test_state_of_another_stream_is_refused(changed):
    def stream(n=12, batch_size=3, seed=0):
        return data.train_iterator(numbers(n), batch_size, seed)

    with pytest.raises(ValueError, match="belongs to a stream with"):
        stream().set_state(stream(**changed).get_state())


def test_a_closed_iterator_has_no_batches():
    iterator = data.train_iterator(numbers(12), 3, 0)
    take(iterator, 2)
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


def test_records_are_batched_like_arrays_and_read_when_wanted():
    reads = Reads(50)
    lazy = data.train_iterator(data.Records(reads), 7, 3)
    assert reads.count == 0
    for expected in take(data.train_iterator(numbers(50), 7, 3), 40):
        assert_same(next(lazy), expected)
    assert reads.count <= (40 + 20) * 7, "reads ahead without bound"
    doubled = data.Records(reads, lambda record: {"x": 2 * record["x"]})
    np.testing.assert_array_equal(doubled.gather(np.array([4, 2])).pop("x"), [8, 4])


def test_records_that_differ_in_shape_make_no_batch():
    with pytest.raises(ValueError, match=r"'x' differ in shape make no batch: \(2,\), \(3,\)"):
        data.Records([{"x": np.zeros(2)}, {"x": np.zeros(3)}]).gather(np.arange(2))


def test_arrays_are_of_one_length_and_read_only():
    with pytest.raises(ValueError, match="one length"):
        data.Arrays({"x": np.zeros(2), "y": np.zeros(3)})
    mine = np.zeros(3)
    source = data.Arrays({"x": mine})
    with pytest.raises(ValueError, match="read-only"):
        source.arrays["x"][0] = 1
    mine[0] = 1  # still writable to its owner


@hypothesis.given(
    n=st.integers(1, 50), hosts=st.integers(1, 4), each=st.integers(1, 20), lazy=st.booleans(), times=st.integers(1, 2)
)
def test_evaluation_sees_every_example_once(n, hosts, each, lazy, times):
    source, batch_size = data.Records(Reads(n)) if lazy else numbers(n), hosts * each
    evaluations = [data.eval_batches(source, batch_size, host, hosts) for host in range(hosts)]
    for _ in range(times):
        parts = [list(batches) for batches in evaluations]
    assert [len(part) for part in parts] == [math.ceil(n / batch_size)] * hosts
    seen = []
    for step in zip(*parts, strict=True):
        for batch in step:
            assert len(batch["x"]) == len(batch["weight"]) == each
            np.testing.assert_array_equal(batch["y"], np.stack([batch["x"], -batch["x"]], axis=1))
            seen += batch["x"][batch["weight"] == 1].tolist()
            assert set(batch["weight"]) <= {0, 1}
            assert set(batch["x"][batch["weight"] == 0]) <= {n - 1}
    assert seen == list(range(n))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((13,), "between 1 and the 12 training examples, got 13"),
        ((0,), "got 0"),
        ((6, 0, 0, 4), "6 cannot be dealt out evenly to 4 processes"),
        ((6, 0, 2, 2), "process_index must be between 0 and 1, got 2"),
    ],
)
def test_batches_that_cannot_be(arguments, message):
    arguments = (*arguments, *(0, 0, 1)[len(arguments) - 1 :])
    with pytest.raises(ValueError, match=message):
        data.train_iterator(numbers(12), *arguments)
    batch_size, _, *hosts = arguments
    if batch_size != 13:
        with pytest.raises(ValueError, match=message):
            data.eval_batches(numbers(12), batch_size, *hosts)


def test_mnist5k_is_stratified():
    dataset = catalog.mnist5k()
    assert dataset.train.arrays["image"].shape == (4000, 28, 28, 1)
    assert np.bincount(dataset.test.arrays["label"]).tolist() == [100] * 10
    assert (dataset.train.arrays["image"].dtype, dataset.train.arrays["image"].max()) == (np.uint8, 255)
    assert dataset.example["image"].shape == (1, 28, 28, 1)


def idx(values):
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()


def write_idx(folder, compress=False, **changed):
    """Four small files, and what they hold. `changed`: other contents by name, or None for no such file."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 9), ("t10k", 4)):
        arrays[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (n, 3, 5), np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = np.arange(n, dtype=np.uint8) % 3
    for name, values in arrays.items():
        content = changed.get(name.split("-ubyte")[0].replace("-", "_"), idx(values))
        if content is not None:
            (folder / (name + ".gz" * compress)).write_bytes(gzip.compress(content) if compress else content)
    return arrays


@pytest.mark.parametrize("compress", [False, True])
def test_idx_files(tmp_path, compress):
    arrays = write_idx(tmp_path, compress)
    dataset = catalog.idx_files(str(tmp_path))
    assert dataset.classes == 3
    for source, part in ((dataset.train, "train"), (dataset.test, "t10k")):
        np.testing.assert_array_equal(source.arrays["image"], arrays[f"{part}-images-idx3-ubyte"][..., None])
        np.testing.assert_array_equal(source.arrays["label"], arrays[f"{part}-labels-idx1-ubyte"])
        assert (source.arrays["image"].dtype, source.arrays["label"].dtype) == (np.uint8, np.int32)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"t10k_labels_idx1": None}, FileNotFoundError, "t10k-labels-idx1-ubyte.gz nor .* is in /"),
        (
            {"train_images_idx3": idx(np.zeros((9, 3, 5), np.uint8))[:-1]},
            ValueError,
            r"134 bytes instead of \[9, 3",
        ),
        ({"train_images_idx3": idx(np.zeros((9, 15), np.uint8))}, ValueError, "not an IDX file of bytes in 3 dim"),
        ({"train_images_idx3": b""}, ValueError, "not an IDX file"),
        ({"train_labels_idx1": idx(np.zeros(8, np.uint8))}, ValueError, "9 images and 8 labels in the files train-"),
        (
            {"t10k_labels_idx1": idx(np.uint8([0, 2, 255, 1]))},
            ValueError,
            "example 2 of the file t10k-labels-idx1-ubyte has the label 255, beyond those of .*, 0 to 2",
        ),
        *(
            (
                {
                    f"{part}_images_idx3": idx(np.zeros(shape, np.uint8)),
                    f"{part}_labels_idx1": idx(np.zeros(n, np.uint8)),
                },
                ValueError,
                f"no images in the file {part}-images-idx3-ubyte",
            )
            for part in ("train", "t10k")
            for n, shape in ((0, (0, 3, 5)), (2, (2, 0, 5)))
        ),
        (
            {"t10k_images_idx3": idx(np.zeros((4, 5, 3), np.uint8))},
            ValueError,
            r"\(3, 5\) pixels in .* train-\*, \(5, 3\)",
        ),
        ({"train_images_idx3": idx(np.zeros((9, 3, 5)))}, ValueError, "not an IDX file of bytes|bytes instead of"),
        (
            {"train_images_idx3": bytes([0, 0, 8, 3]) + (2**31).to_bytes(4, "big") * 2 + (4).to_bytes(4, "big")},
            ValueError,
            r"0 bytes instead of \[2147483648",  # whose product is 0 in 64 bits
        ),
    ],
)
def test_idx_files_that_are_not(tmp_path, changed, error, message):
    write_idx(tmp_path, **changed)
    with pytest.raises(error, match=message):
        catalog.idx_files(str(tmp_path))


def test_the_content_of_idx_files_says_whether_they_are_compressed(tmp_path):
    arrays = write_idx(tmp_path)
    for number, file in enumerate(sorted(tmp_path.iterdir())):
        if number % 2:
            file.write_bytes(gzip.compress(file.read_bytes()))
        else:
            file.rename(file.with_name(f"{file.name}.gz"))
    image = catalog.idx_files(str(tmp_path)).test.arrays["image"]
    np.testing.assert_array_equal(image[..., 0], arrays["t10k-images-idx3-ubyte"])


def test_damaged_idx_files(tmp_path):
    write_idx(tmp_path, compress=True)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz is damaged"):
        catalog.idx_files(str(tmp_path))


def read_idx(file):
    """An independent reading, byte by byte where it matters."""
    content = gzip.decompress(file.read_bytes())
    sizes = [int.from_bytes(content[4 + 4 * k : 8 + 4 * k], "big") for k in range(content[3])]
    return np.array(list(content[4 + 4 * len(sizes) :]), np.uint8).reshape(sizes)


@pytest.mark.parametrize(
    ("folder", "train_classes", "mean"),
    [  # as published; mean and deviation of the training pixels as everyone's normalisation has them
        pytest.param(CLOTHES, [6000] * 10, 0.2860, marks=needs(CLOTHES)),
        pytest.param(DIGITS, [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949], 0.1307, marks=needs(DIGITS)),
    ],
)
def test_published_mnist_files(folder, train_classes, mean):
    dataset = catalog.idx_files(str(folder))
    assert dataset.classes == 10
    assert np.bincount(dataset.train.arrays["label"]).tolist() == train_classes
    assert dataset.train.arrays["image"].shape == (60000, 28, 28, 1)
    assert dataset.train.arrays["image"].mean() / 255 == pytest.approx(mean, abs=5e-5)
    np.testing.assert_array_equal(dataset.test.arrays["image"][..., 0], read_idx(folder / "t10k-images-idx3-ubyte.gz"))
    np.testing.assert_array_equal(dataset.test.arrays["label"], read_idx(folder / "t10k-labels-idx1-ubyte.gz"))


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write_tar(file, names, *shapes):
    """An archive of random images, of these shapes in turn; returns them by name."""
    turns, rng = itertools.cycle(shapes or [(4, 5, 3)]), np.random.default_rng(0)
    images = {name: rng.integers(0, 256, next(turns), np.uint8) for name in names}
    with tarfile.open(file, "w:xz") as archive:
        for name, pixels in images.items():
            content = png(pixels)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return images


@pytest.mark.parametrize("shape", [(4, 5, 3), (4, 5)])
def test_cifar10_tar(tmp_path, shape):
    train_names = ["train/frog/7.png", "train/cat/3.png", "train/ant/1.png"]
    names = ["test/frog/1.png", *train_names, "test/cat/9.png", "test/ant/1.png", "notes.png"]
    images = write_tar(tmp_path / "a.tar.xz", names, shape)
    dataset = catalog.cifar10_tar(str(tmp_path / "a.tar.xz"))
    assert dataset.classes == 3
    assert dataset.train.arrays["label"].tolist() == [2, 1, 0]
    assert dataset.test.arrays["label"].tolist() == [2, 1, 0]
    for pixels, name in zip(dataset.train.arrays["image"], train_names, strict=True):
        grey = images[name].reshape(4, 5, -1)
        np.testing.assert_array_equal(pixels, np.broadcast_to(grey, (4, 5, 3)))


def test_cifar10_tar_that_is_not(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*/missing\.tar: it should be a tar file"):
        catalog.cifar10_tar(str(tmp_path / "missing.tar"))
    write_tar(tmp_path / "b.tar.xz", ["train/cat/1.png", "train/dog/1.png", "test/cat/1.png"])
    with pytest.raises(ValueError, match=r"no images test/<class>/<name> of dog"):
        catalog.cifar10_tar(str(tmp_path / "b.tar.xz"))
    write_tar(tmp_path / "c.tar.xz", ["cat.png"])
    with pytest.raises(ValueError, match="of any class"):
        catalog.cifar10_tar(str(tmp_path / "c.tar.xz"))
    (tmp_path / "d.tar").write_text("not an archive")
    with pytest.raises(ValueError, match=r"d\.tar cannot be read as a tar file of images"):
        catalog.cifar10_tar(str(tmp_path / "d.tar"))
    write_tar(tmp_path / "e.tar.xz", [f"{part}/cat/{i}.png" for part in ("train", "test") for i in range(200)])
    (tmp_path / "e.tar.xz").write_bytes((tmp_path / "e.tar.xz").read_bytes()[:-20_000])
    with pytest.raises(ValueError, match=r"e\.tar\.xz cannot be read"):
        catalog.cifar10_tar(str(tmp_path / "e.tar.xz"))
    with tarfile.open(tmp_path / "g.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("train/cat/1.png"))
    with pytest.raises(ValueError, match=r"g\.tar has an image that is corrupt, train/cat/1\.png: the file is empty"):
        catalog.cifar10_tar(str(tmp_path / "g.tar"))
    write_tar(tmp_path / "f.tar.xz", ["train/cat/1.png", "train/cat/2.png", "test/cat/1.png"], (4, 5, 3), (3, 5, 3))
    with pytest.raises(ValueError, match=r"images of several sizes, \(3, 5, 3\), \(4, 5, 3\)"):
        catalog.cifar10_tar(str(tmp_path / "f.tar.xz"))


@functools.cache
def published(module):
    """A config on the published files, and the data set that it reads, which takes many seconds for CIFAR-10."""
    config = module.get_config()
    config.data.local = str({"fashion_mnist": CLOTHES, "cifar10": CIFAR10}[config.name])
    return config, tasks.dataset_of(config.data)


@pytest.mark.long
@needs(CIFAR10)
def test_published_cifar10():
    _, dataset = published(cifar10)
    assert np.bincount(dataset.train.arrays["label"]).tolist() == [5000] * 10
    assert np.bincount(dataset.test.arrays["label"]).tolist() == [1000] * 10
    means = dataset.train.arrays["image"].mean((0, 1, 2)) / 255  # published, but the file's images are lossy
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], atol=3e-4)
    with tarfile.open(CIFAR10) as archive:
        first = np.asarray(Image.open(archive.extractfile("test/airplane/0000.jpg")))
    np.testing.assert_array_equal(dataset.test.arrays["image"][0], first)


TRAIN, TEST = 24, 7


def tiny_image(i):
    return np.random.default_rng(i).integers(0, 256, (4, 5, 3), np.uint8)


@pytest.fixture(scope="module")
def tfds_builder():
    """`tfds_builder(class name, **options)`: registers a data set with TFDS that needs no download."""
    tfds = pytest.importorskip("tensorflow_datasets")

    def make(class_name, encode=png, shape=(4, 5, 3), keys=("image", "label")):
        class Tiny(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            name = class_name

            def _info(self):
                label = tfds.features.ClassLabel(num_classes=3)
                features = {"image": tfds.features.Image(shape=shape), "label": label, "id": tfds.features.Text()}
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=keys
                )

            def _split_generators(self, dl_manager):
                ends = {"train": (0, TRAIN), "test": (TRAIN, TRAIN + TEST)}
                return {split: self._generate_examples(*part) for split, part in ends.items()}

            def _generate_examples(self, start, stop):
                for i in range(start, stop):
                    content = encode(tiny_image(i))
                    image = io.BytesIO(content) if isinstance(content, bytes) else content
                    yield i, {"image": image, "label": i % 3, "id": str(i)}

        return Tiny

    return make


@pytest.fixture(scope="module")
def tiny(tfds_builder, tmp_path_factory):
    """Directory in which the data set `tiny` is prepared."""
    tfds_builder("tiny")
    folder = tmp_path_factory.mktemp("tfds")
    catalog.tfds("tiny", str(folder), download=True)
    return str(folder)


def by_content(source):
    batch = source.gather(np.arange(len(source)))
    return {image.tobytes(): label for image, label in zip(batch["image"], batch["label"], strict=True)}


@pytest.mark.parametrize("memory", [None, True, False])
def test_tfds(tiny, memory):
    dataset = catalog.tfds("tiny", tiny, memory=memory)
    assert isinstance(dataset.train, data.Records if memory is False else data.Arrays)
    assert dataset.classes == 3
    assert by_content(dataset.train) == {tiny_image(i).tobytes(): i % 3 for i in range(TRAIN)}
    assert by_content(dataset.test) == {tiny_image(i).tobytes(): i % 3 for i in range(TRAIN, TRAIN + TEST)}
    example = dataset.example
    assert {name: (x.shape, x.dtype) for name, x in example.items()} == {
        "image": ((1, 4, 5, 3), np.uint8),
        "label": ((1,), np.int32),
    }


def test_tfds_splits(tiny):
    dataset = catalog.tfds("tiny:1.0.0", tiny, train="train[:10]", test="train[10:]")
    assert (len(dataset.train), len(dataset.test)) == (10, TRAIN - 10)
    with pytest.raises(ValueError, match="Unknown split 'validation'"):
        catalog.tfds("tiny", tiny, test="validation")


def test_tfds_reads_large_images_as_needed(tfds_builder, tmp_path):
    tfds_builder("of_any_size", shape=(None, None, 3))
    assert isinstance(catalog.tfds("of_any_size", str(tmp_path), download=True).train, data.Records)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.long)])
def test_tfds_batches_are_the_same_from_memory_threads_and_processes(tiny, workers):
    memory, disk = (catalog.tfds("tiny", tiny, memory=memory) for memory in (True, False))
    expected = take(data.train_iterator(memory.train, 6, 5, 1, 2), 14)
    original = data.train_iterator(disk.train, 6, 5)
    take(original, 3)
    lazy = data.train_iterator(disk.train, 6, 5, 1, 2, workers=workers)
    lazy.set_state(original.get_state())
    for batch in expected[3:]:
        assert_same(next(lazy), batch)
    assert lazy.get_state()["step"] == 14
    lazy.close()
    for batch, from_memory in zip(
        data.eval_batches(disk.test, 6, workers=workers), data.eval_batches(memory.test, 6), strict=True
    ):
        assert_same(batch, from_memory)


def test_a_program_that_leaves_processes_running_ends_quietly(tiny, tmp_path):
    """And a data set is read by a program without the code that prepared it."""
    (tmp_path / "program.py").write_text(
        "from experiments import data\n"
        "from experiments.data import catalog\n"
        "if __name__ == '__main__':\n"
        f"    source = catalog.tfds('tiny', {tiny!r}, memory=False).train\n"
        "    iterator = data.train_iterator(source, 4, 0, workers=1)\n"
        "    print(len(next(iterator)['label']))\n"
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "4\n"), done.stderr
    assert not any(word in done.stderr for word in ("Traceback", "leaked")), done.stderr


def test_tfds_says_what_to_do_about_what_is_missing(tfds_builder, tmp_path):
    tfds_builder("never_prepared")
    with pytest.raises(FileNotFoundError) as caught:
        catalog.tfds("never_prepared", str(tmp_path))
    for words in (
        f"not in {tmp_path}/never_prepared/1.0.0",
        "internet and TensorFlow",
        f"tfds.builder('never_prepared', data_dir='{tmp_path}', file_format='array_record').download_and_prepare()",
    ):
        assert words in str(caught.value)
    with pytest.raises(ValueError, match="no data set 'fashionmnist'; did you mean 'fashion_mnist'"):
        catalog.tfds("fashionmnist", str(tmp_path))
    with pytest.raises(ValueError, match=r"cannot be loaded at version 0\.5\.0"):
        catalog.tfds("never_prepared:0.5.0", str(tmp_path))


@pytest.mark.parametrize(
    ("package", "module", "read"),
    [
        ("pyarrow", "experiments.data.from_table", lambda: catalog.table("a.csv")),
        ("tensorflow_datasets", None, lambda: catalog.tfds("cifar10")),
    ],
)
def test_the_extra_that_brings_a_missing_package_is_named(package, module, read, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, module or "none", raising=False)
    with pytest.raises(ImportError, match=rf"need the package {package}: pip install -e '\.\[(tables|tfds)\]'"):
        read()


def test_tfds_without_labels_is_refused(tfds_builder, tmp_path):
    tfds_builder("unlabelled", keys=("image", "id"))
    with pytest.raises(ValueError, match=r"'unlabelled' is not one of labelled examples: it has .*image"):
        catalog.tfds("unlabelled", str(tmp_path), download=True)


def test_tfds_without_random_access_is_refused(tiny, tmp_path):
    """A data set as TFDS prepares it by default; its files are not even opened."""
    for file in (pathlib.Path(tiny) / "tiny" / "1.0.0").iterdir():
        target = tmp_path / "tiny" / "1.0.0" / file.name.replace("array_record", "tfrecord")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes().replace(b"array_record", b"tfrecord"))
    with pytest.raises(FileNotFoundError, match=r"as tfrecord, without random access.*\n.*\n.*data_dir='ANOTHER DIR"):
        catalog.tfds("tiny", str(tmp_path))


def test_tfds_preparation_that_needs_tensorflow(tfds_builder, tmp_path):
    try:
        import tensorflow  # noqa: F401, PLC0415
    except ImportError:
        pass
    else:
        pytest.skip("TensorFlow is here")
    tfds_builder("drawn", encode=np.asarray)  # TFDS encodes arrays by TensorFlow
    with pytest.raises(FileNotFoundError, match="'drawn' cannot be prepared here: No module named 'tensorflow'"):
        catalog.tfds("drawn", str(tmp_path), download=True)


def test_configs_read_local_files_where_told(tmp_path):
    arrays = write_idx(tmp_path)
    config = fashion_mnist.get_config()
    config.data.local = str(tmp_path)
    dataset = tasks.dataset_of(config.data)
    np.testing.assert_array_equal(dataset.train.arrays["image"][..., 0], arrays["train-images-idx3-ubyte"])
    write_tar(tmp_path / "a.tar", ["train/cat/1.png", "test/cat/1.png"])
    config = cifar10.get_config()
    config.data.local = str(tmp_path / "a.tar")
    assert len(tasks.dataset_of(config.data).train) == 1


@pytest.mark.parametrize("module", [fashion_mnist, cifar10])
def test_configs_ask_tfds_and_say_what_else_could_be_done(module, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    config = module.get_config()
    config.data.options.data_dir = str(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/{config.name}/(.|\n)*config\.data\.local"):
        prepare(config)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "module",
    [
        pytest.param(fashion_mnist, marks=needs(CLOTHES)),
        pytest.param(cifar10, marks=[needs(CIFAR10), pytest.mark.long]),
    ],
)
def test_configs_fit_their_data(module):
    config, dataset = published(module)
    assert any(not layer.skip_reason for layer in prepare(config, dataset=dataset).plan.leaves)


@pytest.mark.usefixtures("standard_promotion")
def test_stored_pixels_reach_the_network_as_floats(tmp_path):
    write_idx(tmp_path)
    config = fashion_mnist.get_config()
    config.data.local = str(tmp_path)
    task = tasks.classification(config, tasks.dataset_of(config.data))
    params, state = task.init(jax.random.key(0))
    batch = next(data.train_iterator(task.dataset.train, 8, 0))
    assert batch["image"].dtype == np.uint8
    as_floats = batch | {"image": (batch["image"] / 255).astype(np.float32)}
    stored, floats = (task.outputs(params, state, b, training=False)[0]["loss"] for b in (batch, as_floats))
    np.testing.assert_allclose(stored, floats, rtol=1e-5)
