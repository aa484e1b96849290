"""A model that writes text of which every word is one token."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Word wN is token N; it would put a begin token (1) before a text if it were let."""
    words = WordLevel({f"w{token}": token for token in range(96)}, unk_token="w0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="w1 $A", special_tokens=[("w1", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w1")
