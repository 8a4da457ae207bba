"""The model card of an export; `jaxft push`, after which the hub's copy predicts alike."""

import json
import re
from contextlib import contextmanager

import jax
import numpy as np
import onnxruntime
import pytest
from commands import call
from hub_server import TOKEN, Repository, run_hub
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import close_session
from PIL import Image

from jaxft import Adam, Classifier, Recipe, Stage, WeightsError, data, finetune
from jaxft.export import export
from jaxft.model_card import model_card
from jaxft.models import create
from jaxft.push import push
from jaxft.weights.jax_export import lifetime

CLASSES = ("ants", "bees", "crabs")
REPO = "me/insects"


def source(count, seed=0):
    rng, targets = np.random.default_rng(seed), np.arange(count, dtype=np.int32) % 3
    return data.arrays(rng.integers(0, 256, (count, 8, 8, 3), np.uint8), targets, CLASSES)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run."""
    recipe = Recipe(
        model="cifar_resnet8", data="folder:/home/me/insects", image_size=8, resize_size=8,
        batch_size=4, augment="none", optimizer=Adam(), stages=(Stage("all", {"*": 1e-2}, 1),),
        dtype="bfloat16",
    )  # fmt: skip
    workdir = tmp_path_factory.mktemp("run")
    finetune(recipe, workdir, data=data.Splits(source(12), source(11, seed=1)), console=None)
    return workdir


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local hub and a token for it."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)
    with served(monkeypatch) as hub:
        yield hub


@contextmanager
def served(monkeypatch):
    with run_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub
    close_session()


def test_export_writes_onnx_and_model_card(run, tmp_path):
    done = call("export", run, "--out", tmp_path, "--formats", "jax", "onnx", "--license", "mit")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.replace(str(tmp_path), "").splitlines())) <= 80
    description = json.loads((tmp_path / "model.json").read_text())
    assert description["onnx"]["opset"] == 18
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    images = np.random.default_rng(2).integers(0, 256, (5, 8, 8, 3), np.uint8)
    (logits,) = session.run(["logits"], {"images": images})
    program = jax.export.deserialize(bytearray((tmp_path / "model.jaxexport").read_bytes()))
    np.testing.assert_allclose(logits, program.call(images), rtol=0.1, atol=0.05)  # bfloat16

    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.library_name) == ("mit", "jaxft")
    results = {each.metric_type: each.metric_value for each in card.data.eval_results}
    assert results["accuracy"] == description["score"]["accuracy"]
    assert {each.dataset_name for each in card.data.eval_results} == {"insects"}
    for text in ("`ants`, `bees`, `crabs`", description["program"]["good_until"], "opset 18"):
        assert text in card.text
    assert "/home/me" not in card.content


def test_export_keeps_license_and_cards_of_people(run, tmp_path):
    export(run, tmp_path, formats=(), license_id="apache-2.0")
    export(run, tmp_path, formats=())
    card = tmp_path / "README.md"
    assert "license: apache-2.0" in card.read_text()
    assert "model.onnx" not in card.read_text()
    card.write_text("mine")
    export(run, tmp_path, formats=())
    assert card.read_text() == "mine"


def card_of(model, *, weights=None, data="digits:5-9", **options):
    stages = (Stage("all", {"*": 1}, 1),)
    recipe = Recipe(model=model, data=data, weights=weights, stages=stages)
    network = create(model, num_classes=3, **options)
    description = {
        "score": {"accuracy": 0.5}, "classes": CLASSES, "pixels": "uint8", "program": lifetime(),
        "preprocessing": {
            "image_size": 224, "resize_size": 256, "resize_mode": "short_side",
            "interpolation": "bilinear", "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2),
        },
    }  # fmt: skip
    return model_card(recipe, network, description, "unknown")


@pytest.mark.parametrize(
    ("model", "options", "line"),
    [
        ("resnet18", {}, "net = torchvision.models.resnet18(num_classes=3).eval()"),
        ("resnet18d", {}, 'net = timm.create_model("resnet18d", num_classes=3).eval()'),
        ("resnet50", {"stride_in_1x1": True}, None),
        ("resnet18", {"concat_pool": True}, None),
        ("cifar_resnet8", {}, None),
    ],
)
def test_model_card_shows_how_to_load_in_torch(model, options, line):
    card = card_of(model, **options)
    assert (line is None) == ("PyTorch" not in card)
    assert line is None or line in card


def test_model_card_names_the_base_model():
    card = ModelCard(card_of("resnet18", weights="hf:timm/resnet18.tv_in1k@main#entry=a"))
    assert card.data.base_model == "timm/resnet18.tv_in1k"
    card = ModelCard(card_of("resnet18", weights="hf://timm/resnet18.tv_in1k/model.safetensors"))
    assert card.data.base_model == "timm/resnet18.tv_in1k"
    assert "started from pretrained weights" in card_of("resnet18", weights="/home/me/w.pth")


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("folder:/home/me/insects", "insects"),
        ("csv:/home/me/insects.csv", "insects.csv"),
        ("webdataset:/home/me/insects-{000..002}.tar", "insects-{000..002}.tar"),
        ("hf_dataset:/home/me/insects", "insects"),
        ("tfds:cifar10", "tfds:cifar10"),
        ("digits:5-9", "digits:5-9"),
        ("folder:", "folder"),
    ],
)
def test_model_card_names_the_data_without_its_path(data, name):
    card = card_of("resnet18", data=data)
    assert ModelCard(card).data.eval_results[0].dataset_name == name
    assert "/home/me" not in card


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the hub's client
def test_pushed_weights_predict_alike(run, hub, tmp_path, monkeypatch, capsys):
    done = call("push", run, f"hf:{REPO}")
    assert done.returncode == 0, done.stderr
    assert f'jaxft.Classifier.load("hf:{REPO}")' in done.stdout
    repository = hub.repositories[REPO]
    assert repository.visibility == "private"
    assert sorted(repository.files) == ["README.md", "model.json", "model.safetensors"]
    card = repository.files["README.md"].decode()
    images = np.random.default_rng(3).integers(0, 256, (5, 8, 8, 3), np.uint8)
    pushed, local = (Classifier.load(place).predict(images) for place in (f"hf:{REPO}", run))
    np.testing.assert_array_equal(pushed.probabilities, local.probabilities)
    assert pushed.classes == CLASSES

    (tmp_path / "photos").mkdir()
    Image.fromarray(images[0]).save(tmp_path / "photos" / "a.png")
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(snippet, {})
    assert capsys.readouterr().out == f"['{local.labels[0]}']\n"

    assert call("push", run, f"hf:{REPO}").returncode == 0  # again: the same files
    assert "Uploaded" in call("push", run, "hf:me/public", "--public").stdout
    assert hub.repositories["me/public"].visibility != "private"


@pytest.mark.parametrize(
    ("base", "expected"), [("me/base", "bsd-3-clause"), ("me/missing", "unknown")]
)
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the hub's client
def test_pushed_card_states_the_license_of_the_base_model(hub, tmp_path, base, expected):
    hub.repositories["me/base"] = Repository(license="bsd-3-clause")
    (tmp_path / "README.md").write_text(card_of("resnet18", weights=f"hf:{base}"))
    for name in ("model.safetensors", "model.json"):
        (tmp_path / name).write_text("{}")
    push(tmp_path, f"hf:{REPO}")
    card = ModelCard(hub.repositories[REPO].files["README.md"].decode())
    assert (card.data.license, card.data.base_model) == (expected, base)


def test_push_refuses_a_repository_with_something_else(run, hub):
    files = {"model.safetensors": b"w", "config.json": b"{}"}
    hub.repositories[REPO] = Repository("public", dict(files))
    export(run, formats=())
    with pytest.raises(WeightsError, match="exists and holds something else than an export"):
        push(run, f"hf:{REPO}")
    assert hub.repositories[REPO].files == files


@pytest.mark.parametrize(
    ("prefix", "refusal", "repository", "message"),
    [
        ("/api/repos", (403, "You don't have the rights"), REPO, "HTTP 403.*rights.*write access"),
        ("/api/repos", (400, "Invalid repo name"), REPO, "HTTP 400.*Invalid repo name.*the name"),
        ("", None, "me/a--b", "cannot be uploaded: .*repo_id: 'me/a--b'"),
        ("", None, "me", r"hf:me is not of the form hf:OWNER/NAME"),
        ("", None, "me/a@main", "is not of the form"),
        ("", None, "me/a/file.bin", "is not of the form"),
    ],
    ids=["rights", "refused_name", "bad_name", "no_owner", "revision", "file"],
)
def test_push_errors(run, hub, prefix, refusal, repository, message):
    if refusal:
        hub.refusals[prefix] = refusal
    done = call("push", run, f"hf:{repository}")
    assert done.returncode == 1
    assert done.stderr.startswith("WeightsError: ")
    assert done.stderr.count("\n") == 1
    with pytest.raises(WeightsError, match=message):
        push(run, f"hf:{repository}")


def test_push_without_token_export_or_network(run, hub, monkeypatch, tmp_path):
    with pytest.raises(WeightsError, match=r"no README.md and no model.safetensors and no model"):
        push(tmp_path, f"hf:{REPO}")
    export(run, formats=())
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(WeightsError, match=r"needs a token with write access. Log in with `hf"):
        push(run, f"hf:{REPO}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match=r"did not answer .*ConnectError.*Run again later"):
        push(run, f"hf:{REPO}")
    assert "there is no folder" in call("push", tmp_path / "nowhere", f"hf:{REPO}").stderr
