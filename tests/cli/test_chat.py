"""`hf-gradmem chat`: lines from stdin, and lines typed at a terminal."""

import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
import torch
from datasets import Dataset

from hf_gradmem import GradMemForCausalLM, GradMemMemory, MemoryStore
from hf_gradmem.commands.chat import COMMANDS, Chat
from hf_gradmem.commands.packaged import FORWARD_ADAPTER
from hf_gradmem.commands.packaged import RETRIEVAL_ADAPTER as ADAPTER
from hf_gradmem.commands.write_dataset import write_dataset
from tests.support.command_line import run
from tests.support.small_models import named_base, small_tokenizer


@pytest.fixture(scope="module")
def model():
    return GradMemForCausalLM.from_pretrained(ADAPTER)


def talk(model, *lines, **options):
    """What is told of some lines, and the conversation."""
    told: list[str] = []
    chat = Chat(model, told.append, **options)
    for line in lines:
        chat.take(line)
    return "".join(told), chat


def test_what_was_written_is_answered_from_the_memory_in_use(model):
    told, chat = talk(model, "/write !a:b!", "?!a:", "/write !a:c!", "?!a:", "/use text-1", "?!a:", "/memories")
    answers = [line for line in told.splitlines() if line in ("b!", "c!")]
    assert answers == ["b!", "c!", "b!"]
    assert told.endswith("* text-1\n  text-2\n")
    assert chat.in_use == "text-1"


def test_a_question_beyond_the_window_is_told_and_the_conversation_goes_on(model):
    told, _ = talk(model, "/write !a:b!", "?!a:" * 1000, "?!a:")
    assert "The longest prompt has 4000 tokens" in told
    assert told.endswith("b!\n")


def test_files_are_written_under_their_names_and_memories_saved(model, tmp_path):
    (tmp_path / "pairs.txt").write_text("\ufeff!a:b!\n", encoding="utf-8")
    told, chat = talk(model, f"/write {tmp_path / 'pairs.txt'}", f"/save {tmp_path / 'kept'}")
    assert "Written as pairs.txt: 5 tokens, 2 steps" in told
    saved = GradMemMemory.from_pretrained(tmp_path / "kept")
    assert saved.embeddings.equal(chat.written["pairs.txt"].embeddings)


def test_a_name_that_is_taken_gets_a_number(model, tmp_path):
    """A file of the store's, or of another folder."""
    write_dataset(model, Dataset.from_dict({"id": ["pairs.txt"], "context": ["!a:1!"]}), tmp_path / "store")
    (tmp_path / "pairs.txt").write_text("!a:b!", encoding="utf-8")
    store = MemoryStore.from_pretrained(tmp_path / "store")
    lines = [f"/write {tmp_path / 'pairs.txt'}", "/memories", "?!a:", "/use pairs.txt", "?!a:"]
    told, chat = talk(model, *lines, f"/write {tmp_path / 'pairs.txt'}", store=store)
    assert "Written as pairs.txt-2: " in told
    assert [line for line in told.splitlines() if line in ("1!", "b!")] == ["b!", "1!"]
    assert chat.ids() == ["pairs.txt", "pairs.txt-2", "pairs.txt-3"]


def test_a_text_is_numbered_beside_the_ids_of_the_store(model, tmp_path):
    write_dataset(model, Dataset.from_dict({"id": ["text-1"], "context": ["!a:1!"]}), tmp_path / "store")
    told, chat = talk(model, "/write !a:b!", "?!a:", store=MemoryStore.from_pretrained(tmp_path / "store"))
    assert told.endswith("b!\n")
    assert chat.ids() == ["text-1", "text-2"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("?!a:", "There is no memory yet"),
        ("/memories", "There is no memory yet"),
        ("/forget", "There is no memory yet"),
        ("/use one", "no memory 'one'"),
        ("/wrote x", "no command /wrote"),
        ("/write", "Say what to write"),
        ("/write missing/notes.txt", "no file missing/notes.txt"),
        ("/write noets.txt", "no file noets.txt"),
        ("/write NOTES.MD", "no file NOTES.MD"),
        ("/write " + "!a:b!" * 100, "Written as text-1: 500 tokens"),
        ("/help", "/save DIRECTORY"),
        ("/write ~nobody-here/x.txt", "no file ~nobody-here/x.txt"),
    ],
)
def test_what_cannot_be_done_is_told_and_the_conversation_goes_on(line, message, model):
    told, chat = talk(model, line, "/write !a:b!", "?!a:")
    assert message in told
    assert told.endswith("b!\n")
    assert not chat.ended


def test_a_text_of_several_words_may_end_in_the_name_of_a_file(model):
    assert "Written as text-1" in talk(model, "/write !a:b! !c:d.txt")[0]


def test_a_writer_without_losses_writes_as_well():
    told, _ = talk(GradMemForCausalLM.from_pretrained(FORWARD_ADAPTER), "/write !a:b!")
    assert "Written as" in told
    assert "loss" not in told


def test_running_out_of_memory_is_told_and_the_conversation_goes_on(model, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("WRITE ran out of memory.")

    monkeypatch.setattr(model, "write", fail)
    told, _ = talk(model, "/write !a:b!", "/memories")
    assert told == "WRITE ran out of memory.\nThere is no memory yet: /write FILE or TEXT makes one.\n"


def test_forget_drops_the_memory_in_use(model):
    told, chat = talk(model, "/write !a:b!", "/write !a:c!", "/forget", "?!a:", "/forget", "?!a:")
    assert "b!\n" in told
    assert told.endswith("There is no memory yet: /write makes one.\n")
    assert chat.ids() == []


def test_every_command_is_told_of_and_known(model):
    told, chat = talk(model, "/help")
    assert all(name in told and hasattr(chat, name.removeprefix("/")) for name in COMMANDS)


def test_lines_from_stdin_are_taken_to_their_end():
    given = run("chat", ADAPTER, stdin="/write !a:b!\n?!a:\n/quit\n?!a:\n")
    assert given.exit_code == 0, given.output
    assert given.stdout.splitlines()[1:] == ["b!"]


def test_a_directory_may_begin_with_the_name_of_nobody(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told, _ = talk(model, "/write !a:b!", "/save ~nobody-here/kept", "?!a:")
    assert told.endswith("Saved text-1 to ~nobody-here/kept.\nb!\n")
    assert len(GradMemMemory.from_pretrained(Path("~nobody-here/kept"))) == 1


def test_a_memory_of_any_size_that_a_plain_base_wrote_is_read(tmp_path):
    named_base(tmp_path / "base")
    small_tokenizer().save_pretrained(tmp_path / "base")
    options = ["--model", tmp_path / "base", "--steps", "1"]
    written = run("write", "abc", *options, "--memory-tokens", "4", "--output", tmp_path / "memory")
    assert written.exit_code == 0, written.output
    asked = ["chat", tmp_path / "base", "--memory", tmp_path / "memory", "--max-new-tokens", "2"]
    given = run(*asked, stdin="abc\n")
    assert given.exit_code == 0, given.output
    assert "written by another model" not in given.stdout
    refused = run(*asked, "--seed", "1", stdin="abc\n")
    assert refused.exit_code == 2
    assert "another" in refused.stderr


def test_a_memory_in_the_folder_that_one_is_in_has_its_name(model, tmp_path, monkeypatch):
    model.write("!a:b!").save_pretrained(tmp_path / "kept")
    monkeypatch.chdir(tmp_path / "kept")
    given = run("chat", ADAPTER, "--memory", ".", stdin="/memories\n")
    assert given.stdout == "* kept\n", given.output


def test_lines_are_typed_at_a_terminal_with_a_history(tmp_path):
    arguments = ["-m", "hf_gradmem_cli", "chat", str(ADAPTER)]
    environment = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "TERM": "dumb", "PATH": "/usr/bin:/bin"}
    child = pexpect.spawn(sys.executable, arguments, env=environment, timeout=180, encoding="utf-8")
    child.expect("> ")
    child.sendline("/write !a:b!")
    child.expect("Written as text-1")
    child.sendline("?!a:")
    child.expect("b!")
    child.expect("> ")
    child.send("a line that is dropped")
    child.expect("dropped")
    child.sendcontrol("c")
    child.expect("> ")
    child.sendline("?!a:")
    child.expect("b!")
    child.expect("> ")
    child.sendline("/quit")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert list(tmp_path.rglob("chat_history"))


def test_an_interrupt_that_a_library_keeps_to_itself_does_not_end_the_conversation_as_interrupted():
    script = """
import contextlib, signal, sys
from hf_gradmem.commands import chat
from hf_gradmem_cli import main

def typed_line(*_):
    def next_line():
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    return next_line

chat.typed_line, sys.stdin.isatty = typed_line, lambda: True
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", script, "--quiet", "chat", str(ADAPTER)], stdin=subprocess.PIPE, capture_output=True
    )
    assert done.returncode == 0, done.stderr
