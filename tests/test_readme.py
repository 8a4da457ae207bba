"""The Markdown files: their code blocks run, their links resolve, their quotes are current."""

import json
import pathlib
import re
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from narrow import narrowed
from PIL import Image
from safetensors.numpy import load_file

import jaxft
from jaxft import models
from jaxft.cli.data_recipe import STRATEGY
from jaxft.default_stages import EPOCHS, LR, default_stages
from jaxft.export import export
from jaxft.models.norm_modes import norm_modes
from jaxft.recipe import Recipe
from jaxft.recipe_file import read
from jaxft.report.block_table import block_table
from jaxft.report.console import Console
from jaxft.report.lr_plot import lr_table
from jaxft.report.stage_text import epilogue
from jaxft.train.frozen_prefix import block_labels
from jaxft.train.metrics import Score
from jaxft.train.state import Progress

ROOT = Path(__file__).parents[1]
FILES = (
    "README.md",
    "configs/README.md",
    "scripts/README.md",
    "jaxft/README.md",
    "jaxft/models/README.md",
    "jaxft/weights/README.md",
    "jaxft/data/README.md",
    "jaxft/parity/README.md",
    "tests/README.md",
    ".github/CONTRIBUTING.md",
    ".github/CHANGELOG.md",
)
TEXTS = {file: (ROOT / file).read_text() for file in FILES}


def sections(file):
    """Returns the text below each second-level heading; above the first one: below ""."""
    parts = re.split(r"^## (.*)\n", TEXTS[file], flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def blocks(file, title, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", sections(file)[title], re.DOTALL)


def quotes(file, title):
    """Returns the blocks without a language: quoted output."""
    return re.findall(r"\n\n```\n(.*?)```", sections(file)[title], re.DOTALL)


def without_numbers(text):
    return re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?", "#", text).split()


# Sections whose Python blocks the tests below run.
RUN = {
    ("README.md", "A recipe"),
    ("README.md", "In your own training loop"),
    ("configs/README.md", "A stage"),
    ("configs/README.md", "LoRA"),
    ("configs/README.md", "Weight averages"),
    ("configs/README.md", "Schedules"),
    ("configs/README.md", "A linear probe"),
    ("configs/README.md", "Ready-made stages"),
    ("jaxft/README.md", "Loops"),
    ("jaxft/README.md", "Stages in your own loop"),
    ("jaxft/README.md", "Save and restore across a re-labelling"),  # in test_state_shapes.py
    ("jaxft/README.md", "A function after each epoch"),
    ("jaxft/README.md", "Your own network"),
    ("jaxft/README.md", "Own loss and metrics"),
    ("jaxft/README.md", "Add a data source"),
    ("jaxft/README.md", "Add an optimizer"),
    ("jaxft/models/README.md", ""),
    ("jaxft/models/README.md", "Add a network"),
    ("jaxft/weights/README.md", ""),
    ("jaxft/weights/README.md", "Options of the network"),
    ("jaxft/weights/README.md", "Export"),
    ("scripts/README.md", "Predict and evaluate"),
    ("jaxft/data/README.md", "Images in memory"),
    ("jaxft/data/README.md", "Several labels per image"),
    ("jaxft/parity/README.md", ""),
}


def test_every_code_block_runs():
    assert {(f, title) for f in FILES for title in sections(f) if blocks(f, title)} == RUN


def run(file, title, names):
    """Runs the Python blocks of a section, one after the other, in the namespace `names`."""
    for block in blocks(file, title):
        exec(block, names)
    return names


def libraries():
    """Returns the names that the blocks without imports use."""
    import equinox as eqx  # slow imports, for the tests that need them
    import haiku as hk

    names = {"jax": jax, "jnp": jnp, "optax": optax, "jaxft": jaxft, "pathlib": pathlib}
    return names | {"nn": nn, "nnx": nnx, "hk": hk, "eqx": eqx, "TrainState": TrainState}


def test_ci_runs_the_test_command_of_the_readme():
    lines = [line for line in TEXTS["README.md"].splitlines() if "pytest" in line]
    assert len(lines) == 1  # the line that .ci/run looks for
    assert "grep -m 1 'pytest' README.md" in (ROOT / ".ci" / "run").read_text()


def test_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 150


def anchors(file):
    """Returns the anchors of the headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)", TEXTS[file], re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in headings}


@pytest.mark.parametrize("file", FILES)
def test_links_resolve(file):
    broken = []
    for link in re.findall(r"\]\(([^)]+)\)", TEXTS[file]):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / file).parent / path if path else ROOT / file
        known = str(target.resolve().relative_to(ROOT.resolve()))
        known = f"{known}/README.md" if target.is_dir() and anchor else known
        if not target.exists() or (anchor and anchor not in anchors(known)):
            broken.append(link)
    assert broken == []


def test_map_names_existing_files():
    rows = re.findall(r"^\| [^|]+ \| (.*) \|$", sections("jaxft/README.md")["Map"], re.MULTILINE)
    links = [re.findall(r"\[`([^`]+)`\]\(([^)]+)\)", cell) for cell in rows[1:]]
    assert len(links) >= 40
    assert all(links)
    shown = [(name.rstrip("/"), path) for row in links for name, path in row]
    assert [pair for pair in shown if pair[0] != pair[1]] == []
    assert [path for _, path in shown if not (ROOT / "jaxft" / path).exists()] == []


@pytest.mark.parametrize("file", FILES)
def test_commands_name_existing_files(file):
    commands = "\n".join(block for title in sections(file) for block in blocks(file, title, "sh"))
    paths = re.findall(r"\b(?:scripts|configs|tests)/[\w/.]+\w", commands)
    assert [path for path in paths if not (ROOT / path).exists()] == []


CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def test_configs_readme_lists_every_recipe():
    listed = re.findall(r"^\| \[`(\w+)`\]", TEXTS["configs/README.md"], re.MULTILINE)
    assert sorted(listed) == CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_readme_repeats_the_measured_result(name):
    (row,) = re.findall(rf"^\| \[`{name}`\].*", TEXTS["configs/README.md"], re.MULTILINE)
    docstring = (ROOT / "configs" / f"{name}.py").read_text().split('"""')[1]
    result = row.rstrip("| ").rpartition("| ")[2]
    assert [x for x in re.findall(r"\d+\.\d+", result) if x not in docstring] == []
    assert ("Not measured here" in docstring) == ("not measured" in result)


def test_configs_readme_describes_every_field_of_a_stage():
    rows = re.findall(r"^\| (`.*?`) \|", sections("configs/README.md")["A stage"], re.MULTILINE)
    described = {"name", "train", *re.findall(r"`(\w+)`", " ".join(rows))}
    assert described == {field.name for field in fields(jaxft.Stage)}


def test_output_of_the_readme_is_printed(capsys):
    network = models.create("resnet50", num_classes=2)
    params, stats = jax.eval_shape(network.init, jax.random.key(0))
    stages = default_stages(STRATEGY, network, lr=LR, epochs=EPOCHS)
    plan = jaxft.plan(stages, params)[-1]
    modes = norm_modes(params, stats, plan.labels, plan.stage.norm_choices)
    quoted, table = quotes("README.md", "Your photographs")
    lines = quoted.splitlines()
    (title,) = [line for line in lines if line.startswith("Stage 2 of 2")]
    Console().stage(plan, title, "", params, modes)
    printed = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(printed) == 5  # title, head and two rows of the table, head of the epochs
    assert [line for line in printed if line not in lines] == []
    assert max(map(len, [*lines, *table.splitlines()])) <= 80

    scores = re.findall(r"^ +(?:start|\d) .* (0\.\d+) +(0\.\d+) ", quoted, re.MULTILINE)
    start, *epochs = (Score(float(loss), float(accuracy), 1.0) for loss, accuracy in scores)
    progress = Progress.at_start(1, 1, start)
    for number, score in enumerate(epochs, 1):
        done = f"{EPOCHS} of {EPOCHS} epochs done" if number == len(epochs) else ""
        progress = progress.after_epoch(plan.stage, score, done=done)
    assert epilogue(plan, progress) in " ".join(quoted.split())


def test_tables_of_rates_and_layers_are_printed():
    lrs, layers = quotes("scripts/README.md", "Finding learning rates and layers")
    suggestions = {"valley": 1.2e-3, "steepest": 5.2e-3, "minimum / 10": 1.4e-2}
    assert [*lr_table({"*": 1e-3}, suggestions)] == lrs.splitlines()[3:]

    model = read(ROOT / "configs" / "quickstart.py").network(5)
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    ratios = {block: float(x) for block, x in re.findall(r"^  (\w+) +\S+ +(0\.\d+) ", layers, re.M)}
    printed = [line.rstrip() for line in block_table(block_labels(model, params), params, ratios)]
    assert printed == layers.splitlines()[: len(printed)]


def test_recipe_is_a_recipe():
    (example,) = blocks("README.md", "A recipe")
    assert len(example.splitlines()) <= 12
    names = run("README.md", "A recipe", {})
    assert isinstance(names["recipe"], Recipe)


STAGES = ["A stage", "LoRA", "Weight averages", "Schedules", "A linear probe", "Ready-made stages"]


@pytest.mark.parametrize("title", STAGES)
def test_stages_are_stages(title):
    run("configs/README.md", title, {})


def changed(before, after):
    """Returns the roots of the parameters that are not bit-identical."""
    named = zip(
        *map(jaxft.paths, (before, after)), *map(jax.tree.leaves, (before, after)), strict=True
    )
    roots = set()
    for path, same_path, old, new in named:
        assert path == same_path
        if np.asarray(old).tobytes() != np.asarray(new).tobytes():  # 0.0 is not -0.0
            roots.add(path.split(".")[0])
    return roots


def freeze(setup, five_lines):
    """Runs the setup of a framework and the five lines; the head alone must change."""
    names = {**libraries(), "x": jax.random.normal(jax.random.key(7), (5, 4))}
    exec(setup, names)
    before = names["params"]
    assert len(five_lines.splitlines()) == 5
    exec(five_lines, names)
    half = names["trainable"]
    updates, names["opt_state"] = names["tx"].update(names["gradients"], names["opt_state"], half)
    half = optax.apply_updates(half, updates)
    after = jaxft.combine(half, names["frozen"])
    assert jax.tree.structure(after) == jax.tree.structure(before)
    assert changed(before, after) == {"head"}
    return names


def test_five_lines_of_the_readme_freeze():
    freeze(*blocks("README.md", "In your own training loop"))


@pytest.mark.slow
def test_freezing_and_stages():
    run_stages(freeze(*blocks("README.md", "In your own training loop")))


def run_stages(names):
    """Runs the loop over stages with the parameters and the loss in `names`."""
    before = names["params"]
    run("jaxft/README.md", "Stages in your own loop", names)
    assert changed(before, names["params"]) == {"body", "head"}
    states = names["opt_state"].inner_states
    counts = {name: int(states[name].inner_state.rule.count) for name in ("head", "*")}
    assert counts == {"head": 50, "*": 30}
    wrapped = names["transform"](names["plan"]).init(names["params"])
    arrays = [leaf for leaf in jax.tree.leaves(before) if isinstance(leaf, jax.Array)]
    assert len(jax.tree.leaves(wrapped.acc_grads)) == len(arrays)


LOOPS = re.split(r"^### (.*)\n", sections("jaxft/README.md")["Loops"], flags=re.MULTILINE)
LOOPS = {
    title: re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for title, text in zip(LOOPS[1::2], LOOPS[2::2], strict=True)
}


@pytest.mark.slow
@pytest.mark.parametrize("title", LOOPS)
def test_loop_trains_only_what_is_labelled(title):
    (block,) = LOOPS[title]
    assert len(block.splitlines()) <= 25
    names = libraries() | {"x": jax.random.normal(jax.random.key(7), (5, 4))}
    exec(LOOPS["Plain optax"][0], names)
    exec(block, names)
    if "NNX" in title:
        before, after = (
            nnx.state(net, nnx.Param) for net in (names["Net"](nnx.Rngs(0)), names["net"])
        )
    else:
        before, after = names["params"], names["trained"]
    if title == "LoRA":
        before = names["tree"]
        assert changed(before, after) == {"params", "lora"}
        assert changed(before["params"], after["params"]) == {"head"}
        assert changed(before["params"], names["params"]) == {"body", "head"}
    elif title == "Scanned layers":
        assert changed(before, after) == {"blocks", "head"}
        kernels = (tree["blocks"]["fc"]["kernel"].layers for tree in (before, after))
        assert changed(*kernels) == {"3", "4", "5"}
    else:
        assert changed(before, after) == {"head"}


@pytest.mark.slow
@pytest.mark.parametrize("title", ["Flax Linen and TrainState", "Equinox", "Haiku"])
def test_stages_in_every_framework(title):
    names = libraries() | {"x": jax.random.normal(jax.random.key(7), (5, 4))}
    for block in (*LOOPS["Plain optax"], *LOOPS[title]):
        exec(block, names)
    run_stages(names)


def test_optimizer_updates_by_its_learning_rate():
    params = {"w": jnp.ones(3)}
    tx = run("jaxft/README.md", "Add an optimizer", libraries() | {"params": params})["tx"]
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -1e-4, rtol=1e-6)  # lion: the sign


class Trial:
    """Stands for a trial of Optuna that is pruned after some epochs."""

    number = 7

    def __init__(self, epochs):
        self.epochs, self.reports = epochs, []

    def report(self, value, step):
        self.reports.append((value, step))

    def should_prune(self):
        return len(self.reports) == self.epochs


@pytest.mark.slow
def test_trial_is_pruned_and_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stages = (jaxft.Stage("head", {"fc": 1e-2}, epochs=3),)
    names = {
        "jaxft": jaxft,
        "optuna": SimpleNamespace(TrialPruned=type("Pruned", (Exception,), {})),
    }
    names["recipe"] = Recipe(
        model="cifar_resnet8", data="digits:5-9", shots=4, image_size=8, stages=stages
    )
    objective = run("jaxft/README.md", "A function after each epoch", names)["objective"]
    pruned, resumed = Trial(epochs=2), Trial(epochs=None)
    with pytest.raises(names["optuna"].TrialPruned):
        objective(pruned)
    assert objective(resumed) == max(value for value, _ in (*pruned.reports, *resumed.reports))
    assert [step for _, step in (*pruned.reports, *resumed.reports)] == [1, 2, 3]


@pytest.mark.slow
def test_own_network_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("jaxft/README.md", "Your own network", {})
    assert (tmp_path / "runs/cnn/model.safetensors").samefile(names["result"].weights)
    assert names["build"](5).num_classes == 5
    assert names["recipe"].model == "my_module:build"


@pytest.mark.slow
def test_networks_are_created_by_name(capsys):
    run("jaxft/models/README.md", "", {})
    assert int(capsys.readouterr().out) == len(models.names())


@pytest.mark.slow
@pytest.mark.smoke
def test_newcomers_network_takes_two_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    *files, recipe = blocks("jaxft/models/README.md", "Add a network")
    for content in files:
        Path(content.partition("\n")[0].removeprefix("# ")).write_text(content)
    exec(recipe, {})
    run_folder = tmp_path / "runs/toynet"
    assert read(run_folder / "recipe.yaml").image_size == 16
    classifier = jaxft.Classifier.load(run_folder)
    saved = load_file(run_folder / "model.safetensors")
    assert saved["conv1.weight"].shape == (16, 8, 3, 3)
    theirs = {re.sub(r"(conv|bn)(\d)", r"features.\2.\1", name): x for name, x in saved.items()}
    assert "features.1.bn.running_var" in theirs
    loaded = jaxft.weights.from_state_dict(theirs, classifier.model)
    jax.tree.map(np.testing.assert_array_equal, loaded, (classifier.params, classifier.stats))
    late = json.loads((run_folder / "metrics.jsonl").read_text().splitlines()[1])
    assert late["stage"] == "late"
    assert late["feature_seconds"] > 0


def test_own_loss_and_metrics_train(tmp_path, monkeypatch):
    module, recipe = blocks("jaxft/README.md", "Own loss and metrics")
    assert len((module + recipe).splitlines()) <= 20
    (tmp_path / "my_losses.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    names = {"Stage": jaxft.Stage, "Recipe": Recipe, "EarlyStop": jaxft.EarlyStop}
    exec(recipe, names)
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)
    source = jaxft.data.arrays(images, np.arange(20) % 4, classes="abcd")
    recipe = replace(names["recipe"], image_size=8, resize_size=8)
    console = Console(quiet=True)
    result = jaxft.finetune(recipe, tmp_path / "run", data=source, console=console)
    assert 0 < result.score.custom["brier"] < 2
    assert read(tmp_path / "run" / "recipe.yaml").loss == "my_losses:softmax_focal"


@pytest.mark.slow
def test_own_data_source_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"Stage": jaxft.Stage, "Recipe": Recipe, "finetune": jaxft.finetune}
    names = run("jaxft/README.md", "Add a data source", names)
    assert (tmp_path / "runs/squares/model.safetensors").samefile(names["result"].weights)


@pytest.mark.slow
def test_images_in_memory_train_and_export(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("jaxft/data/README.md", "Images in memory", libraries())
    assert (tmp_path / "runs/noise/model.safetensors").samefile(names["result"].weights)
    names = run("jaxft/data/README.md", "Several labels per image", names)
    assert (tmp_path / "runs/labels/model.safetensors").samefile(names["result"].weights)

    formats = ("jax", "onnx")
    export(tmp_path / "runs/noise", tmp_path / "runs/ants", formats=formats, platforms=("cpu",))
    images = np.zeros((2, 8, 8, 3), np.uint8)
    names = libraries() | {"images": images, "onnxruntime": onnxruntime}
    names = run("jaxft/weights/README.md", "Export", names)
    assert names["logits"].shape == (2, 3)
    (tmp_path / "photos").mkdir()
    Image.fromarray(images[0]).save("photos/a.png")
    names = run("scripts/README.md", "Predict and evaluate", libraries())
    assert names["predictions"].labels[0] in names["classifier"].classes


@pytest.mark.slow
def test_weights_are_loaded_and_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with narrowed(()):
        model = jaxft.models.create("resnet18")
        trees = jax.tree.map(
            lambda x: np.full(x.shape, 0.01, np.float32),
            jax.eval_shape(model.init, jax.random.key(0)),
        )
        jaxft.weights.save("resnet18.safetensors", model, *trees)

        class Module:
            def state_dict(self):
                from safetensors.numpy import load_file

                return load_file("again.safetensors")

        names = {"images": jnp.ones((1, 64, 64, 3)), "module": Module()}
        run("jaxft/weights/README.md", "", names)
    assert names["logits"].shape == (1, 1000)
    assert names["features"].shape == (1, 4, 4, 16)
    files = (tmp_path / name for name in ("resnet18.safetensors", "again.safetensors"))
    assert len({file.read_bytes() for file in files}) == 1
    assert changed(trees[0], names["params"]) == set()


@pytest.mark.slow
def test_weights_with_stride_in_1x1_load_into_torchvisions_network(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    import safetensors.torch
    from torch_network import ResNet

    monkeypatch.chdir(tmp_path)
    with narrowed(()):
        model = jaxft.models.create("resnet50", num_classes=3, stride_in_1x1=True)
        params, stats = jax.jit(model.init)(jax.random.key(0))
        jaxft.weights.save("model.safetensors", model, params, stats)
        images = np.random.default_rng(0).standard_normal((2, 64, 64, 3)).astype(np.float32)
        logits, _ = jax.jit(partial(model.apply, norms="running"))(params, stats, images)
    net = ResNet(bottleneck=True).eval()
    names = {"safetensors": safetensors, "net": net}
    run("jaxft/weights/README.md", "Options of the network", names)
    with torch.no_grad():
        expected = net(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.slow
def test_parity_finds_the_new_optimizer():
    torch = pytest.importorskip("torch")
    from torch_network import ResNet

    (example,) = blocks("jaxft/parity/README.md", "")
    different, equal = quotes("jaxft/parity/README.md", "")
    for carry, quoted in {"keep": different, "reset": equal}.items():
        torch.manual_seed(0)
        rng = np.random.default_rng(0)
        batches = [(rng.standard_normal((n, 32, 32, 3)), rng.integers(0, 3, n)) for n in (8, 5)]
        reports = []
        names = {"module": ResNet(), "batches": batches, "print": reports.append}
        with narrowed(()):
            exec(example.replace('carry="keep"', f'carry="{carry}"'), names)
        words = without_numbers(quoted)
        assert without_numbers(str(reports[0]))[: len(words)] == words
