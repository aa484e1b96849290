"""What every test starts from."""

import logging
import os

# One thread for each of the workers that share the machine; nothing is fetched from anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from hf_gradmem.base import output_head
from hf_gradmem.writing import rows as context_rows
from tests.support.hub_server import running_hub, use_hub
from tests.support.on_the_hub import BASE, push_base
from tests.support.small_models import named_base

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def server():
    with running_hub() as hub:
        yield hub


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    """An empty hub, and a client that is logged in as the owner of `me/...`."""
    for held in (server.repos, server.objects, server.requests):
        held.clear()
    use_hub(monkeypatch, server, tmp_path / "home")
    return server


@pytest.fixture
def hub_base(hub):
    """A base on the hub, loaded from there."""
    push_base(seed=0)
    return AutoModelForCausalLM.from_pretrained(BASE)


@pytest.fixture
def base(tmp_path):
    """A base that was loaded from a directory, and so has a name."""
    return named_base(tmp_path / "base")


@pytest.fixture
def small_parts(monkeypatch):
    """A few positions at a time and groups of few rows, so that the pieces are many."""
    monkeypatch.setattr(output_head, "_LOGITS_AT_ONCE", {"cpu": 1})
    monkeypatch.setattr(output_head, "_FEWEST_POSITIONS", 4)
    monkeypatch.setattr(context_rows, "_POSITIONS_AT_ONCE", 20)
    monkeypatch.setattr(context_rows, "_PADDING_WORTH_A_RUN", 2)


@pytest.fixture
def transformers_warnings():
    """Messages at warning level and above that Transformers logs."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)
