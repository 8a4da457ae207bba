"""Progress of long work: a bar on a terminal, one line in a log, nothing for short work."""

import io
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from rich.console import Console as Terminal

from jaxft.progress import Work, show_progress_on, track


class Clock:
    """Seconds that a test sets."""

    seconds = 0.0

    def __call__(self):
        return self.seconds


def output(*, terminal):
    return Terminal(file=io.StringIO(), force_terminal=terminal, width=80, color_system=None)


def shown(steps, *, terminal, total=100, unit="images"):
    """Returns the output of work that has done a number of units at each of some times."""
    out, clock = output(terminal=terminal), Clock()
    work = Work("Checking images", total, unit, out, clock)
    for clock.seconds, done in steps:
        work.update(done, total)
    work.close()
    return out.file.getvalue()


@pytest.mark.parametrize(
    ("steps", "line"),
    [
        ([(1, 10), (9.9, 99)], ""),
        ([(1, 10), (11, 20), (20, 50), (40, 90)], "20 of 100 images after 11 s, about 44 s left"),
        ([(60, 10)], "10 of 100 images after 60 s, about 9 min left"),
        ([(12, 0)], "0 images after 12 s"),
    ],
)
def test_progress_in_a_log_is_one_line_of_long_work(steps, line):
    text = shown(steps, terminal=False)
    assert text == (f"Checking images: {line}\n" if line else "")


def test_progress_line_counts_megabytes():
    text = shown([(10, 30_000_000)], terminal=False, total=120_000_000, unit="bytes")
    assert text == "Checking images: 30 of 120 MB after 10 s, about 30 s left\n"


def test_progress_line_without_a_total():
    assert shown([(10, 7)], terminal=False, total=None) == "Checking images: 7 images after 10 s\n"


def test_progress_line_fits_80_columns():
    text = shown([(12, 1_000)], terminal=False, total=9_999_999)
    assert len(text) <= 80


def test_progress_bar_appears_for_work_of_a_second_and_is_removed():
    assert shown([(0.5, 50), (0.9, 100)], terminal=True) == ""
    text = shown([(0.5, 50), (2, 70)], terminal=True)
    assert "Checking images" in text
    assert "70/100" in text
    assert text.endswith("\x1b[2K")  # erases the line
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[?\d]*[A-Za-z]", "", text))
    assert max(map(len, lines)) == 80


def test_progress_of_several_threads_counts_all_units():
    out, clock = output(terminal=False), Clock()
    work = Work("Checking images", 1000, "images", out, clock)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: work.advance(), range(999)))
    clock.seconds = 10.0
    work.advance()
    assert out.file.getvalue().startswith("Checking images: 1,000 of 1,000 images")


def test_tracked_work_is_shown_where_the_context_shows_it(monkeypatch):
    monkeypatch.setattr("jaxft.progress._LINE_SECONDS", 0)
    inner, outer = output(terminal=False), output(terminal=False)
    with track("hidden", 1) as work:
        work.advance()
    with show_progress_on(outer):
        with show_progress_on(inner), track("inner", 1) as work:
            work.advance()
        with show_progress_on(None), track("quiet", 1) as work:
            work.advance()
        with track("outer", 1) as work:
            work.advance()
    texts = [each.file.getvalue().split(":")[0] for each in (inner, outer)]
    assert texts == ["inner", "outer"]


class FullDisk(io.StringIO):
    """A file that cannot be written."""

    def write(self, text):
        raise OSError(28, "No space left on device")


def test_progress_that_cannot_be_printed_does_not_end_the_work():
    clock = Clock()
    out = Terminal(file=FullDisk(), force_terminal=False)
    work = Work("Checking images", 10, "images", out, clock)
    clock.seconds = 20.0
    work.advance()
    work.advance()
