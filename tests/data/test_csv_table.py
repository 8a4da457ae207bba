"""`read_table` reads the columns of a CSV file, and names line and column of errors."""

import re

import pytest

from jaxft.data.csv_table import read_table
from jaxft.errors import DataError


def table(tmp_path, text, **options):
    file = tmp_path / "list.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_table("csv:", str(file), ("path", "label"), "split", **options)


@pytest.mark.parametrize(
    "text",
    [
        "path,label\na.jpg,ant\nb.jpg,bee\n",
        "label, note ,PATH\nant,x,a.jpg\nbee,,b.jpg",
        "path,label\r\n\r\na.jpg,ant\r\n b.jpg , bee \r\n",
        b"\xef\xbb\xbfpath,label\na.jpg,ant\nb.jpg,bee\n",  # as spreadsheets save UTF-8
        'path,label\n"a.jpg","ant"\nb.jpg,bee\n',
    ],
    ids=["plain", "order and case", "spaces and empty lines", "byte order mark", "quotes"],
)
def test_read_table_finds_columns_by_name(text, tmp_path):
    columns = table(tmp_path, text).columns
    assert columns == {"path": ["a.jpg", "b.jpg"], "label": ["ant", "bee"]}


def test_read_table_returns_the_optional_column_and_line_numbers(tmp_path):
    found = table(tmp_path, "path,label,split\n\na.jpg,ant,val\n")
    assert found.columns["split"] == ["val"]
    assert list(found.lines) == [3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no column path; its first line names none. Columns are path, label and perhaps"),
        ("file,label\na,b\n", "has no column path; its first line names file, label"),
        ("path;label\na;b\n", "its first line names path;label. (.|\n)* separated by commas"),
        ("path,label,path\na,b,c\n", "has two columns path"),
        ("path,label\n", "lists no images below its header"),
        ("path,label\na,b\nc\nd,e,f\n", "in 2 of 3 lines:\n  line 3: 1\n  line 4: 3"),
        ("path,label\na,\n,b\n", "empty values in the column path, in 1 of 2 lines:\n  line 3"),
        ("path,label\na,b\nc, \n", "empty values in the column label, in 1 of 2 lines:\n  line 3"),
        ("path,label,split\na,b,\n", "empty values in the column split"),
        ("path,label\n" + "a,\n" * 9, "9 of 9 lines:\n  line 2(.|\n)*line 6: empty\n  and 4 more"),
        ('path,label\na,"b\n', "list.csv, line 2: unexpected end of data"),
        ("path,label\nä,b\n".encode("latin-1"), "list.csv is not UTF-8"),
    ],
)
def test_read_table_rejects_wrong_files(text, message, tmp_path):
    with pytest.raises(DataError, match=message):
        table(tmp_path, text)


@pytest.mark.parametrize("place", ["", "gone.csv", "."])
def test_read_table_of_no_file_explains_the_columns(place):
    message = f"csv:{place}: there is no such file (looked from"
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        read_table("csv:", place, ("path", "label"), "split")
    assert "columns path, label, split" in str(caught.value)


def test_image_files_are_relative_to_the_folder_of_the_table(tmp_path, monkeypatch):
    for name in ("data/in/a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    text = f"path,label\nin/a.jpg,x\n../b.jpg,x\n{tmp_path}/c.jpg,x\n"
    files = table(tmp_path / "data", text).image_files()
    assert files == [tmp_path / name for name in ("data/in/a.jpg", "b.jpg", "c.jpg")]


def test_image_files_lists_missing_and_repeated_files(tmp_path):
    (tmp_path / "a.jpg").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"do not exist (.|\n)* 2 of 3 lines:\n  line 3: b\.jpg\n"):
        table(tmp_path, "path,label\na.jpg,x\nb.jpg,x\nfolder,x\n").image_files()
    with pytest.raises(DataError, match="twice, in 1 of 2 lines:\n  line 3: as line 2"):
        table(tmp_path, "path,label\na.jpg,x\n./a.jpg,y\n").image_files()
