"""Rounds of `agreement` in the first of two processes, with a key-value store in place of JAX's."""

import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath

from jaxft import DataError, ParallelError, Recipe, Stage, agreement, data, process_exchange
from jaxft.data import Splits


class Client:
    """A key-value store like that of `jax.distributed`, with values from the other process."""

    def __init__(self, **values):
        self.values = {f"jaxft/0/{name}/1": json.dumps(value) for name, value in values.items()}

    def key_value_set(self, key, value):
        self.values[key] = value

    def key_value_dir_get(self, folder):
        return [*self.values.items()]

    def blocking_key_value_get(self, key, milliseconds):
        if key not in self.values:
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
        return self.values[key]

    def wait_at_barrier(self, name, milliseconds):
        pass


def connect(monkeypatch, client):
    """Makes this process the first of two."""
    state = SimpleNamespace(client=client, process_id=0, num_processes=2)
    monkeypatch.setattr(process_exchange.distributed, "global_state", state)
    monkeypatch.setattr(process_exchange, "_round", 0)


def test_agreement_prints_which_process_it_waits_for(monkeypatch, capsys):
    """Once, however long it takes."""
    waits = iter([True, True, False])

    class SlowClient(Client):
        def blocking_key_value_get(self, key, milliseconds):
            if key.endswith("/1") and next(waits):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
            return "{}"

    connect(monkeypatch, SlowClient())
    monkeypatch.setattr(process_exchange, "_NOTICE_SECONDS", 0.0)
    assert process_exchange.exchange("facts", {}) == [{}, {}]
    printed = capsys.readouterr().err
    assert printed.startswith(
        "Waiting for process 1 of 2 to check its images, and to compare recipe"
    )
    assert printed.count("Waiting") == 1


@pytest.mark.parametrize(
    ("code", "sent"),
    [(2, {"error": "it exited with code 2; its output shows why."}), (0, None), (None, None)],
)
def test_agreement_sends_only_exits_with_an_error(code, sent, monkeypatch):
    """`--help` exits with code 0 and is no failure."""
    client = Client(facts={})
    connect(monkeypatch, client)
    with pytest.raises(SystemExit), process_exchange.announced():
        sys.exit(code)
    assert json.loads(client.values.get("jaxft/0/facts/0", "null")) == sent


def test_agreement_sends_an_error_while_it_collects_the_facts(monkeypatch):
    """Without it the other processes would wait for the facts for ever."""

    class Unreadable:
        classes, targets = ("a",), np.zeros(1, np.int32)

        def __len__(self):
            return 1

        def identity(self, index):
            raise DataError("no such image")

    client = Client(facts={})
    connect(monkeypatch, client)
    with pytest.raises(DataError), process_exchange.announced():
        agreement.check_agreement("run", None, Splits(Unreadable(), Unreadable()), 0)
    assert json.loads(client.values["jaxft/0/facts/0"]) == {"error": "DataError: no such image"}
    assert process_exchange._round == 1


RECIPE = Recipe(model="cifar_resnet8", data="a", stages=(Stage("s", {"*": 1e-3}, epochs=1),))


def arrays(targets, first_pixel=0):
    pixels = np.zeros((len(targets), 4, 4, 3), np.uint8)
    pixels[0, 0, 0, 0] = first_pixel
    return data.arrays(pixels, targets, classes=["a", "b"])


ANY = arrays([[1, 1]])  # validation images


def agreement_error(monkeypatch, tmp_path, here, there, **values):
    """Returns the lines of process 0's error, and the names of the keys that it sent.

    Process 1 has the splits `there`. Under each other key it sends what process 0 does, or
    `values[key]`.
    """

    class Twin(Client):
        def key_value_set(self, key, value):
            assert key not in self.values
            super().key_value_set(key, value)
            self.values.setdefault(f"{key[:-1]}1", value)

    facts = {**agreement._facts(RECIPE, there), "device_cache_mib": 0}
    values = {name.replace("_", " "): value for name, value in values.items()}
    client = Twin(facts=facts, **values)
    connect(monkeypatch, client)
    with pytest.raises(ParallelError) as error:
        agreement.check_agreement(tmp_path, RECIPE, here, 0)
    lines = [line.strip() for line in str(error.value).splitlines()[1:-1]]
    return lines, [key.split("/")[2] for key in client.values if key.endswith("/0")]


DIGESTS = [f"names, sizes or classes of {split} images (digest)" for split in ("train", "val")]


def test_agreement_finds_classes_that_alternate_in_another_order(monkeypatch, tmp_path):
    """Each class has the same images, so that no image is to blame."""
    here, there = (Splits(x, x) for x in map(arrays, ([0, 1], [1, 0])))
    lines, keys = agreement_error(monkeypatch, tmp_path, here, there)
    assert [line.partition(":")[0] for line in lines] == DIGESTS
    assert keys == ["facts", "train digests", "val digests"]


def test_agreement_names_a_validation_image_if_training_images_alternate(monkeypatch, tmp_path):
    here = Splits(arrays([0, 1]), arrays([0, 1]))
    there = Splits(arrays([1, 0]), arrays([0, 1], first_pixel=1))
    names = agreement._names_by_class(there.val)
    lines, keys = agreement_error(
        monkeypatch, tmp_path, here, there,
        val_digests={"digests": [*map(agreement._digest, names)]}, val_names={"names": names[0]},
    )  # fmt: skip
    assert [line.partition(":")[0] for line in lines[:2]] == DIGESTS
    own = agreement._names_by_class(here.val)[0][0]
    expected = f"only process 0 has {own}, only process 1 has {names[0][0]}"
    assert lines[2:] == [f"val images of class a: {expected}"]
    assert keys == ["facts", "train digests", "val digests", "val names"]


@pytest.mark.parametrize(
    ("here", "there", "group"),
    [
        ([[1, 1], [0, 1]], [[1, 1], [1, 0]], "of class a"),
        ([[0, 1], [0, 0]], [[0, 1], [0, 1]], "of class b"),
        ([[0, 0], [0, 1]], [[0, 1], [0, 0]], "of class b"),
    ],
)
def test_agreement_names_an_image_whose_labels_differ(here, there, group, monkeypatch, tmp_path):
    here, there = (
        Splits(data.arrays(np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3), x, "ab"), ANY)
        for x in (np.array(here), np.array(there))
    )
    names = agreement._names_by_class(there.train)
    index = {"of class a": 0, "of class b": 1}[group]
    lines, keys = agreement_error(
        monkeypatch, tmp_path, here, there,
        train_digests={"digests": [*map(agreement._digest, names)]},
        train_names={"names": names[index]},
    )  # fmt: skip
    own = {*agreement._names_by_class(here.train)[index]} ^ {*names[index]}
    assert lines[-1].startswith(f"train images {group}: only process ")
    assert all(name in lines[-1] for name in own)
    assert keys == ["facts", "train digests", "train names"]


def test_agreement_tells_one_hot_labels_from_classes(monkeypatch, tmp_path):
    here, there = (Splits(x, x) for x in map(arrays, ([0, 1], np.eye(2, dtype=int))))
    lines, _ = agreement_error(monkeypatch, tmp_path, here, there)
    assert lines[0] == "images with several labels: false in process 0, true in process 1"
    assert [line.partition(":")[0] for line in lines[1:]] == DIGESTS


@pytest.mark.parametrize("process", [0, 1])
def test_agreement_sends_none_if_names_cannot_be_read(process, monkeypatch, tmp_path):
    """The other process waits for the digests, whatever happens here."""
    here, there = (Splits(x, x) for x in (arrays([0, 1]), arrays([0, 1], first_pixel=1)))
    values = {}
    if process == 0:
        monkeypatch.setattr(agreement, "_names_by_class", lambda _: {}["unreadable"])
    else:
        values = {f"{split}_digests": {"digests": None} for split in ("train", "val")}
    lines, keys = agreement_error(monkeypatch, tmp_path, here, there, **values)
    assert [line.partition(":")[0] for line in lines] == DIGESTS
    assert keys == ["facts", "train digests", "val digests"]


def test_agreement_ends_at_once_after_ctrl_c(monkeypatch, tmp_path):
    class Interrupted(Client):
        def blocking_key_value_get(self, key, milliseconds):
            raise KeyboardInterrupt

        def wait_at_barrier(self, name, milliseconds):
            raise AssertionError

    connect(monkeypatch, Interrupted())
    splits = Splits(arrays([0, 1]), arrays([0, 1]))
    with pytest.raises(KeyboardInterrupt):
        agreement.check_agreement(tmp_path, RECIPE, splits, 0)


UNSEEN = {"problem": "does not see a file that process 0 has written there"}


@pytest.mark.parametrize("before", [None, [], ["recipe.yaml"]], ids=["new", "empty", "begun"])
def test_agreement_leaves_a_workdir_as_it_was(before, monkeypatch, tmp_path):
    workdir = tmp_path / "run"
    if before is not None:
        workdir.mkdir()
        for name in before:
            (workdir / name).touch()
    for lost in (False, True):  # the other process
        connect(monkeypatch, LostClient(file={}) if lost else Client(file={}, seen=UNSEEN))
        expected = (jax.errors.JaxRuntimeError, "ended") if lost else (ParallelError, "1 does not")
        with pytest.raises(expected[0], match=expected[1]):
            agreement._check_shared(epath.Path(workdir))
        assert (sorted(x.name for x in workdir.iterdir()) if workdir.exists() else None) == before


class LostClient(Client):
    """The other process has ended."""

    def blocking_key_value_get(self, key, milliseconds):
        if key not in self.values:
            raise jax.errors.JaxRuntimeError("a process has ended")
        return self.values[key]


class Bucket:
    """A folder in a bucket whose client raises an error in a method."""

    def __init__(self, failing):
        self.failing = failing

    def __truediv__(self, name):
        return self

    def __str__(self):
        return "gs://bucket/run"

    def call(self, name):
        if name == self.failing:
            raise RuntimeError("Forbidden")

    def exists(self):
        self.call("exists")
        return True

    def mkdir(self, **_):
        self.call("mkdir")

    def touch(self):
        self.call("touch")

    def unlink(self, **_):
        self.call("unlink")


@pytest.mark.parametrize("failing", ["exists", "mkdir", "touch"])
def test_agreement_sends_the_error_of_a_bucket(failing, monkeypatch):
    client = Client(file={})
    connect(monkeypatch, client)
    message = "gs://bucket/run cannot be written: RuntimeError: Forbidden."
    with pytest.raises(ParallelError, match=message):
        agreement._check_shared(Bucket(failing))
    assert json.loads(client.values["jaxft/0/file/0"])["problem"] == message


def test_agreement_sends_why_a_file_cannot_be_looked_for(monkeypatch):
    client = Client(seen={"problem": ""})
    connect(monkeypatch, client)
    problem = agreement._unseen(Bucket("exists"), "file")
    assert "process 0 cannot read it (RuntimeError: Forbidden). A run of several" in problem
    assert json.loads(client.values["jaxft/0/seen/0"])["problem"].startswith("cannot read it")
