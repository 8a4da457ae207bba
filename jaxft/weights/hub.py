"""Weights from a repository on the Hugging Face hub, through the hub's own client."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from urllib.parse import unquote

from jaxft.errors import WeightsError
from jaxft.weights.download import sha256_of

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""What a repository's weights are called, the first that it has."""

_EXAMPLES = "hf:timm/resnet50.a1_in1k, hf:microsoft/resnet-50@main or hf:OWNER/REPO/FILENAME"
_REFERENCE = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>refs/[^/]+/[^/]+|[^/]+))?(/(?P<file>.+))?", re.ASCII
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHOWN = 12  # of a repository's files


@dataclass(frozen=True)
class Reference:
    """`OWNER/REPO[@REVISION][/FILENAME]`."""

    repo: str
    revision: str = "main"
    file: str | None = None

    def __str__(self) -> str:
        return f"hf:{self.repo}" + (f"@{self.revision}" if self.revision != "main" else "")

    @property
    def candidates(self) -> tuple[str, ...]:
        """The files that may be meant."""
        return WEIGHTS if self.file is None else (self.file,)


def fetch(reference: str) -> Path:
    """The weights file of `OWNER/REPO[@REVISION][/FILENAME]` in the client's cache.

    The JSON files that say what the weights expect lie beside it. A slash in a revision is written
    %2F, but for `refs/pr/1`. What the hub says of a revision goes; where it cannot be asked, what
    is cached of that revision serves, and a whole commit hash that is cached is not asked about.

    The client reads HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN when it is first imported.

    Raises:
      WeightsError: no such repository, revision or file, or it cannot be had; or it is damaged.
    """
    wanted = _parse(reference)
    path = _cached(wanted)
    if path is None or not _COMMIT.fullmatch(wanted.revision):
        path = _download(wanted, path)
    _verify(path, wanted)
    return path


def descriptions(weights: PurePath) -> tuple[PurePath, ...]:
    """Where it may be written what the weights in a file expect: ours, timm's, transformers'."""
    beside = (weights.with_name(name) for name in ("config.json", "preprocessor_config.json"))
    return (weights.with_suffix(".json"), *beside)


def _parse(reference: str) -> Reference:
    found = _REFERENCE.fullmatch(reference.removeprefix("//"))  # `hf://` is the client's own form
    if found is None:
        raise WeightsError(
            f"hf:{reference} is not of the form hf:OWNER/REPO[@REVISION][/FILENAME], "
            f"such as {_EXAMPLES}."
        )
    return Reference(found["repo"], unquote(found["revision"] or "main"), found["file"])


def _cached(wanted: Reference) -> Path | None:
    import huggingface_hub as hub

    for name in wanted.candidates:
        try:
            path = hub.try_to_load_from_cache(wanted.repo, name, revision=wanted.revision)
        except ValueError as error:  # a name that no repository or file can have
            raise WeightsError(f"{wanted}: {error}") from error
        if isinstance(path, str):
            return Path(path)
    return None


def _download(wanted: Reference, cached: Path | None) -> Path:
    import huggingface_hub as hub
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT

    # Any Exception: beside the client's own there are those of its HTTP library, which is another
    # one in every other version.
    try:
        info = hub.HfApi().model_info(
            wanted.repo, revision=wanted.revision, timeout=HF_HUB_ETAG_TIMEOUT
        )
    except Exception as error:
        if cached is not None:
            return cached
        raise WeightsError(_explain(wanted, error)) from error
    files = [file.rfilename for file in info.siblings or ()]
    name = _choose(wanted, files)
    try:
        # These first: who has the weights in the cache has them all.
        for description in descriptions(PurePosixPath(name)):
            if str(description) in files:
                hub.hf_hub_download(wanted.repo, str(description), revision=info.sha)
        # By the revision, not its commit: the client notes it for days without a network.
        return Path(hub.hf_hub_download(wanted.repo, name, revision=wanted.revision))
    except Exception as error:
        raise WeightsError(_explain(wanted, error)) from error


def _choose(wanted: Reference, files: Sequence[str]) -> str:
    for name in wanted.candidates:
        if name in files:
            return name
    near = difflib.get_close_matches(wanted.file or WEIGHTS[0], files, n=1)
    like = [f for f in files if PurePosixPath(f).suffix in (".safetensors", ".bin", ".pth", ".pt")]
    example = (near or like or ["FILENAME"])[0]
    listed = like + [f for f in files if f not in like]
    more = f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
    raise WeightsError(
        f"{wanted} has no {' or '.join(wanted.candidates)}. Name a file of it, as in "
        f"{wanted}/{example}. It has {', '.join(listed[:_SHOWN]) or 'no files'}{more}."
    )


def _verify(path: Path, wanted: Reference) -> None:
    """Large files are kept under their sha256, which the client itself never computes."""
    if not path.is_symlink():  # a file system without links: the name is lost
        return
    # One link only: the next, if any, leads to a store that names files by another kind of hash.
    kept = path.parent / path.readlink()
    if not re.fullmatch(r"[0-9a-f]{64}", kept.name):
        return
    found = sha256_of(path)
    if found != kept.name:
        for file in (path.resolve(), kept, path):
            file.unlink(missing_ok=True)
        raise WeightsError(
            f"{wanted}: {path.name} came damaged, its sha256 is {found} and should be {kept.name}. "
            "It is removed from the cache: run again to download it anew."
        )


def _explain(wanted: Reference, error: Exception) -> str:
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{wanted.repo}"
    login = "log in with `hf auth login`, or set HF_TOKEN"
    names = " or ".join(wanted.candidates)
    copy = f"A copy from elsewhere serves as well, by its path: {names} of {page}."
    # The client may wrap what happened in "cannot find the requested files in the local cache".
    wrapped = isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__
    happened = wrapped or error
    if isinstance(happened, errors.GatedRepoError):
        return f"{wanted} asks for consent: give it at {page}, then {login}."
    if isinstance(happened, errors.RepositoryNotFoundError):
        return (
            f"{wanted}: there is no repository {page}, or it is private. "
            f"Look for a slip in its name, or {login}."
        )
    if isinstance(happened, errors.RevisionNotFoundError):
        return (
            f"{wanted}: {page} has no revision '{wanted.revision}'. Name a branch, a tag or a "
            f"commit after the @; {page}/commits/main lists the latter."
        )
    if isinstance(happened, errors.OfflineModeIsEnabled):
        return (
            f"{wanted}: HF_HUB_OFFLINE is set, and {constants.HF_HUB_CACHE} holds no {names} of "
            f"that revision. Unset it. {copy}"
        )
    if isinstance(happened, errors.HfHubHTTPError):
        reply = happened.response
        status = f"HTTP {reply.status_code} {reply.reason_phrase}"
        out = login[0].upper() + login[1:] if reply.status_code in (401, 403) else "Run again later"
        return f"{wanted}: {constants.ENDPOINT} refuses it ({status}). {out}. {copy}"
    cause = f"{type(happened).__name__}: {' '.join(str(happened).split())}"
    return f"{wanted} cannot be had from {constants.ENDPOINT} ({cause}). Run again later. {copy}"
