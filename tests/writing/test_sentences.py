"""Contexts of one text that an adapter cuts into their sentences."""

import pytest
import torch

from hf_gradmem import DataCollatorForGradMem, GradMemConfig, GradMemForCausalLM
from hf_gradmem.writing.fitting import fit_contexts
from tests.support.small_models import nameless_base, small_tokenizer, with_memory

TEXT = "Ada Holm works as a nurse. She lives in Bergen. Her room is 218."
SENTENCES = ["Ada Holm works as a nurse.", " She lives in Bergen.", " Her room is 218."]


def build(**options) -> GradMemForCausalLM:
    model = with_memory(
        nameless_base(), **{"num_memory_tokens": 3, "write_steps": 2, "write_prefix_segments": 0} | options
    )
    model.tokenizer = small_tokenizer()  # a token for each letter
    return model


def test_a_text_is_written_as_its_sentences_are():
    model = build(write_sentence_segments=True)
    memory, of_sentences = model.write(TEXT), model.write([SENTENCES])
    torch.testing.assert_close(memory.embeddings, of_sentences.embeddings, rtol=0, atol=0)
    assert memory.segment_lengths.tolist() == of_sentences.segment_lengths.tolist()
    whole = build().write(TEXT)
    assert not torch.allclose(memory.embeddings, whole.embeddings)


def test_segments_that_are_given_stay_as_they_are():
    given = [[TEXT[:20], TEXT[20:]]]
    left = build(write_sentence_segments=True).write(given)
    torch.testing.assert_close(left.embeddings, build().write(given).embeddings, rtol=0, atol=0)


def test_a_sentence_that_does_not_fit_is_cut_and_the_others_stay_sentences():
    model = build(write_sentence_segments=True)
    longest = model.writer.longest_segment
    text = TEXT + " X" + "x" * longest + "y."
    (cut,) = fit_contexts(model.writer, model.tokenizer, [text])
    assert (cut[:3], "".join(cut)) == (SENTENCES, text)
    assert fit_contexts(model.writer, model.tokenizer, [TEXT]) == [TEXT]


def test_a_row_of_a_task_is_cut_by_the_collator_too():
    model = build(write_sentence_segments=True)
    collator = DataCollatorForGradMem(model.tokenizer, cut=model.writer.segments)
    rows = [{"context": [text], "queries": ["q"], "targets": ["a"]} for text in (TEXT, SENTENCES[0])]
    batch = collator(rows)
    tokenized = model.tokenize([TEXT, SENTENCES[0]])
    of_batch = model.write(
        **{name: batch[f"context_{name}"] for name in ("input_ids", "attention_mask", "segment_ids")}
    )
    torch.testing.assert_close(
        of_batch.embeddings,
        model.write(
            input_ids=tokenized.input_ids, attention_mask=tokenized.attention_mask, segment_ids=tokenized.segment_ids
        ).embeddings,
        rtol=0,
        atol=0,
    )


def test_sentences_and_a_length_exclude_each_other():
    with pytest.raises(ValueError, match="write_segment_length=8"):
        GradMemConfig(write_sentence_segments=True, write_segment_length=8)
