"""Running text: what is cut out of a book, and what leaves no rows."""

import pytest

from hf_gradmem.tasks import load_task
from hf_gradmem.tasks.text import sentences, strip_gutenberg

BOOK = """The Project Gutenberg EBook of Something

*** START OF THIS PROJECT GUTENBERG EBOOK SOMETHING ***

Chapter 1

It was a day
of rain. Nobody came.

"Who is there?" said she. Nobody spoke. All was
still.

End of the Project Gutenberg EBook of Something

*** END OF THIS PROJECT GUTENBERG EBOOK SOMETHING ***
Licence.
"""
BOOK_SENTENCES = [
    "Chapter 1",
    "\n\nIt was a day of rain.",
    " Nobody came.",
    '\n\n"Who is there?" said she.',
    " Nobody spoke.",
    " All was still.",
]


def test_book_is_cut_out_of_its_licence_and_into_sentences():
    assert sentences(strip_gutenberg(BOOK)) == BOOK_SENTENCES
    assert strip_gutenberg("No header. No footer.") == "No header. No footer."


def test_text_gives_as_many_windows_as_asked_for_from_all_of_the_text(tmp_path):
    (tmp_path / "book.txt").write_text(" ".join(f"Sentence {number}." for number in range(12)), encoding="utf-8")
    options = {"path": tmp_path / "book.txt", "context_sentences": 1, "target_sentences": 1}
    rows = load_task("text", "test", num_contexts=3, **options)
    assert [row["context"] for row in rows] == [["Sentence 0."], ["Sentence 4."], ["Sentence 8."]]


def test_text_windows_follow_each_other(tmp_path):
    (tmp_path / "book.txt").write_text(BOOK, encoding="utf-8", newline="\r\n")
    rows = load_task("text", "test", path=tmp_path / "book.txt", context_sentences=2, target_sentences=1)
    assert list(rows) == [
        {"context": BOOK_SENTENCES[:2], "queries": [""], "targets": [" Nobody came."], "add_end_token": False},
        {
            "context": ['"Who is there?" said she.', " Nobody spoke."],
            "queries": [""],
            "targets": [" All was still."],
            "add_end_token": False,
        },
    ]
    back = load_task("text", "test", path=tmp_path / "book.txt", mode="reconstruction", context_sentences=3)
    assert [row["targets"] for row in back] == [["".join(row["context"])] for row in back]
    assert len(back) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "copy"}, "mode .* 'copy'"),
        ({"context_sentences": 100}, "fewer than the 104 sentences"),
        ({"context_sentences": 0}, "context_sentences .* 0"),
        ({"num_contexts": 2}, r"num_contexts .* 1\.\.1, .* got 2"),
        ({"validation_share": 1.0, "split": "train"}, "validation_share"),
        ({"hub_name": "a/b"}, "not both"),
    ],
)
def test_text_refuses_what_leaves_no_rows(arguments, message, tmp_path):
    (tmp_path / "book.txt").write_text(BOOK, encoding="utf-8")
    defaults = {"path": tmp_path / "book.txt", "split": "test", "context_sentences": 2, "target_sentences": 4}
    with pytest.raises(ValueError, match=message):
        load_task("text", **defaults | arguments)
