"""Whether a run waits for its images, and what would help."""

from dataclasses import dataclass

_SHARE = 0.3  # of an epoch, from which on it is worth a word
_SECONDS = 2.0  # an epoch, below which nobody minds


@dataclass(frozen=True)
class Waiting:
    """Of an epoch's training, in seconds: all of it, and how long the device stood idle for input.

    The first step, which compiles, is in neither.
    """

    seconds: float
    idle: float

    def advice(self, epoch: int, *, workers: int, cores: int, cached: bool) -> str | None:
        """A sentence about the input, if it is the bottleneck and something can be done about it.

        epoch: the stage's, from 1; in the first one the cache only fills.
        cached: all training images are in memory.
        """
        if epoch == 1 or self.idle < _SECONDS or self.idle < _SHARE * self.seconds:
            return None
        ways = ["more workers (--workers)"] if workers < cores else []
        ways += [] if cached else ["a larger --cache-mib"]
        if not ways:
            return None
        share = self.idle / self.seconds
        return f"Reading images took {share:.0%} of epoch {epoch}: {' or '.join(ways)} would help."
