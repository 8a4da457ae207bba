"""Where weights lie, and what they expect: a file, a run, a package's asset, the hub, the web."""

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
from jaxft.weights.preprocessing_config import expected
from jaxft.weights.torchvision import published

_FORMS = """
  PATH                                        a file, a run's folder or one of its checkpoints
  asset:NAME                                  what comes with the package
  hf:OWNER/REPO[@REVISION][/FILENAME]         a repository on the Hugging Face hub
  torchvision:ResNet50_Weights.IMAGENET1K_V2  what torchvision publishes
  https://HOST/PATH#sha256=HEX                any other file
with #entry=NAME behind it for one entry of a file that holds several, #prefix=NAME for the tensors
whose names begin with it."""
# What others call them.
_SCHEMES = {
    "hf": "hf:", "huggingface": "hf:", "hf_hub": "hf:", "hf-hub": "hf:", "timm": "hf:timm/",
    "torchvision": "torchvision:", "tv": "torchvision:", "torch": "torchvision:",
    "asset": "asset:", "assets": "asset:", "file": "", "http": "https:", "https": "https:",
}  # fmt: skip
# A repository's page or file, as one copies it from a browser.
_HUB_PAGE = re.compile(
    r"https://(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)"
    r"(?:/(?:tree|blob|resolve|raw)/([^/?]+)(?:/([^?]+))?)?/?(?:\?.*)?$"
)
_OPTION = r"\w+=[^&#]*"


@dataclass(frozen=True)
class Located:
    """Weights on this machine.

    path: a file, or a folder (a run's workdir or one of its checkpoints).
    preprocessing: what the weights expect of images, where their source says; the nearest that
      there is to other interpolations, crops and sides that differ.
    entry: which entry of the file holds them, where the source names one.
    prefix: what their names begin with, likewise.
    """

    path: Path
    preprocessing: Preprocessing | None = None
    entry: str | None = None
    prefix: str | None = None


def locate(weights: str) -> Located:
    """Finds weights by their source, and downloads them where they are not here yet.

    The source is one of

        PATH, or gs://BUCKET/FOLDER of a run
        asset:NAME
        hf:OWNER/REPO[@REVISION][/FILENAME]
        torchvision:ResNet50_Weights.IMAGENET1K_V2
        https://HOST/PATH#sha256=HEX

    where a file name such as `resnet50-11ad3fa6.pth` states a hash as well. `#entry=NAME` behind
    any of them selects an entry, `#prefix=NAME` the tensors whose names begin with it; `&` joins
    these and a hash. A path that exists is taken as it is,
    whatever it looks like.

    Raises:
      WeightsError: there are no such weights, or they cannot be had.
    """
    if os.path.exists(weights):  # never raises, unlike Path's
        return Located(Path(weights), expected(Path(weights)))
    source, options = _split(weights)
    entry, prefix, sha256 = (options.get(name) for name in ("entry", "prefix", "sha256"))
    scheme, _, name = source.partition(":")
    if scheme in ("https", "http"):
        return Located(_from_url(source, sha256), entry=entry, prefix=prefix)
    if sha256 is not None:
        raise WeightsError(f"{weights}: #sha256 is for https:// URLs; {source} needs none.")
    if scheme == "torchvision":
        found = published(name)
        path = download(found.url, sha256=found.sha256)
        return Located(path, found.preprocessing, entry, prefix)
    if scheme == "hf":
        path = hub.fetch(name)
    elif scheme == "asset":
        path = _asset(name)
    elif scheme in BUCKETS:
        path = anywhere(source)
        if not path.is_dir():
            raise WeightsError(f"{source} is not the folder of a run. Copy a file to a disk first.")
    else:
        path = Path(source).expanduser()
        if not source or not os.path.exists(path):
            raise WeightsError(f"there are no weights '{source}'.{_hint(source)}")
    return Located(path, expected(path), entry, prefix)


def _split(weights: str) -> tuple[str, Mapping[str, str]]:
    """A source and the options behind its last `#`."""
    source, mark, fragment = weights.rpartition("#")
    if not mark or not re.fullmatch(rf"{_OPTION}(&{_OPTION})*", fragment):
        return weights, {}
    options = dict(option.split("=", 1) for option in fragment.split("&"))
    for name, value in options.items():
        if name not in ("entry", "prefix", "sha256") or not value:
            raise WeightsError(
                f"{weights}: '{name}={value}' means nothing. After # there may be entry=NAME, "
                "prefix=NAME, or sha256=HEX for a URL."
            )
    return source, options


def _from_url(url: str, sha256: str | None) -> Path:
    """Checked by the hash given, or else by the one in the file's name."""
    if sha256 is not None:
        if not re.fullmatch(r"[0-9a-fA-F]{8,64}", sha256):
            raise WeightsError(f"{url}: sha256={sha256} is not a hash, 8 to 64 digits in hex.")
        return download(url, sha256=sha256.lower())
    if on_hub := _HUB_PAGE.match(url):
        repo, revision, file = on_hub.groups()
        meant = f"hf:{repo}" + (f"@{revision}" if revision else "") + (f"/{file}" if file else "")
        raise WeightsError(f"{url} is on the hub, which knows its hash. Did you mean '{meant}'?")
    if in_name := re.search(r"-([0-9a-f]{8,64})(\.\w+)+$", urlsplit(url).path):
        return download(url, sha256=in_name[1])
    path = download(url)
    Terminal(stderr=True, highlight=False, soft_wrap=True).print(
        f"{url} came without a hash, so nothing was checked. To hold on to this very file, "
        f"put #sha256={sha256_of(path)} behind the URL.",
        markup=False,
    )
    return path


def _asset(name: str) -> Path:
    folder = Path(str(files("jaxft") / "assets"))
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        known = ", ".join(f"asset:{p.stem}" for p in sorted(folder.glob("*.safetensors")))
        raise WeightsError(f"asset:{name}: no such asset. There is {known or 'none'}.")
    return path


def _hint(source: str) -> str:
    """What may have been meant, and all that can be said."""
    scheme, mark, name = source.partition(":")
    if mark and "/" not in scheme:
        near = difflib.get_close_matches(scheme.lower(), _SCHEMES, n=1)
        meant = [_SCHEMES[near[0]] + name.removeprefix("//")] if near else []
    elif re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) and not os.path.isdir(Path(source).parent):
        meant = [f"hf:{source}"]
    else:
        path = Path(source).expanduser()
        beside = os.listdir(path.parent) if path.parent.is_dir() else []
        meant = [str(path.with_name(n)) for n in difflib.get_close_matches(path.name, beside, n=1)]
    return "".join(f" Did you mean '{m}'?" for m in meant) + f" Weights are one of{_FORMS}"
