"""What a forward pass gives."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from ..memory.written import GradMemMemory

Tensor = torch.Tensor


@dataclass
class GradMemOutput(ModelOutput):
    """Output of [`GradMemForCausalLM`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*):
            `read_loss` plus the further terms of the training loss times their weights (`reconstruction_loss_weight`,
            `alignment_loss_weight`, `intermediate_read_loss_weight`, `distillation_loss_weight`), given labels. Without
            a query L(M_K; C), the mean over the contexts of the reconstruction loss after the last step, in nats per
            token.
        logits (`torch.FloatTensor` of shape `(..., query_length, vocab_size)`, *optional*):
            Aligned with `input_ids`: position i predicts token i + 1. Meaningless at padding.
        read_loss (`torch.FloatTensor` of shape `()`, *optional*):
            Mean cross-entropy over the label tokens of the batch.
        write_losses (`torch.FloatTensor` of shape `(batch, write_steps)`, *optional*):
            Each context's reconstruction loss before each step, detached. `None` when a memory was given.
        memory ([`GradMemMemory`]):
            What was read, or written.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    read_loss: Tensor | None = None
    write_losses: Tensor | None = None
    memory: GradMemMemory | None = None
