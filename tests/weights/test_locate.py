"""Sources of weights: the file that each one names, and suggestions for mistyped ones."""

import hashlib
import json
from pathlib import Path

import pytest
from server import Answer, serve

from jaxft.data.preprocessing import Preprocessing
from jaxft.errors import WeightsError
from jaxft.weights import torchvision
from jaxft.weights.locate import Located, locate

CONTENT = b"weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def server():
    with serve({}) as server:
        yield server


# Source, existing file, and the expected path and entry.
LOCAL = {
    "a file": ("w.pth", "w.pth", "w.pth", None),
    "an entry": ("w.pth#entry=model_ema", "w.pth", "w.pth", "model_ema"),
    "a nested entry": ("w.pth#entry=state.model", "w.pth", "w.pth", "state.model"),
    "a # in the name": ("w#1.pth", "w#1.pth", "w#1.pth", None),
    "one like a fragment": ("w#entry=a", "w#entry=a", "w#entry=a", None),
    "both": ("w#1.pth#entry=a", "w#1.pth", "w#1.pth", "a"),
    "a : in the name": ("hf:w", "hf:w", "hf:w", None),
    "in the home": ("~/w.pth#entry=a", "w.pth", "{folder}/w.pth", "a"),
}


@pytest.mark.parametrize(("source", "file", "path", "entry"), LOCAL.values(), ids=LOCAL)
def test_locate_a_path(source, file, path, entry, folder):
    Path(file).touch()
    assert locate(source) == Located(Path(path.format(folder=folder)), None, entry)


def test_locate_an_asset():
    located = locate("asset:digits_0to4")
    assert located.path.is_file()
    assert located.preprocessing is None
    with pytest.raises(WeightsError, match=r"asset:nothing: no such asset.*asset:digits_0to4"):
        locate("asset:nothing")


def test_locate_on_the_hub(folder, monkeypatch):
    """In the client's cache; test_hub.py tests downloads."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    snapshot = folder / "models--timm--resnet50" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    (snapshot / "config.json").write_text(
        json.dumps({"input_size": [3, 224, 224], "crop_pct": 0.95})
    )
    located = locate(f"hf:timm/resnet50@{'a' * 40}#entry=ema")
    preprocessing = Preprocessing(resize_size=235, interpolation="bicubic")
    assert located == Located(snapshot / "model.safetensors", preprocessing, "ema")


def test_locate_torchvision_weights(server, monkeypatch):
    monkeypatch.setattr(torchvision, "BASE", f"{server.url}/models/")
    monkeypatch.setitem(
        torchvision._FILES, "ResNet50_Weights", {"V2": (f"resnet50-{SHA256[:8]}.pth", 232)}
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
def test_locate_a_url_with_a_hash(name, fragment, server, capsys):
    server.answers[f"/{name}"] = Answer(CONTENT)
    located = locate(f"{server.url}/{name}{fragment}")
    assert located.path.read_bytes() == CONTENT
    assert located.entry == ("ema" if "entry" in fragment else None)
    assert capsys.readouterr().err == ""
    server.answers[f"/{name}"] = Answer(b"changed")
    located.path.unlink()
    with pytest.raises(WeightsError, match=f"should begin with {name[2:10]}|{SHA256[:8]}"):
        locate(f"{server.url}/{name}{fragment}")


def test_locate_a_url_without_a_hash_prints_the_hash(server, capsys):
    server.answers["/w.pth"] = Answer(CONTENT)
    located = locate(f"{server.url}/w.pth#entry=ema")
    assert (located.path.read_bytes(), located.entry) == (CONTENT, "ema")
    assert f"was not verified. To pin this file, append #sha256={SHA256} to the URL" in (
        capsys.readouterr().err
    )


FORMS = ["PATH", "asset:NAME", "hf:OWNER/REPO", "torchvision:ResNet50_", "https://", "#entry=NAME"]
MISTYPED = {
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
    "https://a.org/w.pth#entry=a&hash=1": ["'hash=1' is not an option", "sha256=HEX"],
    "https://a.org/w.pth#sha256=1": ["sha256=1 is not a hash"],
    "http://a.org/w.pth": ["unencrypted", "https://"],
    "w.safetensors#sha256=00000000": ["#sha256 is for https:// URLs"],
    "hf:resnet50": ["hf:resnet50 is not of the form hf:OWNER/REPO"],
    "torchvision:resnet50": ["mean torchvision:ResNet50_Weights.IMAGENET1K_V1 or"],
    "https://huggingface.co/timm/resnet50": ["Did you mean 'hf:timm/resnet50'?"],
    "https://huggingface.co/timm/resnet50/resolve/v1/w.bin": ["'hf:timm/resnet50@v1/w.bin'?"],
}  # fmt: skip


@pytest.mark.parametrize(("source", "texts"), MISTYPED.items())
def test_locate_suggests_similar_sources(source, texts):
    Path("w.safetensors").touch()
    with pytest.raises(WeightsError) as raised:
        locate(source)
    for text in texts:
        assert text in str(raised.value)


def test_locate_a_very_long_name():
    with pytest.raises(WeightsError, match="no weights"):
        locate("w" * 5000)
