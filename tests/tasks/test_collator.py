"""The collator: its tensors against hand-written ones, and against what forward makes of them."""

import warnings

import pytest
import torch
from datasets import Dataset, concatenate_datasets

from hf_gradmem import GradMemConfig, get_gradmem_model
from hf_gradmem.evaluation import evaluate_rows
from hf_gradmem.tasks import load_task
from hf_gradmem.tasks.collator import DataCollatorForGradMem
from hf_gradmem.tasks.kv_retrieval import build_tokenizer
from tests.support.small_models import small_llama

TOKENIZER = build_tokenizer()
PAD, END = TOKENIZER.pad_token_id, TOKENIZER.eos_token_id
ROWS = [
    {"context": ["!a:1!", "!b:2!|"], "queries": ["?!b:", "?!a:"], "targets": ["2!|", "1!|"]},
    {"context": ["!c:33!|"], "queries": ["?!c:"], "targets": ["33!|"]},
]


def ids(text):
    return TOKENIZER(text, add_special_tokens=False).input_ids


def small_model(**options):
    base = small_llama(len(TOKENIZER), TOKENIZER).double()
    return get_gradmem_model(base, GradMemConfig(num_memory_tokens=3, **options))


def test_batch_is_what_one_would_write_by_hand():
    batch = DataCollatorForGradMem(TOKENIZER)(ROWS)
    assert batch["context_input_ids"].tolist() == [ids("!a:1!!b:2!|"), ids("!c:33!|") + [PAD] * 4]
    assert batch["context_attention_mask"].tolist() == [[1] * 11, [1] * 7 + [0] * 4]
    assert batch["context_segment_ids"].tolist() == [[0] * 5 + [1] * 6, [0] * 11]
    assert batch["input_ids"].tolist() == [
        [[*ids("?!b:2!|"), PAD], [*ids("?!a:1!|"), PAD]],
        [ids("?!c:33!|"), [PAD] * 8],
    ]
    assert batch["attention_mask"].tolist() == [[[1] * 7 + [0]] * 2, [[1] * 8, [0] * 8]]
    assert batch["labels"].tolist() == [
        [[-100] * 4 + ids("2!|") + [-100], [-100] * 4 + ids("1!|") + [-100]],
        [[-100] * 4 + ids("33!|"), [-100] * 8],
    ]
    assert all(tensor.dtype == torch.long for tensor in batch.values())


def test_answer_gets_an_end_token_unless_it_has_one():
    row = {"context": ["!a:1!"], "queries": ["?!a:"], "targets": ["1!"]}
    assert DataCollatorForGradMem(TOKENIZER)([row])["input_ids"].tolist() == [[ids("?!a:1!|")]]
    plain = DataCollatorForGradMem(TOKENIZER, add_end_token=False)([row])
    assert plain["input_ids"].tolist() == [[ids("?!a:1!")]]
    both = DataCollatorForGradMem(TOKENIZER)([row | {"add_end_token": False}, row])
    assert both["input_ids"].tolist() == [[[*ids("?!a:1!"), PAD]], [ids("?!a:1!|")]]


def test_rows_of_tables_that_were_put_together_end_as_before():
    """The column of one table is `None` in the rows of another, which has none: such answers had no end token."""
    row = {"context": ["!a:1!"], "queries": ["?!a:"], "targets": ["1!"]}
    tables = [Dataset.from_list([row | {"add_end_token": False}]), Dataset.from_list([row])]
    batch = DataCollatorForGradMem(TOKENIZER)(list(concatenate_datasets(tables)))
    assert batch["input_ids"].tolist() == [[[*ids("?!a:1!"), PAD]], [ids("?!a:1!|")]]


def test_an_answer_of_words_that_the_tokenizer_does_not_know_is_refused():
    """It would be the same as any other such, in training and where answers are compared."""
    row = {"context": ["!a:1!"], "queries": ["?!a:"], "targets": ["é!"]}
    with pytest.raises(ValueError, match="target 'é!' has words that the tokenizer does not know"):
        DataCollatorForGradMem(TOKENIZER)([row])
    DataCollatorForGradMem(TOKENIZER, add_end_token=False)([row])


def test_context_that_is_one_text_has_no_segments():
    row = {"context": "!a:1!!b:2!|", "queries": ["?!a:"], "targets": ["1!|"]}
    assert "context_segment_ids" not in DataCollatorForGradMem(TOKENIZER)([row])


def test_one_text_is_cut_as_write_cuts_it():
    model = small_model(write_segment_length=3)
    collate = DataCollatorForGradMem(TOKENIZER, segment_length=model.writer.segment_length)
    assert "context_segment_ids" not in collate([ROWS[1]])
    assert collate(ROWS)["context_segment_ids"][1, :7].tolist() == [0, 0, 0, 1, 1, 1, 2]
    model.tokenizer = TOKENIZER
    (record,) = evaluate_rows(model, [ROWS[1]], [2])
    memory = model.write([ROWS[1]["context"]], write_steps=2, measure_final_loss=True)
    assert memory.segment_lengths.tolist() == [[3, 3, 1]]
    assert record["write_loss"] == pytest.approx(float(memory.final_write_loss), rel=1e-9)


def test_sentences_of_a_context_that_is_one_text_are_segments():
    collate = DataCollatorForGradMem(TOKENIZER, cut=lambda _: ["!a:1!", "!b:2!|"])
    row = ROWS[0] | {"context": "!a:1!!b:2!|"}
    assert collate([row])["context_segment_ids"].tolist() == [[0] * 5 + [1] * 6]


def test_a_memory_that_is_none_is_no_memory():
    batch = DataCollatorForGradMem(TOKENIZER)([row | {"memory": None} for row in ROWS])
    assert torch.equal(batch["context_input_ids"], DataCollatorForGradMem(TOKENIZER)(ROWS)["context_input_ids"])


def test_query_may_be_empty():
    row = {"context": ["!a:1!"], "queries": [""], "targets": ["!a:1!"]}
    batch = DataCollatorForGradMem(TOKENIZER)([row])
    assert batch["labels"].tolist() == batch["input_ids"].tolist() == [[ids("!a:1!|")]]


@pytest.mark.parametrize("segmented", [True, False])
def test_forward_makes_the_same_of_a_ragged_batch_as_of_its_rows(segmented):
    model = small_model()
    rows = [{**row, "context": row["context"] if segmented else "".join(row["context"])} for row in ROWS]
    collator = DataCollatorForGradMem(TOKENIZER)
    with torch.no_grad():
        output = model(**collator(rows))
        alone = [model(**collator([row])) for row in rows]
    labels = [3 + 3, 4]
    expected = sum(count * single.read_loss for count, single in zip(labels, alone, strict=True)) / sum(labels)
    torch.testing.assert_close(output.read_loss, expected, rtol=1e-9, atol=1e-9)
    for index, single in enumerate(alone):
        torch.testing.assert_close(output.write_losses[index], single.write_losses[0], rtol=1e-9, atol=1e-9)
        _, queries, length, _ = single.logits.shape
        torch.testing.assert_close(output.logits[index, :queries, :length], single.logits[0], rtol=1e-9, atol=1e-9)


def test_fixed_shape_changes_nothing_but_the_shape():
    model = small_model()
    limits = {"max_context_length": 20, "max_query_length": 12, "queries_per_context": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = DataCollatorForGradMem(TOKENIZER, **limits, padding="max_length")(ROWS)
    assert batch["context_input_ids"].shape == (2, 20)
    assert batch["labels"].shape == (2, 3, 12)
    with torch.no_grad():
        loss = model(**DataCollatorForGradMem(TOKENIZER)(ROWS)).loss
        torch.testing.assert_close(model(**batch).loss, loss, rtol=1e-9, atol=1e-9)


def test_what_is_cut_is_said_once_and_counted():
    collator = DataCollatorForGradMem(TOKENIZER, max_context_length=7, max_query_length=7, queries_per_context=1)
    with pytest.warns(UserWarning, match="2 contexts: 1 contexts, 1 queries, 1 left out.*max_query_length=7"):
        batch = collator(ROWS)
    assert batch["context_input_ids"].tolist() == [ids("!a:1!!b"), ids("!c:33!|")]
    assert batch["input_ids"].tolist() == [[ids("?!b:2!|")], [ids("!c:33!|")]]
    assert batch["labels"].tolist() == [[[-100] * 4 + ids("2!|")], [[-100] * 3 + ids("33!|")]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collator(ROWS)
    assert collator.truncated == {"contexts": 2, "queries": 2, "answers": 0, "left out": 2}


def test_an_answer_that_loses_its_end_is_said_and_counted():
    collator = DataCollatorForGradMem(TOKENIZER, max_query_length=2)
    with pytest.warns(UserWarning, match="1 contexts: 1 queries, 1 answers "):
        batch = collator([ROWS[1]])
    assert batch["labels"].tolist() == [[ids("33")]]
    assert collator.truncated["answers"] == 1


@pytest.mark.parametrize("context", ["!a:1!!b:2!|", ["!a:1!", "!b:2!|"]], ids=["one_text", "segments"])
def test_what_is_recited_before_a_query_is_what_is_written(context):
    """A context that is cut stands before the query as far as it is in the memory; it stood there whole."""
    words = {"context": "{context}", "query": "{context}{query}"}
    row = ROWS[0] | {"context": context}
    collate = DataCollatorForGradMem(TOKENIZER, max_context_length=7, template=words)
    with pytest.warns(UserWarning, match="1 contexts"):
        batch = collate([row])
    assert batch["context_input_ids"].tolist() == [ids("!a:1!!b")]
    assert batch["input_ids"].tolist() == [[ids("!a:1!!b?!b:2!|"), ids("!a:1!!b?!a:1!|")]]
    whole = DataCollatorForGradMem(TOKENIZER, max_context_length=20, template=words)([row])
    assert whole["input_ids"].tolist() == [[ids("!a:1!!b:2!|?!b:2!|"), ids("!a:1!!b:2!|?!a:1!|")]]


def test_no_query_leaves_the_contexts_alone():
    whole = DataCollatorForGradMem(TOKENIZER)(ROWS)
    alone = DataCollatorForGradMem(TOKENIZER, queries_per_context=0)(ROWS)
    assert alone.keys() == {name for name in whole if name.startswith("context_")}
    assert all(torch.equal(alone[name], whole[name]) for name in alone)


def test_curriculum_asks_for_write_steps():
    collator = DataCollatorForGradMem(TOKENIZER)
    batch = collator([{**row, "write_steps": 3} for row in ROWS])
    assert batch["write_steps"] == 3
    with torch.no_grad():
        assert small_model()(**batch).write_losses.shape == (2, 3)
    with pytest.raises(ValueError, match=r"same write_steps, got \[1, 2\]"):
        collator([{**ROWS[0], "write_steps": 1}, {**ROWS[1], "write_steps": 2}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": ["", "1!|"]}, r"target of query '\?!b:' in row 1 of the batch is empty"),
        ({"context": [""]}, "context of row 1 of the batch is empty"),
        ({"context": []}, "context of row 1 of the batch is empty"),
        ({"queries": ["?!a:"]}, "1 queries and 2 targets"),
        ({"context": None}, "row 1 of the batch has no column 'context'.*remove_unused_columns=False"),
    ],
)
def test_row_that_cannot_be_trained_on_is_named(change, message):
    bad = {name: value for name, value in (ROWS[0] | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        DataCollatorForGradMem(TOKENIZER)([ROWS[1], bad])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_query_length": 0}, "max_query_length .* 0"),
        ({"queries_per_context": -1}, "queries_per_context must be at least 0, got -1"),
        ({"padding": "left"}, "padding .* 'left'"),
        ({"padding": "queries", "max_query_length": 5}, "needs queries_per_context"),
        ({"padding": "max_length", "max_query_length": 5}, "needs max_context_length, queries_per_context"),
    ],
)
def test_limits_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        DataCollatorForGradMem(TOKENIZER, **arguments)


def test_streamed_rows_collate_like_stored_ones():
    stored = load_task("kv_retrieval", num_contexts=3)
    streamed = list(load_task("kv_retrieval", streaming=True, num_contexts=3))
    collator = DataCollatorForGradMem(TOKENIZER)
    first, second = collator([stored[index] for index in range(3)]), collator(streamed)
    assert all(torch.equal(first[name], second[name]) for name in first)
