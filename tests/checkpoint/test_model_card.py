"""The model card: what it says, whether the Hub takes it, and whose text stands."""

import json
import re

import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from hf_gradmem import GradMemConfig, GradMemForCausalLM, get_gradmem_model
from hf_gradmem.base.cache_size import expected_cache_bytes, kv_cache_bytes
from hf_gradmem.checkpoint.model_card import model_card
from hf_gradmem.checkpoint.run_facts import CardFacts, Result, facts_of_directory, published_recipe
from hf_gradmem.commands.push import push
from hf_gradmem.hub.cards import MARK, address_card, is_own_card
from hf_gradmem.tasks import load_task
from hf_gradmem.training.card import ModelCardCallback, fill_model_card, hardware
from hf_gradmem.training.run import build_trainer, run_training
from tests.support.small_models import PLAIN, named_base, small_tokenizer, with_memory
from tests.support.tiny_models import tiny_causal_lm, tiny_config
from tests.support.tiny_training import stock_trainer, tiny_model, tiny_recipe

BASE, ADAPTER = "me/base", "me/adapter"
OWN = "---\ntags:\n- mine\n---\n# My own words\n"

SMALL_GEMMA = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


@pytest.fixture
def base(hub):
    tiny_causal_lm("llama", torch.float32).push_to_hub(BASE)
    small_tokenizer().push_to_hub(BASE)
    return AutoModelForCausalLM.from_pretrained(BASE)


def card_of(hub, repo_id=ADAPTER) -> ModelCard:
    card = ModelCard(hub.repos[repo_id].files["README.md"].decode())
    card.validate()
    return card


def code_of(card: ModelCard) -> str:
    return re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]


def test_card_of_a_push_has_what_the_hub_shows_and_passes_its_check(hub, base):
    get_gradmem_model(base, GradMemConfig(num_memory_tokens=3, num_control_tokens=2)).push_to_hub(ADAPTER)
    data = card_of(hub).data
    assert (data.library_name, data.pipeline_tag, data.base_model) == ("transformers", "text-generation", BASE)
    assert data.base_model_relation == "adapter"
    assert {"gradmem", "arxiv:2603.13875"} <= set(data.tags)


def test_card_weighs_the_memory_against_the_cache(hub, base):
    model = get_gradmem_model(base, GradMemConfig(num_memory_tokens=3, num_control_tokens=2))
    text = model.model_card(ADAPTER).text
    per_token = kv_cache_bytes(model.decoder, 10) // 10
    assert "3 vectors × 32 = 96 floats, 384 bytes" in text
    assert f"{per_token} bytes for each token" in text
    assert f"{384 / per_token:.3g} tokens" in text
    assert "7 positions" in text


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mixtral", "bamba"])
def test_growth_of_the_cache_is_what_the_base_keeps(model_type):
    config = tiny_config(model_type).get_text_config()
    base = tiny_causal_lm(model_type, torch.float32)
    state = torch.random.get_rng_state()
    measured = expected_cache_bytes(config, 12)
    assert torch.equal(torch.random.get_rng_state(), state)  # a save does not change what is drawn after it
    model = get_gradmem_model(base, GradMemConfig(**PLAIN))
    assert measured == kv_cache_bytes(model.decoder, 24) - kv_cache_bytes(model.decoder, 12)


def test_layers_with_a_sliding_window_keep_its_tokens_alone():
    config = Gemma2Config(**SMALL_GEMMA, sliding_window=32)
    model = get_gradmem_model(Gemma2ForCausalLM(config), GradMemConfig(**PLAIN))
    lengths = (8, 31, 40, 60)
    growth = [kv_cache_bytes(model.decoder, length) - kv_cache_bytes(model.decoder, 8) for length in lengths]
    expected = [expected_cache_bytes(config, length) - expected_cache_bytes(config, 8) for length in lengths]
    assert expected == growth
    text = model.model_card(ADAPTER).text
    assert "128 bytes for each token of the context, 64 beyond 31 tokens" in text


def test_cache_that_does_not_grow_or_cannot_be_measured_is_left_out():
    config = GradMemConfig(text_config=tiny_config("mamba"))
    assert expected_cache_bytes(config.text_config, 1) == 0
    assert "KV cache" not in model_card(config, ADAPTER).text


def test_code_of_the_card_runs_as_it_stands(hub, base, monkeypatch, tmp_path, capsys):
    get_gradmem_model(base, GradMemConfig(**PLAIN)).push_to_hub(ADAPTER)
    monkeypatch.chdir(tmp_path)
    exec(code_of(card_of(hub)), {})
    assert (tmp_path / "memory" / "memory.safetensors").is_file()


def test_code_of_the_card_asks_as_the_reader_is_asked(hub, base, monkeypatch, tmp_path, capsys):
    """In the words of its template, and without a token that begins a text between memory and query."""
    plain = get_gradmem_model(base, GradMemConfig(**PLAIN))
    assert '"The ferry to Trieste", add_special_tokens=False' in code_of(plain.model_card(ADAPTER))
    get_gradmem_model(base, GradMemConfig(**PLAIN, template="recite")).push_to_hub(ADAPTER)
    model = GradMemForCausalLM.from_pretrained(ADAPTER)
    text = "The ferry to Trieste leaves at 06:45 from gate 7."
    (answer,) = model.answer(["When does the ferry to Trieste leave?"], memory=model.write(text))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(code_of(card_of(hub)), {})
    assert capsys.readouterr().out == f"{answer.text}\n"


def test_users_own_card_is_never_written_over(hub, base, tmp_path):
    model = with_memory(base, **PLAIN)
    model.save_pretrained(tmp_path)
    assert is_own_card((tmp_path / "README.md").read_text())
    (tmp_path / "README.md").write_text(OWN)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == OWN
    model.push_to_hub(ADAPTER)
    ModelCard(OWN).push_to_hub(ADAPTER)
    model.push_to_hub(ADAPTER, commit_message="again")
    assert hub.repos[ADAPTER].files["README.md"].decode() == OWN


def test_a_card_that_is_not_utf_8_is_the_users_own_and_the_model_is_saved(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "README.md").write_bytes("Résumé".encode("latin-1"))
    with_memory(named_base(tmp_path / "base"), **PLAIN).save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "README.md").read_bytes() == "Résumé".encode("latin-1")
    assert (tmp_path / "adapter" / "model.safetensors").is_file()


def test_a_card_is_addressed_whatever_the_name_of_its_folder(tmp_path):
    for folder in ("my run", "run", "run.v2"):
        card = f"{MARK} your-name/{folder} or, where it was saved, your-name/before"
        assert address_card(card, ADAPTER, tmp_path / folder) == f"{MARK} {ADAPTER} or, where it was saved, {ADAPTER}"
    assert address_card("your-name/run your-name/run-2", ADAPTER, tmp_path / "run") == f"{ADAPTER} your-name/run-2"


def test_a_card_that_is_not_utf_8_which_the_hub_does_not_take_is_named_before_anything_is_pushed(hub, base, tmp_path):
    with_memory(base, **PLAIN).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_bytes("Résumé".encode("latin-1"))
    with pytest.raises(ValueError, match=r"README.md is not UTF-8 text"):
        push(tmp_path / "adapter", ADAPTER)
    assert ADAPTER not in hub.repos


def test_card_is_brought_up_to_date_at_the_next_save(tmp_path):
    model = with_memory(named_base(tmp_path / "base"), **PLAIN)
    model.save_pretrained(tmp_path / "adapter")
    model.card_facts = CardFacts({"seed": 7}, results=[Result("babi", "qa1", {"exact_match": 0.5, "answer_loss": 1.0})])
    model.save_pretrained(tmp_path / "adapter")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert "- seed: 7" in card.text
    assert "| qa1 (validation) | 2 | 0.5000 | 1.0000 |" in card.text
    (result,) = card.data.eval_results  # losses are in the table alone
    assert (result.dataset_type, result.dataset_config, result.metric_type) == ("unknown", "qa1", "exact_match")
    assert result.metric_args == {"write_steps": 2}
    assert card.data.base_model is None  # a directory is nothing to others


@pytest.mark.parametrize(("reduction", "told"), [("mean", "loss"), ("sum", "loss, the sum over its tokens")])
def test_card_says_what_a_step_descends_on(reduction, told):
    config = GradMemConfig(num_memory_tokens=3, write_steps=2, write_loss_reduction=reduction)
    card = get_gradmem_model(tiny_causal_lm("llama"), config).model_card(ADAPTER)
    assert f"2 steps of gradient descent on its reconstruction {told}, with the weights frozen" in card.text


def test_card_of_a_writer_that_takes_no_step_tells_of_none():
    model = with_memory(tiny_causal_lm("llama", torch.float32), writer="pooled")
    facts = CardFacts({}, results=[Result("babi", "qa1", {"exact_match": 0.5})])
    text = model_card(model.config, "me/pooled", facts).text
    assert "by the means of its embeddings, without a step" in text
    assert "| qa1 (validation) | 0 | 0.5000 |" in text
    assert "backward pass" not in text


def test_trainer_that_pushes_writes_this_card_and_an_adapter_that_loads(hub, base, tmp_path):
    rows = load_task("kv_retrieval", num_contexts=6, num_pairs=2, key_length=1, value_length=1)
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 1, "eval_strategy": "steps"}
    settings |= {"eval_steps": 1, "push_to_hub": True, "hub_model_id": ADAPTER, "seed": 3}
    trainer = stock_trainer(tmp_path / "run", tiny_model(), rows, **settings)
    fill_model_card(trainer, task="kv_retrieval")
    trainer.train()
    trainer.push_to_hub(license="apache-2.0", dataset_tags="me/pairs", finetuned_from=BASE)
    card = card_of(hub)
    assert is_own_card(str(card))
    for fact in ("outer steps: 2", "seed: 3", "hardware: 1 × CPU", "contexts in each step: 2", "task: kv_retrieval"):
        assert f"- {fact}" in card.text
    assert (card.data.license, card.data.datasets) == ("apache-2.0", "me/pairs")
    assert {result.metric_type for result in card.data.eval_results} == {"exact_match", "token_accuracy"}
    assert rows[0]["queries"][0] in code_of(card)
    assert "modeling_gradmem_hub.py" in hub.repos[ADAPTER].files
    loaded = GradMemForCausalLM.from_pretrained(ADAPTER)
    assert torch.equal(loaded.memory_init, trainer.model.memory_init)


def test_a_model_that_was_evaluated_alone_claims_no_training(tmp_path):
    rows = load_task("kv_retrieval", num_contexts=2, num_pairs=2, key_length=1, value_length=1)
    trainer = stock_trainer(tmp_path, tiny_model(), rows)
    fill_model_card(trainer, task="kv_retrieval")
    trainer.evaluate()
    text = trainer.model.model_card(ADAPTER).text
    assert "No record of the training was kept" in text
    assert "outer steps" not in text
    assert "| evaluation set (validation; generated by kv_retrieval) | 2 |" in text
    assert json.dumps(rows[0]["queries"][0]) in text


def test_a_card_names_what_was_computed_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    assert hardware(1, torch.device("cpu")).startswith("1 × CPU")
    assert hardware(2, torch.device("cuda")) == "2 × a GPU"


def test_stock_trainer_alone_pushes_an_adapter_that_loads(hub, base, tmp_path):
    trainer = stock_trainer(tmp_path / "run", tiny_model(), push_to_hub=True, hub_model_id=ADAPTER)
    trainer.push_to_hub()
    card_of(hub)
    assert GradMemForCausalLM.from_pretrained(ADAPTER).config.num_memory_tokens == 2


def test_training_from_a_recipe_leaves_a_card_with_recipe_and_results_and_pushes_it(hub, tmp_path):
    changes = {"eval_sets": {"n2": {"num_contexts": 4, "seed": 1}}, "push_to_hub": True, "hub_model_id": ADAPTER}
    recipe = tiny_recipe(tmp_path / "run", stages=[{"steps": 1}], **changes)
    run_training(recipe)
    card = card_of(hub)
    published = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card.text, re.DOTALL)[1])
    here = {"output_dir", "push_to_hub", "hub_model_id"}
    assert published == {key: value for key, value in recipe.values.items() if key not in here}
    assert {result.dataset_config for result in card.data.eval_results} == {"n2"}
    assert (tmp_path / "run" / "README.md").read_text() == str(card)
    assert f'from_pretrained("{ADAPTER}")' in code_of(card)
    assert re.search(r'write\(\[\["!', code_of(card))  # an example of the task, in its segments


def test_a_token_in_a_recipe_is_refused_since_recipes_are_pushed(tmp_path):
    with pytest.raises(ValueError, match="Set HF_TOKEN"):
        tiny_recipe(tmp_path, hub_token="hf_secret")


def test_facts_are_read_from_the_files_of_a_run_or_an_evaluation(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    recipe = {"task": "babi", "seed": 1, "stages": [{"steps": 3}, {"steps": 4}]}
    recipe["eval_sets"] = {"qa1": {"split": "train"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "results.json").write_text(json.dumps({"steps": 5, "metrics": {"eval_qa1_exact_match": 0.25}}))
    facts = facts_of_directory(folder)
    assert facts.training == {"task": "babi", "outer steps": 5, "seed": 1}
    assert facts.results == [Result("babi", "qa1", {"exact_match": 0.25}, "train")]
    record = {"model": "adapters/mine", "set": "qa2", "context": "memory", "write_steps": 4, "exact_match": 0.5}
    others = [record | {"context": "prompt"}, record | {"model": "adapters/another"}]
    others.append(record | {"set": "qa1", "arguments": {"split": "train"}})
    report = {"task": "babi", "split": "test", "results": [record | {"num_answers": 8, "f1": None}, *others]}
    (folder / "results.json").write_text(json.dumps(report))
    facts = facts_of_directory(folder)
    assert facts.training["outer steps"] == 7
    assert facts.results == [
        Result("babi", "qa2", {"exact_match": 0.5}, "test", 4),
        Result("babi", "qa1", {"exact_match": 0.5}, "train", 4),
    ]
    (folder / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"mine has an unreadable recipe.yaml or results.json"):
        facts_of_directory(folder)


@pytest.mark.parametrize("recipe", ["", "- a\n- b\n", "stages: [1]\n", "eval_sets: [qa1]\n", "a: b: c\n"])
def test_a_recipe_of_another_kind_is_refused(tmp_path, recipe):
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    with pytest.raises(ValueError, match=r"an unreadable recipe.yaml or results.json"):
        facts_of_directory(tmp_path)


@pytest.mark.parametrize("results", [["a"], {"results": ["a"]}, {"results": [{"a": 1}]}, {"metrics": ["a"]}, None])
def test_results_of_another_kind_are_refused(tmp_path, results):
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    with pytest.raises(ValueError, match=r"an unreadable recipe.yaml or results.json"):
        facts_of_directory(tmp_path)


def test_a_recipe_without_anything_cannot_be_published():
    for recipe in ("", "- a\n", "a: b: c\n"):
        with pytest.raises(ValueError, match="recipe"):
            published_recipe(recipe)


PRIVATE = "/home/me/secret/patients.json"
SOURCES = [
    # task, arguments, data set of the model-index: type, name, config, revision; what the table says
    ("squad", {"path": PRIVATE}, ("local-file", "patients.json (dev)", "dev", None), "the local file patients.json"),
    (
        "squad",
        {"path": "C:\\secret\\patients.json"},
        ("local-file", "patients.json (dev)", "dev", None),
        "the local file patients.json",
    ),
    (
        "babi",
        {"hub_name": "facebook/babi_qa", "hub_config": "en-10k-qa1", "hub_revision": "abc"},
        ("facebook/babi_qa", "facebook/babi_qa on the Hub (dev)", "en-10k-qa1", "abc"),
        "facebook/babi_qa on the Hub",
    ),
    (
        "kv_retrieval",
        {"num_pairs": 2},
        ("kv_retrieval", "kv_retrieval (dev)", "dev", None),
        "generated by kv_retrieval",
    ),
    (
        "mixture",
        {"parts": [{"task": "squad", "path": PRIVATE}]},
        ("local-file", "patients.json (dev)", "dev", None),
        "the local file patients.json",
    ),
    (
        "jsonl",
        {"path": [PRIVATE, "/home/me/secret/b.jsonl"]},
        ("local-file", "patients.json, b.jsonl (dev)", "dev", None),
        "the local file patients.json, b.jsonl",
    ),
    (
        "jsonl",
        {"path": {"train": "/home/me/secret/b.jsonl", "validation": PRIVATE}},
        ("local-file", "patients.json (dev)", "dev", None),
        "the local file patients.json",
    ),
    ("mixture", {"parts": [{"task": "facts"}]}, ("facts", "facts (dev)", "dev", None), "generated by facts"),
    ("mixture", {"parts": [{"task": "facts"}, {"task": "babi"}]}, ("unknown", "dev", "dev", None), ""),
    (
        "facts",
        {"task": "babi", "path": "/home/me/secret/qa1.txt"},
        ("local-file", "qa1.txt (dev)", "dev", None),
        "the local file qa1.txt",
    ),
    ("squad", {}, ("unknown", "dev", "dev", None), ""),
    ("my own", {}, ("unknown", "dev", "dev", None), ""),
]


@pytest.mark.parametrize("kind", ["train", "evaluate"])
@pytest.mark.parametrize(("task", "arguments", "expected", "told"), SOURCES, ids=[str(n) for n in range(len(SOURCES))])
def test_results_are_claimed_on_what_the_rows_came_from(tmp_path, kind, task, arguments, expected, told):
    folder = tmp_path / "mine"
    with_memory(named_base(tmp_path / "base"), **PLAIN).save_pretrained(folder)
    own = "task" in arguments  # then nothing of the recipe's counts for the set
    recipe = {"task": task, "task_arguments": {"path": "/home/me/secret/no.txt"} if own else arguments}
    recipe["eval_sets"] = {"dev": arguments if own else {}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    record = {"model": "mine", "set": "dev", "arguments": arguments, "context": "memory", "write_steps": 2}
    results = {
        "train": {"steps": 5, "metrics": {"eval_dev_exact_match": 0.25}},
        "evaluate": {"task": task, "split": "validation", "results": [record | {"exact_match": 0.25}]},
    }
    (folder / "results.json").write_text(json.dumps(results[kind]))
    card = model_card(GradMemConfig.from_pretrained(folder), "me/mine", facts_of_directory(folder))
    (result,) = ModelCard(str(card)).data.eval_results
    found = (result.dataset_type, result.dataset_name, result.dataset_config, result.dataset_revision)
    assert found == expected
    assert f"| dev (validation{'; ' if told else ''}{told}) | 2 | 0.2500 |" in card.text
    assert "secret" not in str(card)


def test_a_recipe_is_published_without_the_folders_of_this_machine():
    recipe = {"base_model": "~/models/base", "memories": "/data/secret/memories", "task_arguments": {"path": PRIVATE}}
    assert yaml.safe_load(published_recipe(yaml.safe_dump(recipe))) == {
        "base_model": "base",
        "memories": "memories",
        "task_arguments": {"path": "patients.json"},
    }
    recipe = {"base_model": "models/secret/base", "adapter": str(PRIVATE), "fsdp_config": PRIVATE, "deepspeed": None}
    named = {"base_model": "base", "adapter": "patients.json", "fsdp_config": "patients.json", "deepspeed": None}
    assert yaml.safe_load(published_recipe(yaml.safe_dump(recipe))) == named
    path = {"train": [PRIVATE, "b.jsonl"], "test": PRIVATE}
    recipe = {"adapter": "/home/me/secret/adapter", "eval_sets": {"dev": {"path": path}}}
    assert yaml.safe_load(published_recipe(yaml.safe_dump(recipe))) == {
        "adapter": "adapter",
        "eval_sets": {"dev": {"path": {"train": ["patients.json", "b.jsonl"], "test": "patients.json"}}},
    }
    on_the_hub = "base_model: someone/base  # a small one\n"
    assert published_recipe(on_the_hub) == on_the_hub
    here = "output_dir: /home/me/secret/run\npush_to_hub: true\n" + on_the_hub + "hub_model_id:\n  me/secret\nseed: 0\n"
    assert published_recipe(here) == on_the_hub + "seed: 0\n"
    assert yaml.safe_load(published_recipe("{output_dir: /home/me/secret/run, seed: 0}")) == {"seed": 0}


def test_a_run_on_a_private_file_claims_no_public_data_set_and_shows_no_path(hub, tmp_path):
    paragraph = "bob stone sees a doctor. He has a cold."
    asked = [{"question": "Who sees a doctor?", "answer": "bob stone"}]
    entries = [{"context": f"{paragraph} {number} days.", "qas": asked} for number in range(4)]
    private = tmp_path / "secret" / "patients.json"
    private.parent.mkdir()
    private.write_text(json.dumps(entries))
    named_base(tmp_path / "base").save_pretrained(tmp_path / "base")
    small_tokenizer().save_pretrained(tmp_path / "base")
    changes = {
        "task": "squad",
        "task_arguments": {"path": str(private), "validation_share": 0.5},
        "base_model": str(tmp_path / "base"),
        "base_config": None,
        "train_base": False,
        "eval_sets": {"dev": {}},
        "stages": [{"steps": 1}],
    }
    changes |= {"push_to_hub": True, "hub_model_id": "me/by-trainer", "save_strategy": "steps", "save_steps": 1}
    run_training(tiny_recipe(tmp_path / "secret" / "run", **changes))
    written = (tmp_path / "secret" / "run" / "README.md").read_text(encoding="utf-8")
    names = {(result.dataset_type, result.dataset_name) for result in ModelCard(written).data.eval_results}
    assert names == {("local-file", "patients.json (dev)")}
    assert "secret" not in written
    assert "bob stone" not in written
    push(tmp_path / "secret" / "run", ADAPTER)
    for name in (ADAPTER, "me/by-trainer"):
        pushed = hub.repos[name].files
        assert yaml.safe_load(pushed["recipe.yaml"])["task_arguments"]["path"] == "patients.json"
        assert b"secret" not in pushed["README.md"] + pushed["recipe.yaml"]
        assert "_recipe.yaml" not in pushed


def test_no_row_of_a_local_file_is_shown_from_within_mixtures(tmp_path):
    row = {"context": "bob stone has a cold.", "question": "Who has a cold?", "answer": "bob stone"}
    (tmp_path / "patients.jsonl").write_text(json.dumps(row), encoding="utf-8")
    private = {"task": "mixture", "parts": [{"task": "jsonl", "path": str(tmp_path / "patients.jsonl")}]}
    facts = {"task": "facts", "num_contexts": 1}
    for parts, shown in (([facts, facts], True), ([private, facts], False)):
        held_out = {"task": "mixture", "split": "test", "parts": parts}
        trainer = build_trainer(tiny_recipe(tmp_path / "run", eval_sets={"mixed": held_out}))
        (card,) = [each for each in trainer.callback_handler.callbacks if isinstance(each, ModelCardCallback)]
        assert (card.example is not None) == shown


@pytest.mark.parametrize(
    ("task", "set_arguments", "shown"),
    [
        ("kv_retrieval", None, True),
        ("squad", {"dev": {"hub_name": "someone/questions"}}, True),
        ("squad", {"dev": {"path": PRIVATE}}, False),
        ("squad", None, False),
        (None, None, False),
    ],
)
def test_a_row_of_a_set_without_a_name_is_shown_where_it_is_known_to_be_public(tmp_path, task, set_arguments, shown):
    text = "bob stone sees a doctor."
    rows = Dataset.from_list([{"context": text, "queries": ["Who?"], "targets": [" bob stone"]}])
    trainer = stock_trainer(tmp_path, tiny_model(), rows)
    assert fill_model_card(trainer, task, set_arguments=set_arguments).example == ((text, "Who?") if shown else None)


def test_the_check_refuses_what_the_hub_would(hub):
    with pytest.raises(ValueError, match="base_model"):
        ModelCard("---\nbase_model: /home/me/base\n---\n").validate()
    with pytest.raises(ValueError, match="license"):
        ModelCard("---\nlicense:\n- mit\n---\n").validate()
