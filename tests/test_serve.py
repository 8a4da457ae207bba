"""`scripts/serve.py`: a hundred images over HTTP are classified as by `Classifier.predict`."""

import json
import sys
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError
from urllib.request import urlopen

import jax
import numpy as np
import pytest
from PIL import Image

from jaxft import Classifier, models, weights

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import serve

CLASSES = ("ants", "bees", "crabs")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A classifier and the address of its server."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    model = models.create("cifar_resnet8", num_classes=3)
    weights.save(path, model, *model.init(jax.random.key(0)), classes=CLASSES)
    preprocessing = {
        "image_size": 16, "resize_size": 20, "resize_mode": "short_side",
        "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.2] * 3,
    }  # fmt: skip
    path.with_suffix(".json").write_text(json.dumps({"preprocessing": preprocessing}))
    with serve.make_server(str(path), 0) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield Classifier.load(path), f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def post(url, content):
    with urlopen(url, data=content) as response:
        return json.load(response)


def test_serve_answers_a_hundred_images(served, tmp_path):
    classifier, url = served
    rng, paths = np.random.default_rng(0), [tmp_path / f"{i:03}.png" for i in range(100)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (24, 30, 3), np.uint8)).save(path)
    answers = [post(url, path.read_bytes()) for path in paths]
    expected = classifier.predict(paths).top(3)
    for answer, row in zip(answers, expected, strict=True):
        assert [*answer] == [name for name, _ in row]
        assert [*answer.values()] == pytest.approx([p for _, p in row], abs=1e-5)


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "the file is empty"), (b"no image", "not an image")]
)
def test_serve_refuses_what_is_no_image(served, content, message):
    with pytest.raises(HTTPError, match="400") as error:
        post(served[1], content)
    with error.value as answer:
        assert json.load(answer)["error"] == message
