"""Texts cut into segments: nothing lost, nothing too long, at the places where a reader would cut."""

import random
from itertools import pairwise

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_gradmem import cut_text
from hf_gradmem.texts.cutting import split_paragraphs

WORDS = ["gate", "opens", "noon", "and", "a", "ferry", "for", "Bergen", "when", "7", "12", "naïve", "🙂", "漢字"]


@pytest.fixture(scope="module")
def by_word() -> PreTrainedTokenizerFast:
    """A token for each word, each mark and each run of white space."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated") for pattern in (" ", ".", "\n")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture(scope="module")
def byte_pairs() -> PreTrainedTokenizerFast:
    """Merges that reach over words and marks, and characters of several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([" ".join(WORDS[:11])] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class Slow:
    """A tokenizer that does not tell where its tokens lie."""

    is_fast = False

    def __call__(self, text, **_):
        class Encoded:
            input_ids = list(text.encode())

        return Encoded


def count(tokenizer, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids)


def test_a_text_that_fits_stays_whole(by_word):
    text = "One.\n\nTwo."
    assert cut_text(text, by_word, count(by_word, text)) == [text]
    assert len(cut_text(text, by_word, count(by_word, text) - 1)) == 2


def test_a_long_text_is_cut_at_paragraphs_then_sentences_then_tokens(by_word):
    text = "A b.\n\nOne two three. Four five six. \n\nseven eight nine ten eleven twelve"
    assert cut_text(text, by_word, 8) == [
        "A b.",
        "\n\nOne two three.",
        " Four five six. ",
        "\n\nseven eight nine ",  # no sentence ends here, so it is cut between tokens
        "ten eleven twelve",
    ]


def test_short_neighbours_are_joined_for_as_long_as_they_fit(by_word):
    text = "\n\n".join(f"Note {number}." for number in range(6))
    segments = cut_text(text, by_word, 12)
    assert segments == ["Note 0.\n\nNote 1.", "\n\nNote 2.\n\nNote 3.", "\n\nNote 4.\n\nNote 5."]
    for left, right in pairwise(segments):
        assert count(by_word, left + right) > 12


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["by_word", "byte_pairs", "slow"])
def test_segments_are_the_text_and_none_is_too_long(kind, seed, request):
    tokenizer = Slow() if kind == "slow" else request.getfixturevalue(kind)
    chance = random.Random(seed)
    text = "".join(
        chance.choice(WORDS) + chance.choice([" ", " ", " ", ". ", "! ", "\n", "\n\n", "\n \n", "", "\r\n\r\n"])
        for _ in range(chance.choice([1, 40, 300]))
    )
    for max_length in (4, 9, 40):
        segments = cut_text(text, tokenizer, max_length)
        assert "".join(segments) == text
        assert all(0 < count(tokenizer, segment) <= max_length for segment in segments) or segments == [text]


def test_a_segment_ends_where_a_token_ends(byte_pairs):
    text = "gateopensnoonferry" * 30
    starts = {start for start, _ in byte_pairs(text, return_offsets_mapping=True)["offset_mapping"]}
    cut_at, place = [], 0
    for segment in cut_text(text, byte_pairs, 10)[:-1]:
        place += len(segment)
        cut_at.append(place)
    assert set(cut_at) <= starts


def test_what_cannot_be_cut_is_refused(byte_pairs):
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        cut_text("a", byte_pairs, 0)
    with pytest.raises(ValueError, match=r"max_length=2 is too small: the character '🙂' alone has 4 tokens"):
        cut_text("🙂🙂", byte_pairs, 2)


def test_paragraphs_are_the_text_with_its_white_space():
    assert split_paragraphs("\n\n a\n\n\nb\n \nc\n\n") == ["\n\n a", "\n\n\nb", "\n \nc\n\n"]
    assert split_paragraphs("a\nb") == ["a\nb"]
    assert split_paragraphs("") == [""]
