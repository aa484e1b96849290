"""What of Trainer's arguments goes past the loss of the model."""

from transformers import TrainingArguments


def check_loss_is_the_models(arguments: TrainingArguments) -> None:
    """Refuse arguments by which `Trainer` computes a loss of its own.

    With label smoothing it takes the labels away, calls the model without them and scores its logits against them
    unshifted: another loss, which leaves out the reconstruction as well. The model cannot tell such a call from one
    that asks for logits alone.

    Raises:
        ValueError: `label_smoothing_factor` is set.
    """
    if arguments.label_smoothing_factor != 0:
        raise ValueError(
            f"label_smoothing_factor={arguments.label_smoothing_factor} makes Trainer compute a loss of its own, on "
            "labels that are not shifted and without the reconstruction loss. Leave it at 0."
        )
