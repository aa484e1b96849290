"""GradMem in the style of its authors' published code, to measure against; written for this comparison, not copied.

What it shares with theirs, and [`hf_gradmem`] avoids: eager attention, logits of every position, the graph of all K
WRITE steps kept, gradients enabled for the whole base, and the same graph built when nothing is trained. It passes the
golden cases (`tests/test_reference_style.py`), so what it computes is what they compute.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

Tensor = torch.Tensor


@dataclass(frozen=True)
class ReferenceSettings:
    """The authors' options, under this package's names (see [`hf_gradmem.GradMemConfig`])."""

    num_memory_tokens: int = 8
    write_steps: int = 2
    write_learning_rate: float = 0.4
    second_order: bool = True
    second_order_steps: int | None = None
    max_grad_norm: float | None = None
    num_control_tokens: int = 0
    memory_projection: bool = False
    write_head: bool = False
    reconstruction_loss_weight: float = 0.0


class ReferenceStyle(nn.Module):
    """A base with a memory; parameters are named as in the golden cases.

    Args:
        base: a decoder loaded with `attn_implementation="eager"`; all of it is given a gradient.
        settings: what to write, and how.
    """

    def __init__(self, base: PreTrainedModel, settings: ReferenceSettings) -> None:
        super().__init__()
        self.model, self.settings = base.requires_grad_(True), settings
        embeddings = base.get_input_embeddings().weight
        width = embeddings.shape[1]

        def vectors(count: int) -> nn.Parameter:
            noise = torch.randn(count, width, dtype=embeddings.dtype, device=embeddings.device)
            return nn.Parameter(embeddings.detach().mean(0) + embeddings.detach().std() * noise)

        like = {"dtype": embeddings.dtype, "device": embeddings.device}
        self.mem = vectors(settings.num_memory_tokens)
        self.mem_proj = nn.Linear(width, width, **like) if settings.memory_projection else None
        self.write_head = nn.Linear(width, len(embeddings), bias=False, **like) if settings.write_head else None
        for name in ("write_st", "write_end", "read_st", "read_end"):
            setattr(self, name, vectors(settings.num_control_tokens) if settings.num_control_tokens else None)

    def write(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Memory after K steps and each sample's loss before the last; contexts `(batch, length)` are right-padded."""
        settings = self.settings
        second_order_steps = settings.second_order_steps
        second_order_steps = settings.write_steps if second_order_steps is None else second_order_steps
        memory = self.mem.expand(len(input_ids), -1, -1)
        with torch.enable_grad():
            for step in range(settings.write_steps):
                second_order = settings.second_order and step >= settings.write_steps - second_order_steps
                losses = self._write_losses(memory, input_ids, attention_mask)
                (gradient,) = torch.autograd.grad(losses.sum(), memory, create_graph=second_order, retain_graph=True)
                if settings.max_grad_norm is not None:
                    norm = gradient.flatten(1).norm(dim=1)
                    gradient = gradient * (settings.max_grad_norm / (norm + 1e-6)).clamp(max=1)[:, None, None]
                memory = memory - settings.write_learning_rate * gradient
        return memory, losses

    def _write_losses(self, memory: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits = self._logits(memory, (self.write_st, self.write_end), input_ids, attention_mask, self.write_head)
        token_losses = functional.cross_entropy(logits.transpose(1, 2), input_ids, reduction="none")
        return (token_losses * attention_mask).sum(1) / attention_mask.sum(1)

    def _logits(
        self,
        memory: Tensor,
        control: tuple[Tensor | None, Tensor | None],
        input_ids: Tensor,
        attention_mask: Tensor,
        head: nn.Linear | None = None,
    ) -> Tensor:
        """Logits `(batch, length, vocab)`; position j predicts token j."""
        memory = memory if self.mem_proj is None else self.mem_proj(memory)
        start, end = (None if part is None else part.expand(len(memory), -1, -1) for part in control)
        prefix = torch.cat([part for part in (start, memory, end) if part is not None], dim=1)
        embeds = torch.cat([prefix, self.model.get_input_embeddings()(input_ids)], dim=1)
        mask = torch.cat([attention_mask.new_ones(prefix.shape[:2]), attention_mask], dim=1)
        output = self.model(
            inputs_embeds=embeds, attention_mask=mask, use_cache=False, output_hidden_states=head is not None
        )
        logits = output.logits if head is None else head(output.hidden_states[-1])
        return logits[:, prefix.shape[1] - 1 : -1]

    def forward(
        self,
        context_input_ids: Tensor,
        context_attention_mask: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The outer loss, the logits that predict each query token, the memory, and the last losses of WRITE."""
        memory, write_losses = self.write(context_input_ids, context_attention_mask)
        logits = self._logits(memory, (self.read_st, self.read_end), input_ids, attention_mask)
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        return loss + self.settings.reconstruction_loss_weight * write_losses.mean(), logits, memory, write_losses
