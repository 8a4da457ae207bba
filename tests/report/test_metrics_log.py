"""The records of a run: strict JSON, the same numbers for TensorBoard, and a full disk."""

import json
import math
import struct
from contextlib import closing

import pytest

from jaxft.report.metrics_log import MetricsLog


def begun(workdir, earlier=(), **options):
    log = MetricsLog(workdir, **options)
    log.begin(earlier)
    return log


def row(step, **more):
    return {"stage": "head", "epoch": step, "step": step, "val_loss": 0.5, **more}


def rows(workdir):
    def strict(name):
        raise AssertionError(f"{name} is no JSON")

    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=strict) for line in lines]


def events(workdir):
    """(step, tag, value) of all event files, oldest first, their framing checked."""
    from tensorboardX.proto.event_pb2 import Event  # imports torch where it is installed
    from tensorboardX.record_writer import masked_crc32c

    found = []
    for file in sorted((workdir / "tensorboard").iterdir(), key=lambda path: path.stat().st_ctime):
        content = file.read_bytes()
        while content:
            length, check = struct.unpack("<QI", content[:12])
            assert check == masked_crc32c(content[:8])
            data, (check,) = (
                content[12 : 12 + length],
                struct.unpack_from("<I", content, 12 + length),
            )
            assert check == masked_crc32c(data)
            event, content = Event.FromString(data), content[16 + length :]
            if event.HasField("session_log"):
                found.append((event.step, "purged", None))
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def test_a_row_in_both(tmp_path):
    written = row(
        7,
        val_loss=float("nan"),
        rates={"fc": 0.5, "layer4": math.inf},
        gradient_norms={"fc": {"mean": 2.0}},
        improved=True,
    )
    with closing(begun(tmp_path)) as log:
        log.write(written)
    assert rows(tmp_path) == [
        {**written, "val_loss": None, "rates": {"fc": 0.5, "layer4": None}}
    ]  # nothing but numbers is changed
    (purged, *scalars) = events(tmp_path)
    assert purged == (1, "purged", None)
    tags = {tag: value for step, tag, value in scalars if step == 7}
    assert math.isnan(tags.pop("val_loss"))
    assert tags == {"rates/fc": 0.5, "rates/layer4": math.inf, "gradient_norms/fc/mean": 2.0}


@pytest.mark.parametrize("damage", ["none", "cut", "changed", "missing"])
def test_metrics_of_a_resumed_run_are_the_rows_of_its_checkpoint(damage, tmp_path):
    file = tmp_path / "metrics.jsonl"
    with closing(begun(tmp_path)) as log:
        for step in (10, 20):
            log.write(row(step))
        earlier = list(log.rows)
        log.write(row(30))
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 3])
    elif damage == "changed":
        file.write_bytes(content.replace(b"0.5", b"0.7"))
    elif damage == "missing":
        file.unlink()
    with closing(begun(tmp_path, earlier)) as log:
        log.write(row(30, val_loss=0.25))
    assert rows(tmp_path) == [row(10), row(20), row(30, val_loss=0.25)]
    assert events(tmp_path)[-2:] == [(21, "purged", None), (30, "val_loss", 0.25)]


def test_another_process_than_the_first_writes_nothing(tmp_path):
    with closing(begun(tmp_path, writes=False)) as log:
        log.write(row(1))
    assert not list(tmp_path.iterdir())


def test_what_a_full_disk_does_not_take_comes_with_the_next_row(disk):
    log = begun(disk.folder)
    log.write(row(1))
    disk.fill(but=0)
    long = {f"layer{n}": 0.5 for n in range(1000)}
    log.write(row(2, rates=long))
    log.write(row(3))
    assert rows(disk.folder) == [row(1)]
    disk.free()
    log.write(row(4))
    log.close()
    assert [kept["step"] for kept in rows(disk.folder)] == [1, 2, 3, 4]
    assert [step for step, tag, _ in events(disk.folder) if tag == "val_loss"] == [1, 2, 3, 4]
    assert len(events(disk.folder)) == 1 + 4 + 1000


def test_what_a_full_disk_never_takes_is_a_warning(disk):
    log = begun(disk.folder)
    disk.fill(but=0)
    log.write(row(2, rates={f"layer{n}": 0.5 for n in range(1000)}))
    with pytest.warns(RuntimeWarning, match=r"metrics.jsonl, or .* are missing: .*No space left"):
        log.close()
