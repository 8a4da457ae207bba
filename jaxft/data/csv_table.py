"""Reads CSV files that list images, and names line and column of what is wrong in them."""

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxft.data.image_files import printable
from jaxft.errors import DataError, first_of

_MAX_LINES = 5  # lines of the file in one message


@dataclass(frozen=True)
class CsvTable:
    """The columns in use of a CSV file, without its header.

    Attributes:
      file: the file.
      lines: line number of each row.
      columns: values of each column, by name.
    """

    file: Path
    lines: Sequence[int]
    columns: Mapping[str, Sequence[str]]

    def image_files(self) -> list[Path]:
        """Returns the files in the column `path`; relative ones lie below the CSV file's folder.

        Raises:
          DataError: files are missing, or listed twice.
        """
        folder, values = os.path.abspath(self.file.parent), self.columns["path"]
        files = [os.path.normpath(os.path.join(folder, os.path.expanduser(v))) for v in values]
        first_line = dict(zip(reversed(files), reversed(self.lines), strict=True))
        repeats = [
            "" if line == first_line[file] else f"as line {first_line[file]}"
            for line, file in zip(self.lines, files, strict=True)
        ]
        self.raise_problems("lists an image twice", repeats)
        self.raise_problems(
            f"lists files that do not exist (relative paths start from {printable(folder)})",
            ["" if os.path.isfile(f) else printable(v) for f, v in zip(files, values, strict=True)],
        )
        return [Path(file) for file in files]

    def raise_problems(self, summary: str, problems: Sequence[str]) -> None:
        """Raises DataError with the rows whose problem is not empty, if there are any."""
        found = [f"line {n}: {p}" for n, p in zip(self.lines, problems, strict=True) if p]
        if found:
            count = f"{len(found):,} of {len(problems):,} lines"
            listing = "".join(f"\n  {each}" for each in first_of(found, _MAX_LINES))
            raise DataError(f"{printable(self.file)} {summary}, in {count}:{listing}")


def read_table(kind: str, place: str, required: Sequence[str], optional: str = "") -> CsvTable:
    """Reads the named columns of a CSV file in UTF-8 with commas and a header.

    Ignores empty lines, other columns, and spaces around values.

    Args:
      kind: the option that names the file, for messages.
      place: the file.
      required: columns that must exist.
      optional: a column that may exist.

    Raises:
      DataError: the file is missing, is no such file, lacks a column, or a line has an empty value
        or another number of values than the header.
    """
    file = Path(place).expanduser()
    if not place or not file.is_file():
        raise DataError(
            f"{kind}{place}: there is no such file (looked from {printable(Path.cwd())}); a CSV "
            f"file with the columns {', '.join(filter(None, (*required, optional)))} belongs here."
        )
    lines, rows = [], []
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.reader(opened, skipinitialspace=True, strict=True)
            for row in filter(None, reader):
                lines.append(reader.line_num)
                rows.append([value.strip() for value in row])
    except UnicodeDecodeError as error:
        raise DataError(f"{printable(file)} is not UTF-8: save it with that encoding.") from error
    except csv.Error as error:
        line = lines[-1] + 1 if lines else 1
        raise DataError(f"{printable(file)}, line {line}: {error}.") from error
    except OSError as error:
        raise DataError(f"{printable(file)} cannot be read: {error.strerror}.") from error
    header = [name.casefold() for name in rows[0]] if rows else []
    lines, rows = lines[1:], rows[1:]
    names = [*required, *([optional] if optional in header else [])]
    if wrong := [name for name in names if header.count(name) != 1]:
        how = "two columns" if wrong[0] in header else "no column"
        raise DataError(
            f"{printable(file)} has {how} {wrong[0]}; its first line names "
            f"{', '.join(header) or 'none'}. Columns are {', '.join(required)}"
            f"{f' and perhaps {optional}' if optional else ''}, separated by commas."
        )
    table = CsvTable(file, lines, {})
    table.raise_problems(
        f"has {len(header)} columns and lines with another number of values",
        ["" if len(row) == len(header) else f"{len(row)}" for row in rows],
    )
    columns = {name: [row[header.index(name)] for row in rows] for name in names}
    for name, values in columns.items():
        table.raise_problems(
            f"has empty values in the column {name}", ["" if v else "empty" for v in values]
        )
    if not rows:
        raise DataError(f"{printable(file)} lists no images below its header.")
    return CsvTable(file, lines, columns)
