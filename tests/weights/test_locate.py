"""Sources of weights: where each leads, what it says of images, and what is said of a slip."""

import hashlib
import json
from pathlib import Path

import pytest
from server import Answer, serve

from jaxft.data.preprocessing import Preprocessing
from jaxft.errors import WeightsError
from jaxft.weights import torchvision
from jaxft.weights.locate import Located, locate

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
HALVES = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CONTENT = b"weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def server():
    with serve({}) as server:
        yield server


# A source, the file that is there, and the path and entry it means.
LOCAL = {
    "a file": ("w.pth", "w.pth", "w.pth", None),
    "an entry": ("w.pth#entry=model_ema", "w.pth", "w.pth", "model_ema"),
    "a nested entry": ("w.pth#entry=state.model", "w.pth", "w.pth", "state.model"),
    "a # in the name": ("w#1.pth", "w#1.pth", "w#1.pth", None),
    "one like a fragment": ("w#entry=a", "w#entry=a", "w#entry=a", None),
    "both": ("w#1.pth#entry=a", "w#1.pth", "w#1.pth", "a"),
    "a : in the name": ("hf:w", "hf:w", "hf:w", None),
    "in the home": ("~/w.pth#entry=a", "w.pth", "{here}/w.pth", "a"),
}


@pytest.mark.parametrize(("source", "file", "path", "entry"), LOCAL.values(), ids=LOCAL)
def test_local(source, file, path, entry, here):
    Path(file).touch()
    assert locate(source) == Located(Path(path.format(here=here)), None, entry)


def test_an_asset():
    located = locate("asset:digits_0to4")
    assert located.path.is_file()
    assert located.preprocessing is None
    with pytest.raises(WeightsError, match=r"asset:nothing: no such asset.*asset:digits_0to4"):
        locate("asset:nothing")


OURS = Preprocessing(image_size=32, resize_size=None, interpolation="bicubic", **HALVES)
OWN = {"model": "resnet18", "preprocessing": {
    "image_size": 32, "resize_size": None, "interpolation": "bicubic",
    "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
}}  # fmt: skip
RECIPE = {"model": "resnet18", "stages": [{"name": "head"}], **OWN["preprocessing"]}
OLDER = {"preprocessing": {"image_size": 64, "resize_size": 72, **IMAGENET}}


@pytest.mark.parametrize(
    ("weights", "description", "said", "expected"),
    [
        ("model.safetensors", "model.json", OWN, OURS),
        ("best.pt", "best.json", OWN, OURS),
        ("best.pt", "model.json", OWN, None),
        ("w.pth", "w.json", OLDER, Preprocessing(image_size=64, resize_size=72)),
        ("w.pth", "w.json", {"preprocessing": {"image_size": 64}}, None),
        ("w.pth", "w.json", {"preprocessing": {**OWN["preprocessing"], "tint": 1}}, None),
        ("w.pth", "w.json", {"preprocessing": "none"}, None),
        ("w.pth", "w.json", [1, 2], None),
        ("w.pth", "w.json", "not JSON", None),
        ("run", "run/model.json", OWN, OURS),
        ("run/checkpoints/120", "run/model.json", OWN, OURS),
        ("run/elsewhere/120", "run/model.json", OWN, None),
        ("run", "run/recipe.yaml", RECIPE, OURS),
        ("run/checkpoints/120", "run/recipe.yaml", RECIPE, OURS),
        ("run", "run/recipe.yaml", "stages: []", None),
        ("run", "run/recipe.yaml", "{", None),
    ],
)
def test_our_own_description(weights, description, said, expected):
    path = Path(weights)
    if path.suffix:
        path.touch()
    else:
        path.mkdir(parents=True)
    content = said if isinstance(said, str) else json.dumps(said)
    Path(description).write_text(content)
    assert locate(weights) == Located(path, expected)


TIMM = {"input_size": [3, 224, 224], "crop_pct": 0.95, "interpolation": "bicubic", **IMAGENET}
CONVNEXT = {
    "feature_extractor_type": "ConvNextFeatureExtractor",
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 3, "size": 224,
}  # fmt: skip
VIT = CONVNEXT | {"feature_extractor_type": "ViTFeatureExtractor", "resample": 2}
# What `config.json` or `preprocessor_config.json` says: input, shorter side, interpolation, mode.
TIMMS = {
    "usual": (TIMM, (224, 235, "bicubic")),
    "bilinear": (TIMM | {"interpolation": "bilinear"}, (224, 235, "bilinear")),
    "no crop": (TIMM | {"crop_pct": 1.0}, (224, 224, "bicubic")),
    "defaults": ({"input_size": [3, 224, 224]}, (224, 256, "bicubic")),
    "for tests": (TIMM | {"test_input_size": [3, 288, 288]}, (224, 235, "bicubic")),
    "lanczos": (TIMM | {"interpolation": "lanczos"}, (224, 235, "bicubic")),
    "nearest": (TIMM | {"interpolation": "nearest"}, (224, 235, "bilinear")),
    "not square": (TIMM | {"input_size": [3, 256, 320]}, (256, 269, "bicubic")),
    "squashed": (TIMM | {"crop_mode": "squash"}, (224, 235, "bicubic", "squash")),
    "grey": (TIMM | {"input_size": [1, 224, 224]}, None),
}
TRANSFORMERS = {
    "resnet": (CONVNEXT, (224, 256, "bicubic")),
    "its crop": (CONVNEXT | {"crop_pct": 0.95}, (224, 235, "bicubic")),
    "shortest edge": (CONVNEXT | {"size": {"shortest_edge": 224}}, (224, 256, "bicubic")),
    "large": (CONVNEXT | {"size": {"shortest_edge": 384}}, (384, 384, "bicubic", "squash")),
    "processor": (
        {"image_processor_type": "ConvNextImageProcessorFast", **CONVNEXT},
        (224, 256, "bicubic"),
    ),
    "bilinear": (CONVNEXT | {"resample": 2}, (224, 256, "bilinear")),
    "vit": (VIT, (224, 224, "bilinear")),
    "sides": (VIT | {"size": {"height": 240, "width": 240}}, (240, 240, "bilinear", "squash")),
    "crop": (
        VIT | {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},
        (224, 256, "bilinear"),
    ),
    "crop not done": (VIT | {"crop_size": 200, "do_center_crop": False}, (224, 224, "bilinear")),
    "no mean": ({"size": 224}, None),
    "other size": (VIT | {"size": {"longest_edge": 224}}, None),
}


def written(said, name: str) -> Preprocessing | None:
    Path("model.safetensors").touch()
    Path(name).write_text(json.dumps(said))
    return locate("model.safetensors").preprocessing


def wanted(expected, **normalisation) -> Preprocessing | None:
    if expected is None:
        return None
    names = ("image_size", "resize_size", "interpolation", "resize_mode")
    return Preprocessing(**dict(zip(names, expected, strict=False)), **normalisation)


@pytest.mark.parametrize(("said", "expected"), TIMMS.values(), ids=TIMMS)
def test_timms_description(said, expected):
    assert written({"pretrained_cfg": said}, "config.json") == wanted(expected)
    assert written({"architecture": "resnet50", **said}, "config.json") == wanted(expected)


@pytest.mark.parametrize(("said", "expected"), TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_transformers_description(said, expected):
    Path("config.json").write_text('{"architectures": ["ResNetForImageClassification"]}')
    assert written(said, "preprocessor_config.json") == wanted(expected, **HALVES)


def test_transformers_without_normalisation():
    found = written(CONVNEXT | {"do_normalize": False}, "preprocessor_config.json")
    assert (found.mean, found.std) == ((0, 0, 0), (1, 1, 1))


def test_hub(here, monkeypatch):
    """Through its cache here; test_hub.py has the hub itself."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here))
    snapshot = here / "models--timm--resnet50" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    (snapshot / "config.json").write_text(json.dumps({"pretrained_cfg": TIMM}))
    located = locate(f"hf:timm/resnet50@{'a' * 40}#entry=ema")
    preprocessing = Preprocessing(resize_size=235, interpolation="bicubic")
    assert located == Located(snapshot / "model.safetensors", preprocessing, "ema")


def test_torchvision(server, monkeypatch):
    monkeypatch.setattr(torchvision, "BASE", f"{server.url}/models/")
    monkeypatch.setitem(
        torchvision._TABLE, "ResNet50_Weights", {"V2": (f"resnet50-{SHA256[:8]}.pth", 232)}
    )
    server.answers[f"/models/resnet50-{SHA256[:8]}.pth"] = Answer(CONTENT)
    located = locate("torchvision:ResNet50_Weights.DEFAULT#entry=a")
    assert located.path.read_bytes() == CONTENT
    assert located.preprocessing == Preprocessing(resize_size=232)
    assert located.entry == "a"


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("w.pth", f"#sha256={SHA256}"),
        ("w.pth", f"#sha256={SHA256[:8].upper()}"),
        ("w.pth", f"#entry=ema&sha256={SHA256}"),
        (f"w-{SHA256[:8]}.pth", ""),
        (f"w-{SHA256[:10]}.pth.tar", ""),
        ("w-20240101.pth", f"#sha256={SHA256}"),
    ],
)
def test_urls_with_a_hash(name, fragment, server, capsys):
    server.answers[f"/{name}"] = Answer(CONTENT)
    located = locate(f"{server.url}/{name}{fragment}")
    assert located.path.read_bytes() == CONTENT
    assert located.entry == ("ema" if "entry" in fragment else None)
    assert capsys.readouterr().err == ""
    server.answers[f"/{name}"] = Answer(b"changed")
    located.path.unlink()
    with pytest.raises(WeightsError, match=f"should begin with {name[2:10]}|{SHA256[:8]}"):
        locate(f"{server.url}/{name}{fragment}")


def test_a_url_without_a_hash_says_so(server, capsys):
    server.answers["/w.pth"] = Answer(CONTENT)
    located = locate(f"{server.url}/w.pth#entry=ema")
    assert (located.path.read_bytes(), located.entry) == (CONTENT, "ema")
    assert f"nothing was checked. To hold on to this very file, put #sha256={SHA256}" in (
        capsys.readouterr().err
    )


FORMS = ["PATH", "asset:NAME", "hf:OWNER/REPO", "torchvision:ResNet50_", "https://", "#entry=NAME"]
SLIPS = {
    "w.safetensor": ["no weights 'w.safetensor'", "Did you mean 'w.safetensors'?", *FORMS],
    "runs/w.pth": ["no weights 'runs/w.pth'", *FORMS],
    "timm/resnet50.a1_in1k": ["Did you mean 'hf:timm/resnet50.a1_in1k'?", *FORMS],
    "tv:ResNet50_Weights.DEFAULT": ["mean 'torchvision:ResNet50_Weights.DEFAULT'?", *FORMS],
    "timm:resnet50.a1_in1k": ["mean 'hf:timm/resnet50.a1_in1k'?", *FORMS],
    "hf_hub:timm/resnet50": ["mean 'hf:timm/resnet50'?", *FORMS],
    "HF:timm/resnet50": ["mean 'hf:timm/resnet50'?", *FORMS],
    "ftp://host/w.pth": ["no weights 'ftp://host/w.pth'", *FORMS],
    "resnet50": ["no weights 'resnet50'", *FORMS],
    "": ["no weights ''", *FORMS],
    "w#1": ["no weights 'w#1'", *FORMS],
    "https://a.org/w.pth#entry=a&hash=1": ["'hash=1' means nothing", "sha256=HEX"],
    "https://a.org/w.pth#sha256=1": ["sha256=1 is not a hash"],
    "http://a.org/w.pth": ["unencrypted", "https://"],
    "w.safetensors#sha256=00000000": ["#sha256 is for https:// URLs"],
    "hf:resnet50": ["hf:resnet50 is not of the form hf:OWNER/REPO"],
    "torchvision:resnet50": ["mean torchvision:ResNet50_Weights.IMAGENET1K_V1 or"],
    "https://huggingface.co/timm/resnet50": ["Did you mean 'hf:timm/resnet50'?"],
    "https://huggingface.co/timm/resnet50/resolve/v1/w.bin": ["'hf:timm/resnet50@v1/w.bin'?"],
}  # fmt: skip


@pytest.mark.parametrize(("source", "said"), SLIPS.items())
def test_slips(source, said):
    Path("w.safetensors").touch()
    with pytest.raises(WeightsError) as raised:
        locate(source)
    for words in said:
        assert words in str(raised.value)


def test_a_very_long_name_is_no_crash():
    with pytest.raises(WeightsError, match="no weights"):
        locate("w" * 5000)
