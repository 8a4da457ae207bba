"""Processes of a run with other images, recipe or workdir: one error in each."""

import json
import os
import re
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

CHILD = """
import json, os, sys
from jaxft import JaxftError, Recipe, Stage, distributed, finetune
from jaxft.report.console import Console
from jaxft import agreement
from jaxft.process_exchange import announced

address, process, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
agreement._FILE_TIMEOUT = 0.5
distributed.start(address, 2, process)
stages, errors = (Stage("all", {"*": 1e-3}, epochs=1),), {}
for case in ("file", "size", "seed", "missing", "exit", "disk"):
    os.chdir(f"{folder}/{case}/host{process}")
    recipe = Recipe(
        model="cifar_resnet8", data="folder:images", image_size=8, resize_size=8, batch_size=4,
        seed=process if case == "seed" else 0, workers=process, stages=stages,
    )
    try:
        with announced():  # as scripts/finetune.py reads its arguments
            if case == "exit" and process == 1:
                sys.exit(2)
        finetune(recipe, "own" if case == "disk" else "../shared", console=Console(quiet=True))
    except (JaxftError, SystemExit) as error:
        errors[case] = f"{type(error).__name__}: {error}"
with open(f"{folder}/errors{process}.json", "w") as file:
    json.dump(errors, file)
distributed.barrier("end")
"""


def images(folder):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("ants", "bees"):
            (folder / split / name).mkdir(parents=True)
            for i in range(2):
                pixels = rng.integers(0, 256, (9, 9, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for each case, in which each host has images that lie at the same path."""
    folder = tmp_path_factory.mktemp("hosts")
    for case in ("file", "size", "seed", "missing", "exit", "disk"):
        for process in range(2):
            images(folder / case / f"host{process}" / "images")
    (folder / "file/host1/images/train/bees/1.png").unlink()
    changed = Image.fromarray(np.zeros((20, 20, 3), np.uint8))
    changed.save(folder / "size/host1/images/train/bees/1.png")
    (folder / "missing/host1/images").rename(folder / "missing/host1/pictures")
    return folder


@pytest.fixture(scope="module")
def errors(folder):
    """The errors of each case, of the first and the second process."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, address, str(process), folder],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        for process in range(2)
    ]  # fmt: skip
    ended = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    return [json.loads((folder / f"errors{process}.json").read_text()) for process in range(2)]


@pytest.mark.slow
def test_agreement_finds_a_missing_image(errors):
    first, second = (each["file"] for each in errors)
    assert first == second
    assert first.startswith(
        "ParallelError: the processes of this run differ:\n"
        "  train images: 4 in process 0, 3 in process 1\n"
        "  train images of class bees: 2 in process 0, 1 in process 1\n"
    )
    assert "\n  train images of class bees: only process 0 has bees/1.png of 3" in first


@pytest.mark.slow
def test_agreement_finds_an_image_of_another_size(errors):
    first, second = (each["size"] for each in errors)
    assert first == second
    assert "\n  names, sizes or classes of train images (digest): " in first
    assert first.count(" in process 1") == 1
    assert re.search(
        r"\n  train images of class bees: only process 0 has bees/1.png of \d+ bytes, "
        r"only process 1 has bees/1.png of \d+ bytes\nGive",
        first,
    )


@pytest.mark.slow
def test_agreement_finds_another_recipe(errors):
    """`workers` changes nothing and may differ."""
    first, second = (each["seed"] for each in errors)
    assert first == second
    assert "differ:\n  recipe: seed: 0 in process 0, 1 in process 1\nGive all" in first


@pytest.mark.slow
def test_agreement_passes_an_error_of_one_process_to_the_others(errors):
    first, second = (each["missing"] for each in errors)
    assert second.startswith("DataError: ")
    assert first.startswith(f"ParallelError: process 1 of this run has failed: {second[:30]}")
    assert "there is no folder images" in first


@pytest.mark.slow
def test_agreement_passes_an_exit_of_one_process_to_the_others(errors):
    """Such as the command line for an unknown option."""
    first, second = (each["exit"] for each in errors)
    assert second == "SystemExit: 2"
    assert first == (
        "ParallelError: process 1 of this run has failed: it exited with code 2; its output shows "
        "why."
    )


@pytest.mark.slow
def test_agreement_finds_a_workdir_that_is_not_shared(errors, folder):
    first, second = (each["disk"] for each in errors)
    assert first == second
    assert "own is not the same folder in all processes" in first
    assert "process 1 does not see" in first


@pytest.mark.slow
def test_agreement_leaves_nothing_behind(errors, folder):
    assert not [*folder.glob("*/host*/own"), *folder.glob("*/shared")]
