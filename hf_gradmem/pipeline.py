"""The pipeline: questions on contexts, or on memories that were written before."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, Pipeline, PreTrainedTokenizerBase
from transformers.pipelines import PIPELINE_REGISTRY

from .memory.written import GradMemMemory
from .modeling_gradmem import GradMemForCausalLM
from .reading.answering import answer_features, confidences, up_to_end
from .reading.generation import ending_tokens, new_sequences
from .reading.queries import tokenize_queries
from .reading.reciting import recited
from .template import get_template, template_in_use
from .writing.contexts import texts_in, tokenize_contexts

TASK = "gradmem-text-generation"
Tensor = torch.Tensor
_WRITE_OPTIONS = ("write_steps", "write_learning_rate", "tolerance")
MemorySource = GradMemMemory | str | os.PathLike
"""A written memory, or where one was saved."""
_INPUTS = {"context", "memory", "question", "questions"}


@dataclass(frozen=True)
class _Request:
    """Questions on one context, or on one memory in place of it.

    `nested` tells a list of questions, even of one, from a question alone: the answers have the same form.
    """

    source: str | Sequence[str] | GradMemMemory
    questions: list[str]
    nested: bool


class GradMemTextGenerationPipeline(Pipeline):
    """Answers questions on contexts: each context is written into a memory once, and its questions are read from it.

        answer = pipeline("gradmem-text-generation", model="path/or/repo")
        answer(context="Gate 7 opens at 06:45.", question="When does gate 7 open?")
        # [{"generated_text": "06:45"}]

    The form of the answers follows that of the inputs, as in Transformers' text-generation pipeline:

    | inputs | output |
    |---|---|
    | one context, `question="..."` | `[{"generated_text": ...}]`: one entry for each of `num_return_sequences` |
    | one context, `questions=[...]` | a list of these, one for each question |
    | a list of contexts | a list of either, one for each context |

    Generation follows the base's generation configuration; what it leaves open is greedy, of at most 256 new tokens.
    `model` must be a [`GradMemForCausalLM`]; the tokenizer need not have a padding token.

    Raises:
        TypeError: the model is not a [`GradMemForCausalLM`].
    """

    model: GradMemForCausalLM
    tokenizer: PreTrainedTokenizerBase
    _pipeline_calls_generate = True
    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = None  # an adapter without one reads with its base's
    _default_generation_config = GenerationConfig(max_new_tokens=256, do_sample=False)

    def __init__(self, model: GradMemForCausalLM, *args: Any, **kwargs: Any) -> None:
        if not isinstance(model, GradMemForCausalLM):
            raise TypeError(
                f"The pipeline {TASK!r} needs a GradMem model, got {type(model).__name__}. Give it an adapter, or wrap "
                "a base by get_gradmem_model(base_model, GradMemConfig())."
            )
        if kwargs.get("tokenizer") is None:
            kwargs["tokenizer"] = model.tokenizer
        super().__init__(model, *args, **kwargs)

    def __call__(
        self,
        inputs: dict[str, Any] | Iterable[dict[str, Any]] | None = None,
        *,
        context: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
        memory: MemorySource | Sequence[MemorySource] | None = None,
        question: str | Sequence[str] | None = None,
        questions: Sequence[str] | Sequence[Sequence[str]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Answer questions.

        Args:
            inputs: the four below as the keys of a dictionary; or a list, a generator or a data set of such
                dictionaries, each with one context. A generator or data set gives an iterator, which reads on as it is
                asked for.
            context: as in [`GradMemForCausalLM.write`]: a text; a list of texts is that many contexts, a list of lists
                contexts in segments.
            memory: a written memory in place of a context, or the directory, file or Hub repository of one; several, in
                one or in a list, are a list of contexts.
            question: a question on each context, or a list with one for each.
            questions: several questions on each context, or a list of lists, one list for each. What follows an empty
                question comes from the memory alone.
            batch_size: how many contexts to write, and how many questions to read, at a time. 1 by default.
            write_steps, write_learning_rate, tolerance: as in [`GradMemForCausalLM.write`].
            template: the words around each question, as in [`GradMemConfig`]; the adapter's by default.
            return_full_text: whether `generated_text` begins with the question. `False` by default.
            return_tensors: return `generated_token_ids`, the new tokens, in place of `generated_text`.
            skip_special_tokens: leave special tokens out of the text. `True` by default.
            return_confidence: also give `log_prob` and `confidence` of each answer, as in [`Answer`], by two more
                forward passes; `confidence` is `None` for an adapter that is not calibrated. `False` by default.
            stop_sequence: a text, or several, that an answer ends with.
            streamer: receives the tokens as they come, one question after the other: the questions are then read one
                at a time. Not with beam search.
            kwargs: arguments of `generate`.

        Returns:
            `[{"generated_text": str}]` for one question on one context; see the class for the other forms. An adapter
            whose template has it quote adds `quote` to each record that has one.

        Raises:
            ValueError: neither or both of context and memory, or of question and questions; as many contexts as
                questions are not given; write options with a memory; a streamer with beam search; and what
                [`GradMemForCausalLM.write`] and [`GradMemForCausalLM.generate`] raise.
        """
        given = {"context": context, "memory": memory, "question": question, "questions": questions}
        given = {name: value for name, value in given.items() if value is not None}
        if inputs is not None and given:
            raise ValueError(f"Give either inputs or {', '.join(given)}, and not both.")
        batch_size = next(size for size in (kwargs.pop("batch_size", None), self._batch_size, 1) if size is not None)
        if inputs is None or isinstance(inputs, dict):
            requests, several = _requests(inputs or given)
            answers = self._answer(requests, batch_size, **kwargs)
            return list(answers) if several else next(answers)
        answers = self._answer((_request(item) for item in inputs), batch_size, **kwargs)
        return list(answers) if isinstance(inputs, list | tuple) else answers

    def _answer(self, requests: Iterable[_Request], batch_size: int, **kwargs: Any) -> Iterator[Any]:
        # What Transformers batches is padded to one shape; contexts have any number of questions. So its items are
        # batches already.
        write_options = [name for name in _WRITE_OPTIONS if kwargs.get(name) is not None]
        batches = ({"requests": _checked(batch, write_options)} for batch in _batched(requests, batch_size))
        return chain.from_iterable(super().__call__(batches, batch_size=1, rows_at_a_time=batch_size, **kwargs))

    def _sanitize_parameters(
        self,
        template: str | Mapping[str, str] | None = None,
        return_full_text: bool | None = None,
        return_tensors: bool | None = None,
        skip_special_tokens: bool | None = None,
        stop_sequence: str | list[str] | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if stop_sequence is not None:
            kwargs |= {"stop_strings": stop_sequence, "tokenizer": self.tokenizer}
        preprocess = {"template": template}
        postprocess = {
            "return_full_text": return_full_text,
            "return_tensors": return_tensors,
            "skip_special_tokens": skip_special_tokens,
        }
        given = [
            {name: value for name, value in part.items() if value is not None} for part in (preprocess, postprocess)
        ]
        return given[0], kwargs, given[1]

    def preprocess(
        self, inputs: dict[str, list[_Request]], template: str | Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Tokenise a batch of requests."""
        requests = inputs["requests"]
        counts = [len(request.questions) for request in requests]
        texts = [question for request in requests for question in request.questions]
        setting = template_in_use(template, self.model.config.template, self.tokenizer)
        input_ids, attention_mask = tokenize_queries(texts, self.tokenizer, setting)
        if isinstance(requests[0].source, GradMemMemory):
            memories: list[Any] = [request.source for request in requests]
            source: dict[str, Any] = {"memory": GradMemMemory.cat(memories, keep_measured=True)}
        else:
            contexts: list[Any] = [request.source for request in requests]
            # By the pipeline's own tokenizer, which need not be the model's.
            source = {"contexts": tokenize_contexts(contexts, self.tokenizer, **self.model.writer.cutting)}
        index = torch.arange(len(requests)).repeat_interleave(torch.tensor(counts))
        prompts = {"input_ids": input_ids, "attention_mask": attention_mask, "context_index": index}
        return source | prompts | {"requests": requests, "texts": texts, "template": setting}

    def _forward(
        self, model_inputs: dict[str, Any], rows_at_a_time: int = 1, return_confidence: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Write the contexts, unless there are memories, and generate after each question."""
        write_options = {name: kwargs.pop(name) for name in _WRITE_OPTIONS if name in kwargs}
        kwargs = self._generation_arguments(kwargs)
        memory = model_inputs.get("memory")
        if memory is None:
            contexts = model_inputs["contexts"]
            memory = self.model.write(
                input_ids=contexts.input_ids,
                attention_mask=contexts.attention_mask,
                segment_ids=contexts.segment_ids,
                batch_size=rows_at_a_time,
                measure_final_loss=return_confidence,
                **write_options,
            )
        words, index = model_inputs["template"], model_inputs["context_index"].tolist()
        if get_template(words, self.tokenizer).recites:
            before = recited(self.model, memory, index, words)  # asked in the pipeline's own tokenizer
            ids, mask = tokenize_queries(model_inputs["texts"], self.tokenizer, words, before)
            model_inputs = model_inputs | {"input_ids": ids, "attention_mask": mask}
        rows = torch.arange(len(model_inputs["input_ids"]))
        generated: list[list[list[int]]] = []
        sure: list[list[dict[str, Any]]] = []
        for part in rows.split(1 if kwargs.get("streamer") is not None else rows_at_a_time):
            generated += self._generate(model_inputs, memory, part, kwargs)
            if return_confidence:
                in_force = self._get_set_generation_params(kwargs)
                ending = in_force.get("eos_token_id"), in_force.get("pad_token_id")
                answers = [[up_to_end(tokens, *ending) for tokens in each] for each in generated[-len(part) :]]
                sure += self._confidences(model_inputs, memory, part, answers)
        return {"generated": generated, "sure": sure} | {name: model_inputs[name] for name in ("requests", "template")}

    def _confidences(
        self, inputs: dict[str, Any], memory: GradMemMemory, part: Tensor, answers: list[list[list[int]]]
    ) -> list[list[dict[str, Any]]]:
        """What the answers to some of the questions are worth, for each returned sequence."""
        per_question = len(answers[0])
        rows = part.repeat_interleave(per_question)
        index = inputs["context_index"][rows].tolist()
        ids, mask = inputs["input_ids"][rows].cpu(), inputs["attention_mask"][rows].cpu()
        features = answer_features(self.model, memory, ids, mask, list(chain(*answers)), index)
        known = zip(features[:, 0].tolist(), confidences(self.model, features), strict=True)
        told = [{"log_prob": log_prob, "confidence": confidence} for log_prob, confidence in known]
        return [told[first : first + per_question] for first in range(0, len(told), per_question)]

    def _generation_arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """What to pass to `generate`: what was asked for here and at the start, then the base's, then our defaults."""
        asked = {**self._generate_kwargs, **given}
        config = asked.get("generation_config")
        ends = ending_tokens(self.tokenizer, self.model.generation_config)
        ends = {
            name: value for name, value in ends.items() if name not in asked and getattr(config, name, None) is None
        }
        arguments = self._prepare_generate_kwargs(given, **ends)
        beams = self._get_set_generation_params(arguments).get("num_beams") or 1
        if arguments.get("streamer") is not None and beams > 1:
            raise ValueError(
                f"A streamer cannot follow beam search (num_beams={beams}): no token is settled before the end. Leave "
                "out one of the two."
            )
        return arguments

    def _generate(
        self, inputs: dict[str, Any], memory: GradMemMemory, part: Tensor, arguments: dict[str, Any]
    ) -> list[list[list[int]]]:
        """The new tokens for some of the questions, each with one list for each returned sequence."""
        mask = inputs["attention_mask"][part]
        first = mask.shape[1] - int(mask.sum(1).max())  # padding that only the questions of other parts need
        ids, index = inputs["input_ids"][part, first:], inputs["context_index"][part]
        return new_sequences(self.model, memory, ids, mask[:, first:], index, **arguments)

    def postprocess(
        self,
        model_outputs: dict[str, Any],
        return_full_text: bool = False,
        return_tensors: bool = False,
        skip_special_tokens: bool = True,
    ) -> list[Any]:
        """The answers to each request of a batch."""
        generated = iter(model_outputs["generated"])
        sure = iter(model_outputs["sure"])
        words = get_template(model_outputs["template"], self.tokenizer)

        def record(question: str, tokens: list[int]) -> dict[str, Any]:
            if return_tensors:
                return {"generated_token_ids": tokens}
            text = str(self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))
            quote, text = words.split(text)
            quoted = {} if quote is None else {"quote": quote}
            return {"generated_text": question + text if return_full_text else text} | quoted

        def records(question: str) -> list[dict[str, Any]]:
            sequences = next(generated)
            beside: list[dict[str, Any]] = next(sure, [{}] * len(sequences))
            return [record(question, tokens) | more for tokens, more in zip(sequences, beside, strict=True)]

        results = []
        for request in model_outputs["requests"]:
            answers = [records(question) for question in request.questions]
            results.append(answers if request.nested else answers[0])
        return results


def _requests(inputs: dict[str, Any]) -> tuple[list[_Request], bool]:
    """One request for each context, and whether the contexts came as a list."""
    unknown = sorted(inputs.keys() - _INPUTS)
    if unknown:
        raise ValueError(f"There is no input {unknown[0]!r}. The inputs are {', '.join(sorted(_INPUTS))}.")
    inputs = {name: value for name, value in inputs.items() if value is not None}  # a data set fills up with None
    for either, other in (("context", "memory"), ("question", "questions")):
        if (either in inputs) == (other in inputs):
            both = ", and not both" if either in inputs else ""
            raise ValueError(f"Give either {either} or {other}{both}: got {', '.join(sorted(inputs)) or 'neither'}.")
    sources, several = _sources(inputs.get("context", inputs.get("memory")), "memory" in inputs)
    nested = "questions" in inputs
    questions = inputs["questions"] if nested else inputs["question"]
    if isinstance(questions, str) and nested:
        raise ValueError("questions is a list of texts, or of lists of texts. Give one text as question.")
    for text in chain.from_iterable([item] if isinstance(item, str) or not nested else item for item in questions):
        if not isinstance(text, str):
            raise TypeError(f"a question is a text, got {text!r}.")
    texts = [isinstance(item, str) for item in questions]
    if any(texts) and not all(texts):
        raise ValueError("questions is a list of texts, or a list of lists of texts: it must not mix the two.")
    listed = not isinstance(questions, str) and not (nested and all(texts))
    if listed and (not several or len(questions) != len(sources)):
        raise ValueError(
            f"There are questions for {len(questions)} contexts, but "
            f"{f'{len(sources)} contexts' if several else 'one context, not in a list'}. Give as many, or the same "
            "question(s) for all of them."
        )
    each = [list(item) if nested else [item] for item in (questions if listed else [questions] * len(sources))]
    if not all(each):
        raise ValueError("There is no question on one of the contexts: questions has an empty list.")
    return [_Request(source, asked, nested) for source, asked in zip(sources, each, strict=True)], several


def _sources(given: Any, are_memories: bool) -> tuple[list[Any], bool]:
    """Contexts or memories one by one, and whether they came as a list."""
    if are_memories:
        alone = isinstance(given, MemorySource)
        memories = [_memory(item) for item in ([given] if alone else given)]
        sources: list[Any] = [memory[index] for memory in memories for index in range(len(memory))]
        several = not alone or len(sources) > 1
    else:
        sources, several = texts_in(given), not isinstance(given, str | os.PathLike)
    if not sources:
        raise ValueError("There is no context: the list is empty.")
    return sources, several


def _memory(given: Any) -> GradMemMemory:
    """A memory as it is, or loaded from where it was saved."""
    if isinstance(given, GradMemMemory):
        return given
    if isinstance(given, str | os.PathLike):
        return GradMemMemory.from_pretrained(given)
    raise TypeError(
        f"memory must be a GradMemMemory, where one was saved, or a list of them, got a {type(given).__name__}."
    )


def _request(item: dict[str, Any]) -> _Request:
    if not isinstance(item, dict):
        raise TypeError(f"Each of the inputs is a dictionary with context and question, got a {type(item).__name__}.")
    requests, _ = _requests(item)
    if len(requests) != 1:
        raise ValueError(f"Each of the inputs has one context, got {len(requests)}: split them into as many inputs.")
    return requests[0]


def _batched(requests: Iterable[_Request], size: int) -> Iterator[list[_Request]]:
    """Lists of at most `size` requests, in which there are either contexts or memories."""
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, got {size}.")
    batch: list[_Request] = []
    for request in requests:
        if batch and (len(batch) == size or _has_memory(request) != _has_memory(batch[0])):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


def _checked(batch: list[_Request], write_options: Sequence[str]) -> list[_Request]:
    if write_options and _has_memory(batch[0]):
        raise ValueError(f"{', '.join(write_options)} would do nothing: a memory was given, nothing is written.")
    return batch


def _has_memory(request: _Request) -> bool:
    return isinstance(request.source, GradMemMemory)


def register() -> None:
    """Make the task known to `transformers.pipeline`."""
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            TASK, pipeline_class=GradMemTextGenerationPipeline, pt_model=AutoModelForCausalLM, type="text"
        )
        # By this mark, saving a pipeline would copy this file into the adapter, and loading it run the copy.
        del GradMemTextGenerationPipeline._registered_impl  # type: ignore[attr-defined]
