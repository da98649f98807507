"""Tokens in, text out as it becomes certain: whole characters only, and cut before a stop string."""

from collections.abc import Sequence

from mlx_training.data.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no character, yet


class TextStream:
    """The text that continues a prompt.

    What `push` and `end` return, joined, is `text`. A character whose bytes are spread over tokens comes when its last
    one does; what may be the beginning of a stop string is held back until that is decided.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        assert all(stop), "an empty stop string stops everything"
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.ids = [int(token) for token in prompt]  # a tokenizer may spell a token by what stands before it
        self.start, self.read = max(0, len(self.ids) - 8), len(self.ids)
        self.text = self.held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain now and was not before this token."""
        self.ids.append(int(token))
        text = self._decoded()
        if text.endswith(UNFINISHED):
            return ""
        self.start, self.read = self.read, len(self.ids)
        return self._release(text, last=False)

    def end(self) -> str:
        """The rest, when no more tokens come."""
        return "" if self.stopped else self._release(self._decoded(), last=True)

    def _decoded(self) -> str:
        """The text of the tokens after `read`; those from `start` on are decoded with it, for the spaces between."""
        before = self.tokenizer.decode(self.ids[self.start : self.read])
        return self.tokenizer.decode(self.ids[self.start :])[len(before) :]

    def _release(self, text: str, *, last: bool) -> str:
        text = self.held + text
        found = [(place + len(stop), place) for stop in self.stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, certain = True, min(found)[1]  # the one that ends first: how tokens fall does not matter
        else:
            certain = len(text) - (0 if last else self._undecided(text))
        self.held = "" if found else text[certain:]
        self.text += text[:certain]
        return text[:certain]

    def _undecided(self, text: str) -> int:
        """How many of the last characters may begin a stop string."""
        longest = max((len(stop) - 1 for stop in self.stop), default=0)
        sizes = range(min(longest, len(text)), 0, -1)
        return next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in self.stop)), 0)
