"""Two processes check a part of the images each, and report the same unreadable ones."""

import json
import os
import socket
import subprocess
import sys

import pytest

CHILD = """
import json, sys
import numpy as np
from jaxft import DataError, JaxftError, distributed
from jaxft.data import Splits, check_sample, open_source
from jaxft.data.validate import problem
from jaxft.divided_check import check_in_parts
from jaxft.process_exchange import announced

address, process, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
distributed.start(address, 2, process)

class Pictures:
    classes = ("a", "b")
    def __init__(self, name, bad=(), failing=None, count=10):
        self.name, self.bad, self.failing, self.checked = name, bad, failing, []
        self.targets = (np.arange(count) % 2).astype(np.int32)
    def __len__(self): return len(self.targets)
    def __getitem__(self, index): raise AssertionError
    def identity(self, index): return f"{self.name}{index}"
    def problem(self, index):
        self.checked.append(index)
        if index == self.failing:
            raise RuntimeError("a bug")
        return f"{self.name}/{index}.jpg: not an image" if index in self.bad else None

results = {}
check_sample.SAMPLE_SIZE = 4
for case, train, on_bad_image in (
    ("readable", Pictures("train"), "error"),
    ("error", Pictures("train", bad=(2, 3, 7)), "error"),
    ("skip", Pictures("train", bad=(2, 3, 7)), "skip"),
    ("sample", Pictures("train", bad=(3, 5)), "error"),
    ("bug", Pictures("train", failing=4), "error"),
    ("other count", Pictures("train", bad=(0, 1), count=10 + 2 * process), "skip"),
):
    val = Pictures("val", bad=(5,) if train.bad else ())
    try:
        with announced():
            splits = open_source(
                Splits(train, val), on_bad_image=on_bad_image, divide=check_in_parts,
                sample_above=0 if case == "sample" else None,
            )
        kept = [[each.identity(k) for k in range(len(each))] for each in splits]
        found = {"kept": kept, "remarks": splits.remarks}
    except (JaxftError, RuntimeError) as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    results[case] = {**found, "checked": [sorted(train.checked), sorted(val.checked)]}
with open(out, "w") as file:
    json.dump(results, file)
distributed.barrier("end")
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of each case in the first and the second process."""
    folder = tmp_path_factory.mktemp("results")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, address, str(process), folder / f"{process}.json"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        for process in range(2)
    ]  # fmt: skip
    ended = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    return [json.loads((folder / f"{process}.json").read_text()) for process in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["readable", "error", "skip"])
def test_check_in_parts_checks_each_image_once(case, results):
    parts = [each[case].pop("checked") for each in results]
    assert parts == [[[0, 2, 4, 6, 8]] * 2, [[1, 3, 5, 7, 9]] * 2]
    assert results[0][case] == results[1][case]


@pytest.mark.slow
def test_check_in_parts_lists_the_images_of_both_processes(results):
    lines = [f"train/{k}.jpg: not an image" for k in (2, 3, 7)] + ["val/5.jpg: not an image"]
    listing = "".join(f"\n  {line}" for line in lines)
    assert results[0]["error"]["error"] == (
        "DataError: 4 of 20 images cannot be read; replace or remove them, or leave them out with "
        f"on_bad_image='skip':{listing}"
    )
    skipped = results[0]["skip"]
    assert skipped["remarks"] == [f"Left out 4 of 20 images, which cannot be read:{listing}"]
    assert skipped["kept"][0] == [f"train{k}" for k in (0, 1, 4, 5, 6, 8, 9)]


@pytest.mark.slow
def test_check_in_parts_divides_a_sample(results):
    assert [each["sample"]["checked"] for each in results] == [[[0, 6]] * 2, [[3, 9]] * 2]
    for each in results:
        assert each["sample"]["error"].startswith("DataError: 1 of 8 images cannot be read")
        assert "train/3.jpg: not an image" in each["sample"]["error"]


@pytest.mark.slow
def test_check_in_parts_passes_an_error_of_one_process_to_the_other(results):
    errors = [each["bug"]["error"] for each in results]
    message = "RuntimeError: a bug"
    assert errors == [message, f"ParallelError: process 0 of this run has failed: {message}"]


@pytest.mark.slow
def test_check_in_parts_checks_all_images_if_their_numbers_differ(results):
    for process, count in enumerate((10, 12)):
        found = results[process]["other count"]
        assert found["checked"] == [[*range(count)], [*range(10)]]
        assert len(found["kept"][0]) == count - 2
