"""The configuration: what is refused, and what the message says."""

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError

from hf_gradmem import GradMemConfig
from tests.support.messages import says


@pytest.mark.parametrize(
    ("option", "nearest"),
    [("write_step", "write_steps"), ("num_mem_tokens", "num_memory_tokens"), ("wlora", "write_lora")],
)
def test_unknown_option_names_the_nearest(option, nearest):
    with pytest.raises(ValueError, match=says(f"no option '{option}'", f"nearest is '{nearest}'")):
        GradMemConfig(**{option: 1})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_memory_tokens": 0}, ("num_memory_tokens must be at least 1, got 0",)),
        ({"write_steps": -2}, ("write_steps must be at least 0, got -2",)),
        ({"write_learning_rate": 0.0}, ("write_learning_rate must be greater than 0, got 0.0",)),
        ({"write_learning_rate": float("nan")}, ("write_learning_rate must be greater than 0, got nan",)),
        ({"write_max_grad_norm": -1.0}, ("write_max_grad_norm must be greater than 0, got -1.0",)),
        ({"write_betas": (0.9, 1.0)}, ("write_betas must be two numbers in [0, 1), got (0.9, 1.0)",)),
        ({"meta_gradient": "second"}, ("meta_gradient must be one of", "'exact'", "'first_order'", "got 'second'")),
        ({"write_step_decay": 0.0}, ("write_step_decay must be above 0 and at most 1, got 0.0",)),
        ({"write_step_decay": 1.5}, ("write_step_decay must be above 0 and at most 1, got 1.5",)),
        ({"meta_gradient_radius": 0.0}, ("meta_gradient_radius must be greater than 0, got 0.0",)),
        ({"write_optimizer": "rmsprop"}, ("write_optimizer must be one of", "'sgd'", "got 'rmsprop'")),
        ({"writer": "rmt"}, ("writer must be one of", "'forward'", "got 'rmt'")),
        (
            {"writer": "forward", "write_head": True},
            ('write_head=True belongs to writer="gradient"', "Leave it at False"),
        ),
        ({"learn_write_learning_rate": "per_step", "write_steps": 0}, ("'per_step' needs write_steps of at least 1",)),
        ({"write_segment_length": 0}, ("write_segment_length must be at least 1, got 0",)),
    ],
    ids=str,
)
def test_option_out_of_range(options, expected):
    with pytest.raises(ValueError, match=says(*expected)):
        GradMemConfig(**options)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("num_memory_tokens", "8", "int"),
        ("num_memory_tokens", 8.0, "int"),
        ("write_steps", None, "int"),
        ("write_learning_rate", "fast", "float"),
        ("memory_projection", "yes", "bool"),
        ("write_lora", ["q_proj"], "dict"),
    ],
)
def test_option_of_another_type(option, value, expected):
    with pytest.raises(StrictDataclassFieldValidationError, match=says(option, "expected", expected, str(value))):
        GradMemConfig(**{option: value})
