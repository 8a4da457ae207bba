"""Writes TensorBoard event files, on a disk or in a bucket."""

import os
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from etils import epath

from jaxft.checkpoint.atomic import in_bucket


class EventFile:
    """An event file in `folder`.

    Replaces tensorboardX's `SummaryWriter`, whose thread ends at the first full disk, and which
    needs another client library for buckets.
    """

    def __init__(self, folder: epath.Path, *, purge_step: int) -> None:
        """Starts a file; TensorBoard hides values of older files from `purge_step` on."""
        with _without_torch():
            from tensorboardX.proto.event_pb2 import Event, SessionLog

        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._path = folder / name
        self._records, self._bytes_written = bytearray(), 0
        start = SessionLog(status=SessionLog.START)
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._append(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Adds scalars by tag; the next `flush` writes them."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._append(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))

    def flush(self) -> None:
        """Writes all records added since the last flush.

        After an OSError the next call continues at the first byte that was not written.
        """
        if in_bucket(self._path):  # an object cannot be extended
            self._path.write_bytes(bytes(self._records))
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self._path, os.O_CREAT | os.O_WRONLY, 0o644)
        try:
            while unwritten := self._records[self._bytes_written :]:
                self._bytes_written += os.pwrite(file, unwritten, self._bytes_written)
        finally:
            os.close(file)

    def _append(self, event: Any) -> None:
        from tensorboardX.record_writer import masked_crc32c

        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        for part in (length, data):
            self._records += part + struct.pack("<I", masked_crc32c(part))


@contextmanager
def _without_torch() -> Iterator[None]:
    """Hides torch from imports, unless it is imported already.

    tensorboardX imports torch, if installed, for an annotation; that takes a second or two.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]
