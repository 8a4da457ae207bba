"""Uploads an export to the Hugging Face hub with its client, `huggingface_hub`."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxft.errors import WeightsError
from jaxft.model_card import NAME, REPOSITORY
from jaxft.weights.hub import parse_repository

FILES = (NAME, "model.safetensors", "model.json", "model.onnx", "model.jaxexport")
"""Files of an export that are uploaded, where they exist."""

_LOGIN = "Log in with `hf auth login`, or set HF_TOKEN"
_RETRY = "Run again later."


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
        card = _complete(hub.ModelCard.load(folder / NAME), repo, api)
        operations = [
            hub.CommitOperationAdd(name, card if name == NAME else folder / name)
            for name in FILES
            if (folder / name).is_file()
        ]
        message = "Upload with jaxft push"
        return str(api.create_commit(repo, operations, commit_message=message).commit_url)
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(f"hf:{repo} cannot be uploaded: {_explain(error)}") from error


def _complete(card: Any, repo: str, api: Any) -> bytes:
    """Fills in the repository's name and, if it is unknown, the license of the base model."""
    if card.data.license == "unknown" and card.data.base_model:
        with suppress(Exception):  # the base model may have disappeared, or have no card
            card.data.license = api.model_info(card.data.base_model).card_data.license or "unknown"
    return str(card).replace(REPOSITORY, f"hf:{repo}").encode()


def _explain(error: BaseException) -> str:
    from huggingface_hub import constants, errors

    while isinstance(error, RuntimeError) and error.__cause__:  # "Error while uploading ..."
        error = error.__cause__
    if isinstance(error, errors.HFValidationError):
        return " ".join(str(error).split())
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set. Unset it."
    if not isinstance(error, errors.HfHubHTTPError):
        reason = " ".join(str(error).split())
        return f"{constants.ENDPOINT} did not answer ({type(error).__name__}: {reason}). " + _RETRY
    status = error.response.status_code
    reason = f": {error.server_message}" if error.server_message else ""
    refusal = f"{constants.ENDPOINT} refuses it (HTTP {status}{reason}). "
    if status in (401, 403):
        return f"{refusal}The token needs write access to this owner. {_LOGIN}."
    return refusal + (_RETRY if status >= 500 else "Check the name.")
