"""Images in a bucket: the same splits and pixels as on a disk, few requests, and clear errors."""

import io
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import bucket
import numpy as np
import pytest
from PIL import Image

from jaxft.data import bucket_folder, open_source
from jaxft.data.fingerprint import record
from jaxft.errors import DataError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not find_spec("gcsfs"), reason="needs gcsfs"),
]

PROGRAM = """
import json, sys
from jaxft.data import BatchConfig, Preprocessing, open_source, train_batches
from jaxft.data.fingerprint import record
from jaxft.data.process_source import in_processes
from jaxft.errors import DataError

results = {}
for spec in sys.argv[1:]:
    try:
        splits = open_source(spec, on_bad_image="skip")
    except DataError as error:
        results[spec] = {"error": str(error)}
        continue
    config = BatchConfig(
        preprocessing=Preprocessing(image_size=8), augment="crop_flip", batch_size=4, seed=0,
        stage=0,
    )
    (pooled,) = in_processes([splits.train], 2)
    batches = [
        [batch.image.tolist() for batch in train_batches(source, config, epochs=1, workers=2)]
        for source in (splits.train, pooled)
    ]
    results[spec] = {"record": record(splits), "remarks": splits.remarks, "batches": batches}
print(json.dumps(results))
"""


def jpeg(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


FILES = {
    **{
        f"{split}/{name}/{k}.jpg": jpeg(k)
        for split in ("train", "val")
        for name in ("ant", "bee")
        for k in range(3)
    },
    "train/bee/deep/é 1.JPG": jpeg(9),
    "train/bee/broken.jpg": b"no image",
    "train/bee/notes.txt": b"text",
    "train/ant/.hidden.jpg": b"",
    "train/ant/Thumbs.db": b"",
}
MANY = 2500


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Results by spec, the folder with the same images, and the requests of the listing."""
    folder = tmp_path_factory.mktemp("images")
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    names = (
        *("data", "data/", "data/train", "data/train/ant/0.jpg", "nothing", "forbidden", "many"),
    )
    specs = [*(f"folder:gs://bucket/{name}" for name in names), "folder:gs://other/data",
             "folder:gs://", "gs://bucket/data"]  # fmt: skip
    with bucket.serve() as server:
        for number, (name, content) in enumerate(FILES.items(), 1):
            server.objects[f"data/{name}"] = (content, number)
        server.objects["data/train/ant/"] = (b"", 99)  # as the console creates folders
        server.objects["data/train//loose.jpg"] = (jpeg(3), 100)
        for k in range(MANY):
            server.objects[f"many/train/{k}.txt"] = (b"", 1)
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *specs],
            capture_output=True, text=True, timeout=300,
            env={
                **os.environ,
                "STORAGE_EMULATOR_HOST": server.url,
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks Google itself
                "JAX_PLATFORMS": "cpu",
            },
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        requests = [*server.requests]
    results = json.loads(done.stdout)
    return {spec.removeprefix("folder:gs://"): results[spec] for spec in specs}, folder, requests


@pytest.mark.parametrize("name", ["bucket/data", "bucket/data/"])
def test_bucket_folder_has_the_images_of_a_folder(opened, name):
    results, folder, _ = opened
    found, splits = results[name], open_source(f"folder:{folder}", on_bad_image="skip")
    assert found["record"] == record(splits)
    remarks = [text.replace(str(folder), "gs://bucket/data") for text in splits.remarks]
    assert found["remarks"] == remarks
    assert "gs://bucket/data/train/bee/broken.jpg: not an image" in remarks[-1]


def test_bucket_folder_is_read_by_threads_and_processes(opened):
    threads, processes = opened[0]["bucket/data"]["batches"]
    assert threads == processes
    assert len(threads) == 2


def test_bucket_folder_is_listed_by_the_page(opened):
    _, _, requests = opened
    lists = [request for request in requests if request == "GET /storage/v1/b/bucket/o"]
    # One each, two where there may be a file of that name, and a page for each 1,000 objects.
    assert len(lists) == 3 + 2 + 2 + 1 + 3
    assert not [
        request for request in requests if request.startswith("GET /storage/v1/b/bucket/o/")
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bucket/nothing", "there is no folder gs://bucket/nothing; images belong in PATH/train/"),
        ("bucket/data/train/ant/0.jpg", "there is no folder gs://bucket/data/train/ant/0.jpg;"),
        ("bucket/many", "no class folders in gs://bucket/many/train; images belong"),
        ("other/data", "there is no bucket other (gs://other/data)."),
        ("", "names no bucket: write folder:gs://BUCKET/PATH."),
        ("gs://bucket/data", "Did you mean 'folder:gs://bucket/data'?"),
        (
            "bucket/forbidden",
            "gs://bucket/forbidden cannot be listed: the account does not have "
            "storage.objects.list access. Log in with 'gcloud auth application-default login'; the "
            "account needs the role Storage Object Viewer on the bucket bucket.",
        ),
    ],
)
def test_bucket_folder_errors(opened, name, message):
    assert message in opened[0][name]["error"]


def test_bucket_folder_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setattr(bucket_folder, "_file_system", lambda: __import__("gcsfs"))
    with pytest.raises(
        DataError, match=r"gs://bucket/data needs gcsfs: pip install 'jaxft\[gcs\]'"
    ):
        open_source("folder:gs://bucket/data")
