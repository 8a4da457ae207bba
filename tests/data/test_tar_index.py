"""`read_samples` groups the files of a tar file, and finds damage."""

import gzip
import io
import tarfile

import pytest

from jaxft.data.tar_index import read_samples
from jaxft.errors import DataError


def write_tar(path, files, **options):
    with tarfile.open(path, "w", **options) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def contents(path):
    """Returns the content of each file by key and extension."""
    data = path.read_bytes()
    return [
        (key, {name: data[each.offset :][: each.size] for name, each in members.items()})
        for key, members in read_samples(path)
    ]


LONG = "x" * 150


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_read_samples_groups_files_by_key(tar_format, tmp_path):
    files = [
        ("a/0.jpg", b"first" * 300), ("a/0.cls", b"1"),
        ("a/1.CLS", b"0"), ("a/1.seg.png", b""), ("a/1.jpg", b"second"),
        ("b.c/1.jpg", b"third"), ("README", b"no extension"), ("b.c/._1.jpg", b"hidden"),
        *([(f"{LONG}é.jpg", b"long")] if tar_format != tarfile.USTAR_FORMAT else []),
    ]  # fmt: skip
    found = contents(write_tar(tmp_path / "x.tar", files, format=tar_format))
    assert found[:3] == [
        ("a/0", {"jpg": b"first" * 300, "cls": b"1"}),
        ("a/1", {"cls": b"0", "seg.png": b"", "jpg": b"second"}),
        ("b.c/1", {"jpg": b"third"}),
    ]
    assert found[3:] == ([] if len(files) == 8 else [(f"{LONG}é", {"jpg": b"long"})])


def test_read_samples_leaves_out_folders_and_links(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE):
            info = tarfile.TarInfo("a.jpg")
            info.type = kind
            tar.addfile(info)
    assert contents(tmp_path / "x.tar") == []


def test_read_samples_accepts_first_names_that_begin_like_bzip2(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("BZ01.jpg", b"1")])
    assert contents(path) == [("BZ01", {"jpg": b"1"})]


def damaged(data):
    return data[:1024] + b"\1" * 512 + data[1536:]  # the second header


def truncated(data):
    return data[:1600]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (gzip.compress, r"x\.tar is compressed \(gzip\)(.|\n)* unpack it to a plain \.tar file"),
        (damaged, r"x\.tar is no readable tar file: damaged at byte 1,024"),
        (truncated, r"x\.tar is no readable tar file: b\.jpg is truncated"),
        (lambda data: b"no tar file" * 100, r"x\.tar is no readable tar file"),
        (lambda data: b"", r"x\.tar is no readable tar file: empty file"),
    ],
    ids=["gzip", "damaged", "truncated", "text", "empty"],
)
def test_read_samples_rejects_damaged_files(change, message, tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), ("b.jpg", b"2" * 400)])
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        list(read_samples(path))


def test_read_samples_rejects_repeated_and_missing_files(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), ("a.jpg", b"2")])
    with pytest.raises(DataError, match=r"a\.jpg is there twice in a row"):
        list(read_samples(path))
    with pytest.raises(DataError, match=r"gone\.tar cannot be read: No such file"):
        list(read_samples(tmp_path / "gone.tar"))
