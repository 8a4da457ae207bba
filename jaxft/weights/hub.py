"""Downloads weights from the Hugging Face hub with its client, `huggingface_hub`."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from urllib.parse import unquote

from jaxft.errors import WeightsError
from jaxft.weights.download import sha256_of

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Default names of a weights file; the first that a repository has is used."""

_EXAMPLES = "hf:timm/resnet50.a1_in1k, hf:microsoft/resnet-50@main or hf:OWNER/REPO/FILENAME"
_REFERENCE = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>refs/[^/]+/[^/]+|[^/]+))?(/(?P<file>.+))?", re.ASCII
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHOWN = 12  # files of a repository


@dataclass(frozen=True)
class Reference:
    """Parsed `OWNER/REPO[@REVISION][/FILENAME]`."""

    repo: str
    revision: str = "main"
    file: str | None = None

    def __str__(self) -> str:
        return f"hf:{self.repo}" + (f"@{self.revision}" if self.revision != "main" else "")

    @property
    def candidates(self) -> tuple[str, ...]:
        """Names of the weights file, in order of preference."""
        return WEIGHTS if self.file is None else (self.file,)


def fetch(reference: str) -> Path:
    """Downloads a weights file, and the JSON files that describe it, into the client's cache.

    A branch or tag is looked up on the hub; if the hub cannot be reached, the cached file is used.
    A cached commit is used without a request. The client reads HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE
    and HF_TOKEN when it is first imported.

    Args:
      reference: `OWNER/REPO[@REVISION][/FILENAME]`. A slash in a revision is written %2F, except in
        `refs/pr/1`.

    Returns:
      Path in the cache.

    Raises:
      WeightsError: The repository, revision or file does not exist, the download failed, or the
        file is damaged.
    """
    parsed = parse_reference(reference)
    path = _find_cached(parsed)
    if path is None or not _COMMIT.fullmatch(parsed.revision):
        path = _download(parsed, cached=path)
    _verify(path, parsed)
    return path


def description_paths(weights: PurePath) -> tuple[PurePath, ...]:
    """Returns the paths at which jaxft, timm or transformers describe a weights file."""
    names = ("config.json", "preprocessor_config.json")
    return (weights.with_suffix(".json"), *(weights.with_name(name) for name in names))


def parse_reference(reference: str) -> Reference:
    """Parses `OWNER/REPO[@REVISION][/FILENAME]`.

    Raises:
      WeightsError: the reference has another form.
    """
    match = _REFERENCE.fullmatch(reference.removeprefix("//"))  # the client also accepts `hf://`
    if match is None:
        raise WeightsError(
            f"hf:{reference} is not of the form hf:OWNER/REPO[@REVISION][/FILENAME], "
            f"such as {_EXAMPLES}."
        )
    return Reference(match["repo"], unquote(match["revision"] or "main"), match["file"])


def parse_repository(reference: str) -> str:
    """Returns `OWNER/NAME` of `hf:OWNER/NAME`, without a revision or a file.

    Raises:
      WeightsError: the reference has another form.
    """
    scheme, _, rest = reference.partition(":")
    match = _REFERENCE.fullmatch(rest.removeprefix("//")) if scheme == "hf" else None
    if match is None or match["revision"] or match["file"]:
        raise WeightsError(f"{reference} is not of the form hf:OWNER/NAME, such as hf:me/ants.")
    return match["repo"]


def _find_cached(reference: Reference) -> Path | None:
    import huggingface_hub as hub

    for name in reference.candidates:
        try:
            path = hub.try_to_load_from_cache(reference.repo, name, revision=reference.revision)
        except ValueError as error:  # an invalid name of a repository or file
            raise WeightsError(f"{reference}: {error}") from error
        if isinstance(path, str):
            return Path(path)
    return None


def _download(reference: Reference, *, cached: Path | None) -> Path:
    import huggingface_hub as hub
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT

    # Any exception, because the client also raises errors of its HTTP library, which differs by
    # version.
    try:
        info = hub.HfApi().model_info(
            reference.repo, revision=reference.revision, timeout=HF_HUB_ETAG_TIMEOUT
        )
    except Exception as error:
        if cached is not None:
            return cached
        raise WeightsError(_explain(reference, error)) from error
    files = [file.rfilename for file in info.siblings or ()]
    name = _choose_file(reference, files)
    try:
        # Descriptions first, so that cached weights always have them.
        for description in description_paths(PurePosixPath(name)):
            if str(description) in files:
                hub.hf_hub_download(reference.repo, str(description), revision=info.sha)
        # By revision, not commit, so that the client can resolve the revision offline later.
        path = hub.hf_hub_download(reference.repo, name, revision=reference.revision)
        return Path(path)
    except Exception as error:
        raise WeightsError(_explain(reference, error)) from error


def _choose_file(reference: Reference, files: Sequence[str]) -> str:
    for name in reference.candidates:
        if name in files:
            return name
    suffixes = (".safetensors", ".bin", ".pth", ".pt")
    weights = [file for file in files if PurePosixPath(file).suffix in suffixes]
    near = difflib.get_close_matches(reference.file or WEIGHTS[0], files, n=1)
    example = (near or weights or ["FILENAME"])[0]
    shown = (weights + [file for file in files if file not in weights])[:_SHOWN]
    more = f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
    raise WeightsError(
        f"{reference} has no {' or '.join(reference.candidates)}. Name one of its files, as in "
        f"{reference}/{example}. It has {', '.join(shown) or 'no files'}{more}."
    )


def _verify(path: Path, reference: Reference) -> None:
    """Checks the hash of a large file, which the client stores by its sha256 but never verifies."""
    if not path.is_symlink():  # a file system without links: the hash is not known
        return
    # Follow one link only: a second one leads to a store that names files by another kind of hash.
    blob = path.parent / path.readlink()
    if not re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return
    sha256 = sha256_of(path)
    if sha256 != blob.name:
        for file in (path.resolve(), blob, path):
            file.unlink(missing_ok=True)
        raise WeightsError(
            f"{reference}: {path.name} is damaged: its sha256 is {sha256} and should be "
            f"{blob.name}. It was removed from the cache: run again to download it."
        )


def _explain(reference: Reference, error: Exception) -> str:
    """Returns the message for an error of the client."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{reference.repo}"
    login = "log in with `hf auth login`, or set HF_TOKEN"
    names = " or ".join(reference.candidates)
    alternative = f"Or download {names} from {page} elsewhere, and pass its path."
    # The client may wrap the cause in "cannot find the requested files in the local cache".
    is_wrapped = isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None
    cause = error.__cause__ if is_wrapped else error
    if isinstance(cause, errors.GatedRepoError):
        return f"{reference} requires consent: give it at {page}, then {login}."
    if isinstance(cause, errors.RepositoryNotFoundError):
        return (
            f"{reference}: there is no repository {page}, or it is private. "
            f"Check its name, or {login}."
        )
    if isinstance(cause, errors.RevisionNotFoundError):
        return (
            f"{reference}: {page} has no revision '{reference.revision}'. Name a branch, a tag or "
            f"a commit after the @; {page}/commits/main lists the commits."
        )
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return (
            f"{reference}: HF_HUB_OFFLINE is set, and {constants.HF_HUB_CACHE} holds no {names} of "
            f"that revision. Unset it. {alternative}"
        )
    if isinstance(cause, errors.HfHubHTTPError):
        response = cause.response
        status = f"HTTP {response.status_code} {response.reason_phrase}"
        is_denied = response.status_code in (401, 403)
        remedy = login[0].upper() + login[1:] if is_denied else "Run again later"
        return f"{reference}: {constants.ENDPOINT} refuses it ({status}). {remedy}. {alternative}"
    summary = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
    return (
        f"{reference} cannot be downloaded from {constants.ENDPOINT} ({summary}). Run again later. "
        f"{alternative}"
    )
