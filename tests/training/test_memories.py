"""READ trained on memories that were written once, and a start that is the mean of what was written from it."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from hf_gradmem import GradMemForCausalLM
from hf_gradmem.hub.client import folder_files
from hf_gradmem.memory.store import MemoryStore
from hf_gradmem.tasks import load_task
from hf_gradmem.training.memories import WrittenRows, check_rows, train_reading_alone
from hf_gradmem.training.recipe import make_recipe
from hf_gradmem.training.run import build_model, build_trainer, run_training
from hf_gradmem.training.start import START_FILE, Start, learn_start
from tests.support.tiny_training import TINY, assert_same_weights, tiny_model, weights

PARTS = [TINY["task_arguments"] | {"task": "kv_retrieval", "num_contexts": 12}]
GRADMEM = {
    "num_memory_tokens": 2,
    "write_steps": 2,
    "write_learning_rate": 0.1,
    "write_optimizer": "adam",
    "meta_gradient": "first_order",
    "read_lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
}
TAUGHT = {"distillation_loss_weight": 0.5, "reconstruction_loss_weight": 0}
FROM_MEMORIES = TINY | {
    "task_arguments": TINY["task_arguments"] | {"num_contexts": 12},
    "eval_sets": {"held_out": {"num_contexts": 3}},
    "train_base": False,
    "gradmem": GRADMEM,
    "stages": [{"steps": 4}],
    "per_device_eval_batch_size": 2,
}


def recipe(directory, **changes):
    values = {"output_dir": str(directory / "run"), "memories": str(directory / "memories")}
    return make_recipe(FROM_MEMORIES | values | changes)


def test_what_read_has_of_its_own_trains_on_memories_and_nothing_else(tmp_path):
    trainer = build_trainer(recipe(tmp_path))
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed
    assert all(".read." in name for name in changed)
    assert trainer.model.card_facts.training["questions in each step"] == 4  # which have a memory each
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 4
    assert all(entry["read_loss"] == pytest.approx(entry["loss"], rel=1e-3) for entry in steps)
    store = MemoryStore.from_pretrained(tmp_path / "memories" / "train")
    assert len(store) == 12
    assert store.fingerprint == trainer.model.fingerprint()  # so the trained reader still reads them


def test_the_loss_on_a_memory_is_that_of_writing_its_context_in_the_loop(tmp_path):
    trainer = build_trainer(recipe(tmp_path))
    rows = [trainer.train_dataset[index] for index in range(4)]
    collator = trainer.data_collator
    batch = collator(rows)
    assert "context_input_ids" not in batch
    stored = trainer.model(**batch)
    in_the_loop = trainer.model(**collator([{n: v for n, v in row.items() if n != "memory"} for row in rows]))
    torch.testing.assert_close(stored.loss, in_the_loop.read_loss)
    torch.testing.assert_close(stored.memory.embeddings, in_the_loop.memory.embeddings)
    assert stored.write_losses is None


def test_contexts_come_beside_their_memories_for_a_teacher(tmp_path):
    trainer = build_trainer(recipe(tmp_path, gradmem=FROM_MEMORIES["gradmem"] | TAUGHT))
    rows = [trainer.train_dataset[index] for index in range(4)]
    batch = trainer.data_collator(rows)
    taught = trainer.model(**batch)
    in_the_loop = trainer.model(**{name: value for name, value in batch.items() if name != "memory"})
    assert taught.loss > taught.read_loss
    torch.testing.assert_close(taught.loss, in_the_loop.loss)
    trainer.train()


def test_a_context_that_leaves_a_teacher_no_room_for_the_question_is_refused():
    model = tiny_model(**GRADMEM, distillation_loss_weight=0.5)
    window = model.decoder.window
    rows = Dataset.from_list([{"context": ["a" * window], "queries": ["b"], "targets": ["c"]}])
    with pytest.raises(ValueError, match=rf"needs {window + 3} positions with its memory or its context"):
        check_rows(model, rows, "mine")
    check_rows(model, rows, "mine", longest_context=window - 3)
    model.config.distillation_loss_weight = 0.0
    check_rows(model, rows, "mine")


def test_a_batch_has_memories_throughout_or_contexts_throughout(tmp_path):
    trainer = build_trainer(recipe(tmp_path))
    with_memory = trainer.train_dataset[0]
    without = {name: value for name, value in with_memory.items() if name != "memory"}
    with pytest.raises(ValueError, match="Of the 2 rows of a batch, 1 have a memory"):
        trainer.data_collator([with_memory, without])


def test_every_question_is_an_item_with_the_memory_of_its_context(tmp_path):
    trainer = build_trainer(recipe(tmp_path))
    rows = load_task("kv_retrieval", **FROM_MEMORIES["task_arguments"])
    asked = [(row["context"], query) for row in rows for query in row["queries"]]
    store = trainer.train_dataset.store
    assert len(trainer.train_dataset) == len(asked) == 24
    for index in (0, 1, 23):
        item = trainer.train_dataset[index]
        assert (item["context"], item["queries"][0]) == asked[index]
        assert torch.equal(item["memory"].embeddings, store[str(index // 2)].embeddings)


def test_a_run_and_its_evaluation_go_from_stored_memories_and_are_repeatable(tmp_path):
    first = run_training(recipe(tmp_path))
    files = sorted((tmp_path / "memories").glob("*/data/*.parquet"))
    times = [file.stat().st_mtime_ns for file in files]
    assert len(files) == 2
    again = run_training(recipe(tmp_path, output_dir=str(tmp_path / "again")))
    assert [file.stat().st_mtime_ns for file in files] == times  # nothing was written twice
    assert again["metrics"]["eval_held_out_loss"] == first["metrics"]["eval_held_out_loss"]
    model = GradMemForCausalLM.from_pretrained(tmp_path / "run")
    assert model.fingerprint() == MemoryStore.from_pretrained(tmp_path / "memories" / "train").fingerprint


def test_memories_of_another_writer_or_of_other_rows_are_refused_before_training(tmp_path):
    build_trainer(recipe(tmp_path))
    with pytest.raises(ValueError, match=r"begun by another run: fingerprint was"):
        build_trainer(recipe(tmp_path, seed=1))
    with pytest.raises(ValueError, match=r"begun by another run: .*source\.sha256 was"):
        build_trainer(recipe(tmp_path, task_arguments=FROM_MEMORIES["task_arguments"] | {"seed": 5}))
    with pytest.raises(ValueError, match=r"begun by another run: .*write_steps was 2 and is 3"):
        build_trainer(recipe(tmp_path, gradmem=GRADMEM | {"write_steps": 3}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_base": True}, "leave train_base at false"),
        ({"stages": [{"steps": 2, "write_steps": 3}]}, "a stage has steps alone"),
        ({"max_context_length": 3}, "max_context_length would do nothing, got 3"),
        ({"queries_per_context": 2}, "queries_per_context would do nothing, got 2"),
        ({"step_size_learning_rate": 0.1}, "step_size_learning_rate would do nothing, got 0.1"),
        ({"eval_sets": {"train": {}}}, "beside that of the training data.* 'train' cannot be one"),
        ({"eval_sets": {"../escaped": {}}}, "'../escaped' cannot be one"),
        ({"eval_sets": {"..": {}}}, "'..' cannot be one"),
        ({"gradmem": {"num_memory_tokens": 2}}, "READ has nothing of its own"),
        ({"base_dtype": "float23"}, "base_dtype"),
        ({"base_dtype": "nn"}, "base_dtype"),
        ({"start": {"method": "reptile"}}, "must have method and contexts"),
        ({"start": {"method": "mean", "contexts": 2}}, "'reptile'"),
        ({"start": {"method": "reptile", "contexts": 0}}, "contexts of a start"),
        ({"start": {"method": "reptile", "contexts": 2, "rounds": 1.5}}, "rounds of a start"),
        ({"start": {"method": "reptile", "contexts": 2, "write_learning_rates": [0.0]}}, "write_learning_rates"),
        ({"start": {"method": "reptile", "contexts": 7, "rounds": 2}}, "14 contexts.* there are 12"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build_trainer(recipe(tmp_path, **changes))
    assert not (tmp_path / "memories" / "train" / "data").exists()


def test_another_recipe_is_refused_before_anything_is_written(tmp_path):
    run_training(recipe(tmp_path))
    with pytest.raises(ValueError, match="another recipe; memories, seed changed"):
        run_training(recipe(tmp_path, seed=1, memories=str(tmp_path / "others")))
    assert not (tmp_path / "others").exists()


def test_rows_that_could_not_be_trained_on_are_refused_before_they_are_written():
    model = tiny_model(**GRADMEM, learn_write_learning_rate="none", write_head=False)
    model.base_model.config.max_position_embeddings = 64
    fits = {"context": ["ab"], "queries": ["k"], "targets": ["v"]}
    for row, message in (
        (fits | {"queries": [], "targets": []}, "row 1 of mine has 0 queries"),
        (fits | {"targets": [""]}, "target of query 'k' in row 1 of mine is empty"),
        (fits | {"queries": ["k" * 80]}, "A question of row 1 of mine needs 84 positions.* is 64"),
    ):
        with pytest.raises(ValueError, match=message):
            check_rows(model, Dataset.from_list([fits, row]), "mine")
    check_rows(model, Dataset.from_list([fits | {"queries": ["k" * 80]}]), "mine", longest=60)
    text = {"context": ["ab"], "queries": [""], "targets": ["v" * 60]}  # 60 positions beside those of the memory
    check_rows(model, Dataset.from_list([text | {"add_end_token": False}]), "mine")
    for long in (text | {"targets": ["v" * 62]}, text | {"targets": ["v" * 62], "add_end_token": None}):
        with pytest.raises(ValueError, match="needs 65 positions"):
            check_rows(model, Dataset.from_list([long]), "mine")


# ------------------------------------------------------------------------------------------------ distractors


def test_a_question_is_trained_on_its_memory_among_others_in_a_random_place(tmp_path):
    trainer = build_trainer(recipe(tmp_path, distractors=2))
    store = MemoryStore.from_pretrained(tmp_path / "memories" / "train")
    stored = [store[str(number)].embeddings[0] for number in range(len(store))]

    def read_in(rows, index: int) -> list[int]:
        parts = rows[index]["memory"].embeddings[0].split(2)  # of two positions each
        return [next(number for number, own in enumerate(stored) if torch.equal(part, own)) for part in parts]

    rows = trainer.train_dataset
    own = [number for number, row in enumerate(rows.rows) for _ in row["queries"]]
    drawn = []
    for rows.epoch in (0, 1):
        drawn.append([read_in(rows, index) for index in range(len(rows))])
        assert drawn[-1] == [read_in(rows, index) for index in range(len(rows))]
    assert drawn[0] != drawn[1]
    found = [pair for epoch in drawn for pair in enumerate(epoch)]
    assert all(own[index] in numbers and len(set(numbers)) == 3 for index, numbers in found)
    assert {numbers.index(own[index]) for index, numbers in found} == {0, 1, 2}
    held_out = trainer.eval_dataset["held_out"]
    assert torch.equal(held_out[1]["memory"].embeddings, held_out[1]["memory"].embeddings)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed
    assert all(".read." in name for name in changed)
    assert "eval_held_out_loss" in trainer.evaluate()


def test_a_run_with_distractors_that_goes_on_equals_an_unbroken_one(tmp_path):
    """An epoch of 24 questions takes six steps; the run goes on within the second one."""
    settings = {"distractors": 2, "save_strategy": "steps", "save_steps": 8, "stages": [{"steps": 10}]}
    for name in ("whole", "cut"):
        run_training(recipe(tmp_path, output_dir=str(tmp_path / name), **settings))
    shutil.rmtree(tmp_path / "cut" / "checkpoint-10")
    run_training(recipe(tmp_path, output_dir=str(tmp_path / "cut"), **settings))
    assert_same_weights(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_a_worker_that_outlives_an_epoch_draws_anew_in_the_next(tmp_path):
    rows = build_trainer(recipe(tmp_path, distractors=2)).train_dataset
    loader = DataLoader(rows, num_workers=1, persistent_workers=True, collate_fn=_memory_of)
    for rows.epoch in (0, 1):
        loaded = list(loader)
        assert all(torch.equal(memory, _memory_of([rows[index]])) for index, memory in enumerate(loaded))


def test_distractors_are_memories_of_other_contexts_where_questions_on_one_text_are_rows_of_their_own(tmp_path):
    rows = load_task("kv_retrieval", **FROM_MEMORIES["task_arguments"]).select([0, 0, 0, 1])
    trainer = build_trainer(recipe(tmp_path))
    model, asked = trainer.model, WrittenRows(rows, trainer.train_dataset.store, distractors=1)
    size = model.form.num_memory_tokens
    for epoch in range(4):
        asked.epoch = epoch
        for index in range(len(asked)):
            one, other = asked[index]["memory"].embeddings.split(size, dim=1)
            assert not torch.equal(one, other)


def _memory_of(rows):
    return rows[0]["memory"].embeddings


def test_distractors_that_there_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match="distractors must be 0 or more, and goes with memories, got 2"):
        recipe(tmp_path, distractors=2, memories=None)
    with pytest.raises(ValueError, match="distractors must be 0 or more"):
        recipe(tmp_path, distractors=-1)
    start = {"method": "reptile", "contexts": 4}
    with pytest.raises(ValueError, match="distractors is 3, and there are 2 other contexts beside each of held_out"):
        build_trainer(recipe(tmp_path, distractors=3, start=start))
    assert not list(tmp_path.rglob("*.parquet")) + list(tmp_path.rglob(START_FILE))  # nothing was written in vain


# ------------------------------------------------------------------------------------------------ the start


def test_the_start_becomes_the_mean_of_what_was_written_from_it():
    torch.manual_seed(0)
    model = tiny_model(**GRADMEM, learn_write_learning_rate="none", write_head=False)
    contexts = [row["context"] for row in load_task("kv_retrieval", **FROM_MEMORIES["task_arguments"])]
    start = model.memory_init.detach().clone()
    first = model.write(contexts[:4])
    assert torch.equal(model.memory_init, start)
    report = learn_start(model, contexts, Start("reptile", contexts=4, rounds=2), batch_size=3)
    assert [entry["round"] for entry in report] == [1, 2]
    with torch.no_grad():
        model.memory_init.copy_(first.embeddings.mean(0))
    second = model.write(contexts[4:8])
    learn_start(model, contexts[4:], Start("reptile", contexts=4), batch_size=4)
    torch.testing.assert_close(model.memory_init, second.embeddings.mean(0))


def test_the_step_size_that_writes_best_is_kept():
    torch.manual_seed(0)
    model = tiny_model(**GRADMEM, learn_write_learning_rate="none", write_head=False)
    contexts = [row["context"] for row in load_task("kv_retrieval", **FROM_MEMORIES["task_arguments"])]
    start = Start("reptile", contexts=3, write_learning_rates=[1e-4, 0.2, 1e-3])
    report = learn_start(model, contexts, start, batch_size=3)
    finals = {entry.get("write_learning_rate"): entry["final_write_loss"] for entry in report}
    assert model.config.write_learning_rate == 0.2
    assert finals[0.2] == min(finals[rate] for rate in start.write_learning_rates)
    assert model.writer.step_sizes(None, None) == [0.2, 0.2]


def test_memories_within_what_is_pushed_are_refused_and_left_at_home(tmp_path):
    inside = {"memories": str(tmp_path / "run" / "memories"), "push_to_hub": True}
    with pytest.raises(ValueError, match="push_to_hub uploads all of"):
        run_training(recipe(tmp_path, **inside))
    run_training(recipe(tmp_path, **inside | {"push_to_hub": False}))
    pushed = set(folder_files(tmp_path / "run"))
    assert {"config.json", "model.safetensors", "recipe.yaml"} <= pushed
    assert not [name for name in pushed if name.startswith("memories")]
    (tmp_path / "run" / "kept").mkdir()
    for name in ("memory.safetensors", "kept/memory.safetensors"):
        (tmp_path / "run" / name).write_bytes(b"a single one")
        assert set(folder_files(tmp_path / "run")) == pushed
        with pytest.raises(ValueError, match="push_to_hub uploads all of"):
            run_training(recipe(tmp_path, push_to_hub=True))
        (tmp_path / "run" / name).unlink()
    store = tmp_path / "run" / "memories" / "train"
    assert {"memories.json", "data/train-00000-of-00001.parquet"} <= set(folder_files(store))


def test_options_given_anew_to_an_adapter_are_looked_at_with_its_own(tmp_path):
    """Drawn words go with segments that follow none, which is an option of the adapter here."""
    model = tiny_model(**GRADMEM, write_prefix_segments=0, learn_write_learning_rate="none", write_head=False)
    model.save_pretrained(tmp_path / "adapter")
    changes = {"adapter": str(tmp_path / "adapter"), "base_config": None, "gradmem": {"write_prompt": "{words}?"}}
    assert recipe(tmp_path, **changes).arguments.gradmem == {"write_prompt": "{words}?"}
    with pytest.raises(ValueError, match=r"gradmem holds a value of another kind: .*'write_prompt' expected str"):
        recipe(tmp_path, **changes | {"gradmem": {"write_prompt": 3}})


def test_step_sizes_that_are_learned_begin_at_the_one_that_writes_best(tmp_path):
    changes = {"start": {"method": "reptile", "contexts": 3, "write_learning_rates": [1e-4, 0.2]}}
    changes["gradmem"] = GRADMEM | {"learn_write_learning_rate": "per_step"}
    for model in (build_trainer(recipe(tmp_path, **changes)).model, build_trainer(recipe(tmp_path, **changes)).model):
        assert model.config.write_learning_rate == 0.2
        assert model.write_log_learning_rate.exp().tolist() == pytest.approx([0.2] * model.config.write_steps)


@pytest.mark.parametrize(
    "change",
    [
        {"start": {"method": "reptile", "contexts": 5}},
        {"seed": 7},
        {"gradmem": GRADMEM | {"write_loss_reduction": "sum"}},
        {"max_context_length": 5},
        {"task_arguments": {"num_pairs": 3, "num_contexts": 12}},
    ],
)
def test_a_start_that_was_learned_otherwise_is_refused(change, tmp_path):
    values = {"start": {"method": "reptile", "contexts": 4}, "memories": None}
    build_trainer(recipe(tmp_path, **values))
    with pytest.raises(ValueError, match="learned otherwise, of other contexts, by other options of WRITE"):
        build_trainer(recipe(tmp_path, **values | change))


def test_a_run_that_goes_on_takes_the_start_it_learned(tmp_path):
    changes = {"start": {"method": "reptile", "contexts": 4, "write_learning_rates": [0.05, 0.2]}}
    learned = build_trainer(recipe(tmp_path, **changes)).model
    report = json.loads((tmp_path / "run" / "start.json").read_text(encoding="utf-8"))
    assert len(report) == 3
    kept = (tmp_path / "run" / START_FILE).stat().st_mtime_ns
    again = build_trainer(recipe(tmp_path, **changes)).model
    assert (tmp_path / "run" / START_FILE).stat().st_mtime_ns == kept
    assert torch.equal(again.memory_init, learned.memory_init)
    assert again.config.write_learning_rate == learned.config.write_learning_rate
    assert again.fingerprint() == learned.fingerprint()


def test_a_start_is_learned_from_what_is_trained_on_of_a_context(tmp_path):
    """Contexts of two pairs, of five tokens each, are cut to the first; they were written whole."""
    changes = {"start": {"method": "reptile", "contexts": 12}, "memories": None, "max_context_length": 5}
    with pytest.warns(UserWarning, match="12 contexts: 12 contexts"):
        learned = build_trainer(recipe(tmp_path, **changes)).model
    model = build_model(recipe(tmp_path, **changes).arguments)
    contexts = [row["context"][:1] for row in load_task("kv_retrieval", **FROM_MEMORIES["task_arguments"])]
    expected = model.write(contexts).embeddings.mean(0)
    torch.testing.assert_close(learned.memory_init.detach(), expected, rtol=0, atol=1e-5)


def test_keys_and_values_are_given_a_start_of_their_own(tmp_path):
    """The mean of memories is no forward pass of `memory_init`: the adapter gets a parameter for it, and keeps it."""
    form = {"name": "key_values", "write": "values"}
    changes = {"gradmem": GRADMEM | {"memory_form": form}, "start": {"method": "reptile", "contexts": 8}}
    run_training(recipe(tmp_path, **changes))
    (learned,) = json.loads((tmp_path / "run" / "start.json").read_text(encoding="utf-8"))
    model = GradMemForCausalLM.from_pretrained(tmp_path / "run")
    assert model.config.memory_form["own_start"] == model.form.width
    contexts = [row["context"] for row in load_task("kv_retrieval", **FROM_MEMORIES["task_arguments"])]
    assert model.write(contexts).write_losses[:, 0].mean() < learned["write_losses"][0]


# ------------------------------------------------------------------------------------------------ several tasks


def test_a_mixture_has_the_rows_of_its_parts_with_their_references():
    facts = {"task": "facts", "num_contexts": 2}
    rows = load_task("mixture", parts=[*PARTS, facts])
    assert [row["context"] for row in rows][-2:] == [row["context"] for row in load_task("facts", num_contexts=2)]
    assert rows[-1]["answers"][0] == [rows[-1]["targets"][0].strip()]
    assert load_task("mixture", "test", parts=[facts])[0] == load_task("mixture", parts=[facts | {"split": "test"}])[0]
    for parts, message in (([], "needs parts"), ([{"num_contexts": 2}], "A part of a mixture"), (["facts"], "A part")):
        with pytest.raises(ValueError, match=message):
            load_task("mixture", parts=parts)


def test_reading_alone_trains_control_vectors_too():
    model = tiny_model(num_control_tokens=1)
    train_reading_alone(model)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        "read_start",
        "read_end",
    }
