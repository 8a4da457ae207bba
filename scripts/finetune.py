"""Fine-tunes a network in stages, or goes on with a run that was interrupted.

    python scripts/finetune.py CONFIG --workdir DIR [any field of the recipe as an option]

CONFIG is a Python file that defines `recipe`, or the `recipe.yaml` of an earlier run; with
`CONFIG --help` it shows its fields. DIR may lie in a bucket (gs://...).

SIGTERM, or Ctrl-C, has the run save where it is and end, with exit code 75 (or 130); the same
command goes on. Before training either ends it at once, and so does Ctrl-C twice.
"""

if __name__ == "__main__":
    from stop_at_once import stop_at_once

    # Before what takes seconds to import.
    stop_at_once("came before training; the same command starts it, or goes on.")

import argparse
import signal
import sys

from jaxft import InterruptedRunError, JaxftError, distributed, finetune, lost_process, processes
from jaxft.command_line import EXIT_CODES, leave, print_fields, read_with
from jaxft.train import agreement
from jaxft.train.compiled_stage import keep_programs
from jaxft.train.finetune import Result


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--workdir", metavar="DIR")
    parser.add_argument(
        "--extend", action="store_true", help="go on with a longer last stage, or stages after it"
    )
    fork = parser.add_argument_group("a new run from the end of another run's stage")
    fork.add_argument("--fork-from", metavar="RUN", help="the other run's workdir")
    fork.add_argument("--stage", help="the stage, in both recipes; default: the last that ended")
    hosts = parser.add_argument_group("several hosts, where they do not find each other")
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is reached")
    hosts.add_argument("--processes", type=int, metavar="N", help="how many; 1: alone")
    hosts.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")
    if not arguments or arguments[0] in ("-h", "--help"):
        parser.print_help()
        print("\nEach field of a recipe is an option, here with the defaults of an example:\n")
        print_fields()
    known, options = parser.parse_known_args(arguments)
    if known.workdir is None and not {"-h", "--help"} & set(options):
        parser.error("--workdir DIR is required")
    keep_programs()
    try:
        distributed.start(known.coordinator, known.processes, known.process)
        with agreement.announced():
            recipe = read_with(known.config, options)
        result = finetune(
            recipe,
            known.workdir,
            fork_from=known.fork_from,
            stage=known.stage,
            extend=known.extend,
        )
    except InterruptedRunError as stopped:
        leave(f"\n{stopped}", EXIT_CODES[signal.Signals(stopped.signal)])
    except (JaxftError, OSError) as error:
        lost = isinstance(error, lost_process.LostProcessError)
        leave(f"{type(error).__name__}: {error}", lost_process.EXIT_CODE if lost else 1)
    except SystemExit as ended:  # --help, or an option that there is not: all is printed
        leave("", int(ended.code or 0))
    except KeyboardInterrupt:
        leave("\nInterrupted. The same command goes on from the last checkpoint.", 130)
    if __name__ == "__main__":
        for number in EXIT_CODES:
            signal.signal(number, signal.SIG_IGN)  # all is done
    try:
        with lost_process.translated():
            processes.barrier("end")  # or the first to end would take the others along
    except lost_process.LostProcessError as error:
        leave(f"{type(error).__name__}: {error}", lost_process.EXIT_CODE)
    if not processes.is_first():
        return
    try:
        show(result)
    except OSError as error:
        leave(f"All is done, but standard output cannot be written: {error.strerror}.", 0)


def show(result: Result) -> None:
    print(f"\nValidation accuracy {result.score.accuracy:.4f}, loss {result.score.loss:.4f}")
    if result.from_scratch:
        print(f"From scratch:       {result.from_scratch.accuracy:.4f}")
    print(f"Weights     {result.weights} (torch's names; model.json beside it)")
    print(f"Checkpoint  {result.checkpoint}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
