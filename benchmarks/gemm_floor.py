"""The floor under WRITE and training: their matrix products alone, timed bare.

Nothing else is done here: no norm, no softmax, no autograd, no allocation.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

Tensor = torch.Tensor

# Positions at a time: what fits the caches no worse than all at once, and keeps the head's products small.
_BLOCK = 512

# How often each weight is multiplied: with activations, with their gradients, and the two with one another for its own
# gradient. The outer backward pass goes through both passes of a step, hence twice two products more.
# No gradient of a frozen weight is formed.
WRITE_STEP = FROZEN_READ = (1, 1, 0)
SECOND_ORDER_STEP, FROZEN_SECOND_ORDER_STEP = (2, 2, 2), (2, 2, 0)
TRAINED_READ = (1, 1, 1)


def weight_products(
    base: PreTrainedModel, positions: int, scored: int, times: tuple[int, int, int] = WRITE_STEP
) -> Callable[[], None]:
    """The products with the base's weights.

    Args:
        base: a decoder made of `nn.Linear` layers.
        positions: rows × length, memory included.
        scored: positions that the output head is applied to.
        times: of each kind, one of the above.
    """
    layers = [(module.weight, positions) for module in base.get_decoder().modules() if isinstance(module, nn.Linear)]
    work = [*layers, (base.get_output_embeddings().weight, scored)]
    buffers = {}
    for weight, _ in work:
        buffers.setdefault(
            weight.shape,
            (weight.new_zeros(_BLOCK, weight.shape[1]), weight.new_zeros(_BLOCK, weight.shape[0]), weight.clone()),
        )

    @torch.no_grad()
    def run() -> None:
        for weight, rows in work:
            inputs, outputs, of_weight = buffers[weight.shape]
            for start in range(0, rows, _BLOCK):
                size = min(_BLOCK, rows - start)
                for _ in range(times[0]):
                    torch.mm(inputs[:size], weight.T, out=outputs[:size])
                for _ in range(times[1]):
                    torch.mm(outputs[:size], weight, out=inputs[:size])
                for _ in range(times[2]):
                    torch.mm(outputs[:size].T, inputs[:size], out=of_weight)

    return run


def attention_products(base: PreTrainedModel, rows: int, length: int) -> Callable[[], None]:
    """The products of one step inside causal attention: two forward, four backward, the masked half left out."""
    config = base.config
    shape = (rows * config.num_attention_heads, length, config.head_dim)
    queries, keys = (torch.zeros(shape, dtype=base.dtype, device=base.device) for _ in range(2))
    scores = torch.zeros((shape[0], min(_BLOCK, length), length), dtype=base.dtype, device=base.device)

    @torch.no_grad()
    def run() -> None:
        for _ in range(config.num_hidden_layers):
            for start in range(0, length, _BLOCK):
                stop = min(start + _BLOCK, length)
                part, seen = queries[:, start:stop], keys[:, :stop]
                for _ in range(2):  # q·kᵀ and p·v; then the gradient of p
                    weights = torch.bmm(part, seen.mT, out=scores[:, : stop - start, :stop])
                for _ in range(2):  # of the output; of q
                    torch.bmm(weights, seen)
                for _ in range(2):  # of v and of k
                    torch.bmm(weights.mT, part)

    return run
