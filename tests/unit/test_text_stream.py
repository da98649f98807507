"""Text that comes token by token: whole characters, nothing of a stop string, and in the end the whole text."""

from collections.abc import Sequence
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from mlx_training.data.text_stream import TextStream
from mlx_training.data.tokenizer import Tokenizer


def stream(tokenizer: Tokenizer, ids: Sequence[int], prompt: Sequence[int] = (), stop: Sequence[str] = ()):
    """(pieces, the stream), fed until it stops."""
    made, pieces = TextStream(tokenizer, prompt, stop), []
    for token in ids:
        pieces.append(made.push(token))
        if made.stopped:
            break
    return [*pieces, made.end()], made


@given(st.text("aé😀 語\n.", max_size=12), st.text("xü ", max_size=4))
def test_the_pieces_are_the_text(tiny_tokenizer: Tokenizer, text: str, prompt: str) -> None:
    """Most characters here are several byte tokens."""
    ids = tiny_tokenizer.encode(text)
    pieces, made = stream(tiny_tokenizer, ids, tiny_tokenizer.encode(prompt, bos=True))
    assert "".join(pieces) == made.text == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert all(pieces[:-1]) or len(ids) > len(text)  # one piece a token, unless characters are spread


def test_bytes_that_never_become_a_character(tiny_tokenizer: Tokenizer) -> None:
    """They appear as what a decoder writes for them, once it is certain."""
    half = tiny_tokenizer.encode("😀")[:2]
    pieces, made = stream(tiny_tokenizer, [*tiny_tokenizer.encode("a"), *half])
    assert pieces[0] == "a" and not any(pieces[1:-1]) and made.text.strip("\ufffd") == "a" != made.text
    _, made = stream(tiny_tokenizer, [*half, *tiny_tokenizer.encode("b")])
    assert made.text.lstrip("\ufffd") == "b" != made.text


def cut(text: str, stop: Sequence[str]) -> str:
    """Before the stop string that ends first."""
    for end in range(len(text) + 1):
        places = [end - len(word) for word in stop if text[:end].endswith(word)]
        if places:
            return text[: min(places)]
    return text


@given(st.text("abc", max_size=14), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_stop_strings(tiny_tokenizer: Tokenizer, text: str, stop: list[str]) -> None:
    for ids in (tiny_tokenizer.encode(text), [i for letter in text for i in tiny_tokenizer.encode(letter)]):
        pieces, made = stream(tiny_tokenizer, ids, stop=stop)
        assert "".join(pieces) == made.text == cut(text, stop)
        assert made.stopped == (made.text != text)


def test_a_stop_string_across_tokens(tiny_tokenizer: Tokenizer) -> None:
    ids = [tiny_tokenizer.encode(word)[0] for word in ["x", "y", "z"]]
    pieces, made = stream(tiny_tokenizer, [*ids, *ids], stop=["yzx"])
    assert pieces == ["x", "", "", "", ""] and made.stopped
    pieces, made = stream(tiny_tokenizer, [*ids[:2], ids[0]], stop=["yz"])
    assert pieces == ["x", "", "yx", ""] and not made.stopped


def test_sentencepiece_spaces(shared_data: Path) -> None:
    """The space between a prompt and its continuation is part of the continuation."""
    tokenizer = Tokenizer.load(shared_data / "tokenizer_sentencepiece" / "test_model.model")
    prompt, ids = tokenizer.encode("Hello"), tokenizer.encode("world again")
    pieces, made = stream(tokenizer, ids, prompt)
    assert "".join(pieces) == made.text == " world again"
    _, made = stream(tokenizer, ids)
    assert made.text == tokenizer.decode(ids)
