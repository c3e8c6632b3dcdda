"""Photographs: decoding, crops, files in folders and in TFDS, what is corrupt, and the ImageNet configs."""

import io
import tarfile
import zlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import problems
import pytest
from PIL import Image
from real_data import FILES, needs

from experiments import data
from experiments.data import catalog, from_folder, images

PHOTOS = FILES / "imagenette224_subset/imagenette224_subset.tar.xz"


def smooth(height, width):
    """A picture without detail, so that every way to reduce it comes to the same: red across, green down."""
    y, x = np.mgrid[:height, :width] + 0.5
    return np.stack([255 * x / width, 255 * y / height, np.full_like(x, 128)], -1).round().astype(np.uint8)


def encoded(image, kind="JPEG", mode="RGB", **options):
    file = io.BytesIO()
    Image.fromarray(image).convert(mode).save(file, kind, **({"quality": 95, "subsampling": 0} | options))
    return file.getvalue()


def expected_part(height, width, box, size):
    """What resizing a part of `smooth` gives: its colours at the centres of the result's pixels."""
    left, top, right, bottom = box
    x = (left + (np.arange(size) + 0.5) * (right - left) / size) / width * 255
    y = (top + (np.arange(size) + 0.5) * (bottom - top) / size) / height * 255
    return np.stack([*np.broadcast_arrays(x[None, :], y[:, None]), np.full((size, size), 128.0)], -1)


@problems.examples(60)
@hypothesis.given(
    height=st.integers(40, 700),
    width=st.integers(40, 700),
    corners=st.tuples(*[st.floats(0, 1)] * 4),
    size=st.integers(8, 100),
)
def test_a_part_is_where_it_should_be_at_any_reduction(height, width, corners, size):
    (left, right), (top, bottom) = (np.sort([corners[i] * n, corners[i + 2] * n]) for i, n in ((0, width), (1, height)))
    box = (min(left, width - 20.0), min(top, height - 20.0), max(right, left + 20.0), max(bottom, top + 20.0))
    box = (box[0], box[1], min(box[2], width), min(box[3], height))
    part = images.resized_part(encoded(smooth(height, width)), box, size)
    assert (part.shape, part.dtype) == ((size, size, 3), np.uint8)
    inner = slice(2, -2)  # at an edge of the image there is less to average over
    difference = part.astype(float) - expected_part(height, width, box, size)
    assert np.abs(difference[inner, inner]).max() <= 8 + 255 * 4 / min(height, width)


def test_reduction_by_the_decoder_is_close_to_pillow_on_a_photograph_like_picture():
    rng = np.random.default_rng(0)
    picture = np.asarray(Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).resize((640, 480), Image.BICUBIC))
    content = encoded(picture)
    plain = Image.open(io.BytesIO(content)).resize((96, 96), Image.BILINEAR, box=(40, 20, 600, 460))
    part = images.resized_part(content, (40, 20, 600, 460), 96)
    assert np.abs(part.astype(float) - np.asarray(plain, float)).mean() < 1.5


@hypothesis.given(st.integers(1, 900), st.integers(1, 900), st.integers(0, 2**32), st.floats(0.01, 1))
def test_random_boxes_lie_inside_and_have_the_area_asked_for(width, height, seed, min_area):
    random = np.random.default_rng(seed).random(images.CROP_DRAWS, np.float32)
    left, top, right, bottom = images.random_box(width, height, random, min_area)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    if min(width, height) > 100:
        assert (right - left) * (bottom - top) >= 0.95 * min(min_area * width * height, min(width, height) ** 2 * 0.75)
        assert 0.7 < (right - left) / (bottom - top) < 1.43


def test_areas_shapes_places_and_flips_are_uniform():
    boxes, flips = [], 0
    content = encoded(smooth(80, 100))
    for random in np.random.default_rng(0).random((4000, images.CROP_DRAWS)):
        boxes.append(images.random_box(1000, 1000, random, 0.08))
        flips += random[-1] < 0.5
    left, top, right, bottom = np.array(boxes).T
    area, ratio = (right - left) * (bottom - top) / 1e6, (right - left) / (bottom - top)
    # An area near 1 often does not fit and is drawn again, as everywhere: hence not quite uniform above 0.75.
    share = np.histogram(area, np.linspace(0.08, 0.72, 9))[0] / len(area)
    np.testing.assert_allclose(share, share.mean(), rtol=0.2)
    assert abs(np.log(ratio).mean()) < 0.02
    across, down = left / (1000 - right + left + 1e-9), top / (1000 - bottom + top + 1e-9)
    assert abs(np.corrcoef(across, down)[0, 1]) < 0.05
    np.testing.assert_allclose([across.mean(), down.mean()], 0.5, atol=0.03)
    assert 0.46 < flips / 4000 < 0.54
    random = np.full(images.CROP_DRAWS, 0.5)
    straight, random[-1] = images.random_crop(content, 16, random), 0.1
    np.testing.assert_array_equal(images.random_crop(content, 16, random), straight[:, ::-1])


def test_centre_crop_is_the_centre_of_the_resized_image():
    content = encoded(smooth(300, 400))
    crop = images.centre_crop(content, 112)
    plain = Image.open(io.BytesIO(content)).resize((round(400 * 128 / 300), 128), Image.BILINEAR)
    left, top = (plain.width - 112) // 2, 8
    want = np.asarray(plain.crop((left, top, left + 112, top + 112)), float)
    assert np.abs(crop.astype(float) - want).max() <= 3


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("RGBA", "PNG"), ("P", "PNG")]
)
def test_kinds_of_image_files(mode, kind):
    content = encoded(smooth(60, 80), kind, mode)
    crop = images.centre_crop(content, 32, margin=1)
    want = np.asarray(
        Image.open(io.BytesIO(content)).convert("RGB").resize((32, 32), Image.BILINEAR, box=(10, 0, 70, 60))
    )
    assert np.abs(crop.astype(float) - want).max() <= 2
    if mode == "L":
        assert np.ptp(crop, axis=-1).max() == 0


@pytest.mark.parametrize("damage", [lambda c: c[: len(c) // 2], lambda c: c[:30], lambda c: b"", lambda c: b"GIF89a"])
def test_corrupt_content_is_told_apart(damage):
    with pytest.raises(images.CorruptImage):
        images.centre_crop(damage(encoded(smooth(300, 400))), 32)


def test_bytes_after_the_end_of_a_file_do_not_matter():
    content = encoded(smooth(60, 80))
    np.testing.assert_array_equal(images.centre_crop(content + b"\0" * 99, 32), images.centre_crop(content, 32))


def test_shifted_images_against_a_loop():
    rng = np.random.default_rng(0)
    batch = {"image": rng.integers(0, 256, (20, 8, 9, 3), np.uint8), "label": np.arange(20)}
    random = rng.random((20, images.SHIFT_DRAWS))
    got = images.shifted(batch, random, margin=2)
    for image, result, (u, v, flip) in zip(batch["image"], got["image"], random, strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
        want = padded[int(u * 5) : int(u * 5) + 8, int(v * 5) : int(v * 5) + 9]
        np.testing.assert_array_equal(result, want[:, ::-1] if flip < 0.5 else want)
    np.testing.assert_array_equal(got["label"], batch["label"])


@pytest.fixture
def folder(tmp_path):
    """Two classes of three training and two test images, of several sizes and kinds."""
    for part, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(("n01", "n02")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                content = encoded(smooth(50 + 10 * i, 70), mode="L" if label else "RGB")
                (tmp_path / part / name / f"{name}_{i}.JPEG").write_bytes(content)
    return tmp_path


def test_folder(folder):
    dataset = catalog.image_folder(str(folder), size=24)
    assert (len(dataset.train), len(dataset.test), dataset.classes) == (6, 4, 2)
    batch = dataset.test.gather(np.arange(4))
    assert batch["label"].tolist() == [0, 0, 1, 1]
    assert batch["image"].shape == (4, 24, 24, 3)
    assert set(batch) == {"image", "label"}
    np.testing.assert_array_equal(
        batch["image"][1], images.centre_crop((folder / "val/n01/n01_1.JPEG").read_bytes(), 24)
    )


def test_random_crops_depend_on_seed_and_step_alone(folder):
    train = catalog.image_folder(str(folder), size=24).train
    whole = data.train_iterator(train, 4, seed=3)
    batches = [next(whole) for _ in range(4)]
    parts = [data.train_iterator(train, 4, 3, host, 2) for host in range(2)]
    for part in parts:
        part.set_state({**part.get_state(), "step": 2})
    for expected in batches[2:]:
        got = [next(part) for part in parts]
        for name, values in expected.items():
            np.testing.assert_array_equal(np.concatenate([b[name] for b in got]), values)
    other = next(data.train_iterator(train, 4, seed=4))
    assert not np.array_equal(other["image"], batches[0]["image"])


def test_a_corrupt_file_is_named(folder):
    file = folder / "train/n02/n02_1.JPEG"
    file.write_bytes(file.read_bytes()[:200])
    train = catalog.image_folder(str(folder), size=24).train
    with pytest.raises(images.CorruptImage, match=rf"{file} is corrupt.*skip_corrupt"):
        train.gather(np.arange(6))


def test_corrupt_files_are_left_out_and_counted_when_asked(folder):
    for file in (folder / "train/n02/n02_1.JPEG", folder / "val/n01/n01_0.JPEG"):
        file.write_bytes(b"\xff\xd8 nothing")
    dataset = catalog.image_folder(str(folder), size=24, skip_corrupt=True)
    stream = data.train_iterator(dataset.train, 3, 0)
    for _ in range(4):  # two epochs
        next(stream)
    assert stream.skipped == 2
    again = data.train_iterator(dataset.train, 3, 0)
    again.set_state(stream.get_state())
    assert again.skipped == 2
    (batch,) = data.eval_batches(dataset.test, 6)
    assert batch["weight"].tolist() == [0, 1, 1, 1, 0, 0]


def test_folders_that_are_not_as_they_should_be(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no directory .*/nowhere/train: it should hold a directory for each"):
        catalog.image_folder(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"images of 2 classes, not of 1000"):
        catalog.imagenet(str(folder))
    (folder / "val/n03").mkdir()
    with pytest.raises(FileNotFoundError, match=r"val/n03 has no image files"):
        catalog.image_folder(str(folder))
    (folder / "val/n03/x.png").write_bytes(encoded(smooth(50, 50), "PNG"))
    with pytest.raises(ValueError, match=r"differ in their classes: n03"):
        catalog.image_folder(str(folder))
    flat = tmp_path / "flat"
    (flat / "train").mkdir(parents=True)
    (flat / "train/x.JPEG").touch()
    with pytest.raises(FileNotFoundError, match="1 files: sort them by class"):
        catalog.image_folder(str(flat))


def test_imagenet_says_what_to_place_where(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(FileNotFoundError) as error:
        catalog.imagenet(data_dir=str(tmp_path))
    for words in ("ILSVRC2012_img_train.tar", f"{tmp_path}/downloads/manual", "image-net.org", "config.data.local"):
        assert words in str(error.value)


def test_tfds_jpegs_are_read_as_files(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    contents = [encoded(smooth(50 + i, 60), mode="L" if i % 2 else "RGB") for i in range(5)]

    class Photos(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        name = "photos"

        def _info(self):
            features = {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(num_classes=2),
                "file_name": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(), "validation": self._generate_examples()}

        def _generate_examples(self):
            for i, content in enumerate(contents):
                yield i, {"image": io.BytesIO(content), "label": i % 2, "file_name": f"{i}.JPEG"}

    from_folder.image_records("photos", str(tmp_path), download=True, size=24)
    dataset = from_folder.image_records("photos", str(tmp_path), size=24)
    batch = dataset.test.gather(np.arange(5))
    found = {image.tobytes(): label for image, label in zip(batch["image"], batch["label"], strict=True)}
    assert found == {images.centre_crop(c, 24).tobytes(): i % 2 for i, c in enumerate(contents)}
    contents[2] = contents[2][:150]
    other = tmp_path / "other"
    damaged = from_folder.image_records("photos", str(other), download=True, size=24).test
    with pytest.raises(images.CorruptImage, match=r"2\.JPEG"):
        damaged.gather(np.arange(5))


@needs(PHOTOS)
def test_every_photograph_can_be_decoded(tmp_path):
    with tarfile.open(PHOTOS) as archive:
        archive.extractall(tmp_path, filter="data")
    dataset = catalog.imagenette(str(tmp_path), size=64)
    assert (len(dataset.train), len(dataset.test)) == (1850, 500)
    total = sum(batch["weight"].sum() for batch in data.eval_batches(dataset.test, 64))
    assert total == 500
    stream = data.train_iterator(dataset.train, 185, 0)
    means = [next(stream)["image"].mean((0, 1, 2)) / 255 for _ in range(10)]
    np.testing.assert_allclose(np.mean(means, 0), (0.46, 0.455, 0.43), atol=0.03)


def bomb(side):
    """A PNG of few bytes that says it is so many pixels squared, by its header alone."""
    content = encoded(smooth(4, 4), "PNG")
    size = b"IHDR" + side.to_bytes(4, "big") * 2 + content[24:29]
    return content[:12] + size + zlib.crc32(size).to_bytes(4, "big") + content[33:]


UNREADABLE = {
    "empty": (lambda file: file.write_bytes(b""), "the file is empty"),
    "text": (lambda file: file.write_bytes(b"hello"), "it is no image of a known format"),
    "bomb": (lambda file: file.write_bytes(bomb(20_000)), "decompression bomb"),
    "small bomb": (lambda file: file.write_bytes(bomb(10_000)), "decompression bomb"),  # for which Pillow only warns
    "truncated": (lambda file: file.write_bytes(encoded(smooth(90, 90))[:-300]), "truncated"),
    "deleted since": (lambda file: None, "no file of this name"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_whatever_cannot_be_read_is_named_or_left_out(folder, name):
    make, why = UNREADABLE[name]
    file = folder / "train/n02/n02_1.JPEG"
    strict, lenient = (catalog.image_folder(str(folder), size=24, skip_corrupt=skip).train for skip in (False, True))
    file.unlink()
    make(file)
    with pytest.raises(images.CorruptImage, match=rf"{file} is corrupt: .*{why}.*skip_corrupt"):
        strict.gather(np.arange(6))
    assert lenient.gather(np.arange(6))["weight"].tolist() == [1, 1, 1, 1, 0, 1]


@pytest.mark.parametrize(("kind", "what"), [("directory", "a directory"), ("link", "a link to nothing")])
def test_what_only_has_the_name_of_an_image_is_refused_at_once(folder, kind, what):
    file = folder / "val/n01/x.jpg"
    if kind == "directory":
        file.mkdir()
    else:
        file.symlink_to(folder / "nowhere.jpg")
    with pytest.raises(ValueError, match=rf"{file} has the name of an image and is {what}: remove it"):
        catalog.image_folder(str(folder))
    test = catalog.image_folder(str(folder), size=24, skip_corrupt=True).test
    assert test.gather(np.arange(5))["weight"].tolist() == [1, 1, 0, 1, 1]
    file.rmdir() if kind == "directory" else file.unlink()
    file.symlink_to(folder / "val/n01/n01_0.JPEG")  # a link to an image is one
    first, linked = catalog.image_folder(str(folder), size=24).test.gather(np.array([0, 2]))["image"]
    np.testing.assert_array_equal(first, linked)


def test_an_animation_is_its_first_frame(folder):
    frames = [Image.fromarray(smooth(40, 40)), Image.fromarray(255 - smooth(40, 40))]
    file = folder / "val/n01/n01_0.JPEG"
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:])
    got = catalog.image_folder(str(folder), size=24).test.gather(np.arange(1))["image"][0]
    np.testing.assert_array_equal(got, images.centre_crop(encoded(smooth(40, 40), "PNG"), 24))
