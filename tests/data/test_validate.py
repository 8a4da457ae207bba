"""`check_images` reports unreadable images and the images with Pillow warnings."""

import warnings

import numpy as np
import pytest
from PIL import Image

from jaxft.data import (
    BatchConfig,
    Preprocessing,
    check_sample,
    folder,
    open_source,
    train_batches,
)
from jaxft.data.validate import without_warnings
from jaxft.errors import DataError

BROKEN_EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\x05no entry"


@pytest.fixture
def root(tmp_path):
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            for k in range(3):
                picture(k).save(tmp_path / split / name / f"{k}.jpg")
    return tmp_path


def picture(level):
    return Image.fromarray(np.full((12, 10, 3), 20 * level, np.uint8))


def open_folder(root, **options):
    return open_source(f"folder:{root}", **options)


@pytest.mark.parametrize("outer_filter", ["error", "ignore", "default"])
def test_check_images_collects_warnings_in_one_remark(root, outer_filter):
    for name in ("train/ant/0.jpg", "val/bee/2.jpg"):
        picture(1).save(root / name, exif=BROKEN_EXIF)
    with warnings.catch_warnings(record=True) as printed:
        warnings.simplefilter(outer_filter)
        splits = open_folder(root)
    assert [str(warning.message) for warning in printed] == []
    (remark,) = splits.remarks
    first, *lines = remark.split("\n")
    assert first == "Read, but with a warning: 2 of 12 images:"
    assert [line.split(": ")[0] for line in lines] == [
        f"  {root}/train/ant/0.jpg",
        f"  {root}/val/bee/2.jpg",
    ]
    assert all("EXIF" in line for line in lines)
    with warnings.catch_warnings(record=True) as printed:
        warnings.simplefilter("always")
        with without_warnings():
            for batch in train_batches(
                splits.train,
                BatchConfig(
                    preprocessing=Preprocessing(image_size=8, resize_size=8),
                    augment="none", batch_size=6, seed=0, stage=0,
                ),
                epochs=2, workers=1,
            ):  # fmt: skip
                assert batch.image.shape == (6, 8, 8, 3)
    assert printed == []


def test_check_images_warns_about_multiple_frames(root):
    frames = [picture(k) for k in (1, 2)]
    frames[0].save(root / "train/ant/x.gif", save_all=True, append_images=frames[1:])
    frames[0].save(root / "train/bee/x.tif", save_all=True, append_images=frames[1:])
    splits = open_folder(root)
    assert splits.remarks == (
        "Read, but with a warning: 2 of 14 images:\n"
        f"  {root}/train/ant/x.gif: holds several images, of which the first is used\n"
        f"  {root}/train/bee/x.tif: holds several images, of which the first is used",
    )
    pixels = [np.asarray(splits.train[k][0]) for k in (3, 7)]
    for image in pixels:
        np.testing.assert_array_equal(image, np.asarray(frames[0]))


def test_check_images_reports_gray_of_unknown_range(root):
    Image.fromarray(np.ones((4, 4), np.float32)).save(root / "train/ant/x.tif")
    with pytest.raises(DataError, match=r"1 of 13 images(.|\n)*ant/x\.tif: grey levels are floats"):
        open_folder(root)
    splits = open_folder(root, on_bad_image="skip")
    assert len(splits.train) == 6
    assert "ant/x.tif: grey levels are floats" in splits.remarks[0]


def test_check_images_reports_images_too_large_for_pillow(root, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # the images have 120
    with pytest.raises(
        DataError, match=r"train/ant/0\.jpg: the image exceeds the size that is safe"
    ):
        open_folder(root)


DECODED = 12 * 4 * 12 * 10  # bytes of all images


@pytest.mark.parametrize(
    ("sample_above", "on_bad_image", "checked"),
    [
        (None, "error", 12),
        (DECODED, "error", 12),
        (DECODED - 1, "error", 4),
        (0, "error", 4),
        (0, "skip", 12),
    ],
)
def test_check_images_checks_a_sample_of_large_sets(
    sample_above, on_bad_image, checked, root, monkeypatch
):
    monkeypatch.setattr(check_sample, "SAMPLE_SIZE", 2)
    decoded = []
    monkeypatch.setattr(folder.validate, "problem", lambda content, place: decoded.append(place))
    splits = open_folder(root, sample_above=sample_above, on_bad_image=on_bad_image)
    assert len(decoded) == checked
    if checked == 12:
        assert splits.remarks == ()
    else:
        ends = [
            f"{root}/{split}/{name}" for split in ("train", "val") for name in ("ant/0", "bee/2")
        ]
        assert sorted(decoded) == [f"{end}.jpg" for end in ends]
        assert splits.remarks[0].startswith("4 of 12 images have been checked, evenly spread.")


@pytest.mark.parametrize("name", ["train/ant/0.jpg", "val/bee/2.jpg"])
def test_check_images_reports_a_bad_image_of_the_sample(name, root, monkeypatch):
    monkeypatch.setattr(check_sample, "SAMPLE_SIZE", 2)
    (root / name).write_text("no image")
    with pytest.raises(DataError, match=rf"1 of 4 images(.|\n)*{name}: not an image"):
        open_folder(root, sample_above=0)


def test_check_images_checks_all_images_of_small_sets(root):
    (root / "train/ant/1.jpg").write_text("no image")
    with pytest.raises(DataError, match="1 of 12 images"):
        open_folder(root, sample_above=0)
