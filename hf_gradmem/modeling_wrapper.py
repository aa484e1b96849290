"""A `PreTrainedModel` around another one: what Transformers, `Trainer` and the Hub look for on a model.

It stands in for its base (`modeling_base.py`), is saved and loaded as an adapter beside it, and is compiled in parts.
"""

import functools
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import CommitInfo, ModelCard
from torch import nn
from transformers import PreTrainedTokenizerBase

from .base.lora import base_keys, check_head_without_lora, check_savable, lora_scalings, others_on
from .base.weights import base_weights
from .checkpoint import adapter as checkpoint
from .checkpoint.base_model import load_base, load_base_tokenizer, recorded_base
from .checkpoint.model_card import model_card
from .checkpoint.run_facts import CardFacts
from .checkpoint.stored_base import differs_from_stored
from .checkpoint.whole_save import check_apart, whole_save
from .configuration_gradmem import GradMemConfig
from .exports import cartridge, prompt_embeds, prompt_tuning
from .exports.export import StockPrefix, stock_prefix
from .hub.cards import gives_way, keeps_card, local_id, write_card
from .hub.client import CARD_FILE, folder_files, prepare_repository, push_files, remote_card
from .memory.fingerprint import Identity, WriterFingerprint, check_memory, shown_name
from .memory.form import MemoryForm
from .memory.phase import Phase
from .memory.written import GradMemMemory
from .modeling_base import ModelAroundBase
from .writing.writers.writer import Writer


def compiled_in_parts(forward: Callable) -> Callable:
    """Have `torch.compile(model)` do what `model.compile()` does: as one graph, WRITE has no second derivative."""

    @torch.compiler.disable
    def compile_and_run(model: "GradMemPreTrainedModel", *args: Any, **kwargs: Any) -> Any:
        if model._compiled is None:
            model.compile()
        return forward(model, *args, **kwargs)

    @functools.wraps(forward)
    def run(model: "GradMemPreTrainedModel", *args: Any, **kwargs: Any) -> Any:
        kwargs = {name: value for name, value in kwargs.items() if value is not None}  # PEFT names what it leaves out
        return (compile_and_run if torch.compiler.is_compiling() else forward)(model, *args, **kwargs)

    return run


class GradMemPreTrainedModel(ModelAroundBase):
    """What Transformers asks of a model around another; a subclass sets the base and the objects that run it.

    Attributes:
        card_facts: what the model card says of training and results; a training callback sets it.
    """

    config: GradMemConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    form: MemoryForm
    memory_init: nn.Parameter
    write_phase: Phase
    read_phase: Phase
    writer: Writer
    card_facts: CardFacts | None = None
    _compared: tuple[tuple, bool] | None = None  # a base, and whether it has other weights than its name stands for
    _compiled: tuple[tuple, dict[str, Any]] | None = None  # the arguments of `compile`, once it was called

    def __init__(self, config: GradMemConfig) -> None:
        super().__init__(config)
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._fingerprint = WriterFingerprint()
        self._place: dict[str, Any] = {}  # where the adapter was loaded from, for what is fetched later

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Resize the base's vocabulary, and the write head with it: it keeps its rows and takes the base's new ones.

        The base is then no longer the one its name stands for, so checkpoints include it from here on.
        """
        check_head_without_lora(self.base_model)
        before = self.decoder.vocab_size
        embeddings = self.base_model.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.config.includes_base = self.config.includes_base or self.decoder.vocab_size != before
        self.config.text_config = self.base_model.config
        self.write_phase.resize_head()
        return embeddings

    # ------------------------------------------------------------------------------------------------ compiling

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile, in place, what training spends its time on; the results are the same but for rounding.

        With `meta_gradient="exact"` that is WRITE's step together with its gradient; `write` and `generate` go on as
        before. It is compiled when it first runs, which takes a minute or so, and once more for changing lengths; where
        that fails, a warning says so and training goes on uncompiled. It keeps attention's scores, positions ×
        positions, which the plain step does not from 128 positions on: long contexts need more memory.

        Otherwise it is the base's decoder, for `write` and `generate` as well, as `model.get_decoder().compile()`.

        `torch.compile(model)`, hence `TrainingArguments(torch_compile=True)`, does the same, with the defaults of these
        options.

        Args:
            args, kwargs: of [`torch.compile`].
        """
        self._compiled = args, kwargs
        if not self.writer.compile(*args, **kwargs):
            self.get_decoder().compile(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Without the writer, which is made again, and what is compiled in it: that cannot be pickled."""
        return {name: value for name, value in super().__getstate__().items() if name not in ("_compiled", "_writer")}

    # ------------------------------------------------------------------------------------------------ loading

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: checkpoints point to the installed package (`auto_map`), and no code is copied into them."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        config: GradMemConfig | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load an adapter and the base it names, or a checkpoint that includes its base.

        Args:
            pretrained_model_name_or_path: directory or Hub repository of the adapter; `None` for weights given as
                `state_dict`, with their `config`.
            config: in place of the checkpoint's.
            kwargs: those of `PreTrainedModel.from_pretrained`. `revision` and `subfolder` are the adapter's; `dtype`,
                `device_map`, `attn_implementation`, `quantization_config` and the like reach the base. `dtype=
                "fastest"` is float32 or bfloat16, whichever this machine computes faster in.

        Raises:
            OSError: there is no such repository, no config.json in the directory, or no base where the adapter says.
            ValueError: the directory holds another kind of model, or weights that are truncated or do not fit the
                configuration or the base.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        hub = {name: kwargs[name] for name in checkpoint.HUB_ARGUMENTS if kwargs.get(name) is not None}
        options = {}
        if not isinstance(config, GradMemConfig):
            options = {name: kwargs.pop(name) for name in checkpoint.CONFIG_OPTIONS & kwargs.keys()}
        trusted = bool(kwargs.get("trust_remote_code"))
        adapter = checkpoint.Adapter.open(pretrained_model_name_or_path, hub, options, config, trusted)
        kwargs |= {name: value for name, value in adapter.hub_arguments.items() if name == "revision"}
        if adapter.weights is None:
            load = functools.partial(super().from_pretrained, adapter.name_or_path, *model_args)
            model, info = checkpoint.load_full(load, adapter, kwargs)
        else:
            base_model, info = load_base(adapter.config, kwargs)
            adapter.config.name_or_path = adapter.name_or_path
            model = adapter.attach(cls, base_model)
        model.tokenizer, model._place = adapter.tokenizer, adapter.place
        loaded: Any = (model, info) if kwargs.get("output_loading_info") else model  # a pair, as of Transformers
        return loaded

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer given, else the adapter's, else the base's.

        Raises:
            ValueError: none of these can be loaded.
        """
        if self._tokenizer is None:
            self._tokenizer = load_base_tokenizer(self.config, self._place)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, value: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = value

    # ------------------------------------------------------------------------------------------------ saving

    def save_pretrained(self, save_directory: str | os.PathLike, *, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the adapter: configuration, the parameters beside the base, a model card, and the tokenizer if any.

        The base is named, not copied, unless it has no name, its vocabulary was resized, its weights are not those that
        its name stands for, or some weight of it requires a gradient now or did at an earlier save: then the directory
        is a full checkpoint.

        All files change together, weights of another `variant` apart: a save that is stopped leaves an older version
        whole, or the new one. Files of your own stay, README.md too. `auto_map` and a file of a few lines let
        `trust_remote_code=True` load the checkpoint where this package is installed but was not imported.

        Args:
            save_directory: where to.
            push_to_hub: upload it as well, to `repo_id` or a repository of the directory's name.
            kwargs: those of `PreTrainedModel.save_pretrained`.

        Raises:
            OSError: the directory cannot be written to, or the disk is full.
            RuntimeError: the base was given to another model since, or its LoRA was taken out.
            ValueError: a PEFT adapter is around the model, or the directory is that of its base.
        """
        check_savable(self.base_model, self)
        self.config.includes_base = self._saves_base() or self._base_changed()
        recorded_base(self.config).architectures = [type(self.base_model).__name__]
        self.config.auto_map = dict(checkpoint.AUTO_MAP)
        hub = {name: kwargs.pop(name) for name in checkpoint.PUSH_ARGUMENTS & kwargs.keys()}
        writes = self.should_save_on_this_rank(kwargs.get("is_main_process", True))
        if not self.config.includes_base:
            check_apart(self.config.base_model_name_or_path, save_directory)
            # One file of this name, whatever the base's are called: that is where an adapter is looked for.
            kwargs |= {"max_shard_size": sys.maxsize, "variant": None}
        if not writes:
            super().save_pretrained(save_directory, **kwargs)
            return
        with whole_save(save_directory) as folder:
            if self._tokenizer is not None:
                self._tokenizer.save_pretrained(folder)
            super().save_pretrained(folder, **kwargs)
            if not self.config.includes_base:
                checkpoint.drop_generation_config(folder)
            checkpoint.save_remote_code(folder)
            if not keeps_card(save_directory):
                write_card(self.model_card(local_id(save_directory)), folder)
        if push_to_hub:
            repo_id = hub.pop("repo_id", None) or Path(save_directory).name
            self.push_to_hub(repo_id, token=kwargs.get("token"), **hub)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
    ) -> CommitInfo:
        """Upload what `save_pretrained` writes, in one commit. A card that somebody wrote for the repository stays.

        Args:
            repo_id: a Hub model repository, made if it is missing; in the user's namespace if it names none.
            commit_message: `"Upload GradMem adapter"` by default.
            private: whether a repository that is made is private.
            revision: branch to push to, made if it is missing.
            tags: for the card, beside its own.
            commit_description, token, create_pr, max_shard_size: as in `PreTrainedModel.push_to_hub`.

        Raises:
            OSError: the Hub refused or is out of reach; one line says which.
        """
        repo_id = prepare_repository(repo_id, revision=revision, private=private, token=token)
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory, max_shard_size=max_shard_size)
            files: dict[str, Path | bytes] = dict(folder_files(Path(directory)))
            card = str(self.model_card(repo_id, tags=tags))
            files[CARD_FILE] = card.encode()
            if gives_way(card, remote_card(repo_id, revision=revision, token=token)):
                del files[CARD_FILE]
            return push_files(
                files,
                repo_id,
                commit_message=commit_message or "Upload GradMem adapter",
                commit_description=commit_description,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )

    def model_card(self, repo_id: str, *, tags: list[str] | None = None) -> ModelCard:
        """The card that a push to `repo_id` writes; of training and results it says what is in `card_facts`."""
        return model_card(self.config, repo_id, self.card_facts, tags=tags or ())

    def _saves_base(self) -> bool:
        return self.config.includes_base or self._trains_base()

    def _base_changed(self) -> bool:
        """Whether the base has other weights than its name stands for: merged, edited, or changed in their files."""
        name, revision = self.config.base_model_name_or_path, self.config.base_model_revision
        if name is None:
            return False
        now = name, revision, self._fingerprint.of_base(base_weights(self.base_model))
        if self._compared is None or self._compared[0] != now:
            self._compared = now, differs_from_stored(self.base_model, name, revision)
        return self._compared[1]

    @property
    def _keys_to_ignore_on_save(self) -> set[str]:
        """What a save would leave out now: `Trainer` expects exactly these to be missing when it loads a checkpoint."""
        if "base_model" not in self._modules:  # PreTrainedModel.__init__ may ask before there is a base
            return set()
        return checkpoint.tied_keys(self) if self._saves_base() else base_keys(self)

    @_keys_to_ignore_on_save.setter
    def _keys_to_ignore_on_save(self, value: set[str]) -> None:
        """`PreTrainedModel.post_init` gathers those of its children, which are among the base's keys."""

    # ------------------------------------------------------------------------------------------------ memories

    def fingerprint(self) -> str:
        """A hash of what writes this model's memories: the base's weights, and what WRITE uses beside them.

        That is the memory's form and start, the projection, WRITE's control vectors, head and LoRA, and a PEFT adapter
        around the model; not the number or size of its steps, and nothing that READ alone uses. Models of one
        fingerprint read each other's memories, wherever their bases lie. The base counts at bfloat16 precision.
        """
        return self.identity().fingerprint

    def identity(self, *, thorough: bool = True) -> Identity:
        """The fingerprint, and the base's name for people to read.

        It is computed once, in about the time of reading all weights, and again when a weight was replaced or edited.
        Edits through `.data` are found in every element beside the base, and in 32 of each of the base's tensors.

        Args:
            thorough: otherwise tensors beside the base with more than a million elements are looked at like the base's.
        """
        config, phase = self.config, self.write_phase
        form = config.memory_form if isinstance(config.memory_form, str) else config.memory_form["name"]
        others, scalings = others_on(self.base_model)
        fingerprint = self._fingerprint(
            base_weights(self.base_model),
            self.form.extra_tensors() | phase.extra_tensors() | others,
            (form, self.form.shape, lora_scalings(self.base_model, phase.name) | scalings),
            thorough=thorough,
        )
        return Identity(fingerprint, shown_name(config.base_model_name_or_path))

    def check_memory(self, memory: GradMemMemory) -> None:
        """Refuse what is no memory, or one that this model would not read as it was written.

        Raises:
            TypeError: it is not a memory.
            ValueError: it has another shape, or was written by another base or other weights in WRITE.
        """
        check_memory(memory, self.form.shape, functools.partial(self.identity, thorough=False))

    def stock_prefix(self, memory: GradMemMemory) -> StockPrefix:
        """One memory as the exports take it: `[r_start; P(M_K); r_end]`, if the named base alone reads it so.

        Raises:
            ValueError: it does not, or several memories were given.
        """
        self.check_memory(memory)
        with torch.no_grad():
            prefix = self.read_phase.prefix(memory.to(self.device).embeddings)
        return stock_prefix(
            prefix,
            self.decoder,
            base_model_name_or_path=self.config.base_model_name_or_path,
            base_model_revision=self.config.base_model_revision,
            reads_with_lora=self.config.read_lora is not None,
            includes_base=self.config.includes_base or self._base_changed(),
        )

    def export_prompt_tuning(self, memory: GradMemMemory, save_directory: str | os.PathLike) -> None:
        """Write one memory as a stock PEFT PROMPT_TUNING adapter of m + 2n virtual tokens, `[r_start; P(M_K); r_end]`.

        `peft.PeftModel.from_pretrained(base, save_directory)` then reads it without this package. Give it prompts of
        one length, or one at a time: it drops position ids, so in a left-padded row the padding's positions would stay
        between memory and prompt.

        Raises:
            ValueError: several memories were given, or READ uses weights that the named base does not have, or the base
                cannot be run on embeddings, which is all that PEFT gives it.
        """
        prompt_tuning.save(self.stock_prefix(memory), save_directory)

    def export_cartridge(self, memory: GradMemMemory, save_directory: str | os.PathLike) -> None:
        """Write one memory as a stock PEFT CARTRIDGE adapter: the keys and values of its m + 2n vectors in each layer.

        `peft.PeftModel.from_pretrained(base, save_directory)` then reads it without this package, left-padded batches
        included. (On a base with sliding windows, give PEFT prompts of one length: there it masks padding wrongly.)
        The file is larger than that of `export_prompt_tuning` by the factor that a cache is larger than embeddings;
        the base need not run over the memory again.

        Args:
            memory: a batch of one.
            save_directory: where to.

        Raises:
            ValueError: several memories were given, or READ uses weights that the named base does not have, or the
                base keeps anything but equal keys and values of every position, or does not go on from them.
        """
        cartridge.save(self.stock_prefix(memory), save_directory)

    def export_prompt_embeds(self, memory: GradMemMemory, file: str | os.PathLike) -> None:
        """Write one memory as prompt embeddings `(m + 2n, hidden_size)`, for engines that take them before the prompt.

        The file is safetensors with one tensor, `prompt_embeds`, in the base's precision; its header names the base.
        The reader puts the embeddings of the prompt's tokens behind it.

        Args:
            memory: a batch of one.
            file: where to; its directory is made if it is missing.

        Raises:
            ValueError: several memories were given, or READ uses weights that the named base does not have, or the
                base cannot be run on embeddings.
        """
        prompt_embeds.save_file(self.stock_prefix(memory), file)


__all__ = ["GradMemPreTrainedModel", "compiled_in_parts"]
