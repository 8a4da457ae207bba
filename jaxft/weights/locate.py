"""Resolves the source of weights: a file, a run, a package asset, the hub, torchvision or a URL."""

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console as Terminal

from jaxft.checkpoint.atomic import BUCKETS, anywhere
from jaxft.data.preprocessing import Preprocessing
from jaxft.errors import WeightsError
from jaxft.weights import hub
from jaxft.weights.download import download, sha256_of
from jaxft.weights.preprocessing_config import find_preprocessing
from jaxft.weights.torchvision import published_weights

_FORMS = """
  PATH                                        a file, a run's folder or one of its checkpoints
  asset:NAME                                  a file that comes with the package
  hf:OWNER/REPO[@REVISION][/FILENAME]         a repository on the Hugging Face hub
  torchvision:ResNet50_Weights.IMAGENET1K_V2  weights that torchvision publishes
  https://HOST/PATH#sha256=HEX                any other file
Append #entry=NAME to use one entry of a file with several, #prefix=NAME to use the tensors whose
names begin with it."""
# Schemes of other tools, and the corresponding scheme here.
_SCHEMES = {
    "hf": "hf:", "huggingface": "hf:", "hf_hub": "hf:", "hf-hub": "hf:", "timm": "hf:timm/",
    "torchvision": "torchvision:", "tv": "torchvision:", "torch": "torchvision:",
    "asset": "asset:", "assets": "asset:", "file": "", "http": "https:", "https": "https:",
}  # fmt: skip
# URL of a repository or file on the hub, as copied from a browser.
_HUB_PAGE = re.compile(
    r"https://(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)"
    r"(?:/(?:tree|blob|resolve|raw)/([^/?]+)(?:/([^?]+))?)?/?(?:\?.*)?$"
)
_OPTION = r"\w+=[^&#]*"


@dataclass(frozen=True)
class Located:
    """Weights on this machine.

    Attributes:
      path: A file, or a folder (a run's workdir or one of its checkpoints).
      preprocessing: Preprocessing of the images that the weights expect, if the source states it.
        Unsupported interpolations, crops and aspect ratios are replaced by the nearest supported.
      entry: Entry of the file that holds the weights, if the source names one.
      prefix: Prefix of the tensors' names, if the source names one.
    """

    path: Path
    preprocessing: Preprocessing | None = None
    entry: str | None = None
    prefix: str | None = None


def locate(weights: str) -> Located:
    """Finds weights by their source, and downloads them if necessary.

    The source is one of

        PATH, or gs://BUCKET/FOLDER of a run
        asset:NAME
        hf:OWNER/REPO[@REVISION][/FILENAME]
        torchvision:ResNet50_Weights.IMAGENET1K_V2
        https://HOST/PATH#sha256=HEX

    A URL whose file name contains a hash, such as `resnet50-11ad3fa6.pth`, needs no `#sha256`.
    `#entry=NAME` after any source selects an entry of the file, `#prefix=NAME` the tensors whose
    names begin with it; `&` joins several options. An existing path is always used as a path.

    Raises:
      WeightsError: The weights do not exist, or cannot be downloaded.
    """
    if os.path.exists(weights):  # never raises, unlike Path.exists
        return Located(Path(weights), find_preprocessing(Path(weights)))
    source, options = _split_options(weights)
    entry, prefix, sha256 = (options.get(name) for name in ("entry", "prefix", "sha256"))
    scheme, _, name = source.partition(":")
    if scheme in ("https", "http"):
        return Located(_download_url(source, sha256), entry=entry, prefix=prefix)
    if sha256 is not None:
        raise WeightsError(f"{weights}: #sha256 is for https:// URLs; {source} needs none.")
    if scheme == "torchvision":
        published = published_weights(name)
        path = download(published.url, sha256=published.sha256)
        return Located(path, published.preprocessing, entry, prefix)
    if scheme == "hf":
        path = hub.fetch(name)
    elif scheme == "asset":
        path = _asset_path(name)
    elif scheme in BUCKETS:
        path = anywhere(source)
        if not path.is_dir():
            raise WeightsError(f"{source} is not the folder of a run. Copy a file to a disk first.")
    else:
        path = Path(source).expanduser()
        if not source or not os.path.exists(path):
            raise WeightsError(f"there are no weights '{source}'.{_suggest(source)}")
    return Located(path, find_preprocessing(path), entry, prefix)


def _split_options(weights: str) -> tuple[str, Mapping[str, str]]:
    """Splits a source from the options after its last `#`."""
    source, mark, fragment = weights.rpartition("#")
    if not mark or not re.fullmatch(rf"{_OPTION}(&{_OPTION})*", fragment):
        return weights, {}
    options = dict(option.split("=", 1) for option in fragment.split("&"))
    for name, value in options.items():
        if name not in ("entry", "prefix", "sha256") or not value:
            raise WeightsError(
                f"{weights}: '{name}={value}' is not an option. After # give entry=NAME, "
                "prefix=NAME, or sha256=HEX for a URL."
            )
    return source, options


def _download_url(url: str, sha256: str | None) -> Path:
    """Downloads a URL, and verifies it by the given hash or the one in the file's name."""
    if sha256 is not None:
        if not re.fullmatch(r"[0-9a-fA-F]{8,64}", sha256):
            raise WeightsError(f"{url}: sha256={sha256} is not a hash, 8 to 64 digits in hex.")
        return download(url, sha256=sha256.lower())
    if page := _HUB_PAGE.match(url):
        repo, revision, file = page.groups()
        source = f"hf:{repo}" + (f"@{revision}" if revision else "") + (f"/{file}" if file else "")
        raise WeightsError(f"{url} is on the hub, which knows its hash. Did you mean '{source}'?")
    if match := re.search(r"-([0-9a-f]{8,64})(\.\w+)+$", urlsplit(url).path):
        return download(url, sha256=match[1])
    path = download(url)
    Terminal(stderr=True, highlight=False, soft_wrap=True).print(
        f"{url} has no hash, so the file was not verified. To pin this file, append "
        f"#sha256={sha256_of(path)} to the URL.",
        markup=False,
    )
    return path


def _asset_path(name: str) -> Path:
    folder = Path(str(files("jaxft") / "assets"))
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        known = ", ".join(f"asset:{p.stem}" for p in sorted(folder.glob("*.safetensors")))
        raise WeightsError(f"asset:{name}: no such asset. There is {known or 'none'}.")
    return path


def _suggest(source: str) -> str:
    """Returns a similar source that exists, and the list of all forms."""
    scheme, mark, name = source.partition(":")
    if mark and "/" not in scheme:
        near = difflib.get_close_matches(scheme.lower(), _SCHEMES, n=1)
        suggestions = [_SCHEMES[near[0]] + name.removeprefix("//")] if near else []
    elif re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) and not os.path.isdir(Path(source).parent):
        suggestions = [f"hf:{source}"]
    else:
        path = Path(source).expanduser()
        siblings = os.listdir(path.parent) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        suggestions = [str(path.with_name(name)) for name in near]
    return "".join(f" Did you mean '{s}'?" for s in suggestions) + f" Weights are one of{_FORMS}"
