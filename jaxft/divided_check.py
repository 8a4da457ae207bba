"""Divides the check of a run's images among its processes, before it trains."""

import hashlib
from collections.abc import Callable, Mapping

from jax._src import distributed

from jaxft.data import Source
from jaxft.data.validate import Findings
from jaxft.process_exchange import end_round, exchange, failure_message, num_processes, raise_error


def check_in_parts(
    check: Callable[[int, int], Findings], sources: Mapping[str, Source]
) -> list[Findings]:
    """Checks a part of the images in each process and returns the findings of all processes.

    Processes whose classes or numbers of images differ check all of their images, since an index
    may be another image there. `check_agreement` then describes the difference.

    Args:
      check: checks every n-th image from the k-th, given k and n.
      sources: the images.

    Raises:
      ParallelError: another process has failed.
      Exception: an error of `check`.
    """
    count = num_processes()
    if count == 1:
        return [check(0, 1)]
    digest = hashlib.sha256()
    for source in sources.values():
        digest.update(repr(source.classes).encode() + source.targets.astype("<i4").tobytes())
    facts = {"digest": digest.hexdigest()}
    try:
        received = exchange("facts", facts)
        raise_error(received)
        is_same = all(each == facts for each in received)
        part, parts = (distributed.global_state.process_id, count) if is_same else (0, 1)
        try:
            findings = check(part, parts)
        except Exception as error:  # a source may raise any type
            exchange("findings", {"error": failure_message(error)})
            raise
        received = exchange("findings", findings._asdict())
        raise_error(received)
    except Exception:  # not KeyboardInterrupt, which must end this process at once
        end_round(last=True)
        raise
    end_round()
    return [Findings(**each) for each in received] if is_same else [findings]
