"""Many memories: written shard by shard, killed and gone on with, shared by processes, looked up by id."""

import datetime
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import pandas
import pytest
import torch
from datasets import Dataset
from huggingface_hub import DatasetCard, HfApi
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_gradmem import GradMemConfig, GradMemForCausalLM, GradMemMemory, MemoryStore, get_gradmem_model
from hf_gradmem.commands.dataset_rows import load_source
from hf_gradmem.commands.opening import load_store
from hf_gradmem.commands.push import push
from hf_gradmem.commands.write_dataset import write_dataset
from hf_gradmem.writing.writers.gradient import GradientWriter
from hf_gradmem_cli import app
from tests.support import hub_server
from tests.support.hub_server import running_hub, use_hub
from tests.support.small_models import cutting_adapter, nameless_base, small_tokenizer
from tests.support.stores import save_store

CONTEXTS = ["thequickbrown", ["fox", "jumps", "over"], "the", "lazydog", ["a", "b"], "z", "abcdefghijklmnop"]
IDS = [f"id{index}" for index in range(len(CONTEXTS))]
OPTIONS = {"shard_size": 2, "batch_size": 2}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> str:
    return cutting_adapter(tmp_path_factory.mktemp("models"))


@pytest.fixture
def model(adapter) -> GradMemForCausalLM:
    return AutoModelForCausalLM.from_pretrained(adapter)


@pytest.fixture
def source(tmp_path) -> str:
    """A file of JSON lines, with contexts both whole and in segments."""
    path = tmp_path / "contexts.jsonl"
    rows = [{"id": name, "context": context} for name, context in zip(IDS, CONTEXTS, strict=True)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def assert_same(memory: GradMemMemory, expected: GradMemMemory) -> None:
    close = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True}
    torch.testing.assert_close(memory.embeddings, expected.embeddings, **close)
    torch.testing.assert_close(memory.write_losses, expected.write_losses, **close)
    torch.testing.assert_close(memory.final_write_loss, expected.final_write_loss, **close)
    assert torch.equal(memory.segment_lengths, expected.segment_lengths)
    assert memory.fingerprint == expected.fingerprint


def files(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# ------------------------------------------------------------------------------------------------ what is written


def test_each_memory_is_what_write_makes_of_its_context_alone(model, source, tmp_path):
    facts = write_dataset(model, load_source(source), tmp_path / "store", write_steps=3, **OPTIONS)
    assert (facts["num_rows"], facts["num_shards"], facts["written"]) == (7, 4, 7)
    shards = [f"data/train-0000{index}-of-00004.parquet" for index in range(4)]
    assert files(tmp_path / "store") == ["README.md", *shards, "memories.json"]
    store = MemoryStore.from_pretrained(tmp_path / "store")
    assert (len(store), store.ids) == (7, IDS)
    for name, context in zip(IDS, CONTEXTS, strict=True):
        assert_same(store[name], model.write([context], write_steps=3, measure_final_loss=True))
    two = store[["id5", "id1"]]
    assert_same(two[0], store["id5"].cat([store["id5"], store["id1"]])[0])
    assert torch.equal(two.num_context_tokens, torch.tensor([1, 12]))
    row = store.dataset[1]
    assert (row["segment_lengths"], row["num_context_tokens"]) == ([3, 5, 4], 12)


def test_samples_that_stopped_keep_their_missing_losses(model, tmp_path):
    losses = model.write(["thequickbrown", "z"], write_steps=2).write_losses
    tolerance = float(losses[:, 0].mean())  # one of them is below it from the start
    write_dataset(
        model,
        Dataset.from_dict({"context": ["thequickbrown", "z"]}),
        tmp_path / "store",
        tolerance=tolerance,
        write_steps=2,
    )
    store = MemoryStore.from_pretrained(tmp_path / "store")
    both = store[["0", "1"]]
    expected = model.write(["thequickbrown", "z"], tolerance=tolerance, write_steps=2, measure_final_loss=True)
    assert both.write_losses.isnan().any()
    assert_same(both, GradMemMemory.cat([expected]))


def test_memories_of_a_double_precision_base_keep_their_precision(tmp_path):
    base = nameless_base(dtype=torch.float64)
    model = get_gradmem_model(base, GradMemConfig(num_memory_tokens=2), tokenizer=small_tokenizer())
    write_dataset(model, Dataset.from_dict({"context": ["abc"]}), tmp_path / "store")
    embeddings = MemoryStore.from_pretrained(tmp_path / "store")["0"].embeddings
    assert torch.equal(embeddings, model.write("abc").embeddings)
    assert embeddings.dtype == torch.float64


@pytest.mark.parametrize("letters", ["small", "capitals"])
@pytest.mark.parametrize("extension", ["csv", "parquet", "jsonl"])
def test_ids_and_contexts_come_from_any_column_of_any_kind_of_file(model, tmp_path, extension, letters):
    rows = Dataset.from_dict({"number": [30, 10, 20], "text": ["abc", "defg", "h"], "other": [1.0, 2.0, 3.0]})
    path = tmp_path / f"rows.{extension}"
    {"csv": rows.to_csv, "parquet": rows.to_parquet, "jsonl": rows.to_json}[extension](path)
    if letters == "capitals":
        path = path.rename(path.with_suffix(path.suffix.upper()))
    loaded = load_source(str(path))
    write_dataset(model, loaded, tmp_path / "named", context_column="text", id_column="number")
    write_dataset(model, loaded, tmp_path / "numbered", context_column="text")
    named, numbered = (MemoryStore.from_pretrained(tmp_path / name) for name in ("named", "numbered"))
    assert (named.ids, numbered.ids) == (["30", "10", "20"], ["0", "1", "2"])
    assert_same(named["10"], numbered["1"])


# ------------------------------------------------------------------------------------------------ interruptions


def test_a_csv_file_is_read_as_it_stands_and_ids_that_were_taken_for_dates_are_refused(model, tmp_path):
    path, store = tmp_path / "rows.csv", tmp_path / "store"
    path.write_text("id,context\n007,NA\n1.10,abc\n2024-01-01,None\n", encoding="utf-8-sig")
    write_dataset(model, load_source(str(path)), store)
    assert MemoryStore.from_pretrained(store).ids == ["007", "1.10", "2024-01-01"]
    dates = Dataset.from_dict({"id": [datetime.date(2024, 1, 1)], "context": ["abc"]})
    with pytest.raises(ValueError, match="'id' were read as dates"):
        write_dataset(model, dates, tmp_path / "other")


@pytest.mark.parametrize("kind", ["lines", "lines in .json", "list"])
def test_json_is_read_as_it_stands_whatever_other_rows_hold(model, tmp_path, kind):
    path, store = tmp_path / ("rows.jsonl" if kind == "lines" else "rows.json"), tmp_path / "store"
    ids = ['"007"', "8", "2.50", "12345678901234567890123", '"2024-01-01"', '"\u2028"']
    contexts = ['"abc"', '["de", "f"]', '"g"', '["h"]', '"2024-01-01"', '"i"']
    lines = [f'{{"id": {name}, "context": {context}}}' for name, context in zip(ids, contexts, strict=True)]
    more = '{"other": {"x": [1]}, "id": "z", "segments": ["j", "k"]}'
    lines.append(more)
    text = f"[{', '.join(lines)}]\n" if kind == "list" else "\r\n\n".join(lines)
    path.write_bytes(text.encode("utf-8-sig"))
    write_dataset(model, load_source(str(path)), store, shard_size=3)
    opened = MemoryStore.from_pretrained(store)
    assert opened.ids == ["007", "8", "2.50", "12345678901234567890123", "2024-01-01", "\u2028", "z"]
    assert_same(opened["8"], model.write([["de", "f"]], measure_final_loss=True))
    assert_same(opened["z"], model.write([["j", "k"]], measure_final_loss=True))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"context": "a', r"line 3 of .*rows\.jsonl is not JSON in UTF-8"),
        ('["a"]', r"line 3 of .*rows\.jsonl must be an object with a context"),
        ('{"id": "\\ud800", "context": "a"}', r"line 3 of .* is not JSON in UTF-8 .*surrogates"),
        ('{"id": true, "context": "a"}', "id of row 1 must be a text or a number, got True"),
        ('{"id": 2, "context": 7.5}', "Row 1 .id '2'. has no context"),
        ('{"id": "", "context": "a"}', "Row 1 has no id: column 'id' is empty there"),
        ('{"id": 2, "context": " \\n"}', "Row 1 .id '2'. has a context that is blank, or a blank segment in it"),
        ('{"id": 2, "context": ["a", ""]}', "Row 1 .id '2'. has a context that is blank, or a blank segment in it"),
    ],
)
def test_a_line_that_holds_no_row_is_named(model, tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_text('{"id": 1, "context": "a"}\n\n' + line, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        write_dataset(model, load_source(str(tmp_path / "rows.jsonl")), tmp_path / "store")


@pytest.mark.parametrize("text", ['[{"context": "a"}', '[{"context": "a"}, 3]'])
def test_a_file_that_is_no_list_of_objects_is_named(tmp_path, text):
    (tmp_path / "rows.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.json (is not JSON in UTF-8 .*|must hold )a list of objects"):
        load_source(str(tmp_path / "rows.json"))


def test_a_csv_file_may_have_columns_without_a_name_and_long_texts_and_no_more_fields_than_its_header(tmp_path):
    path, text = tmp_path / "rows.csv", "a, b\n" * 50_000
    pandas.DataFrame({"context": ["first, second", text]}).to_csv(path)
    assert load_source(str(path))[:] == {"Unnamed: 0": ["0", "1"], "context": ["first, second", text]}
    path.write_text('\nid,context\n1,"first, second"\n\n2,first, second\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.csv cannot be read as csv: line 5 has 3 fields, and the header 2"):
        load_source(str(path))


def test_a_header_that_names_a_column_twice_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("id,context,context\n1,a,b\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.csv cannot be read as csv: the header names 'context' more than once"):
        load_source(str(tmp_path / "rows.csv"))


@pytest.mark.parametrize("name", [b"a", datetime.timedelta(days=1), float("nan")], ids=str)
def test_an_id_is_a_text_or_a_number(name, model, tmp_path):
    rows = Dataset.from_dict({"id": [name], "context": ["abc"]})
    with pytest.raises(ValueError, match="The id of row 0 must be a text or a number"):
        write_dataset(model, rows, tmp_path / "store")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", ""), ("b.csv", "id,context\n"), ("a.jsonl", ""), ("b.jsonl", "\n\n"), ("a.json", "[]")],
)
def test_a_file_without_rows_is_said_to_have_none(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{name} has no rows: there is nothing to write"):
        load_source(str(tmp_path / name))


def test_brackets_in_a_path_are_no_pattern(model, tmp_path):
    for name, context in (("n1", "abc"), ("n[12]", "def")):
        source = tmp_path / f"{name}.jsonl"
        source.write_text(json.dumps({"id": name, "context": context}), encoding="utf-8")
        write_dataset(model, load_source(str(source)), tmp_path / name)
    assert MemoryStore.from_pretrained(tmp_path / "n[12]").ids == ["n[12]"]


def test_what_a_killed_append_left_does_not_stop_the_next_run(model, source, tmp_path):
    write_dataset(model, load_source(source), tmp_path / "store")
    left = tmp_path / "store" / "data" / ".append-9"
    left.mkdir()
    (left / "part.parquet").touch()
    write_dataset(model, load_source(source), tmp_path / "store")
    assert not left.exists()


def test_an_interrupted_run_goes_on_where_it_stopped(model, source, tmp_path, monkeypatch):
    write, calls = GradientWriter.write, []

    def fails_in_the_third_shard(self, rows, memory, descent):
        calls.append(len(memory))
        if len(calls) == 3:  # a shard is one batch
            raise KeyboardInterrupt
        return write(self, rows, memory, descent)

    monkeypatch.setattr(GradientWriter, "write", fails_in_the_third_shard)
    rows, store = load_source(source), tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        write_dataset(model, rows, store, **OPTIONS)
    done = files(store)
    assert len(done) == 4  # two shards, facts and card; nothing half-written
    with pytest.raises(ValueError, match=r"not finished: 2 of 4 .* train-00002-of-00004"):
        MemoryStore.from_pretrained(store)
    before = {name: (store / name).stat().st_mtime_ns for name in done}
    assert write_dataset(model, rows, store, shard_size=2, batch_size=8)["written"] == 3
    assert {name: (store / name).stat().st_mtime_ns for name in done} == before
    assert write_dataset(model, rows, store, **OPTIONS)["written"] == 0
    assert MemoryStore.from_pretrained(store).ids == IDS


def test_a_file_that_is_not_whole_is_named_before_a_run_goes_on(model, source, tmp_path):
    rows, store = load_source(source), tmp_path / "store"
    write_dataset(model, rows, store, **OPTIONS)
    shard = store / "data" / "train-00001-of-00004.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=rf"{shard} is not a readable Parquet file .* delete it and give the command"):
        write_dataset(model, rows, store, **OPTIONS)
    shard.write_bytes((store / "data" / "train-00003-of-00004.parquet").read_bytes())
    with pytest.raises(ValueError, match=rf"{shard} is broken: it has 1 rows, where 2 by memories.json"):
        write_dataset(model, rows, store, **OPTIONS)
    shard.unlink()
    assert write_dataset(model, rows, store, **OPTIONS)["written"] == 2


KILLED = """
import os, signal, sys
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM
import hf_gradmem
from hf_gradmem.commands.dataset_rows import load_source
from hf_gradmem.commands.write_dataset import write_dataset

disable_progress_bars()
to_parquet = Dataset.to_parquet

def killed_within_the_third_file(self, path):
    to_parquet(self, path)
    if "train-00002" in path.name:
        os.truncate(path, 100)
        os.kill(os.getpid(), signal.SIGKILL)

Dataset.to_parquet = killed_within_the_third_file
model, source, directory = sys.argv[1:]
write_dataset(AutoModelForCausalLM.from_pretrained(model), load_source(source), directory, shard_size=2)
"""


@pytest.mark.skipif(os.name == "nt", reason="sends SIGKILL")
def test_a_killed_run_loses_no_row_and_repeats_none(adapter, model, source, tmp_path):
    store = tmp_path / "store"
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    killed = subprocess.run([sys.executable, "-c", KILLED, adapter, source, str(store)], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len([name for name in files(store) if re.fullmatch(r"data/train-.*\.parquet", name)]) == 2
    assert any(name.startswith("data/.") for name in files(store))
    assert write_dataset(model, load_source(source), store, shard_size=2)["written"] == 3
    assert not any(name.startswith("data/.") for name in files(store))
    opened = MemoryStore.from_pretrained(store)
    assert opened.dataset["id"][:] == IDS
    for name, context in zip(IDS, CONTEXTS, strict=True):
        assert_same(opened[name], model.write([context], measure_final_loss=True))


def test_a_store_that_stopped_between_facts_and_card_gets_its_card(model, tmp_path):
    rows, store = Dataset.from_dict({"context": ["abc"]}), tmp_path / "store"
    write_dataset(model, rows, store)
    card = (store / "README.md").read_bytes()
    (store / "README.md").unlink()
    assert write_dataset(model, rows, store)["written"] == 0
    assert (store / "README.md").read_bytes() == card
    (store / "README.md").write_text("My own.\n", encoding="utf-8")
    write_dataset(model, rows, store)
    assert (store / "README.md").read_text(encoding="utf-8") == "My own.\n"


HOLDING = """
import sys
from hf_gradmem.files import only_writer

with only_writer(sys.argv[1], wait=False):
    print("holding", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(os.name == "nt", reason="directories have no locks")
@pytest.mark.parametrize("begun", [False, True])
def test_a_second_writer_of_a_store_is_refused_until_the_first_is_gone(model, tmp_path, begun):
    rows, store = Dataset.from_dict({"context": ["abc", "de"]}), tmp_path / "store"
    store.mkdir()
    if begun:
        write_dataset(model, rows, store, shard_size=1)
        (store / "data" / "train-00001-of-00002.parquet").unlink()
    before = files(store)
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(store)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout.readline() == "holding\n"
        with pytest.raises(BlockingIOError, match=rf"{store} is being written to by another process\. Wait"):
            write_dataset(model, rows, store, shard_size=1)
    finally:
        first.kill()
        first.communicate()
    assert files(store) == before
    assert write_dataset(model, rows, store, shard_size=1)["written"] == (1 if begun else 2)


@pytest.mark.slow
def test_processes_share_the_shards(adapter, model, source, tmp_path):
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = ["-m", "hf_gradmem_cli", "write-dataset", source, "--model", adapter, "--out", str(tmp_path / "store")]
    options = ["--shard-size", "2", "--json"]
    done = subprocess.run([*launch, *command, *options], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["written"] == 4  # of the main process: its two of four shards
    store = MemoryStore.from_pretrained(tmp_path / "store")
    assert store.dataset["id"][:] == IDS
    for name, context in zip(IDS, CONTEXTS, strict=True):
        assert_same(store[name], model.write([context], measure_final_loss=True))


# ------------------------------------------------------------------------------------------------ refusals


def test_a_directory_of_another_run_is_refused_by_what_differs(model, tmp_path):
    rows, store = Dataset.from_dict({"context": ["abc", "de"]}), tmp_path / "store"
    write_dataset(model, rows, store, model_name="here", source_name="there")
    assert write_dataset(model, rows, store, model_name="elsewhere", batch_size=1)["written"] == 0
    with pytest.raises(ValueError, match=r"shard_size was 1000 and is 1"):
        write_dataset(model, rows, store, shard_size=1)
    with pytest.raises(ValueError, match=r"write\.write_steps was None and is 5"):
        write_dataset(model, rows, store, write_steps=5)
    with pytest.raises(ValueError, match=r"source\.sha256 was"):
        write_dataset(model, Dataset.from_dict({"context": ["abc", "df"]}), store)
    with torch.no_grad():
        model.memory_init.add_(1)
    with pytest.raises(ValueError, match=r"begun by another run: fingerprint was"):
        write_dataset(model, rows, store)


def test_a_store_that_was_put_together_is_not_written_into(model, tmp_path):
    for name in ("a", "b"):
        write_dataset(model, Dataset.from_dict({"context": [name], "id": [name]}), tmp_path / name)
    MemoryStore.merge([MemoryStore.from_pretrained(tmp_path / name) for name in ("a", "b")], tmp_path / "both")
    with pytest.raises(ValueError, match="both was put together of several stores"):
        write_dataset(model, Dataset.from_dict({"context": ["c"]}), tmp_path / "both")


def test_what_is_of_training_alone_may_differ_from_the_run_that_began_a_store(tmp_path):
    rows = Dataset.from_dict({"context": ["abc"]})

    def model(**options):
        torch.manual_seed(0)
        config = GradMemConfig(num_memory_tokens=2, write_steps=1, **options)
        return get_gradmem_model(nameless_base(), config, tokenizer=small_tokenizer())

    write_dataset(model(), rows, tmp_path / "store")
    for options in (
        {"distillation_loss_weight": 0.5, "reconstruction_loss_weight": 0.0},
        {"meta_gradient": "finite_difference", "meta_gradient_radius": 0.01},
        {"checkpoint_write_steps": False, "meta_gradient_steps": 1},
    ):
        assert write_dataset(model(**options), rows, tmp_path / "store")["written"] == 0
    with pytest.raises(ValueError, match=r"begun by another run: write\.config\.write_learning_rate was"):
        write_dataset(model(write_learning_rate=0.5), rows, tmp_path / "store")


def test_a_store_that_was_begun_before_there_was_an_option_has_it_by_default(tmp_path):
    config = GradMemConfig(num_memory_tokens=2, write_steps=1)
    model = get_gradmem_model(nameless_base(), config, tokenizer=small_tokenizer())
    rows, store = Dataset.from_dict({"context": ["abc"]}), tmp_path / "store"
    write_dataset(model, rows, store)
    facts = json.loads((store / "memories.json").read_text(encoding="utf-8"))
    del facts["write"]["config"]["write_loss_reduction"]
    (store / "memories.json").write_text(json.dumps(facts), encoding="utf-8")
    assert write_dataset(model, rows, store)["written"] == 0
    model.config.write_loss_reduction = "sum"
    with pytest.raises(ValueError, match=r"write\.config\.write_loss_reduction was mean and is sum"):
        write_dataset(model, rows, store)


def test_learned_step_sizes_are_those_of_the_whole_store(tmp_path):
    config = GradMemConfig(num_memory_tokens=2, learn_write_learning_rate="per_step")
    model = get_gradmem_model(nameless_base(), config, tokenizer=small_tokenizer())
    rows, store = Dataset.from_dict({"context": ["abc", "de"]}), tmp_path / "store"
    write_dataset(model, rows, store)
    with torch.no_grad():
        model.write_log_learning_rate.add_(1)  # not part of the fingerprint
    with pytest.raises(ValueError, match=r"begun by another run: write\.learned_step_sizes was"):
        write_dataset(model, rows, store)


def test_a_reader_with_a_lora_of_its_own_reads_the_store_and_goes_on_with_it(adapter, model, tmp_path):
    rows, store = Dataset.from_dict({"context": ["abc", "de"]}), tmp_path / "store"
    write_dataset(model, rows, store)
    config = GradMemConfig(
        num_memory_tokens=3, write_segment_length=6, read_lora={"r": 2, "target_modules": ["q_proj"]}
    )
    base = AutoModelForCausalLM.from_pretrained(model.config.base_model_name_or_path)
    reader = get_gradmem_model(base, config, tokenizer=small_tokenizer())
    with torch.no_grad():
        reader.memory_init.copy_(model.memory_init)
    assert write_dataset(reader, rows, store)["written"] == 0
    reader(input_ids=torch.tensor([[5, 6], [7, 8]]), memory=MemoryStore.from_pretrained(store)[["0", "1"]])


def test_no_file_of_a_store_holds_a_local_path(model, tmp_path):
    write_dataset(model, Dataset.from_dict({"context": ["abc"]}), tmp_path / "store", model_name="adapter")
    facts, card = (tmp_path / "store" / "memories.json").read_text(), (tmp_path / "store" / "README.md").read_text()
    assert str(Path(model.config.base_model_name_or_path).parent) not in facts + card
    assert json.loads(facts)["base_name"] == "base"


def test_a_store_of_the_first_version_is_opened_and_read_on_the_readers_word_alone(model, tmp_path):
    rows, store = Dataset.from_dict({"context": ["abc"]}), tmp_path / "store"
    facts = write_dataset(model, rows, store)
    old = facts | {"format_version": 1, "fingerprint": "/home/me/base@main/32/abc"}
    old.pop("base_name")
    (store / "memories.json").write_text(json.dumps(old), encoding="utf-8")
    memory = MemoryStore.from_pretrained(store)["0"]
    with pytest.raises(ValueError, match="saved by an earlier version"):
        model(input_ids=torch.tensor([[5]]), memory=memory)
    model(input_ids=torch.tensor([[5]]), memory=memory.relabelled(model.fingerprint()))
    with pytest.raises(ValueError, match="format_version was 1 and is 2"):
        write_dataset(model, rows, store)


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"context": ["ab", "cd", "ef"], "id": ["x", "y", "x"]}, {}, r"Rows 0 and 2 have the same id 'x'"),
        ({"context": ["ab", "cd"], "id": ["x", None]}, {}, "Row 1 has no id"),
        ({"context": ["ab", None]}, {}, "Row 1 .id '1'. has no context"),
        ({"context": [1, 2]}, {}, "Row 0 .*neither a text"),
        ({"context": [["ab"], []]}, {}, "Row 1 .*a context that is blank"),
        ({"text": ["ab"]}, {}, "no column 'context'. The columns are text"),
        ({"context": ["ab"]}, {"id_column": "key"}, "no column 'key'"),
        ({"context": []}, {}, "no rows"),
        ({"context": ["ab"]}, {"shard_size": 0}, "shard_size must be at least 1"),
        ({"context": ["ab"]}, {"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_rows_that_cannot_be_written_are_named_before_any_is(model, tmp_path, columns, options, message):
    model.config.write_segment_length = None
    with pytest.raises(ValueError, match=message):
        write_dataset(model, Dataset.from_dict(columns), tmp_path / "store", **options)
    assert not (tmp_path / "store").exists()


def test_a_directory_or_source_of_something_else_is_refused(model, tmp_path):
    rows = Dataset.from_dict({"context": ["abc"]})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="not empty"):
        write_dataset(model, rows, tmp_path / "full")
    with pytest.raises(NotADirectoryError, match=r"thesis\.txt"):
        write_dataset(model, rows, tmp_path / "full" / "thesis.txt")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        load_source("nowhere.jsonl")
    with pytest.raises(ValueError, match=r"thesis\.txt is none of \.jsonl"):
        load_source(str(tmp_path / "full" / "thesis.txt"))
    (tmp_path / "broken.jsonl").write_text('{"context": ', encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 1 of .*broken\.jsonl is not JSON"):
        load_source(str(tmp_path / "broken.jsonl"))


# ------------------------------------------------------------------------------------------------ the store


def test_what_is_not_in_a_store_is_said(model, tmp_path):
    write_dataset(model, Dataset.from_dict({"context": ["abc"], "id": ["only"]}), tmp_path / "store")
    store = MemoryStore.from_pretrained(tmp_path / "store")
    assert "only" in store
    with pytest.raises(KeyError, match=r"'other'.*'only'"):
        store["other"]
    with pytest.raises(KeyError, match="No id"):
        store[[]]
    with pytest.raises(FileNotFoundError, match=r"memories\.json is missing"):
        MemoryStore.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no directory"):
        MemoryStore.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "store" / "memories.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="not of format"):
        MemoryStore.from_pretrained(tmp_path / "store")


def test_a_store_that_a_command_opens_for_the_first_time_shows_no_bar(tmp_path, capsys):
    store = save_store(tmp_path / "store")
    datasets.enable_progress_bars()
    try:
        assert len(load_store(str(store))) == 3
    finally:
        datasets.disable_progress_bars()
    assert capsys.readouterr().err == ""


def test_any_reader_of_data_sets_can_read_a_store(model, tmp_path):
    write_dataset(model, Dataset.from_dict({"context": ["abc", "de"]}), tmp_path / "store")
    assert DatasetCard.load(tmp_path / "store" / "README.md").data.tags == ["gradmem"]
    read = datasets.load_dataset(str(tmp_path / "store"), split="train")
    assert read["id"][:] == ["0", "1"]
    torch.testing.assert_close(torch.tensor(read[0]["embeddings"])[None], model.write("abc").embeddings)


def test_a_store_goes_to_the_hub_as_a_data_set_and_comes_back(model, tmp_path, monkeypatch):
    rows = Dataset.from_dict({"context": ["abc", "de", "f"]})
    write_dataset(model, rows, tmp_path / "store", shard_size=2, model_name="me/adapter")
    (tmp_path / "store" / "notes.txt").write_text("not to be shared", encoding="utf-8")
    store = MemoryStore.from_pretrained(tmp_path / "store")
    with running_hub() as hub:
        use_hub(monkeypatch, hub, tmp_path / "home")
        monkeypatch.setattr(hub_server, "_ROUTES", [*hub_server._ROUTES, *map(of_data_sets, hub_server._ROUTES)])
        store.push_to_hub("me/memories", private=True)
        assert sorted(hub.repos["me/memories"].files) == [
            "README.md",
            "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet",
            "memories.json",
        ]
        assert hub.repos["me/memories"].private
        write_dataset(model, rows, tmp_path / "in one", model_name="me/adapter")
        (pushed,) = push(tmp_path / "in one", "me/memories")
        assert pushed.repo_id == "me/memories"
        assert sorted(hub.repos["me/memories"].files)[1:-1] == ["data/train-00000-of-00001.parquet"]
        card = hub.repos["me/memories"].files["README.md"].decode()
        edited = b"# My own words"
        HfApi().upload_file(
            path_or_fileobj=edited, path_in_repo="README.md", repo_id="me/memories", repo_type="dataset"
        )
        store.push_to_hub("me/memories")
        assert hub.repos["me/memories"].files["README.md"] == edited
        (tmp_path / "store" / "README.md").write_text("# Words of the folder", encoding="utf-8")
        store.push_to_hub("me/memories")
        assert hub.repos["me/memories"].files["README.md"] == b"# Words of the folder"
        namespace: dict = {}
        exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], namespace)  # as a visitor of the Hub runs it
        assert_same(namespace["memory"], store["0"])
        fetched = MemoryStore.from_pretrained("me/memories")
        assert fetched.ids == store.ids
        assert_same(fetched[["2", "0"]], store[["2", "0"]])
        with pytest.raises(ValueError, match="opened from the Hub"):
            fetched.push_to_hub("me/again")
        with pytest.raises(OSError, match="me/nothing"):
            MemoryStore.from_pretrained("me/nothing")
        with pytest.raises(OSError, match=f"no revision 'v9': see {hub.endpoint}/datasets/me/memories/tree/main"):
            MemoryStore.from_pretrained("me/memories", revision="v9")


def of_data_sets(route):
    methods, pattern, answer = route
    pattern = pattern.replace("/api/models/", "/api/datasets/")
    if pattern.startswith("/(?P<repo>"):
        pattern = "/datasets" + pattern
    return methods, pattern, answer


# ------------------------------------------------------------------------------------------------ the command line


def test_the_commands_write_and_ask(adapter, model, source, tmp_path):
    store = tmp_path / "store"
    written = run(
        "write-dataset", source, "--model", adapter, "--out", store, "--shard-size", 3, "--steps", 3, "--json"
    )
    assert written.exit_code == 0, written.stderr
    facts = json.loads(written.stdout)
    assert (facts["written"], facts["source"]["name"], facts["model"]) == (7, "contexts.jsonl", "adapter")
    assert written.stderr == ""
    again = run("write-dataset", source, "--model", adapter, "--out", store, "--shard-size", 3, "--steps", 3)
    assert "7 in 3 files" in again.stdout
    asked = ["ask", "fox", "--model", adapter, "--max-new-tokens", 5, "--json"]
    answer = run(*asked, "--memories", store, "--id", "id3")
    assert answer.exit_code == 0, answer.stderr
    model.write("lazydog", write_steps=3).save_pretrained(tmp_path / "memory")
    alone = run(*asked, "--memory", tmp_path / "memory")
    assert json.loads(answer.stdout)["answer"] == json.loads(alone.stdout)["answer"]
    for arguments, message in (
        (["--memories", store, "--id", "id9"], "'id9'"),
        (["--memory", tmp_path, "--id", "id3"], "--id goes with"),
        ([], "--memory, or as --memories"),
        (["--memories", tmp_path, "--id", "x"], "memories.json is missing"),
    ):
        refused = run(*asked, *arguments)
        assert refused.exit_code == 2
        assert message in refused.stderr
        assert refused.stderr.count("\n") == 1
    refused = run("write-dataset", source, "--model", adapter, "--out", store, "--shard-size", 2)
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "begun by another run" in refused.stderr


def test_the_command_writes_a_folder_names_what_it_skips_and_says_what_it_cut(adapter, tmp_path):
    notes, store = tmp_path / "notes", tmp_path / "store"
    notes.mkdir()
    (notes / "short.txt").write_text("fox", encoding="utf-8")
    (notes / "long.md").write_text("thequickbrown", encoding="utf-8")
    (notes / "picture.txt").write_bytes(b"\xff\xfe\0")
    command = ["write-dataset", notes, "--model", adapter, "--out", store, "--segment-length", 5]
    done = run(*command)
    assert done.exit_code == 0, done.stderr
    assert "Skipped 1 of 3 files: picture.txt" in done.stderr
    assert "4; 1 of 2 contexts in up to 3" in done.stdout
    again = run(*command, "--strict", "--json")
    assert again.exit_code == 1
    facts = json.loads(again.stdout)
    assert (facts["written"], facts["skipped"]) == (0, {"picture.txt": "not text in UTF-8"})
    assert MemoryStore.from_pretrained(store).ids == ["long.md", "short.txt"]


def test_contexts_in_segments_may_have_a_column_of_their_own(model, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"context": "abc"}, {"segments": ["de", "f"]}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    write_dataset(model, load_source(str(path)), tmp_path / "store")
    store = MemoryStore.from_pretrained(tmp_path / "store")
    assert store["1"].segment_lengths.tolist() == [[2, 1]]
    path.write_text('{"context": "abc"}\n{"context": null, "segments": null}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"Row 1 .* column 'context' or 'segments' holds None"):
        write_dataset(model, load_source(str(path)), tmp_path / "empty")
