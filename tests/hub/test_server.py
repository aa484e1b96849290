"""The server of the tests itself."""

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForCausalLM

from tests.support.on_the_hub import BASE, push_base


@pytest.fixture
def base(hub):
    """A base on the hub, loaded from there."""
    push_base(seed=0)
    return AutoModelForCausalLM.from_pretrained(BASE)


def test_the_server_refuses_what_the_hub_would(hub, base):
    """What the other tests rest on: a stale parent and an upload of other bytes are refused by the server itself."""
    with pytest.raises(HfHubHTTPError, match="412"):
        HfApi().upload_file(
            path_or_fileobj=b"x", path_in_repo="x", repo_id=BASE, parent_commit=next(iter(hub.repos[BASE].commits))
        )
