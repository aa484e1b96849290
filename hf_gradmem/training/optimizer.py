"""What `Trainer` steps with: its own optimizer, with a group for the step sizes, and Muon for a base's matrices."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Muon, Optimizer
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import get_parameter_names

from ..base.lora import base_keys
from ..modeling_gradmem import GradMemForCausalLM


class JoinedOptimizer(Optimizer):
    """Several optimizers, each with parameters of its own, that are one to `Trainer` and its learning-rate schedule.

    Args:
        parts: the optimizers; their groups are this one's, in order.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: None = None) -> None:  # type: ignore[override] # Trainer has no closure
        """One step of each."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """That of each part."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what [`state_dict`] gave, into the same parts."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]  # loading made new ones


def build_optimizer(
    model: GradMemForCausalLM,
    training: TrainingArguments,
    step_size_learning_rate: float | None = None,
    muon_learning_rate: float | None = None,
) -> Optimizer:
    """Trainer's optimizer, with a group of its own for the learned step sizes: they live in log space.

    Weight decay spares biases, norms, embeddings, vectors beside the base and step sizes. Experts that a base keeps in
    one tensor are decayed, and trained by the optimizer of the rest where Muon trains the matrices.

    Args:
        model: what is trained, every parameter of it that has `requires_grad`.
        training: the optimizer's kind, learning rate and weight decay.
        step_size_learning_rate: that of the step sizes; `training.learning_rate` by default.
        muon_learning_rate: where given, the matrices of the base's layers go to Muon (Jordan et al., 2024) at this
            rate, its step scaled to the size of AdamW's (Liu et al., 2025).
    """
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(training, model)
    outside_embeddings = set(get_parameter_names(model, [torch.nn.Embedding]))
    own_vectors = dict(model.named_parameters(recurse=False))
    with_muon = set()
    if muon_learning_rate is not None:
        head = getattr(model.base_model.get_output_embeddings(), "weight", None)
        base = base_keys(model)
        with_muon = {parameter for name, parameter in model.named_parameters() if name in base} - {head}
    groups: dict[str, list[torch.nn.Parameter]] = {"decayed": [], "plain": [], "step sizes": [], "muon": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.dim() >= 2 and name in outside_embeddings and name not in own_vectors
            if parameter is model.write_log_learning_rate:
                kind = "step sizes"
            elif decayed:
                kind = "muon" if parameter in with_muon and parameter.dim() == 2 else "decayed"
            else:
                kind = "plain"
            groups[kind].append(parameter)
    step_rate = training.learning_rate if step_size_learning_rate is None else step_size_learning_rate
    settings = {
        "decayed": {"weight_decay": training.weight_decay},
        "plain": {"weight_decay": 0.0},
        "step sizes": {"weight_decay": 0.0, "lr": step_rate},
    }
    beside = [{"params": groups[kind], **settings[kind]} for kind in settings if groups[kind]]
    parts: list[torch.optim.Optimizer] = [optimizer_class(beside, **options)] if beside else []
    if muon_learning_rate is not None and groups["muon"]:
        parts.append(Muon(groups["muon"], muon_learning_rate, training.weight_decay, adjust_lr_fn="match_rms_adamw"))
    return parts[0] if len(parts) == 1 else JoinedOptimizer(parts)
