"""Keys and values for every layer as the memory: its start, its gradients, and every way to read it."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_gradmem import GradMemConfig, GradMemForCausalLM, MemoryStore, get_gradmem_model
from hf_gradmem.base.running import side_by_side
from hf_gradmem.commands.dataset_rows import load_source
from hf_gradmem.commands.write_dataset import write_dataset
from hf_gradmem.training.run import build_trainer, run_training
from tests.support.gradients import SEGMENT_IDS, build, loss_of
from tests.support.small_models import named_base, small_tokenizer
from tests.support.tiny_models import tiny_causal_lm, tiny_config, tiny_tokens
from tests.support.tiny_training import TINY, tiny_recipe
from tests.writing.meta_gradients.test_exact import assert_gradient_is_the_slope

VALUES = {"name": "key_values", "write": "values"}
BOTH = pytest.mark.parametrize("form", ["key_values", VALUES], ids=["both", "values"])
FAMILIES = ["llama", "gpt2", "qwen3", "mistral", "falcon", "gemma2", "deepseek_v3"]


def with_memory(model_type: str = "llama", form=VALUES, **options) -> GradMemForCausalLM:
    torch.manual_seed(0)
    settings = {"num_memory_tokens": 3, "write_steps": 2, "write_learning_rate": 3.0, "memory_form": form}
    return get_gradmem_model(tiny_causal_lm(model_type), GradMemConfig(**settings | options))


@BOTH
@pytest.mark.parametrize("model_type", FAMILIES)
def test_it_starts_as_the_base_running_over_its_vectors(model_type, form):
    """Unwritten keys and values give the logits of the vectors that they were made from, in the place of the memory."""
    model = with_memory(model_type, form)
    query, decoder = tiny_tokens(2, 5), model.decoder
    unwritten = model.write(input_ids=tiny_tokens(2, 4), write_steps=0)
    vectors = torch.cat([model.memory_init, model.memory_init[-1:]]).expand(2, -1, -1)
    with torch.no_grad():
        inputs = side_by_side([decoder.vectors(vectors), decoder.tokens(query, torch.ones_like(query).bool())])
        expected = decoder.logits(inputs)[:, len(vectors[0]) :]
        given = model(input_ids=query, memory=unwritten).logits
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)  # some bases place or weigh in float32


@BOTH
@pytest.mark.parametrize("model_type", FAMILIES)
def test_writing_lowers_the_loss_whatever_the_batch_and_the_padding(model_type, form):
    model = with_memory(model_type, form, write_steps=6)
    ids = tiny_tokens(2, 9)
    alone = [model.write(input_ids=ids[:1]), model.write(input_ids=ids[1:, :6])]
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    for order in (torch.arange(9).expand(2, -1), torch.tensor([list(range(9)), [6, 7, 8, 0, 1, 2, 3, 4, 5]])):
        together = model.write(
            input_ids=ids.gather(1, order), attention_mask=mask.gather(1, order), measure_final_loss=True
        )
        for row, memory in enumerate(alone):
            torch.testing.assert_close(together.embeddings[row], memory.embeddings[0], rtol=1e-4, atol=1e-5)
    assert (together.final_write_loss < together.write_losses[:, 0]).all()


@BOTH
@pytest.mark.parametrize("learned", ["none", "per_token"])
def test_a_relative_step_is_a_share_of_the_starts_size_in_each_tensor(form, learned):
    """Adam's first step is α in every number; relative, it is α times the RMS of what the start has there."""
    settings = {"write_optimizer": "adam", "write_relative_step_size": True, "write_learning_rate": 0.25}
    model = with_memory(form=form, learn_write_learning_rate=learned, **settings)
    memory = model.write(input_ids=tiny_tokens(2, 6), write_steps=1).embeddings
    start = model.form.start(2)
    assert len(model.form.blocks) == (2 if form == VALUES else 4)  # of two layers
    for before, after in zip(start.split(model.form.blocks, -1), memory.split(model.form.blocks, -1), strict=True):
        size = 0.25 * before[0].square().mean().sqrt()
        torch.testing.assert_close((after - before).abs(), size.expand_as(before), rtol=1e-3, atol=1e-6)


def test_relative_steps_are_the_same_in_train_mode():
    """What they are relative to, the base makes of M₀, with dropout off."""
    settings = {"write_relative_step_size": True, "write_learning_rate": 0.25, "memory_form": VALUES}
    config = tiny_config("gpt2")
    config.embd_pdrop = config.resid_pdrop = 0.5
    base = AutoModelForCausalLM.from_config(config)
    model = get_gradmem_model(base, GradMemConfig(num_memory_tokens=3, **settings)).requires_grad_(True)
    ids = tiny_tokens(2, 6)
    expected = model.eval().write(input_ids=ids).embeddings
    torch.testing.assert_close(model.train().write(input_ids=ids).embeddings, expected, rtol=0, atol=0)


@pytest.mark.parametrize("model_type", ["mamba", "rwkv", "recurrent_gemma", "jamba"])
def test_a_base_that_keeps_something_else_is_refused_by_name(model_type):
    with pytest.raises(ValueError, match=r"memory_form='key_values' needs a base .*, which \w+ does not"):
        with_memory(model_type)


def test_more_positions_than_a_sliding_window_keeps_are_refused():
    assert with_memory("mistral", num_memory_tokens=7).decoder.keeps_in_cache(7)
    with pytest.raises(ValueError, match=r"of all 12 positions .* MistralForCausalLM .* smaller num_memory_tokens"):
        with_memory("mistral", num_memory_tokens=12)


@BOTH
@pytest.mark.parametrize("checkpointed", [True, False], ids=["checkpointed", "unrolled"])
def test_the_exact_gradient_is_the_slope(form, checkpointed):
    model = build(
        memory_form=form,
        write_head=True,
        learn_write_learning_rate="per_token",
        write_learning_rate=2.0,
        checkpoint_write_steps=checkpointed,
    )
    model.requires_grad_(True)
    assert_gradient_is_the_slope(model, dict(model.named_parameters()))


@BOTH
@pytest.mark.parametrize("prefix_segments", [0, 1])
def test_finite_differences_agree_with_exact(form, prefix_segments):
    gradients = []
    for mode in ("exact", "finite_difference"):
        model = build(
            memory_form=form, meta_gradient=mode, write_prefix_segments=prefix_segments, write_learning_rate=2.0
        )
        model.requires_grad_(True)
        loss_of(model, segment_ids=SEGMENT_IDS).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert (gradients[1][name] - expected).norm() <= 1e-5 * expected.norm(), name


@BOTH
def test_segments_share_a_row_and_come_out_as_in_rows_of_their_own(form, monkeypatch):
    model = build(memory_form=form, write_prefix_segments=0, write_learning_rate=2.0)
    inputs = {"input_ids": tiny_tokens(2, 9), "segment_ids": SEGMENT_IDS}
    together = model.write(**inputs)
    monkeypatch.setattr(type(model.decoder), "keeps_segments_apart", lambda *arguments: False)
    apart = model.write(**inputs)
    torch.testing.assert_close(together.embeddings, apart.embeddings, rtol=1e-9, atol=1e-9)


@BOTH
@pytest.mark.parametrize("model_type", FAMILIES)
def test_generation_follows_the_forward_pass(model_type, form):
    model = with_memory(model_type, form)
    memory = model.write(input_ids=tiny_tokens(2, 9))
    prompts = tiny_tokens(2, 5)
    for mask in (torch.ones((2, 5), dtype=torch.long), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])):
        out = model.generate(prompts, attention_mask=mask, memory=memory, max_new_tokens=4, do_sample=False)
        for row, real in enumerate(mask.bool()):
            tokens = torch.cat([prompts[row, real], out[row, 5:]])[None]
            logits = model(input_ids=tokens, memory=memory[row]).logits[0]
            assert torch.equal(logits[-5:-1].argmax(-1), out[row, 5:])


def test_the_base_itself_generates_behind_its_cache():
    assert with_memory("llama").decoder.generates_from_cache
    assert with_memory("gpt2").decoder.generates_from_cache


def test_beams_and_several_sequences_repeat_the_memory():
    model = with_memory()
    memory, prompts = model.write(input_ids=tiny_tokens(2, 9)), tiny_tokens(2, 5)
    settings = {"max_new_tokens": 3, "do_sample": False}
    both = model.generate(prompts, memory=memory, num_beams=3, num_return_sequences=2, **settings)
    assert both.shape == (4, 8)
    for row in range(2):
        own = model.generate(
            prompts[row : row + 1], memory=memory[row], num_beams=3, num_return_sequences=2, **settings
        )
        assert torch.equal(both[2 * row : 2 * row + 2], own)


def test_values_alone_leave_the_keys_of_the_start_to_every_memory():
    model = with_memory(form=VALUES)
    memory = model.write(input_ids=tiny_tokens(2, 9))
    both = with_memory(form="key_values")
    assert 2 * memory.embeddings.shape[2] == both.form.width
    with torch.no_grad():
        written = model.read_phase.prefix(memory.embeddings).past
        start = model.read_phase.prefix(model.form.start(2)).past
    for (keys, values), (first_keys, first_values) in zip(written, start, strict=True):
        assert torch.equal(keys, first_keys)
        assert not torch.allclose(values, first_values)


def runs_over_the_start(model: GradMemForCausalLM) -> list[bool]:
    """Grows with each run of the base over the vectors that a memory starts from; True where one keeps a graph."""
    runs: list[bool] = []

    def look(module, arguments, options, output):
        if options.get("use_cache") and options["inputs_embeds"].shape[:2] == (1, 3):
            runs.append(output.last_hidden_state.requires_grad)

    model.base_model.get_decoder().register_forward_hook(look, with_kwargs=True)
    return runs


def test_the_keys_of_the_start_are_made_once_until_something_changes():
    model = with_memory()
    runs, query = runs_over_the_start(model), tiny_tokens(1, 5)

    def answer() -> torch.Tensor:
        memory = model.write(input_ids=tiny_tokens(2, 7))
        with torch.no_grad():
            return model(input_ids=query, memory=memory[:1]).logits

    first = answer()
    torch.testing.assert_close(answer(), first, rtol=0, atol=0)
    assert runs == [False]
    for edited in (model.memory_init, model.base_model.model.layers[0].self_attn.k_proj.weight):
        with torch.no_grad():
            edited.mul_(1.5)
        changed, count = answer(), len(runs)
        assert not torch.allclose(changed, first)
        torch.testing.assert_close(answer(), changed, rtol=0, atol=0)
        assert len(runs) == count
    assert not any(runs)
    count = len(runs)
    loss_of(model).backward()
    assert any(runs[count:])  # in training they have their gradient
    assert model.memory_init.grad.abs().sum() > 0


@BOTH
def test_a_store_and_an_adapter_keep_it(form, tmp_path):
    torch.manual_seed(0)
    config = GradMemConfig(num_memory_tokens=3, memory_form=form)
    model = get_gradmem_model(named_base(tmp_path / "base"), config, tokenizer=small_tokenizer())
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    (tmp_path / "rows.jsonl").write_text('{"context": "thequick"}\n{"context": "fox"}\n', encoding="utf-8")
    write_dataset(loaded, load_source(str(tmp_path / "rows.jsonl"), "train"), tmp_path / "store")
    memory = MemoryStore.from_pretrained(tmp_path / "store")["1"]
    expected = model.write("fox")
    torch.testing.assert_close(memory.embeddings, expected.embeddings, rtol=1e-5, atol=1e-5)
    assert memory.fingerprint == loaded.fingerprint() == model.fingerprint()
    assert f"× {model.form.width} = {3 * model.form.width:,} floats" in (tmp_path / "adapter" / "README.md").read_text(
        encoding="utf-8"
    )


def test_a_memory_of_the_other_form_is_refused():
    vectors = with_memory(form="input_vectors")
    memory = vectors.write(input_ids=tiny_tokens(1, 5))
    with pytest.raises(ValueError, match="It was written by another model"):
        with_memory(form="key_values")(input_ids=tiny_tokens(1, 4), memory=memory)


@BOTH
def test_a_memory_beside_another_start_is_refused(form):
    """READ uses the start as well: the vector behind the memory is made of it, and the keys of values alone."""
    model = with_memory(form=form)
    memory = model.write(input_ids=tiny_tokens(1, 5))
    with torch.no_grad():
        model.memory_init[0, 0] += 1
    with pytest.raises(ValueError, match="the same base, but another start"):
        model(input_ids=tiny_tokens(1, 4), memory=memory)


def test_the_stock_formats_refuse_it(tmp_path):
    torch.manual_seed(0)
    model = get_gradmem_model(named_base(tmp_path / "base"), GradMemConfig(memory_form="key_values"))
    memory = model.write(input_ids=tiny_tokens(1, 5))
    with pytest.raises(ValueError, match="keys and values"):
        model.export_prompt_tuning(memory, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@BOTH
def test_trainer_trains_and_evaluates_it(form, tmp_path):
    recipe = tiny_recipe(
        tmp_path,
        gradmem=TINY["gradmem"] | {"memory_form": form},
        eval_sets={"few": {"num_contexts": 4, "seed": 1}},
        stages=[{"steps": 12}],
        learning_rate=1e-2,
    )
    results = run_training(recipe)
    before = build_trainer(recipe).evaluate()["eval_few_loss"]
    assert results["metrics"]["eval_few_loss"] < 0.9 * before


@BOTH
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_a_start_of_its_own_begins_as_the_bases_and_is_kept_with_the_adapter(model_type, form, tmp_path):
    settings = {"name": "key_values"} if form == "key_values" else form
    plain, own = with_memory(model_type, form), with_memory(model_type, {**settings, "own_start": True})
    own.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(own.memory_start, plain.form.start(1)[0])
    ids = tiny_tokens(2, 6)
    assert torch.equal(own.write(input_ids=ids).embeddings, plain.write(input_ids=ids).embeddings)

    before = own.identity()
    own.form.set_start(torch.randn_like(own.memory_start))
    assert own.identity() != before  # memories of before were written from another start
    own.save_pretrained(tmp_path)
    again = GradMemForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.form.start(1)[0], own.memory_start)
    torch.testing.assert_close(again.write(input_ids=ids).embeddings, own.write(input_ids=ids).embeddings)


@BOTH
def test_a_start_is_made_where_there_was_none(form, tmp_path):
    """What a recipe's `start` asks for: the memory begins as before until it is set, and the adapter keeps it."""
    model = with_memory(form=form)
    expected = model.form.start(1)
    assert model.memory_start is None
    (parameter,) = model.form.start_parameters().values()
    assert parameter is model.memory_start
    assert torch.equal(model.form.start(1), expected)
    model.save_pretrained(tmp_path)
    assert GradMemForCausalLM.from_pretrained(tmp_path).memory_start is not None


def test_a_start_of_its_own_trains_by_itself():
    """The outer gradient of each of its numbers is that of finite differences."""
    model = build(memory_form={**VALUES, "own_start": True})
    assert_gradient_is_the_slope(model, {name: getattr(model, name) for name in ("memory_start", "memory_init")})
