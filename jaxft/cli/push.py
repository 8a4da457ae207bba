"""Uploads the weights of a run to the Hugging Face hub, with their description and model card.

    jaxft push runs/ants hf:USER/ants [--public]

WORKDIR is a run, which is exported first, or a folder that `jaxft export` has written. All files
are uploaded in one commit. A new repository is private unless --public is given.

Needs a token with write access: log in with `hf auth login`, or set HF_TOKEN. HF_ENDPOINT names
another hub. Afterwards, jaxft.Classifier.load("hf:USER/ants") loads the weights.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from jaxft.cli.command_setup import check_writable, command_parser, run_until_signal
from jaxft.errors import CheckpointError
from jaxft.export import FORMATS, export
from jaxft.push import push
from jaxft.train.workdir import saved
from jaxft.weights.hub import parse_repository


def run(arguments: Sequence[str], program: str = "jaxft push") -> int:
    """Runs the command; returns its exit code."""
    return run_until_signal(partial(_push, arguments, program))


def _push(arguments: Sequence[str], program: str) -> None:
    parser = command_parser(__doc__, "jaxft push", program)
    parser.add_argument("workdir", metavar="WORKDIR")
    parser.add_argument("repository", metavar="hf:USER/NAME")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    known = parser.parse_args(arguments)
    folder, repo = Path(known.workdir), parse_repository(known.repository)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}; name a run's WORKDIR or an export.")
    if saved(folder) is not None:
        check_writable(folder)
        export(
            folder, formats=tuple(name for name in FORMATS if (folder / FORMATS[name]).is_file())
        )
    url = push(folder, known.repository, public=known.public)
    print(f"Uploaded {url}")
    print(f'Load it with jaxft.Classifier.load("hf:{repo}").')
