"""The configuration of a GradMem model: what is written, how, and over which base decoder."""

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .base.precision import FASTEST
from .losses import LOSSES, weight_name
from .reading.confidence import check_confidence
from .template import check_template, places_memory
from .variants import KINDS, chosen, unread
from .writing.drawn_prompts import WORDS
from .writing.writers import WRITERS

# In a config.json, the save that the file belongs to: of the directory, and not of the model.
SAVE_ID = "save_id"
# Keywords that are not fields of ours but that Transformers itself puts into, or takes out of, a config.json.
_TRANSFORMERS_KEYWORDS = frozenset(
    {
        "attn_implementation",
        "auto_map",
        "distributed_config",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "quantization_config",
        "tie_word_embeddings",
        "torch_dtype",
        "use_cache",
    }
)


# These say how far and how a step is taken, and stay with an adapter whichever way its steps are differentiated.
_NEVER_REFUSED = ("write_learning_rate", "checkpoint_write_steps")


@strict
class GradMemConfig(PreTrainedConfig):
    r"""Configuration of a [`GradMemForCausalLM`] (GradMem, arXiv 2603.13875).

    It is a composite configuration: `text_config` is the configuration of the base decoder.

    Args:
        base_model_name_or_path (`str`, *optional*):
            Hub repository or directory of the frozen base. Without one the base is saved with the adapter.
        base_model_revision (`str`, *optional*):
            Revision of the base on the Hub.
        num_memory_tokens (`int`, defaults to 8):
            Number of memory vectors, m in the paper.
        write_steps (`int`, defaults to 2):
            Number of gradient steps of WRITE, K in the paper. 0 leaves the memory at its learned start.
        write_learning_rate (`float`, defaults to 0.4):
            Step size α, on the *mean* loss over a sample's tokens. 0.4 is the paper's choice for pretrained bases.
        write_loss_reduction (`str`, defaults to `"mean"`):
            `"mean"` or `"sum"`: whether a step descends on the mean loss over a sample's tokens or on their sum. By the
            sum a fact moves the memory as far however many others are written beside it, which is for contexts of
            many sizes; α is then so much smaller. Losses are told as means all the same. For `"sgd"` and
            `"momentum"`: Adam's steps know no scale, nor does a gradient that `write_max_grad_norm` cuts.
        learn_write_learning_rate (`str`, defaults to `"none"`):
            `"per_step"` or `"per_token"` meta-learns one positive step size for each step, or for each step and
            memory token, from `write_learning_rate`. Beyond the trained steps the last goes on with `write_step_decay`.
        write_relative_step_size (`bool`, defaults to `False`):
            Whether α is a share of what is there: in each tensor of the base that a memory fills (the values of one
            layer, say) a step is α times the root mean square of the start's numbers, as the relative step size of
            Adafactor (arXiv 1804.04235). For `"adam"`, whose steps know no scale of their own. The outer gradient takes
            the root mean square for a constant.
        write_step_decay (`float`, defaults to 1.0):
            What the size of a step is multiplied by from one to the next: step k, from 0, is α·dᵏ. Below 1 the memory
            comes to rest, and steps beyond the usual number change little.
        write_optimizer (`str`, defaults to `"sgd"`):
            `"sgd"` (the paper's), `"momentum"` or `"adam"`; each is differentiated through.
        write_betas (`tuple[float, float]`, defaults to `(0.9, 0.9)`):
            Decay of the first moment (momentum and Adam) and of the second (Adam). The second is shorter than Adam's
            usual 0.999 because a write takes a handful of steps.
        write_max_grad_norm (`float`, *optional*):
            Largest norm of one sample's memory gradient; a longer one is scaled down.
        write_grad_clip_value (`float`, *optional*):
            Largest magnitude of one element of the memory gradient.
        meta_gradient (`str`, defaults to `"exact"`):
            How the outer loss is differentiated through the write: `"exact"` (with second-order terms),
            `"finite_difference"` (the same terms from differences of first-order gradients: far leaner, and with the
            base's own attention kernels and activation checkpointing), `"first_order"` (without them) or `"none"` (the
            memory is detached after every step).
        meta_gradient_steps (`int`, *optional*):
            How many of the last steps carry the second-order term. All of them when `None`.
        meta_gradient_radius (`float`, *optional*):
            How far `"finite_difference"` moves a sample's memory to either side, relative to its norm. When `None` it
            follows the precision that the base computes in.
        checkpoint_write_steps (`bool`, defaults to `True`):
            Recompute each step in the backward pass, so that memory does not grow with `write_steps`. `False` keeps
            the graph, which is faster for a small model.
        memory_projection (`bool`, defaults to `False`):
            A trained linear layer P, the identity at the start, between the memory and the decoder.
        write_head (`bool`, defaults to `False`):
            An output head for WRITE alone, started from the base's.
        num_control_tokens (`int`, defaults to 0):
            Trained vectors on either side of the memory: this many in each of `write_start`, `write_end`,
            `read_start` and `read_end`.
        memory_form (`str` or `dict`, defaults to `"input_vectors"`):
            `"input_vectors"`, the paper's: vectors in place of token embeddings. `"key_values"`: keys and values of m
            positions for every layer (appendix J), started from a forward pass of `memory_init`;
            `{"name": "key_values", "write": "values"}` writes the values alone, and `"own_start": True` makes the
            start numbers of its own, `memory_start`.
        write_objective (`str`, defaults to `"reconstruction"`):
            What WRITE descends on.
        write_lora, read_lora (`dict`, *optional*):
            Arguments of a `peft.LoraConfig` that is active in WRITE, or in READ, only: on other layers than the token
            embedding, and without what changes or trains anything else in the base.
        writer (`str`, defaults to `"gradient"`):
            How a context becomes a memory: `"gradient"`, or `"forward"`, the forward-only baseline (RMT): memory
            vectors read back from behind the context, which is read `write_steps` times, whole; or `"pooled"`, the mean
            embeddings of the context's parts. The options of the gradient steps then keep their defaults, and there is
            no reconstruction loss.
        reconstruction_loss_weight (`float`, defaults to 0.5):
            Weight of the last reconstruction loss in the training loss. 0 is the paper's plain objective.
        alignment_loss_weight (`float`, defaults to 0):
            Weight, in the training loss, of 1 − the cosine of WRITE's and READ's gradients at the memory that the last
            step starts from: it draws WRITE to where the answers want the memory. It takes gradient steps on whole
            contexts, and a second derivative of the base in READ whatever `meta_gradient` is. Where `meta_gradient`
            makes the last step first order, WRITE's gradient is a constant, and the term moves READ's gradient alone.
        intermediate_read_loss_weight (`float`, defaults to 0):
            Weight of the answer loss read from the memories between the steps, M_1 to M_{K−1}, in the training loss:
            their mean. One step has none between.
        distillation_loss_weight (`float`, defaults to 0):
            Weight, in the training loss, of KL(p ‖ q) on the label tokens: p is what the plain base says with the
            context's tokens before the query's in its prompt, and q what READ says from the memory. Before the context
            stands what the tokenizer begins texts with; the template's words around it are left out. Memories that were
            written before are read beside their contexts for it.
        write_segment_length (`int`, *optional*):
            Cut contexts that come without segments every so many tokens.
        write_sentence_segments (`bool`, defaults to `False`):
            Cut texts that come without segments into their sentences. With `write_prefix_segments=0` a memory can then
            be asked for what any sentence says, right behind it; a text written whole goes on from its beginning there.
        write_prefix_segments (`int`, defaults to 1):
            How many segments before each one are given to it, unscored. They stand before the memory.
        write_segments_in_turn (`bool`, defaults to `False`):
            Write the segments one after the other, `write_steps` steps each, in place of all together: the memory
            keeps their order, as if each had been appended.
        write_prompt (`str`, defaults to `""`):
            Words between the memory and what is written, unscored: those of READ's question
            (`"Question: Which one?\nQuote:"`), so that the base is asked for what it was taught where it was taught it.
            `{words}` stands for some of the segment's own words, about half of them, drawn anew at each step and
            shuffled, as a question names some (`"Question: {words}?\nQuote:"`). Needs `write_prefix_segments=0`.
        template (`str` or `dict`, defaults to `"plain"`):
            The words around a query, and around a context that stands in a prompt: `"plain"` (none), `"question"`
            (`Question: … Answer:`), `"quote"` (`Question: … Quote:`, upon which the model says the part of the context
            that tells the answer, then `Answer:` and the answer), `"recite"` (the memory is decoded first, and what
            it decodes to stands before `Question: … Answer:`), `"chat"` (a user's turn of the tokenizer's chat
            template, behind the memory), `"chat_inside"` (the same with the memory inside the turn, right before the
            question), or `{"context": "...", "query": "..."}` with `{context}` and `{query}` in them; the words for the
            query may say by `{memory}`, before `{query}`, where the memory stands, and by `{context}` between the two
            that the memory is decoded first, and where that text stands; `"answer_after": "..."` beside them has the
            model quote first, and begins the answer. Training, which has the text itself recited, evaluation, the
            pipeline and the command line put the words around texts; tokens are read as they are, behind the memory
            and what READ has before it, and WRITE takes a context as it is.
        confidence (`dict`, *optional*):
            How `model.answer` makes a confidence of what reading an answer leaves behind: the coefficients that
            `hf-gradmem calibrate` fitted, and the questions that it fitted them on. Without them there is none.
        includes_base (`bool`, defaults to `False`):
            Whether checkpoints hold the base as well; set when the base has no name or was trained, and stays.
        base_model_id (`str`, *optional*):
            In adapters that were saved by earlier versions; nothing reads it.

    Raises:
        ValueError: a value is out of range, or an option is unknown (the nearest known one is named).
    """

    model_type = "gradmem"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama", optional=True)}
    keys_to_ignore_at_inference = ["read_loss", "write_losses", "memory"]

    text_config: dict | PreTrainedConfig | None = None
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    num_memory_tokens: int = 8
    write_steps: int = 2
    write_learning_rate: float | int = 0.4
    write_loss_reduction: Literal["mean", "sum"] = "mean"
    learn_write_learning_rate: Literal["none", "per_step", "per_token"] = "none"
    write_relative_step_size: bool = False
    write_step_decay: float | int = 1.0
    write_optimizer: str = "sgd"
    write_betas: list | tuple = (0.9, 0.9)
    write_max_grad_norm: float | int | None = None
    write_grad_clip_value: float | int | None = None
    meta_gradient: str = "exact"
    meta_gradient_steps: int | None = None
    meta_gradient_radius: float | int | None = None
    checkpoint_write_steps: bool = True
    memory_projection: bool = False
    write_head: bool = False
    num_control_tokens: int = 0
    memory_form: str | dict = "input_vectors"
    write_objective: str = "reconstruction"
    write_lora: dict | None = None
    read_lora: dict | None = None
    writer: str = "gradient"
    reconstruction_loss_weight: float | int = 0.5
    alignment_loss_weight: float | int = 0.0
    intermediate_read_loss_weight: float | int = 0.0
    distillation_loss_weight: float | int = 0.0
    write_segment_length: int | None = None
    write_sentence_segments: bool = False
    write_prefix_segments: int = 1
    write_segments_in_turn: bool = False
    write_prompt: str = ""
    template: str | dict = "plain"
    confidence: dict | None = None
    includes_base: bool = False
    base_model_id: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_unknown(kwargs)
        self.write_betas = tuple(self.write_betas)
        self.write_lora, self.read_lora = _without_sets(self.write_lora), _without_sets(self.read_lora)
        super().__post_init__(**kwargs)
        self._check_values()

    def _refuse_unknown(self, names: Iterable[str]) -> None:
        """`PreTrainedConfig` would keep a misspelt option as an attribute that nothing reads."""
        for name in names:
            if name not in _TRANSFORMERS_KEYWORDS and not name.startswith("_"):
                raise _unknown_option(name)

    def _check_values(self) -> None:
        at_least = {
            "num_memory_tokens": 1,
            "write_steps": 0,
            "num_control_tokens": 0,
            "meta_gradient_steps": 0,
            "write_segment_length": 1,
            "write_prefix_segments": 0,
            **{weight_name(loss): 0 for loss in LOSSES},
        }
        for name, lowest in at_least.items():
            value = getattr(self, name)
            if value is not None and not value >= lowest:  # as NaN is not
                raise ValueError(f"{name} must be at least {lowest}, got {value}.")
        for name in ("write_learning_rate", "write_max_grad_norm", "write_grad_clip_value", "meta_gradient_radius"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be greater than 0, got {value}.")
        if not 0 < self.write_step_decay <= 1:
            raise ValueError(f"write_step_decay must be above 0 and at most 1, got {self.write_step_decay}.")
        if len(self.write_betas) != 2 or not all(
            isinstance(beta, int | float) and 0 <= beta < 1 for beta in self.write_betas
        ):
            raise ValueError(f"write_betas must be two numbers in [0, 1), got {self.write_betas}.")
        check_template(self.template)
        if self.confidence is not None:
            check_confidence(self.confidence)
        self._check_variants()
        self._check_losses()
        form = self.memory_form if isinstance(self.memory_form, str) else self.memory_form.get("name")
        if places_memory(self.template) and form == "key_values":
            raise ValueError(
                f"template={self.template!r} puts words before the memory, and keys and values in the cache stand "
                "before everything else. Use template='chat', or memory_form='input_vectors'."
            )
        if self.write_sentence_segments and self.write_segment_length is not None:
            raise ValueError(
                f"write_sentence_segments=True cuts a text at its sentences, and write_segment_length="
                f"{self.write_segment_length} elsewhere. Leave one of the two at its default."
            )
        if WORDS in self.write_prompt and self.write_prefix_segments:
            raise ValueError(
                f"write_prompt={self.write_prompt!r} puts words of each segment before it, where write_prefix_segments="
                f"{self.write_prefix_segments} would put the segments before. Set write_prefix_segments=0."
            )
        if self.learn_write_learning_rate != "none" and self.write_steps == 0:
            raise ValueError(
                f"learn_write_learning_rate={self.learn_write_learning_rate!r} needs write_steps of at least 1, "
                "got 0: there is no step whose size could be learned."
            )

    def _check_variants(self) -> None:
        """Refuse a choice that there is not, and an option that would be read by nothing."""
        for kind in KINDS:
            chosen(kind, self)
        defaults = {entry.name: entry.default for entry in fields(GradMemConfig) if entry.name not in _NEVER_REFUSED}
        for name, readers in unread(self, defaults):
            raise ValueError(f"{name}={getattr(self, name)!r} belongs to {readers}. Leave it at {defaults[name]!r}.")
        if self.write_lora is not None and not WRITERS[self.writer].runs_base:
            raise ValueError(
                f'write_lora={self.write_lora} is on where WRITE runs the base, and writer="{self.writer}" does not '
                "run it. Leave it at None."
            )

    def _check_losses(self) -> None:
        """Refuse a term of the training loss that the writer leaves nothing for."""
        for loss in LOSSES:
            name, needs = weight_name(loss), set(LOSSES[loss].needs) - {"last_loss"}
            if not getattr(self, name) or not needs:
                continue
            if needs - set(WRITERS[self.writer].leaves):
                able = [f'"{writer}"' for writer in WRITERS if needs <= set(WRITERS[writer].leaves)]
                raise ValueError(
                    f"{name}={getattr(self, name)} is made from the steps of writer={' or '.join(able)}, and "
                    f'writer="{self.writer}" takes none such. Leave it at 0.'
                )
            if self.write_segments_in_turn:
                raise ValueError(
                    f"{name}={getattr(self, name)} needs steps on the whole context, and with "
                    "write_segments_in_turn=True each step is on one segment. Leave one of the two at its default."
                )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As usual; which save the values were read from is no part of the configuration, nor "fastest" a precision."""
        if kwargs.get("dtype") == FASTEST:  # which the Auto classes hand to the model as well, which finds it out
            del kwargs["dtype"]
        # Options that are given beside the dictionary are checked with it: the parent sets them afterwards.
        names = {field.name for field in fields(cls)} - {"dtype", "text_config"}
        given = {name: kwargs.pop(name) for name in names & kwargs.keys()}
        values = {name: value for name, value in config_dict.items() if name != SAVE_ID}
        asked = kwargs.pop("return_unused_kwargs", False)  # by the Auto classes: the rest is the model's
        config, unused = super().from_dict(values | given, return_unused_kwargs=True, **kwargs)
        if asked:
            return config, unused
        config._refuse_unknown(unused)
        return config

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: checkpoints point to the installed package (`auto_map`), and no code is copied into them."""

    def describe_base(self, base_config: PreTrainedConfig, name: str | None) -> None:
        """Record the base that this adapter belongs to.

        A base that has no name cannot be fetched again: checkpoints then include it.
        """
        self.text_config = base_config
        self.base_model_name_or_path = name
        if name is None:
            self.includes_base = True


def _unknown_option(name: str) -> ValueError:
    known = [field.name for field in fields(GradMemConfig)]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return ValueError(f"GradMemConfig has no option {name!r}. The nearest is {nearest!r}.")


@contextmanager
def unknown_options_refused() -> Iterator[None]:
    """For the span of loading a model, whose class is what complains of an option that nobody took on its way.

    Raises:
        ValueError: there is such an option.
    """
    try:
        yield
    except TypeError as error:
        if (unknown := re.search(r"unexpected keyword argument '(\w+)'", str(error))) is None:
            raise
        raise _unknown_option(unknown[1]) from error


def _without_sets(arguments: dict[str, Any] | None) -> dict[str, Any] | None:
    """Arguments with lists for sets, which `peft.LoraConfig.to_dict` has and no config.json can."""
    if arguments is None:
        return None
    return {name: sorted(value) if isinstance(value, set) else value for name, value in arguments.items()}


__all__ = ["GradMemConfig"]
