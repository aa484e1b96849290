"""The modes that a base is run in, and that they are left again."""

import pytest

from hf_gradmem.base.modes import weights_frozen
from tests.support.writing import build


def test_frozen_weights_train_again_after_an_error():
    model = build()
    model.base_model.requires_grad_(True)
    model.memory_init.requires_grad_(False)

    def fail():
        with weights_frozen(model):
            assert not any(parameter.requires_grad for parameter in model.parameters())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(parameter.requires_grad for parameter in model.base_model.parameters())
    assert not model.memory_init.requires_grad
