"""`MetricsLog`: strict JSON, the same numbers for TensorBoard, and a full disk."""

import json
import math
import struct
from contextlib import closing

import pytest

from jaxft.report.metrics_log import MetricsLog


def open_log(workdir, earlier=(), **options):
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
    """(step, tag, value) of all event files, oldest first; checks the records' checksums."""
    from tensorboardX.proto.event_pb2 import Event  # imports torch where it is installed
    from tensorboardX.record_writer import masked_crc32c

    values = []
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
                values.append((event.step, "purged", None))
            values += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return values


def test_metrics_log_writes_a_row_as_json_and_for_tensorboard(tmp_path):
    written = row(
        7,
        val_loss=float("nan"),
        lr={"fc": 0.5, "layer4": math.inf},
        gradient_norms={"fc": {"mean": 2.0}},
        improved=True,
    )
    with closing(open_log(tmp_path)) as log:
        log.write(written)
    assert rows(tmp_path) == [
        {**written, "val_loss": None, "lr": {"fc": 0.5, "layer4": None}}
    ]  # only non-finite numbers change
    (purged, *scalars) = events(tmp_path)
    assert purged == (1, "purged", None)
    tags = {tag: value for step, tag, value in scalars if step == 7}
    assert math.isnan(tags.pop("val_loss"))
    assert tags == {"lr/fc": 0.5, "lr/layer4": math.inf, "gradient_norms/fc/mean": 2.0}


@pytest.mark.parametrize("damage", ["none", "cut", "changed", "missing"])
def test_metrics_log_of_a_resumed_run_starts_with_the_rows_of_its_checkpoint(damage, tmp_path):
    file = tmp_path / "metrics.jsonl"
    with closing(open_log(tmp_path)) as log:
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
    with closing(open_log(tmp_path, earlier)) as log:
        log.write(row(30, val_loss=0.25))
    assert rows(tmp_path) == [row(10), row(20), row(30, val_loss=0.25)]
    assert events(tmp_path)[-2:] == [(21, "purged", None), (30, "val_loss", 0.25)]


def test_metrics_log_of_other_processes_writes_nothing(tmp_path):
    with closing(open_log(tmp_path, writes=False)) as log:
        log.write(row(1))
    assert not list(tmp_path.iterdir())


def test_metrics_log_writes_missing_rows_after_a_full_disk(disk):
    log = open_log(disk.folder)
    log.write(row(1))
    disk.fill(but=0)
    long = {f"layer{n}": 0.5 for n in range(1000)}
    log.write(row(2, lr=long))
    log.write(row(3))
    assert rows(disk.folder) == [row(1)]
    disk.free()
    log.write(row(4))
    log.close()
    assert [written["step"] for written in rows(disk.folder)] == [1, 2, 3, 4]
    assert [step for step, tag, _ in events(disk.folder) if tag == "val_loss"] == [1, 2, 3, 4]
    assert len(events(disk.folder)) == 1 + 4 + 1000


def test_metrics_log_warns_about_rows_lost_to_a_full_disk(disk):
    log = open_log(disk.folder)
    disk.fill(but=0)
    log.write(row(2, lr={f"layer{n}": 0.5 for n in range(1000)}))
    with pytest.warns(RuntimeWarning, match=r"metrics.jsonl, or .* are missing: .*No space left"):
        log.close()
