"""From contexts to memories: in batches of contexts of about one length, or as part of a forward pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from tqdm.auto import tqdm

from ..base.asked import asking
from ..base.modes import evaluating
from ..memory.fingerprint import Identity
from ..memory.written import GradMemMemory
from .contexts import Contexts
from .out_of_memory import IN_EVALUATION, IN_TRAINING, out_of_memory_explained
from .rows import ContextRows
from .writers.writer import Descent, Kept, Writer, WriteTrace

Tensor = torch.Tensor


def write_contexts(
    writer: Writer,
    contexts: Contexts,
    *,
    identity: Identity,
    start: GradMemMemory | None = None,
    write_steps: int | None = None,
    write_learning_rate: float | None = None,
    tolerance: float | None = None,
    batch_size: int | None = None,
    measure_final_loss: bool = False,
    show_progress: bool = False,
    on_batch: Callable[[int], object] = lambda size: None,
    on_step: Callable[[], object] = lambda: None,
) -> GradMemMemory:
    """Write contexts into memories, without a graph and with dropout off, whatever mode the caller is in.

    Args:
        writer: what writes them.
        contexts: what to write.
        identity: of the model.
        start: memories of this model to go on from, one for each context, in place of the learned start.
        write_steps, write_learning_rate, tolerance, batch_size, measure_final_loss, show_progress: as in
            [`GradMemForCausalLM.write`].
        on_batch: called with the size of each batch that was written.
        on_step: called after each step of each batch; what it raises ends the write.

    Returns:
        The memories, in the order of `contexts`.

    Raises:
        ValueError: a context is empty or too long, an option is out of range, or the writer cannot go on from `start`.
        FloatingPointError: a loss became NaN or infinite; names the context.
    """
    _check_options(batch_size, tolerance)
    with torch.inference_mode(False), torch.enable_grad(), evaluating():
        contexts = _checked(writer, contexts)
        start = None if start is None else _own(writer, start, len(contexts))
        step_sizes = writer.step_sizes(write_steps, write_learning_rate)
        # Contexts of about one length share a batch, so that the padding of the longest is not computed for the rest.
        order = contexts.mask.sum(1).argsort(descending=True, stable=True)
        batches = order.split(batch_size or len(contexts))
        rows = [writer.rows(contexts.take(batch)) for batch in batches]
        written = []
        with (
            out_of_memory_explained(
                f"Lower batch_size (now {batch_size or len(contexts)} contexts), or cut the contexts shorter with "
                "write_segment_length, which is also the longest row that is held at a time."
            ),
            _progress(sum(map(writer.turns, rows)) * len(step_sizes), show_progress, on_step) as stepped,
        ):
            descent = Descent(step_sizes, tolerance=tolerance, on_step=stepped)
            for batch, of_batch in zip(batches, rows, strict=True):
                begin = None if start is None else start[batch]
                trace = writer.write(of_batch, _start(writer, of_batch, begin), descent)
                _check_finite(trace, batch, step_sizes)
                written.append(_as_memory(writer, trace, of_batch, begin, identity, measure_final_loss))
                on_batch(len(batch))
        return GradMemMemory.cat(written)[order.argsort()]


def write_at_steps(
    writer: Writer, contexts: Contexts, write_steps: Sequence[int], *, identity: Identity
) -> dict[int, GradMemMemory]:
    """The memories after each of several numbers of steps, in the time of the largest where that is possible.

    A shorter write is the beginning of a longer one, unless the segments of a context are written in turn: each of them
    takes all its steps before the next, so that every number of steps is a write of its own.

    Args:
        writer: what writes them.
        contexts: what to write, in one batch.
        write_steps: the numbers of steps.
        identity: of the model.

    Raises:
        ValueError, FloatingPointError: as in [`write_contexts`].
    """
    with torch.inference_mode(False), torch.enable_grad(), evaluating(), out_of_memory_explained(IN_EVALUATION):
        contexts = _checked(writer, contexts)
        rows = writer.rows(contexts)
        if writer.turns(rows) > 1 or "memories" not in writer.leaves:
            return {
                steps: write_contexts(writer, contexts, identity=identity, write_steps=steps) for steps in write_steps
            }
        step_sizes = writer.step_sizes(max(write_steps), None)
        trace = writer.write(rows, _start(writer, rows), Descent(step_sizes, keep=("memories",)))
        _check_finite(trace, torch.arange(len(contexts)), step_sizes)
        parts = {
            steps: WriteTrace(trace.memories[steps], trace.losses[:, :steps], last_loss=None) for steps in write_steps
        }
        return {steps: _as_memory(writer, part, rows, None, identity, False) for steps, part in parts.items()}


def write_in_forward(
    writer: Writer,
    contexts: Contexts,
    write_steps: int | None,
    *,
    keep: tuple[Kept, ...],
    identity: Callable[[], Identity],
    measure_final_loss: bool = False,
) -> tuple[WriteTrace, GradMemMemory]:
    """WRITE as part of a forward pass: differentiated through if, and only if, gradients are enabled.

    Args:
        writer: what writes them.
        contexts: what to write.
        write_steps: the configuration's when `None`.
        keep: what of the trace the outer loss has a use for.
        identity: of the model; a memory that is differentiated through has none.
        measure_final_loss: also measure L(M_K; C), with its graph where gradients are enabled.

    Raises:
        ValueError: a context is empty or too long, or what trains would get no gradient.
    """
    differentiate = torch.is_grad_enabled()
    advice = IN_EVALUATION
    if differentiate:
        writer.check_trainable()
        advice = f"Set checkpoint_write_steps=True. {IN_TRAINING}" if writer.keeps_graph else IN_TRAINING
    alone = nullcontext() if differentiate else asking(recomputes=False)
    with torch.inference_mode(False), torch.enable_grad(), out_of_memory_explained(advice), alone:
        rows = writer.rows(_checked(writer, contexts))
        descent = Descent(writer.step_sizes(write_steps, None), differentiate, keep)
        trace = writer.write(rows, _start(writer, rows, differentiate=differentiate), descent)
        with torch.set_grad_enabled(differentiate):
            final_loss = writer.objective(rows).first_order(trace.memory) if measure_final_loss else None
    fingerprint, base_name = (None, None) if differentiate else identity()
    memory = GradMemMemory(
        embeddings=trace.memory if differentiate else trace.memory.detach(),
        write_losses=trace.losses,
        segment_lengths=rows.segment_lengths,
        final_write_loss=final_loss,
        fingerprint=fingerprint,
        base_name=base_name,
    )
    return trace, memory


def _check_options(batch_size: int | None, tolerance: float | None) -> None:
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if tolerance is not None and not tolerance >= 0:  # NaN is not
        raise ValueError(f"tolerance must be at least 0, which never stops, got {tolerance}.")


def _checked(writer: Writer, contexts: Contexts) -> Contexts:
    decoder = writer.phase.decoder
    return contexts.checked(decoder.device, decoder.vocab_size)


def _own(writer: Writer, memory: GradMemMemory, count: int) -> GradMemMemory:
    """A memory to go on from, as values that are nobody else's, on the model's device and in its precision."""
    if len(memory) != count:
        raise ValueError(f"memory holds {len(memory)} contexts, but {count} are to be written on from it.")
    own = memory.to(writer.phase.decoder.device)
    own.embeddings = own.embeddings.detach().clone().to(writer.phase.module.memory_init.dtype)
    return own


def _start(
    writer: Writer, rows: ContextRows, begin: GradMemMemory | None = None, differentiate: bool = False
) -> Tensor:
    if begin is not None:
        if not writer.runs_base:
            raise ValueError(
                f'writer="{writer.phase.module.config.writer}" makes a memory of the context alone and cannot go on '
                "from another. Leave memory out, and write both texts as one context."
            )
        return begin.embeddings
    with torch.set_grad_enabled(differentiate):
        return writer.phase.form.start(len(rows.segment_lengths)).clone()  # a memory without steps is its own as well


def _as_memory(
    writer: Writer,
    trace: WriteTrace,
    rows: ContextRows,
    begin: GradMemMemory | None,
    identity: Identity,
    measure_final_loss: bool,
) -> GradMemMemory:
    memory = trace.memory.detach()
    final_loss = None
    if measure_final_loss:
        with torch.no_grad():
            final_loss = writer.objective(rows).first_order(memory)
    lengths = rows.segment_lengths
    return GradMemMemory(
        embeddings=memory,
        write_losses=trace.losses.detach(),
        segment_lengths=lengths if begin is None else torch.cat([begin.segment_lengths, lengths], dim=1),
        final_write_loss=final_loss,
        fingerprint=identity.fingerprint,
        base_name=identity.base_name,
    )


def _check_finite(trace: WriteTrace, batch: Tensor, step_sizes: list[Tensor | float]) -> None:
    broken = (~trace.memory.isfinite().flatten(1).all(dim=1)).nonzero()
    if len(broken) and not step_sizes:
        raise FloatingPointError(
            f"The memory that context {int(batch[broken].min())} is to be written into holds NaN or infinite numbers, "
            "and no step was taken. Give another memory to go on from, or load the model again."
        )
    if len(broken):
        raise FloatingPointError(
            f"The reconstruction of context {int(batch[broken].min())} became NaN or infinite within "
            f"{len(step_sizes)} write steps. Lower write_learning_rate (the first step is "
            f"{float(torch.as_tensor(step_sizes[0]).detach().max()):g} at most), or set write_max_grad_norm in the "
            "configuration."
        )


@contextmanager
def _progress(total: int, shown: bool, then: Callable[[], object]) -> Iterator[Callable[[Tensor], None]]:
    """A progress bar over the steps, as what is called after each of them, and calls `then`."""
    with tqdm(total=total, desc="Writing", unit="step", disable=not shown) as bar:

        def stepped(losses: Tensor) -> None:
            bar.update()
            if shown:  # reading the loss waits for the device
                bar.set_postfix(loss=f"{losses.nanmean():.3f}")
            then()

        yield stepped
