"""The `jaxft` program and the scripts: dispatch, signals, exit codes, help texts."""

import os
import runpy
import signal
import subprocess
import sys
import tomllib
from io import StringIO
from pathlib import Path

import pytest
from commands import call

from jaxft import RecipeError
from jaxft.cli import commands as cli
from jaxft.cli.command_setup import report_errors, run_until_signal
from jaxft.errors import InterruptedRunError

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "finetune": "finetune",
    "plan": "plan",
    "export": "export",
    "convert_weights": "convert",
    "find_lr": "find-lr",
    "probe_layers": "probe-layers",
    "prepare_tfds": "prepare-tfds",
}


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_help_fits_on_one_screen_and_lists_commands(capsys):
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    for name in cli.COMMANDS:
        assert sum(line.startswith(f"  {name} ") for line in lines) == 1


def test_program_without_command_prints_help_and_fails(capsys):
    assert cli.main([]) == 2
    assert "usage: jaxft COMMAND" in capsys.readouterr().err


def test_package_installs_program():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"jaxft": "jaxft.cli.commands:main"}


def test_python_m_jaxft_runs_program():
    done = subprocess.run([sys.executable, "-m", "jaxft", "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: python -m jaxft COMMAND" in done.stdout


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag, capsys):
    assert cli.main([flag]) == 0
    assert capsys.readouterr().out == f"jaxft {cli.version()}\n"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("fintune", " Did you mean 'finetune'?"),
        ("find_lr", " Did you mean 'find-lr'?"),
        ("find-rate", " Did you mean 'find-lr'?"),
        ("convert_weights", " Did you mean 'convert'?"),
        ("--verbose", ""),
    ],
)
def test_unknown_command_is_one_line_with_near_miss(name, hint, capsys):
    assert cli.main([name]) == 2
    names = ", ".join(cli.COMMANDS)
    message = f"jaxft: there is no command {name!r}.{hint} Commands: {names}.\n"
    assert capsys.readouterr().err == message


def test_command_gets_arguments_and_program_name(monkeypatch):
    calls = []
    monkeypatch.setattr(cli, "run_program", lambda *call: calls.append(call))
    assert cli.main(["find-lr", "a.py", "--help"]) == 0
    assert calls == [("find-lr", ["a.py", "--help"], "jaxft find-lr")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_runs_command_under_own_name(script, monkeypatch):
    calls, path = [], str(ROOT / f"scripts/{script}.py")
    monkeypatch.setattr(cli, "run_program", lambda *call: calls.append(call))
    monkeypatch.setattr(sys, "argv", [path, "--help"])
    runpy.run_path(path, run_name="__main__")
    assert calls == [(SCRIPTS[script], ["--help"], f"python {path}")]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_command_names_program_as_called(name, capsys):
    done = call(name, "--help")
    assert done.returncode == 0
    assert f"usage: jaxft {name} " in done.stdout
    assert f"\n    jaxft {name} " in done.stdout


def test_help_of_script_names_script(capsys):
    from jaxft.cli.export import run

    assert run(["--help"], "python scripts/export.py") == 0
    text = capsys.readouterr().out
    assert "usage: python scripts/export.py " in text
    assert "\n    python scripts/export.py WORKDIR" in text
    assert "jaxft export" not in text


def test_program_handles_signals_before_it_imports_jax():
    code = (
        "import sys, jaxft.cli.commands; sys.exit(bool({'jax', 'numpy', 'optax'} & {*sys.modules}))"
    )
    assert python(code).returncode == 0


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGINT", 130)])
def test_exit_on_signal(name, code):
    done = python(
        "import signal; from jaxft.cli.process import exit_on_signal; exit_on_signal('came.');"
        f"signal.raise_signal(signal.{name}); print('not reached')"
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"\n{name} came.\n")


def test_exit_process_after_error_waits_for_no_thread():
    done = python(
        "import threading; from jaxft.cli.process import exit_process; print('printed');"
        "threading.Thread(target=threading.Event().wait).start(); exit_process(3)"
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "printed\n", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_exit_process_keeps_code_if_output_cannot_be_written():
    code = "from jaxft.cli.process import exit_process; print('lost'); exit_process(0)"
    command = [sys.executable, "-c", code]
    buffered = {name: x for name, x in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=buffered)
    assert (done.returncode, done.stderr) == (0, b"")


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RecipeError("no stages."), 1, "RecipeError: no stages.\n"),
        (FileNotFoundError("no file"), 1, "FileNotFoundError: no file\n"),
        (InterruptedRunError("SIGTERM came.", signal.SIGTERM), 75, "\nSIGTERM came.\n"),
        (InterruptedRunError("SIGINT came.", signal.SIGINT), 130, "\nSIGINT came.\n"),
        (SystemExit(), 0, ""),
        (SystemExit(2), 2, ""),
        (SystemExit("no recipe"), 1, "no recipe\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_report_errors(error, code, message, capsys):
    assert report_errors(raising(error)) == code
    assert capsys.readouterr().err == message


def test_report_errors_leaves_bugs_alone():
    with pytest.raises(TypeError):
        report_errors(raising(TypeError()))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_run_until_signal_restores_handlers(number, code, capsys):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert run_until_signal(lambda: signal.raise_signal(number)) == code
    assert capsys.readouterr().err == f"\n{number.name} came; stopped before the end.\n"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_run_until_signal_reports_output_that_cannot_be_written(monkeypatch, capsys):
    class FullDisk(StringIO):
        def flush(self):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", FullDisk())
    assert run_until_signal(lambda: print("lost")) == 1
    assert capsys.readouterr().err == "OSError: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("unbuffered", [(), ("-u",)])
def test_help_is_quiet_when_its_reader_ends_early(unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, *unbuffered, "-m", "jaxft", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
