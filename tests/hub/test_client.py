"""The Hub, both ways: the real client over HTTP, against a small server on the loopback interface."""

import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants
from transformers import AutoModel, AutoModelForCausalLM

from hf_gradmem import GradMemConfig, GradMemForCausalLM, GradMemMemory, get_gradmem_model
from hf_gradmem.hub.errors import HubError
from tests.support.hub_server import READER_TOKEN, log_in
from tests.support.on_the_hub import (
    ADAPTER,
    ADAPTER_FILES,
    BASE,
    CONTEXT,
    MEMORY,
    QUERY,
    files,
    forget,
    logits,
    push_base,
    pushed_adapter,
)
from tests.support.small_models import EVERY_OPTION, PLAIN, small_tokenizer, with_memory
from tests.support.tiny_models import tiny_causal_lm

# ------------------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize("loader", [GradMemForCausalLM, AutoModel, AutoModelForCausalLM])
def test_pushed_adapter_loaded_elsewhere_writes_and_reads_the_same(hub, hub_base, loader, monkeypatch, tmp_path):
    model = pushed_adapter(hub_base, **EVERY_OPTION)
    assert files(hub, ADAPTER) == ADAPTER_FILES
    assert len(hub.repos[ADAPTER].commits) == 2  # the first is empty: all files come in one commit
    forget(tmp_path / "elsewhere", monkeypatch)
    assert torch.equal(logits(loader.from_pretrained(ADAPTER)), logits(model))


def test_adapter_attaches_to_a_base_in_memory(hub, hub_base):
    model = pushed_adapter(hub_base)
    assert torch.equal(logits(get_gradmem_model(AutoModelForCausalLM.from_pretrained(BASE), ADAPTER)), logits(model))


def test_tokenizer_goes_to_the_hub_and_comes_back(hub, hub_base, monkeypatch, tmp_path):
    get_gradmem_model(hub_base, GradMemConfig(**PLAIN), tokenizer=small_tokenizer(offset=3)).push_to_hub(ADAPTER)
    forget(tmp_path / "elsewhere", monkeypatch)
    assert GradMemForCausalLM.from_pretrained(ADAPTER).tokenizer("abc").input_ids == [19, 20, 21]


def test_a_pushed_tokenizer_takes_the_place_of_the_one_before_it(hub, hub_base):
    model = get_gradmem_model(hub_base, GradMemConfig(**PLAIN), tokenizer=small_tokenizer())
    model.tokenizer.chat_template = "{{ messages }}"
    model.push_to_hub(ADAPTER)
    assert "chat_template.jinja" in files(hub, ADAPTER)
    model.tokenizer = small_tokenizer()
    model.push_to_hub(ADAPTER)
    assert files(hub, ADAPTER) >= {"tokenizer.json", "tokenizer_config.json"}
    assert "chat_template.jinja" not in files(hub, ADAPTER)


def test_tokenizer_of_the_base_is_fetched_with_the_token_and_cache_of_the_adapter(hub, hub_base, monkeypatch, tmp_path):
    pushed_adapter(hub_base)
    small_tokenizer().push_to_hub(BASE)
    hub.repos[BASE].private = hub.repos[ADAPTER].private = True
    revision = HfApi().model_info(BASE).sha
    token = os.environ["HF_TOKEN"]
    log_in(monkeypatch, None)
    options = {"token": token, "cache_dir": tmp_path / "other", "base_model_revision": revision}
    model = GradMemForCausalLM.from_pretrained(ADAPTER, **options)
    assert model.tokenizer("abc").input_ids == [16, 17, 18]
    assert not Path(constants.HF_HUB_CACHE, "models--me--adapter", "snapshots").exists()


def test_revisions_are_branches_and_commits(hub, hub_base):
    first = pushed_adapter(hub_base)
    first_commit = HfApi().model_info(ADAPTER).sha
    second = with_memory(hub_base, **PLAIN | {"num_memory_tokens": 5})
    second.push_to_hub(ADAPTER, revision="wider")
    second.push_to_hub(ADAPTER, commit_message="wider")
    for revision, tokens in (("wider", 5), (first_commit, 3), (None, 5)):
        loaded = AutoModelForCausalLM.from_pretrained(ADAPTER, revision=revision)
        assert loaded.config.num_memory_tokens == tokens
    assert torch.equal(logits(GradMemForCausalLM.from_pretrained(ADAPTER, revision=first_commit)), logits(first))


def test_all_files_of_a_load_come_from_one_commit_and_the_next_load_needs_no_network(
    hub, hub_base, monkeypatch, tmp_path
):
    pushed_adapter(hub_base)
    forget(tmp_path / "elsewhere", monkeypatch)
    AutoModelForCausalLM.from_pretrained(ADAPTER)
    hub.requests.clear()
    AutoModelForCausalLM.from_pretrained(ADAPTER, local_files_only=True)
    assert hub.requests == []
    with pytest.raises(OSError, match="couldn't find them in the cached files"):
        AutoModelForCausalLM.from_pretrained(ADAPTER, local_files_only=True, cache_dir=tmp_path / "empty")


def test_full_checkpoint_replaces_an_adapter_and_its_shards_each_other(hub, hub_base):
    pushed_adapter(hub_base)
    hub_base.requires_grad_(True)
    whole = with_memory(hub_base, **PLAIN)
    whole.base_model.requires_grad_(True)
    whole.push_to_hub(ADAPTER, max_shard_size="20KB")
    assert "model.safetensors" not in files(hub, ADAPTER)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(ADAPTER)), logits(whole))
    whole.push_to_hub(ADAPTER)
    assert {name for name in files(hub, ADAPTER) if "safetensors" in name} == {"model.safetensors"}


def test_private_and_branch_and_tags_reach_the_hub(hub, hub_base):
    with_memory(hub_base, **PLAIN).push_to_hub("adapter", private=True, tags=["ferries"])
    assert hub.repos[ADAPTER].private
    assert b"- ferries" in hub.repos[ADAPTER].files["README.md"]


# ------------------------------------------------------------------------------------------------ the base's commit


def test_adapter_keeps_the_commit_of_its_base_when_the_base_moves_on(hub, hub_base, monkeypatch, tmp_path):
    model = pushed_adapter(hub_base)
    assert model.config.base_model_revision == HfApi().model_info(BASE).sha
    push_base(seed=1)
    forget(tmp_path / "elsewhere", monkeypatch)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(ADAPTER)), logits(model))


def test_base_in_memory_that_moved_on_is_refused_and_the_recorded_commit_is_not(hub, hub_base, monkeypatch, tmp_path):
    model = pushed_adapter(hub_base)
    made_with, now = model.config.base_model_revision, push_base(seed=1)
    forget(tmp_path / "elsewhere", monkeypatch)
    moved = AutoModelForCausalLM.from_pretrained(BASE)
    with pytest.raises(ValueError, match=f"commit {made_with}, but base_model was loaded at {now}: the base has moved"):
        get_gradmem_model(moved, ADAPTER)
    same = AutoModelForCausalLM.from_pretrained(BASE, revision=made_with)
    assert torch.equal(logits(get_gradmem_model(same, ADAPTER)), logits(model))


def test_commit_of_the_base_that_is_gone_is_named_with_the_way_out(hub, hub_base, monkeypatch, tmp_path):
    made_with = pushed_adapter(hub_base).config.base_model_revision
    now = push_base(seed=1)
    del hub.repos[BASE].commits[made_with]
    forget(tmp_path / "elsewhere", monkeypatch)
    with pytest.raises(HubError, match=f"{BASE}, has moved on: commit {made_with}.* base_model_revision='main'"):
        AutoModelForCausalLM.from_pretrained(ADAPTER)
    loaded = AutoModelForCausalLM.from_pretrained(ADAPTER, base_model_revision="main")
    assert torch.equal(loaded.base_model.lm_head.weight, tiny_causal_lm("llama", torch.float32, 1).lm_head.weight)
    assert now


def test_revision_of_the_base_that_was_given_is_recorded_as_its_commit(hub, hub_base):
    sha = HfApi().model_info(BASE).sha
    HfApi().create_branch(BASE, branch="v1")
    push_base(seed=1)
    old = AutoModelForCausalLM.from_pretrained(BASE, revision="v1")
    assert get_gradmem_model(old, GradMemConfig(base_model_revision="v1")).config.base_model_revision == sha


# ------------------------------------------------------------------------------------------------ memories


def test_pushed_memory_is_loaded_bit_for_bit_and_read(hub, hub_base, monkeypatch, tmp_path):
    model = pushed_adapter(hub_base)
    memory = model.write(input_ids=CONTEXT)
    commit = memory.push_to_hub(MEMORY, commit_message="two facts", private=True)
    assert commit.oid in hub.repos[MEMORY].commits
    assert files(hub, MEMORY) == {"memory.safetensors", "README.md"}
    forget(tmp_path / "elsewhere", monkeypatch)
    loaded = GradMemMemory.from_pretrained(MEMORY, revision=commit.oid)
    assert torch.equal(loaded.embeddings, memory.embeddings)
    assert loaded.fingerprint == memory.fingerprint
    elsewhere = AutoModelForCausalLM.from_pretrained(ADAPTER)
    assert torch.equal(elsewhere(input_ids=QUERY, memory=loaded).logits, model(input_ids=QUERY, memory=memory).logits)


def test_memory_pushed_beside_its_adapter_leaves_the_adapters_card(hub, hub_base):
    model = pushed_adapter(hub_base)
    card = hub.repos[ADAPTER].files["README.md"]
    model.write(input_ids=CONTEXT).push_to_hub(ADAPTER, revision="with-memory")
    sha = hub.repos[ADAPTER].branches["with-memory"]
    assert hub.repos[ADAPTER].commits[sha]["README.md"].content == card
    assert torch.equal(
        GradMemMemory.from_pretrained(ADAPTER, revision="with-memory").embeddings,
        model.write(input_ids=CONTEXT).embeddings,
    )


# ------------------------------------------------------------------------------------------------ errors


def test_each_refusal_of_the_hub_is_one_line_of_its_own(hub, hub_base, monkeypatch, tmp_path):
    model = pushed_adapter(hub_base)
    model.write(input_ids=CONTEXT).push_to_hub(MEMORY)
    forget(tmp_path / "elsewhere", monkeypatch)
    repo = hub.repos[MEMORY]

    def refusal(name=MEMORY, **options):
        with pytest.raises(HubError) as error:
            GradMemMemory.from_pretrained(name, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no repository 'me/nothing' on the Hub" in refusal("me/nothing")
    assert "me/memory has no revision 'v9'" in refusal(revision="v9")
    assert "me/adapter is not complete: memory.safetensors is missing" in refusal(ADAPTER)
    assert "not whole in the local Hub cache" in refusal(local_files_only=True)
    assert "does not accept the token (Invalid credentials" in refusal(token="hf_wrong")
    log_in(monkeypatch, None)
    repo.private = True
    assert "or it is private and you are not logged in" in refusal()
    log_in(monkeypatch, READER_TOKEN)
    assert "or it is private and this token may not see it" in refusal()
    repo.private, repo.gated = False, True
    assert f"me/memory is gated: ask for access on {hub.endpoint}/me/memory" in refusal()
    hub.repos[ADAPTER].gated = True
    with pytest.raises(HubError, match="gated"):
        GradMemForCausalLM.from_pretrained(ADAPTER)


def test_refusals_of_a_push_leave_nothing_behind(hub, hub_base, monkeypatch):
    model = pushed_adapter(hub_base)
    commits = len(hub.repos[ADAPTER].commits)
    hub.conflict_next_commit = True
    with pytest.raises(HubError, match="was changed while this was pushed, and nothing was uploaded"):
        with_memory(hub_base, num_memory_tokens=4).push_to_hub(ADAPTER)
    log_in(monkeypatch, READER_TOKEN)
    with pytest.raises(HubError, match="This token may not write to me/adapter"):
        model.push_to_hub(ADAPTER)
    with pytest.raises(HubError, match="This token may not write to me/new"):
        model.push_to_hub("me/new")
    log_in(monkeypatch, None)
    with pytest.raises(HubError, match="You are not logged in"):
        model.push_to_hub("me/new")
    assert "me/new" not in hub.repos
    assert len(hub.repos[ADAPTER].commits) == commits


def test_half_uploaded_adapter_is_refused_before_its_base_is_fetched(hub, hub_base, monkeypatch, tmp_path):
    pushed_adapter(hub_base)
    HfApi().delete_file("model.safetensors", ADAPTER)
    forget(tmp_path / "elsewhere", monkeypatch)
    hub.requests.clear()
    with pytest.raises(OSError, match=r"me/adapter has a config.json but no model.safetensors: .*uploaded by half"):
        AutoModelForCausalLM.from_pretrained(ADAPTER)
    assert not any(BASE in request for request in hub.requests)


def test_hub_out_of_reach_is_said(hub, hub_base, monkeypatch, tmp_path):
    model = with_memory(hub_base, **PLAIN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"The Hub \(http://127.0.0.1:9\) cannot be reached"):
        model.push_to_hub(ADAPTER)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"me/memory is not whole in .*switched off by HF_HUB_OFFLINE"):
        GradMemMemory.from_pretrained(MEMORY)
