"""What a terminal and a pipe show."""

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

ODD = "folder:cat at [bold]red[/bold] and [/] :smile:"


def test_names_are_neither_markup_nor_emoji(capsys):
    console = Console()
    console.say(ODD)
    console.row(ODD, style="bold")
    (plan,) = jaxft.plan([Stage("[red]s", {":cat:": 1e-3}, 1)], {":cat:": {"w": jnp.ones(2)}})
    console.stage(
        plan, f"Stage 1 of 1: {plan.stage.name}", "[b]", {":cat:": {"w": jnp.ones(2)}}, {}
    )
    console.epoch_row("[i]x", None, 1.0, 0.5, None, ":cat:")
    said = capsys.readouterr().out
    assert said.count(ODD) == 2
    assert "Stage 1 of 1: [red]s\n[b]\n" in said
    assert "  :cat:           2" in said
    assert "[i]x" in said


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC])
def test_output_that_cannot_be_written_does_not_end_a_run(number, monkeypatch, capsys):
    def refuse(text):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("sys.stdout.write", refuse)
    console = Console()
    for _ in range(2):
        console.row("text")
    assert capsys.readouterr().err.count("Nothing more is printed, as ") == 1


@pytest.mark.parametrize(("loss", "text"), [(float("nan"), "loss - "), (1.25, "loss 1.2500")])
def test_bar_shows_a_loss_once_there_is_one(loss, text, monkeypatch, capsys):
    for name, value in {"TERM": "xterm", "TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1"}.items():
        monkeypatch.setenv(name, value)
    with Console().epoch(1, 4) as bar:
        bar.advance(loss, 1)
    said = capsys.readouterr().out
    assert text in said
    assert "nan" not in said


CASES = {
    "a GPU": (["nvidia0", "nvidiactl"], {}, r"has an NVIDIA GPU: pip install '.\[cuda\]'"),
    "a TPU": (["accel0"], {}, r"has a TPU: pip install '.\[tpu\]'"),
    "nothing": (["null", "accel", "nvidiactl"], {}, None),
    "the CPU on purpose": (["nvidia0"], {"platforms": "cpu"}, None),
    "hidden GPUs": (["nvidia0"], {"CUDA_VISIBLE_DEVICES": ""}, None),
}


@pytest.mark.parametrize(("files", "settings", "message"), CASES.values(), ids=CASES)
def test_idle_accelerator_is_named(files, settings, message, tmp_path, monkeypatch):
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
