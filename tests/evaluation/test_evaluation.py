"""Metrics, answers with the context in memory, in the prompt or nowhere, and what the memories hold."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from tokenizers import processors
from torch.nn import functional

from hf_gradmem import GradMemConfig, GradMemForCausalLM, get_gradmem_model
from hf_gradmem.commands.packaged import RETRIEVAL_ADAPTER
from hf_gradmem.evaluation import ExactMatch, SquadMetric, answer_queries, evaluate_rows, token_losses
from hf_gradmem.tasks import kv_retrieval, load_task
from hf_gradmem.tasks.facts import NOT_TOLD
from tests.support.small_models import small_llama, small_tokenizer, with_memory
from tests.support.tiny_models import tiny_causal_lm

SMALL = {"num_memory_tokens": 4, "write_learning_rate": 0.2}
EVERY_PHASE = SMALL | {
    "num_control_tokens": 1,
    "write_head": True,
    "write_lora": {"r": 2, "target_modules": ["q_proj"]},
    "read_lora": {"r": 2, "target_modules": ["v_proj"]},
}


@pytest.fixture
def model():
    return tiny_model(SMALL)


def tiny_model(options: dict, dtype: torch.dtype = torch.float32) -> GradMemForCausalLM:
    tokenizer = kv_retrieval.build_tokenizer()
    base = small_llama(len(tokenizer), tokenizer, max_position_embeddings=64).to(dtype)
    model = get_gradmem_model(base, GradMemConfig(**options), tokenizer=tokenizer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or name == "write_head.weight":
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def test_exact_match_takes_any_reference_answer():
    scores = ExactMatch().compute(predictions=[" hall ", "Hall", "x"], references=[["hall"], ["hall", "Hall"], ["y"]])
    assert scores == {"exact_match": pytest.approx(2 / 3)}


def test_squad_ignores_case_punctuation_and_articles_and_takes_the_best_answer():
    scores = SquadMetric().compute(
        predictions=["The Eiffel Tower!", "in the big house"], references=[["eiffel tower"], ["dog", "a house in Bath"]]
    )
    # The second shares "in" and "house" with "house in bath": 2 · 2 / (3 + 3).
    assert scores == {"exact_match": 0.5, "f1": pytest.approx((1 + 2 / 3) / 2)}


@pytest.mark.parametrize("metric", [ExactMatch, SquadMetric])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to measure"),
        ({"predictions": [], "references": []}, "nothing to measure"),
        ({"predictions": ["a", "b"], "references": [["a"], []]}, "Prediction 1, 'b', has no reference"),
        ({"predictions": ["a", "b"], "references": [["a"]]}, "number of predictions"),
    ],
)
def test_a_metric_on_nothing_is_an_error(metric, arguments, message):
    with pytest.raises(ValueError, match=message):
        metric(keep_in_memory=True).compute(**arguments)


def test_a_metric_adds_up_batches():
    metric = ExactMatch(keep_in_memory=True)
    metric.add_batch(predictions=["a", "b"], references=[["a"], ["c"]])
    metric.add(prediction="d", reference=["e", "d"])
    assert metric.compute() == {"exact_match": pytest.approx(2 / 3)}


def greedy_answer(model, memory, query: str) -> str:
    """By the plain forward pass, one token at a time, up to and with the end token."""
    tokens = model.tokenizer(query, return_tensors="pt").input_ids
    length = tokens.shape[1]
    while tokens[0, -1] != model.tokenizer.eos_token_id:
        assert tokens.shape[1] < 50, "the model does not end its answer"
        with torch.no_grad():
            next_token = model(input_ids=tokens, memory=memory).logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, next_token], dim=1)
    return model.tokenizer.decode(tokens[0, length:])


def test_generated_and_teacher_forced_answers_agree_with_forward(model):
    """The model's own greedy answers are made the targets of half the rows: those, and only those, are right."""
    with torch.no_grad():
        model.base_model.lm_head.weight[model.tokenizer.eos_token_id] *= 3  # answers end soon
    rows = kv_retrieval.load("test", num_contexts=6, num_pairs=3, key_length=1, value_length=2).to_list()
    memory = model.write([row["context"] for row in rows], measure_final_loss=True)
    for number, row in enumerate(rows[:3]):
        row["targets"] = [greedy_answer(model, memory[number], query) for query in row["queries"]]
    (results,) = evaluate_rows(model, rows, [2], batch_size=4)
    assert results["num_answers"] == 18
    assert results["exact_match"] == results["teacher_forced_exact_match"] == pytest.approx(0.5)
    assert results["write_loss"] == pytest.approx(memory.final_write_loss.mean().item(), rel=1e-4)


def test_rows_may_have_arrays_and_steps_be_numbers_of_numpy(model):
    rows = kv_retrieval.load("test", num_contexts=2, num_pairs=2, key_length=1, value_length=1).to_list()
    rows = [row | {"answers": [[target] for target in row["targets"]]} for row in rows]
    arrays = [{name: np.array(value, dtype=object) for name, value in row.items()} for row in rows]
    records = evaluate_rows(model, arrays, np.arange(1, 3))
    assert json.loads(json.dumps(records)) == evaluate_rows(model, rows, [1, 2])


def test_tokens_that_the_base_does_not_have_are_refused_without_a_memory_too(model):
    model.tokenizer.add_tokens(["added"])
    row = {"context": "a", "queries": ["added"], "targets": ["a"]}
    for metric in (None, "exact_match"):
        with pytest.raises(ValueError, match="resize_token_embeddings"):
            evaluate_rows(model, [row], [], metric=metric, baselines=["none"])


def test_an_accepted_answer_is_generated_to_its_end_in_whatever_batch_it_is_asked(model):
    """The model's own long answer is accepted beside a short target."""
    with torch.no_grad():
        model.base_model.lm_head.weight[model.tokenizer.eos_token_id] *= 3  # answers end soon
    rows = kv_retrieval.load("test", num_contexts=6, num_pairs=1, key_length=1, value_length=1).to_list()
    memory = model.write([row["context"] for row in rows])
    own = [greedy_answer(model, memory[number], row["queries"][0]) for number, row in enumerate(rows)]
    rows = [
        row | {"targets": ["x|"], "answers": [["x", answer.removesuffix("|")]]}
        for row, answer in zip(rows, own, strict=True)
        if "<" not in answer  # of which no text is decoded
    ]
    assert max(map(len, own)) > 3
    for batch_size in (1, 4):
        (record,) = evaluate_rows(model, rows, [2], batch_size=batch_size)
        assert record["exact_match"] == 1.0


def test_more_steps_are_measured_in_their_own_record(model):
    rows = kv_retrieval.load("test", num_contexts=4, num_pairs=2, key_length=1, value_length=1)
    records = evaluate_rows(model, rows, [0, 1, 6, 1])
    assert [record["write_steps"] for record in records] == [0, 1, 6]
    assert records[2]["write_loss"] < records[1]["write_loss"] < records[0]["write_loss"]
    assert records[0]["write_loss"] == pytest.approx(records[0]["start_loss"])
    assert records[0]["bits_over_start"] == pytest.approx(0, abs=1e-4)


def test_questions_without_an_answer_are_told_apart_by_how_likely_it_is_that_there_is_none():
    """Against the loss of a forward pass for each question, and pairs counted one by one."""
    model = with_memory(tiny_causal_lm("llama", torch.float32), num_memory_tokens=2, write_learning_rate=2.0)
    model.tokenizer = small_tokenizer()
    told = [("who", "fox"), ("where", NOT_TOLD), ("what", "dog")]
    rows = [
        {"context": [text], "queries": [query for query, _ in asked], "targets": [f" {target}" for _, target in asked]}
        for text, asked in (("thequickfox", told), ("lazydog", told[1:]), ("jumpsover", told[:2]))
    ]

    def log_prob(memory, query):
        ids, answer = (
            model.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            for text in (query, f" {NOT_TOLD}")
        )
        end = torch.tensor([[model.tokenizer.eos_token_id]])
        labels = torch.cat([torch.full_like(ids, -100), answer, end], dim=1)
        with torch.no_grad():
            return -float(model(input_ids=torch.cat([ids, answer, end], dim=1), labels=labels, memory=memory).read_loss)

    scores: dict[bool, list[float]] = {True: [], False: []}
    for row in rows:
        memory = model.write([row["context"]])
        for query, target in zip(row["queries"], row["targets"], strict=True):
            scores[target.strip() == NOT_TOLD].append(log_prob(memory, query))
    pairs = [one > other for one in scores[True] for other in scores[False]]
    record, other = evaluate_rows(model, rows, [2], "squad", baselines=["other"], batch_size=2)
    assert record["auroc_not_in_memory"] == pytest.approx(sum(pairs) / len(pairs))
    assert "auroc_not_in_memory" not in other  # no answer is in another's memory
    answered = [row | {"targets": [" fox"] * len(row["queries"])} for row in rows]
    assert "auroc_not_in_memory" not in evaluate_rows(model, answered, [2])[0]


# ------------------------------------------------------------------------------------------------ baselines


def plain_logits(base, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return base(input_ids=torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize("baseline", ["prompt", "none"])
def test_baselines_are_the_plain_base_on_a_plain_prompt(baseline):
    """With every option on, against a copy of the base that never had a memory or a LoRA; contexts of two lengths."""
    torch.manual_seed(0)
    plain = tiny_model(SMALL, torch.float64).base_model
    torch.manual_seed(0)
    model = tiny_model(EVERY_PHASE, torch.float64)
    for base in (plain, model.base_model):
        with torch.no_grad():
            base.lm_head.weight[model.tokenizer.eos_token_id] *= 3  # answers end soon
    rows = kv_retrieval.load("test", num_contexts=3, num_pairs=[1, 3], key_length=1, value_length=1).to_list()
    assert len({len(row["queries"]) for row in rows}) > 1
    tokenizer = model.tokenizer
    losses, right = [], 0
    for row in rows:
        for number, query in enumerate(row["queries"]):
            context = "".join(row["context"]) if baseline == "prompt" else ""
            prompt = tokenizer(context + query).input_ids
            answer = []
            while answer[-1:] != [tokenizer.eos_token_id]:
                assert len(answer) < 30, "the model does not end its answer"
                answer.append(int(plain_logits(plain, prompt + answer)[-1].argmax()))
            if number == 0:  # the base's own answer is the right one
                row["targets"][0] = tokenizer.decode(answer)
            target = tokenizer(row["targets"][number]).input_ids
            target += [tokenizer.eos_token_id] * (target[-1] != tokenizer.eos_token_id)
            scores = plain_logits(plain, prompt + target)[len(prompt) - 1 : -1]
            losses.append(functional.cross_entropy(scores, torch.tensor(target), reduction="none"))
            right += answer == target
    (record,) = evaluate_rows(model, rows, [], baselines=[baseline], batch_size=2)
    assert (record["context"], record["write_steps"]) == (baseline, None)
    assert record["num_answer_tokens"] == sum(map(len, losses))
    assert record["answer_loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-9)
    assert record["exact_match"] == pytest.approx(right / len(losses))
    assert "write_loss" not in record


def test_a_prompt_beyond_the_window_is_an_error(model):
    rows = kv_retrieval.load("test", num_contexts=2, num_pairs=12, key_length=1, value_length=1)
    with pytest.raises(ValueError, match=r"needs 6\d positions, but the window of LlamaForCausalLM is 64"):
        evaluate_rows(model, rows, [0], baselines=["prompt"])


def test_running_text_is_scored_on_the_same_tokens_with_memory_prompt_and_nothing(model):
    """Without a query the first token has nothing before it, and no end token belongs to it."""
    rows = [{"context": ["ab", "cd"], "queries": [""], "targets": ["efgh"], "add_end_token": False}]
    records = evaluate_rows(model, rows, [2], metric=None, baselines=["prompt", "none"])
    assert [record["context"] for record in records] == ["memory", "prompt", "none"]
    assert {record["num_answer_tokens"] for record in records} == {3}
    assert not any("exact_match" in record for record in records)
    ids = model.tokenizer("efgh", return_tensors="pt").input_ids
    with torch.no_grad():
        memory = model.write([["ab", "cd"]])
        from_memory = model(input_ids=ids, memory=memory).logits[0, :-1]
    for logits, record in (
        (from_memory, records[0]),
        (plain_logits(model.base_model, ids[0].tolist())[:-1], records[2]),
    ):
        assert record["answer_loss"] == pytest.approx(functional.cross_entropy(logits, ids[0, 1:]).item(), rel=1e-5)


def test_an_empty_query_in_the_words_of_a_template_is_scored_on_the_same_tokens_by_every_reader(model):
    rows = [{"context": ["ab"], "queries": ["", "x"], "targets": ["efgh", "ef"]}]
    for words, tokens in (({"context": "{context}", "query": "{query}:"}, 8), ("plain", 7)):
        model.config.template = words
        records = evaluate_rows(model, rows, [1], metric=None, baselines=["prompt", "none"])
        assert [record["num_answer_tokens"] for record in records] == [tokens] * 3


# ------------------------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize("prefix_segments", [0, 1])
def test_token_losses_are_those_that_write_descends_on(prefix_segments):
    model = tiny_model(EVERY_PHASE | {"write_prefix_segments": prefix_segments}, torch.float64)
    contexts = [["!a:7!", "!b:Q!x"], ["!c:0!"]]
    memory = model.write(contexts, write_steps=3, measure_final_loss=True)
    for index, losses in enumerate(token_losses(model, memory, contexts)):
        assert "".join(losses.tokens) == "".join(contexts[index])
        assert losses.start.mean().item() == pytest.approx(memory.write_losses[index, 0].item())
        assert losses.memory.mean().item() == pytest.approx(memory.final_write_loss[index].item())
        expected = (losses.start - losses.memory).sum().item() / math.log(2)
        assert losses.bits_over_start == pytest.approx(expected)


@pytest.mark.parametrize("prefix_segments", [0, 1])
def test_the_base_alone_sees_the_prefix_and_nothing_of_the_memory(prefix_segments):
    model = tiny_model(EVERY_PHASE | {"write_prefix_segments": prefix_segments}, torch.float64)
    (losses,) = token_losses(model, model.write([["ab", "cde"]]), [["ab", "cde"]])
    a, b, *second = model.tokenizer("abcde").input_ids
    with torch.no_grad():
        copied = copy.deepcopy(model.base_model)
    rows = [[a, b], [a, b, *second] if prefix_segments else second]
    expected = [
        functional.cross_entropy(plain_logits(copied, row)[:-1], torch.tensor(row[1:]), reduction="none")
        for row in rows
    ]
    nothing = torch.tensor([torch.nan], dtype=torch.float64)
    expected = torch.cat(
        [nothing, expected[0], expected[1][1:] if prefix_segments else torch.cat([nothing, expected[1]])]
    )
    torch.testing.assert_close(losses.base, expected, equal_nan=True)
    scored = ~expected.isnan()
    bits = (expected - losses.memory)[scored].sum().item() / math.log(2)
    assert losses.bits_over_base == pytest.approx(bits)


def test_the_base_gets_the_begin_token_that_its_tokenizer_puts_in_front(model):
    """Of context and prompt alike: a base that was trained with it predicts badly without."""
    rows = [{"context": ["ab"], "queries": ["q"], "targets": ["t"]}]
    (without,) = evaluate_rows(model, rows, [], baselines=["none"])
    (missing,) = token_losses(model, model.write("ab"), "ab")
    begin = model.tokenizer.bos_token_id
    model.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", begin)]
    )
    (record,) = evaluate_rows(model, rows, [], baselines=["none"])
    (losses,) = token_losses(model, model.write("ab"), "ab")
    answer = model.tokenizer("qt|", add_special_tokens=False).input_ids
    logits = plain_logits(model.base_model, [begin, *answer])[1:-1]
    assert record["answer_loss"] == pytest.approx(functional.cross_entropy(logits, torch.tensor(answer[1:])).item())
    assert record["answer_loss"] != pytest.approx(without["answer_loss"])
    assert missing.base.isnan().tolist() == [True, False]
    context = model.tokenizer("ab", add_special_tokens=False).input_ids
    logits = plain_logits(model.base_model, [begin, *context])[:-1]
    expected = functional.cross_entropy(logits, torch.tensor(context), reduction="none")
    torch.testing.assert_close(losses.base, expected)


def test_a_context_of_one_token_takes_no_loss_of_the_base_from_the_others(model):
    rows = list(load_task("kv_retrieval", num_contexts=2, num_pairs=2))
    rows = [row | {"context": "".join(row["context"])} for row in rows]
    (whole,) = evaluate_rows(model, rows, [1])
    (with_one,) = evaluate_rows(model, [*rows, rows[0] | {"context": "a"}], [1])
    assert with_one["base_loss"] == pytest.approx(whole["base_loss"], rel=1e-5)
    (alone,) = evaluate_rows(model, [rows[0] | {"context": "a"}], [1])
    assert alone["base_loss"] is None


def test_bits_are_a_mean_over_contexts_and_of_each_number_in_the_memory(model):
    rows = kv_retrieval.load("test", num_contexts=3, num_pairs=[1, 3], key_length=1, value_length=1)
    (record,) = evaluate_rows(model, rows, [2], batch_size=2)
    contexts = list(rows["context"])
    losses = token_losses(model, model.write(contexts), contexts)
    for name in ("bits_over_start", "bits_over_base"):
        mean = sum(getattr(of_one, name) for of_one in losses) / 3
        assert record[name] == pytest.approx(mean, rel=1e-4)
        assert record[f"{name}_per_float"] == pytest.approx(mean / (4 * 32), rel=1e-4)


def test_the_forward_writer_is_measured_by_the_same_records():
    model = tiny_model({"num_memory_tokens": 4, "writer": "forward"})
    rows = kv_retrieval.load("test", num_contexts=2, num_pairs=2, key_length=1, value_length=1)
    contexts = ["".join(context) for context in rows["context"]]
    for record, steps in zip(evaluate_rows(model, rows, [1, 2]), (1, 2), strict=True):
        losses = token_losses(model, model.write(contexts, write_steps=steps), contexts)
        mean = sum(of_one.memory.mean().item() for of_one in losses) / 2
        assert record["write_loss"] == pytest.approx(mean, rel=1e-4)


def test_the_trained_adapter_holds_values_it_was_given_and_answers_where_the_base_cannot():
    model = GradMemForCausalLM.from_pretrained(RETRIEVAL_ADAPTER)
    rows = load_task(
        "kv_retrieval", "test", num_contexts=16, num_pairs=4, key_length=1, value_length=1, end_mark=False, seed=1
    )
    written, prompted, nothing = evaluate_rows(model, rows, [2], baselines=["prompt", "none"])
    assert written["exact_match"] > 0.95
    assert max(prompted["exact_match"], nothing["exact_match"]) < 0.2
    most = math.log2(62**4 * 62**4 / math.factorial(4))  # four pairs of keys and values, in any order
    assert 0.8 * most < written["bits_over_start"] < most
    (losses,) = token_losses(model, model.write([["!a:7!", "!b:Q!"]]), [["!a:7!", "!b:Q!"]])
    values = torch.tensor([token in "7Q" for token in losses.tokens])
    assert losses.start[values].min() > 3
    assert losses.memory[values].max() < 0.1


def test_as_many_contexts_as_memories(model):
    with pytest.raises(ValueError, match="1 memories for 2 contexts"):
        token_losses(model, model.write("ab"), ["ab", "cd"])


# ------------------------------------------------------------------------------------------------ mistakes


def test_answers_are_about_their_own_context(model):
    rows = kv_retrieval.load("test", num_contexts=3, num_pairs=2, key_length=1, value_length=1).to_list()
    memory = model.write([row["context"] for row in rows])
    query = rows[0]["queries"][0]
    together = answer_queries(model, memory, [query] * 3, [2, 0, 1], max_new_tokens=4)
    alone = [answer_queries(model, memory[index], [query], [0], max_new_tokens=4)[0] for index in (2, 0, 1)]
    assert together == alone


@pytest.mark.parametrize("rows", [[], iter(())])
def test_nothing_to_evaluate_is_an_error(model, rows):
    with pytest.raises(ValueError, match="no row"):
        evaluate_rows(model, rows, [1])


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"metric": "bleu"}, "'bleu'.* exact_match, squad"),
        ({}, {"baselines": ["prompt", "rag"]}, "'rag'.* prompt, none"),
        ({}, {"write_steps": [1, -2]}, "write_steps .* -2"),
        ({}, {"write_steps": []}, "nothing to evaluate"),
        ({}, {"batch_size": 0}, "batch_size .* 0"),
        ({"queries": [""]}, {}, "query of row 0 is empty"),
        ({"targets": [""]}, {}, "target .* row 0"),
        ({"context": [""]}, {}, "context of row 0"),
        ({"queries": [""], "targets": ["x"], "add_end_token": False}, {"metric": None}, "nothing to measure"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_written(model, monkeypatch, change, options, message):
    if options.get("metric", "") is not None:
        monkeypatch.setattr(type(model), "write", lambda *_, **__: pytest.fail("a context was written"))
    row = {"context": ["ab"], "queries": ["q"], "targets": ["t"]} | change
    with pytest.raises(ValueError, match=message):
        evaluate_rows(model, [row], **{"write_steps": [1]} | options)
    assert torch.is_grad_enabled()


def test_another_rows_memory_is_read_by_the_same_reader(model):
    """Each row reads the memory of the row before it, in whatever batches; the first one that of its batch's last."""
    rows = list(load_task("kv_retrieval", num_contexts=5, num_pairs=2, key_length=1, value_length=1))
    for batch_size, first in ((1, 1), (2, 1), (3, 2), (9, 4)):
        records = evaluate_rows(model, rows, [2], baselines=["other"], batch_size=batch_size)
        assert [(record["context"], record["write_steps"]) for record in records] == [("memory", 2), ("other", 2)]
        read = [rows[other]["context"] for other in (first, 0, 1, 2, 3)]
        expected = evaluate_rows(model, [row | {"context": other} for row, other in zip(rows, read, strict=True)], [2])
        assert records[1]["answer_loss"] == pytest.approx(expected[0]["answer_loss"], rel=1e-5)
        assert records[1]["exact_match"] == expected[0]["exact_match"]
        assert "write_loss" not in records[1]
    with pytest.raises(ValueError, match="two rows"):
        evaluate_rows(model, rows[:1], [2], baselines=["other"])
    with pytest.raises(ValueError, match="write_steps"):
        evaluate_rows(model, rows, [], baselines=["other"])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_a_row_with_the_same_context_or_with_more_of_it_is_no_other(model, batch_size):
    """Questions of one text that are rows of their own, and a story that is asked about as it goes on."""
    contexts = [["!a:1!"], ["!a:1!"], ["!a:", "1!"], ["!b:2!"], ["!b:2!", "!c:3!"], ["!b:2!", "!c:3!"], ["!b:2!"]]
    rows = [{"context": context, "queries": ["?!a:"], "targets": ["1!|"]} for context in contexts]
    later = 3 if batch_size <= 4 else 6  # the first ones read from the end of the first batch, if it is there
    others = [contexts[other] for other in (later, later, later, 2, 2, 2, 2)]
    records = evaluate_rows(model, rows, [1, 3], baselines=["other"], batch_size=batch_size)
    expected = evaluate_rows(
        model, [row | {"context": other} for row, other in zip(rows, others, strict=True)], [1, 3], batch_size=16
    )
    for measured, by_hand in zip(records[2:], expected, strict=True):
        assert measured["answer_loss"] == pytest.approx(by_hand["answer_loss"], rel=1e-5)
    with pytest.raises(ValueError, match=r"of 4 rows none has another context than row 0 \('!b:2!'\)"):
        evaluate_rows(model, rows[3:], [1], baselines=["other"])
