"""Saving, loading and telling apart: checkpoints, tokenizer and fingerprint of a [`GradMemForCausalLM`]."""

import copy
import functools
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Self

from huggingface_hub import CommitInfo, ModelCard
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import resolve_revision

from . import checkpoint
from . import model_card as cards
from .adapters import lora_parameters
from .configuration_gradmem import GradMemConfig
from .exports import stock_prefix
from .hub import CARD_FILE, folder_files, prepare_repository, push_files, remote_card
from .memory import GradMemMemory


class SavingMixin:
    """The part of [`GradMemForCausalLM`] that is saved and loaded.

    Attributes:
        card_facts: what the model card says of training and results; a training callback sets it.
    """

    card_facts: cards.CardFacts | None = None
    _hub_arguments: dict[str, Any] = {}  # with which the adapter was loaded, for what is fetched later

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
                `device_map`, `attn_implementation`, `quantization_config` and the like reach the base.

        Raises:
            OSError: there is no such repository, no config.json in the directory, or no base where the adapter says.
            ValueError: the directory holds another kind of model, or weights that are truncated or do not fit the
                configuration or the base.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        name_or_path = os.fspath(pretrained_model_name_or_path)
        hub = {name: kwargs[name] for name in checkpoint.HUB_ARGUMENTS if kwargs.get(name) is not None}
        # Resolved once, so that all files come from one commit.
        place = {name: hub[name] for name in ("token", "local_files_only", "cache_dir") if name in hub}
        if (revision := resolve_revision(name_or_path, hub.get("revision"), **place)) is not None:
            hub["revision"] = kwargs["revision"] = revision
        if not isinstance(config, GradMemConfig):
            options = {name: kwargs.pop(name) for name in checkpoint.CONFIG_OPTIONS & kwargs.keys()}
            config = checkpoint.load_config(name_or_path if config is None else config, hub, options)
        if config.includes_base:
            load = functools.partial(super().from_pretrained, name_or_path, *model_args, config=config)
            model, info = checkpoint.load_full(load, name_or_path, kwargs)
        else:
            config = copy.deepcopy(config)
            weights = checkpoint.adapter_file(name_or_path, hub)
            base_model, info = checkpoint.load_base(config, kwargs)
            config.text_config, config.name_or_path = base_model.config, name_or_path
            model = cls(config, base_model)
            checkpoint.load_adapter(model, weights, name_or_path)
        model.tokenizer = checkpoint.load_tokenizer(name_or_path, hub)
        model._hub_arguments = place
        return (model, info) if kwargs.get("output_loading_info") else model

    def save_pretrained(self, save_directory: str | os.PathLike, *, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the adapter: configuration, the parameters beside the base, a model card, and the tokenizer if any.

        The base is named, not copied, unless it has no name, its vocabulary was resized, or some weight of it requires
        a gradient now or did at an earlier save: then the directory is a full checkpoint.

        A README.md of your own is left as it is. `auto_map` and a file of a few lines let `trust_remote_code=True` load
        the checkpoint where this package is installed but was not imported.

        Args:
            save_directory: where to.
            push_to_hub: upload it as well, as `push_to_hub` would, to `repo_id` or a repository of the directory's
                name.
            kwargs: those of `PreTrainedModel.save_pretrained`.
        """
        self.config.includes_base = self._saves_base()
        self.config.text_config.architectures = [type(self.base_model).__name__]
        self.config.auto_map = dict(checkpoint.AUTO_MAP)
        hub = {name: kwargs.pop(name) for name in checkpoint.PUSH_ARGUMENTS & kwargs.keys()}
        writes = kwargs.get("is_main_process", True)
        if not self.config.includes_base:
            # One file of this name, whatever the base's are called: that is where an adapter is looked for.
            kwargs |= {"max_shard_size": sys.maxsize, "variant": None}
        if self._tokenizer is not None and writes:
            self._tokenizer.save_pretrained(save_directory)
        super().save_pretrained(save_directory, **kwargs)
        if not self.config.includes_base and writes:
            checkpoint.drop_generation_config(save_directory)
        if writes:
            checkpoint.save_remote_code(save_directory)
            cards.write_card(self.model_card(cards.local_id(save_directory)), save_directory)
        if push_to_hub and writes:
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
            files[CARD_FILE] = str(self.model_card(repo_id, tags=tags)).encode()
            there = remote_card(repo_id, revision=revision, token=token)
            if there is not None and not cards.is_own_card(there):
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
        """The card that a push to `repo_id` writes: what the memory costs, how it was trained, results, use, limits.

        What it says of training and results is `card_facts`, which a training callback fills.
        """
        return cards.model_card(self.config, repo_id, self.card_facts, tags=tags or ())

    def _saves_base(self) -> bool:
        base = checkpoint.base_keys(self)
        trains = any(parameter.requires_grad for name, parameter in self.named_parameters() if name in base)
        return self.config.includes_base or trains

    @property
    def _keys_to_ignore_on_save(self) -> set[str]:
        """What a save would leave out now: `Trainer` expects exactly these to be missing when it loads a checkpoint."""
        if "base_model" not in self._modules:  # PreTrainedModel.__init__ may ask before there is a base
            return set()
        return checkpoint.tied_keys(self) if self._saves_base() else checkpoint.base_keys(self)

    @_keys_to_ignore_on_save.setter
    def _keys_to_ignore_on_save(self, value: set[str]) -> None:
        """`PreTrainedModel.post_init` gathers those of its children, which are among the base's keys."""

    def export_prompt_tuning(self, memory: GradMemMemory, save_directory: str | os.PathLike) -> None:
        """Write one memory as a stock PEFT PROMPT_TUNING adapter of m + 2n virtual tokens, `[r_start; P(M_K); r_end]`.

        `peft.PeftModel.from_pretrained(base, save_directory)` then reads it without this package. Give it prompts of
        one length, or one at a time: it drops position ids, so in a left-padded row the padding's positions would stay
        between memory and prompt.

        Raises:
            ValueError: several memories were given, or READ uses weights that the named base does not have, or the base
                cannot be run on embeddings, which is all that PEFT gives it.
        """
        checkpoint.save_prompt_tuning(stock_prefix(self, memory)[0], self.base_model, self.config, save_directory)

    def fingerprint(self) -> str:
        """Base, revision, width and a hash of the weights that READ uses beside the base.

        A memory means something to these alone.
        """
        config = self.config
        name = f"{config.base_model_name_or_path or config.base_model_id}@{config.base_model_revision or 'main'}"
        return f"{name}/{self.memory_init.shape[1]}/{self._read_hash()}"

    def _read_hash(self) -> str:
        tensors = dict(lora_parameters(self.base_model, "read"))
        tensors |= {"read_start": self.read_start, "read_end": self.read_end}
        if self.memory_projection is not None:
            tensors |= dict(self.memory_projection.named_parameters(prefix="memory_projection"))
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        # Reading asks for the hash at every call; the weights rarely change between two of them.
        versions = [(name, tensor.data_ptr(), tensor._version) for name, tensor in tensors.items()]
        if self._hashed is None or self._hashed[0] != versions:
            self._hashed = versions, checkpoint.hash_tensors(tensors)
        return self._hashed[1]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer given, else the adapter's, else the base's.

        Raises:
            ValueError: none of these can be loaded.
        """
        if self._tokenizer is None:
            name = self.config.base_model_name_or_path
            if name is None:
                raise ValueError(
                    "This model has no tokenizer: its base has no name to load one from. Pass tokenizer= to "
                    "get_gradmem_model, or give input_ids in place of text."
                )
            revision = self.config.base_model_revision
            self._tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, **self._hub_arguments)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, value: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = value
