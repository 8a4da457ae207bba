"""Output on a terminal and in a pipe."""

import errno
import os
import re

import jax
import jax.numpy as jnp
import pytest

import jaxft
from jaxft import Stage
from jaxft.report import environment
from jaxft.report.console import Console
from jaxft.train.metrics import Score

MARKUP = "folder:cat at [bold]red[/bold] and [/] :smile:"


def test_console_prints_markup_and_emoji_literally(capsys):
    console = Console()
    console.say(MARKUP)
    console.row(MARKUP, style="bold")
    (plan,) = jaxft.plan([Stage("[red]s", {":cat:": 1e-3}, 1)], {":cat:": {"w": jnp.ones(2)}})
    console.stage(
        plan, f"Stage 1 of 1: {plan.stage.name}", "[b]", {":cat:": {"w": jnp.ones(2)}}, {}
    )
    console.epoch_row("[i]x", None, Score(1.0, 0.5, 0.5), None, ":cat:")
    output = capsys.readouterr().out
    assert output.count(MARKUP) == 2
    assert "Stage 1 of 1: [red]s\n[b]\n" in output
    assert "  :cat:           2" in output
    assert "[i]x" in output


@pytest.mark.parametrize(
    ("width", "header", "row"),
    [
        (60, "accuracy    seconds", "0.5000        2.0  best"),
        (80, "accuracy          f1    seconds", "0.5000      0.2500        2.0  best"),
        (
            100,
            "accuracy          f1  true_probability    seconds",
            "0.5000      0.2500            0.7500        2.0  best",
        ),
    ],
)
def test_console_shows_the_metrics_that_fit(width, header, row, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    params = {"fc": {"w": jnp.ones(2)}}
    (plan,) = jaxft.plan([Stage("all", {"*": 1e-3}, 1)], params)
    custom = {"f1": 0.25, "true_probability": 0.75}
    console = Console()
    console.stage(plan, "", "", params, {}, metrics=[*custom])
    console.epoch_row(1, None, Score(1.0, 0.5, 0.5, custom), 2.0, "best")
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.endswith(header)
    assert second.endswith(row)


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC])
def test_console_continues_without_standard_output(number, monkeypatch, capsys):
    def fail(text):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("sys.stdout.write", fail)
    console = Console()
    for _ in range(2):
        console.row("text")
    assert capsys.readouterr().err.count("Output stops: ") == 1


@pytest.mark.parametrize(("loss", "text"), [(float("nan"), "loss - "), (1.25, "loss 1.2500")])
def test_console_bar_hides_an_unknown_loss(loss, text, monkeypatch, capsys):
    for name, value in {"TERM": "xterm", "TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1"}.items():
        monkeypatch.setenv(name, value)
    with Console().epoch(1, 4) as bar:
        bar.advance(loss, 1)
    output = capsys.readouterr().out
    assert text in output
    assert "nan" not in output


CASES = {
    "a GPU": (["nvidia0", "nvidiactl"], {}, r"has an NVIDIA GPU: pip install '.\[cuda\]'"),
    "a TPU": (["accel0"], {}, r"has a TPU: pip install '.\[tpu\]'"),
    "nothing": (["null", "accel", "nvidiactl"], {}, None),
    "CPU selected by the user": (["nvidia0"], {"platforms": "cpu"}, None),
    "hidden GPUs": (["nvidia0"], {"CUDA_VISIBLE_DEVICES": ""}, None),
}


@pytest.mark.parametrize(("files", "settings", "message"), CASES.values(), ids=CASES)
def test_idle_accelerator_remark(files, settings, message, tmp_path, monkeypatch):
    for file in files:
        (tmp_path / file).touch()
    monkeypatch.setattr(environment, "_DEV", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    before = jax.config.jax_platforms
    for name, value in settings.items():
        if name != "platforms":
            monkeypatch.setenv(name, value)
    try:
        jax.config.update("jax_platforms", settings.get("platforms"))
        remarks = environment.idle_accelerator()
    finally:
        jax.config.update("jax_platforms", before)
    assert len(remarks) == (message is not None)
    assert not message or re.search(message, remarks[0])
