"""SIGTERM and SIGINT in each phase of a run: one line, and the resumed run ends as unbroken."""

import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen as nn
from mortal import QUIET, assert_same_end
from PIL import Image
from strike_child import arm, disarm, meet

from jaxft import InterruptedRunError, Recipe, Stage, finetune, models

ROOT = Path(__file__).parents[2]
CHILD = Path(__file__).with_name("strike_child.py")


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        meet("trace", "network")
        return nn.Dense(2, name="head")(nn.relu(nn.Dense(4, name="body")(x.mean((1, 2)))))


# The event of each phase, and its number, in a workdir that was interrupted in the phase before.
# Images are read when they are checked, and once more; then they are in memory.
PHASES = {
    "recipe_resolved": ("open", "recipe.yaml"),
    "images_checked": ("open", "train/a/0.png"),
    "weights_read": ("open", "pretrained.safetensors"),
    "network_created": ("trace", "network"),
    "folder_claimed": ("open", "run/lock"),
    "environment_recorded": ("os.rename", "environment.json"),
    "first_stage_compiled": ("compile", ""),
    "start_validated": ("open", "val/a/0.png", 2),
    "step_taken": ("open", "train/a/0.png", 2),
    "checkpoint_read": ("open", "run/checkpoints"),
    "next_stage_compiled": ("compile", "", 4),
    "epoch_validated": ("os.rename", "metrics.jsonl", 2),
    # A thread renames: two epochs may pass before, and the last stage has five.
    "checkpoint_named": ("os.rename", "run/checkpoints/"),
    "epoch_recorded": ("os.rename", "metrics.jsonl", 2),
    "weights_exported": ("os.rename", "model.safetensors"),
    "score_exported": ("os.rename", "model.json"),
}
SMOKE = (signal.SIGTERM, "step_taken")
EACH_PHASE = [
    pytest.param(
        number,
        phase,
        id=f"{number.name}-{phase}",
        marks=[pytest.mark.smoke] * ((number, phase) == SMOKE),
    )
    for number in (signal.SIGTERM, signal.SIGINT)
    for phase in PHASES
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images and weights."""
    root, rng = tmp_path_factory.mktemp("interrupted"), np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name in "ab":
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    run(root, root / "first", weights=None)
    (root / "first/model.safetensors").rename(root / "pretrained.safetensors")
    return root


def recipe(root, weights="pretrained.safetensors"):
    return Recipe(
        model="net",
        weights=weights and str(root / weights),
        data=f"folder:{root}",
        batch_size=4,
        image_size=8,
        resize_size=8,
        augment="flip",
        stages=(
            Stage("head", {"head": 1e-2}, epochs=2),
            Stage("all", {"*": 1e-3}, epochs=5, carry="keep"),
        ),
    )


def network():
    return models.Linen(Net(), shape=(8, 8, 3), head="head")


def run(root, workdir, model=None, **options):
    model = model or network()
    return finetune(recipe(root, **options), workdir, model=model, console=QUIET)


@pytest.fixture(scope="module")
def unbroken(folder):
    run(folder, folder / "unbroken")
    return folder / "unbroken"


@pytest.fixture(scope="module")
def interrupted(request, folder):
    """The signal of a test, and the folder of the run that receives it in each phase."""
    return request.param, folder / request.param.name / "run"


@pytest.fixture
def handlers():
    """Installs signal handlers of a caller, which fail the test if they receive a signal."""

    def unhandled(number, _):
        raise AssertionError(f"{signal.Signals(number).name} came to the caller")

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, unhandled) for number in numbers}
    yield unhandled
    for number, handler in before.items():
        signal.signal(number, handler)


# Python drops what a handler raises in a weak reference's callback; the run finds the signal later.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
@pytest.mark.parametrize(("interrupted", "phase"), EACH_PHASE, indirect=["interrupted"])
def test_signal_ends_run_in_each_phase(phase, interrupted, folder, handlers, monkeypatch):
    number, workdir = interrupted
    compile = jax.stages.Lowered.compile

    def compiled(*args, **kwargs):
        meet("compile", "")
        return compile(*args, **kwargs)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compiled)
    model = network()
    arm(number, *PHASES[phase])
    with pytest.raises(InterruptedRunError, match=rf"^{number.name} came.*command.*\.$") as stopped:
        run(folder, workdir, model)
    assert disarm()
    assert stopped.value.signal == number
    assert "\n" not in str(stopped.value)
    assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGINT) is handlers


@pytest.mark.slow
@pytest.mark.parametrize(
    "interrupted",
    [
        pytest.param(signal.SIGTERM, id="SIGTERM", marks=pytest.mark.smoke),
        pytest.param(signal.SIGINT, id="SIGINT"),
    ],
    indirect=True,
)
def test_run_interrupted_in_each_phase_ends_as_unbroken(interrupted, folder, unbroken):
    run(folder, interrupted[1])
    assert_same_end(interrupted[1], unbroken)


def struck(number, event, name, script, *arguments):
    """Returns exit code and stderr of a script that gets a signal; see `strike_child.py`."""
    done = subprocess.run(
        [
            sys.executable,
            CHILD,
            number,
            event,
            name,
            "1",
            ROOT / f"scripts/{script}.py",
            *arguments,
        ],
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize(
    ("event", "name"), [("import", "optax"), ("open", "config.py")], ids=["imports", "recipe_file"]
)
def test_signal_before_finetune_ends_script(event, name, number, tmp_path):
    (tmp_path / "config.py").write_text("try:\n    import time\nexcept BaseException:\n    pass\n")
    arguments = (tmp_path / "config.py", "--workdir", tmp_path / "run")
    code, said = struck(number, event, name, "finetune", *arguments)
    assert (code, said.strip()) == (
        {"SIGTERM": 75, "SIGINT": 130}[number],
        f"{number} came before training; the same command starts or resumes the run.",
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "number", "event", "name"),
    [
        ("find_lr", "SIGTERM", "import", "optax"),
        ("find_lr", "SIGINT", "open", "config.py"),
        ("probe_layers", "SIGINT", "import", "optax"),
        ("plan", "SIGTERM", "import", "optax"),
        ("export", "SIGTERM", "import", "orbax.checkpoint"),
        ("convert_weights", "SIGTERM", "open", "digits_0to4"),
        ("prepare_tfds", "SIGINT", "import", "numpy"),
    ],
)
def test_signal_ends_other_scripts_in_one_line(script, number, event, name, tmp_path):
    (tmp_path / "checkpoints/1").mkdir(parents=True)
    (tmp_path / "recipe.yaml").write_text("")
    (tmp_path / "config.py").write_text("")
    arguments = {
        "find_lr": (tmp_path / "config.py", "--out", tmp_path / "out"),
        "probe_layers": (tmp_path / "config.py",),
        "plan": (tmp_path / "config.py", "--topology", "cpu"),
        "export": (tmp_path,),
        "convert_weights": ("asset:digits_0to4", tmp_path / "out", "--model", "cifar_resnet8"),
        "prepare_tfds": (tmp_path, tmp_path / "out"),
    }
    code, said = struck(number, event, name, script, *arguments[script])
    assert code == {"SIGTERM": 75, "SIGINT": 130}[number], said
    assert said.strip().startswith(f"{number} came")
    assert "\n" not in said.strip()
    assert not (tmp_path / "out").exists()
