"""The process: help, options of every command, what it prints and how it ends."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import typer

from hf_gradmem_cli import app
from tests.support.command_line import TEXT, mistake, run, run_process

COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    examples = result.stdout.partition("Examples:")[2]
    assert f"hf-gradmem {command}" in examples


def test_help_and_wrong_options_are_answered_without_torch() -> None:
    script = """if True:
        import sys
        from typer.testing import CliRunner
        from hf_gradmem_cli import app
        assert CliRunner().invoke(app, ["--help"]).exit_code == 0
        for command in sys.argv[1:]:
            assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0
            assert CliRunner().invoke(app, [command, "--no-such-option"]).exit_code == 2
        heavy = {"torch", "transformers", "datasets", "hf_gradmem"} & sys.modules.keys()
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", script, *COMMANDS], check=True)


def test_an_option_has_the_same_spellings_in_every_command_that_has_it() -> None:
    spellings: dict[str, set[tuple[str, ...]]] = {}
    for name, command in typer.main.get_command(app).commands.items():
        options = [parameter.opts for parameter in command.params if parameter.opts[0].startswith("-")]
        assert (["--json"] in options) == (name not in ("chat", "serve")), (
            name
        )  # which print what they are asked, on and on
        for given in options:
            for spelling in given:
                spellings.setdefault(spelling, set()).add(tuple(given))
    assert {spelling: given for spelling, given in spellings.items() if len(given) > 1} == {}
    assert spellings["--output"] == {("--output", "--out", "-o")}


def test_quiet_prints_what_was_asked_for_alone(base: str, memory: str, tmp_path: Path) -> None:
    written = run("--quiet", "write", TEXT, "--model", base, "--output", tmp_path / "memory", "--steps", 1)
    assert (written.exit_code, written.output) == (0, "")
    assert (tmp_path / "memory").is_dir()
    options = ["ask", "When?", "--memory", memory, "--model", base, "--max-new-tokens", 6]
    assert run("-q", *options).output == run(*options).output != ""
    assert run("--quiet", "inspect", memory).stdout != ""
    assert "nowhere" in mistake(run("--quiet", "inspect", tmp_path / "nowhere"))
    assert "contradict" in mistake(run("--quiet", "--verbose", "inspect", memory))


def test_verbose_shows_where_an_error_arose(tmp_path: Path) -> None:
    result = run("--verbose", "inspect", tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1] == mistake(run("inspect", tmp_path / "nowhere"))


def test_what_nobody_foresaw_is_one_line_too(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("hf_gradmem.evaluation.memory_facts.memory_facts", broken)
    result = run("inspect", memory)
    assert result.exit_code == 1
    assert result.stderr == "Error: RuntimeError: two lines (hf-gradmem --verbose ... shows where)\n"


def test_a_real_process_says_nothing_that_was_not_asked_for(base: str, tmp_path: Path) -> None:
    written = run_process("write", "--model", base, "--output", tmp_path, "--steps", 2, "--json", stdin=TEXT)
    assert (written.returncode, written.stderr) == (0, "")
    asked = run_process("ask", "When?", "--memory", tmp_path, "--model", base, "--max-new-tokens", 4, "--json")
    assert (asked.returncode, asked.stderr) == (0, "")
    inspected = run_process("inspect", tmp_path, "--model", base, "--json")
    assert (inspected.returncode, inspected.stderr) == (0, "")
    assert json.loads(inspected.stdout)["fingerprint"] == json.loads(written.stdout)["fingerprint"]
    assert isinstance(json.loads(asked.stdout)["answer"], str)


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_interrupting_a_write_exits_with_130_and_leaves_nothing(base: str, tmp_path: Path) -> None:
    script = """if True:
        import hf_gradmem_cli
        from hf_gradmem import GradMemForCausalLM
        write = GradMemForCausalLM.write
        def announced(*arguments, **options):
            print("writing", flush=True)
            return write(*arguments, **options)
        GradMemForCausalLM.write = announced
        hf_gradmem_cli.main()
    """
    options = ["--model", base, "--output", str(tmp_path / "memory"), "--steps", "100000", "--tolerance", "0"]
    command = [sys.executable, "-c", script, "write", TEXT, *options]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # ignored where the tests run in the background
    )
    try:
        assert process.stdout.readline() == "writing\n"
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, stderr) == (130, "Interrupted.\n")
    assert not (tmp_path / "memory").exists()


INTERRUPTED = {
    "while options are read": """
        manners = sys.modules["hf_gradmem_cli.app"].manners
        def interrupted(self, name, value):
            object.__setattr__(self, name, value)
            if name == "verbose":
                os.kill(os.getpid(), signal.SIGINT)
        type(manners).__setattr__ = interrupted
    """,
    "in a library that makes an error of its own of it": """
        import hf_gradmem.commands.opening as opening
        def load_memory(*_, **__):
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(60)
            except KeyboardInterrupt:
                raise ImportError("broken")
        opening.load_memory = load_memory
    """,
    "in a library that swallows it": """
        import hf_gradmem.commands.opening as opening
        load_memory = opening.load_memory
        def swallowing(*arguments, **options):
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(60)
            except KeyboardInterrupt:
                return load_memory(*arguments, **options)
        opening.load_memory = swallowing
    """,
    "in code that a library runs by the interpreter itself": """
        import ctypes
        import hf_gradmem.commands.opening as opening
        def load_memory(*_, **__):
            run = ctypes.pythonapi.PyRun_String
            run.restype, run.argtypes = ctypes.py_object, [ctypes.c_char_p, ctypes.c_int, *2 * [ctypes.py_object]]
            names = {"os": os, "signal": signal}
            run(b"os.kill(os.getpid(), signal.SIGINT)\\nwhile True: pass", 257, names, names)
        opening.load_memory = load_memory
    """,
    "while the process ends": """
        import atexit
        atexit.register(os.kill, os.getpid(), signal.SIGINT)
    """,
}


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
@pytest.mark.parametrize("moment", INTERRUPTED)
def test_a_process_that_is_interrupted_exits_with_130_whatever_it_is_doing(moment: str, memory: str) -> None:
    script = "\n".join(
        [
            "import os, signal, sys, time",
            "signal.signal(signal.SIGINT, signal.default_int_handler)",
            "import hf_gradmem_cli",
            textwrap.dedent(INTERRUPTED[moment]),
            "hf_gradmem_cli.main()",
        ]
    )
    process = subprocess.run(
        [sys.executable, "-c", script, "inspect", memory], capture_output=True, text=True, timeout=60, check=False
    )
    assert process.returncode == 130, process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_a_process_that_is_interrupted_while_the_command_line_is_imported_exits_with_130() -> None:
    script = """if True:
        import os, signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)
        class Interrupting:
            def find_spec(self, name, *_):
                if name == "typer":
                    os.kill(os.getpid(), signal.SIGINT)
        sys.meta_path.insert(0, Interrupting())
        import hf_gradmem_cli
    """
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (process.returncode, process.stderr) == (130, "")
