"""Uploads an export to the Hugging Face hub with its client, `huggingface_hub`."""

from pathlib import Path

from jaxft.errors import WeightsError
from jaxft.model_card import NAME, REPOSITORY
from jaxft.weights.hub import parse_repository

FILES = (NAME, "model.safetensors", "model.json", "model.onnx", "model.jaxexport")
"""Files of an export that are uploaded, where they exist."""

_LOGIN = "Log in with `hf auth login`, or set HF_TOKEN"


def push(folder: Path, repository: str, *, public: bool = False) -> str:
    """Uploads an exported folder in one commit, and creates the repository if necessary.

    A new repository is private unless `public` is True. An existing one keeps its visibility, and
    must be empty or hold an export of jaxft.

    Args:
      folder: folder that `jaxft export` has written.
      repository: `hf:OWNER/NAME`.
      public: whether a new repository is public.

    Returns:
      URL of the commit.

    Raises:
      WeightsError: the folder is not an export, the name is malformed, there is no token, the
        repository holds something else, or the hub refuses or cannot be reached.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import RepositoryNotFoundError

    repo = parse_repository(repository)
    missing = [name for name in FILES[:3] if not (folder / name).is_file()]
    if missing:
        raise WeightsError(
            f"{folder} has no {' and no '.join(missing)}: export the run first, with jaxft export."
        )
    if hub.get_token() is None:
        raise WeightsError(f"hf:{repo} needs a token with write access. {_LOGIN}.")
    api = hub.HfApi()
    operations = [
        hub.CommitOperationAdd(name, _content(folder / name, repo))
        for name in FILES
        if (folder / name).is_file()
    ]
    # Any exception, because the client also raises errors of its HTTP library.
    try:
        try:
            files = [file.rfilename for file in api.model_info(repo).siblings or ()]
        except RepositoryNotFoundError:
            files = []
            api.create_repo(repo, private=not public, exist_ok=True)
        if "model.json" not in files and {*files} - {".gitattributes", NAME, "LICENSE"}:
            raise WeightsError(
                f"hf:{repo} exists and holds something else than an export of jaxft "
                f"({', '.join(sorted(files)[:5])}). Choose another name."
            )
        message = "Upload with jaxft push"
        return str(api.create_commit(repo, operations, commit_message=message).commit_url)
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(f"hf:{repo} cannot be uploaded: {_explain(error)}") from error


def _content(path: Path, repo: str) -> bytes | Path:
    """Returns a file's content; in the model card, the repository's name is filled in."""
    if path.name != NAME:
        return path
    return path.read_text().replace(REPOSITORY, f"hf:{repo}").encode()


def _explain(error: Exception) -> str:
    from huggingface_hub import constants, errors

    endpoint = constants.ENDPOINT
    if isinstance(error, errors.HFValidationError):
        return " ".join(str(error).split())
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set. Unset it."
    if isinstance(error, errors.HfHubHTTPError):
        response = error.response
        status = f"HTTP {response.status_code} {response.reason_phrase}"
        reason = f": {error.server_message}" if error.server_message else ""
        if response.status_code in (401, 403):
            return (
                f"{endpoint} refuses it ({status}{reason}). The token needs write access to this "
                f"owner. {_LOGIN}."
            )
        remedy = "Run again later." if response.status_code >= 500 else "Check the name."
        return f"{endpoint} refuses it ({status}{reason}). {remedy}"
    return (
        f"{endpoint} did not answer ({type(error).__name__}: {' '.join(str(error).split())}). "
        "Run again later."
    )
