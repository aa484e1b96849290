"""Every causal language model of the installed Transformers, as a tiny random model."""

import pytest

from tests.support.architectures import OWN_LIMITS, outcome
from tests.support.tiny_models import CAUSAL_LM_MODEL_TYPES, UNBUILDABLE

# A few families of different kinds are checked by the fast tests; the whole list takes some minutes.
QUICK = {"llama", "gpt2", "mamba", "mixtral", "gemma3", "gemma4_text", "falcon_h1", "opt"}


@pytest.mark.parametrize(
    "model_type",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CAUSAL_LM_MODEL_TYPES],
)
def test_architecture(model_type):
    result = outcome(model_type)
    expected = "not built" if model_type in UNBUILDABLE else "own limit" if model_type in OWN_LIMITS else "passed"
    assert result.startswith(expected), result
    if expected != "passed":
        pytest.skip(result)
