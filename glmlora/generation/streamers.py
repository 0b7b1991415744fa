"""Streamers that `generate` and `chat` hand each token to, as transformers has them: they print
text, or let another thread iterate over it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from queue import Queue
from typing import Any

import numpy as np

from ..tokenization import TextStream


class BaseStreamer:
    """What a streamer has: `put` takes ids, first the prompt's (1, T), then each new token's (1,);
    `end` is called once, also where generation failed.
    """

    def put(self, value: Any) -> None:
        raise NotImplementedError(f"{type(self).__name__} has no put")

    def end(self) -> None:
        raise NotImplementedError(f"{type(self).__name__} has no end")


class TextStreamer(BaseStreamer):
    """Prints text as soon as its characters are whole.

    skip_prompt: leave the prompt out. Options of `decode`: skip_special_tokens. A subclass may
    have its own `on_finalized_text`.
    """

    def __init__(
        self,
        tokenizer: Any,
        skip_prompt: bool = False,
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ):
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.skip_special_tokens = skip_special_tokens
        self._begin()

    def _begin(self) -> None:
        self._stream = TextStream(self.tokenizer, self.skip_special_tokens)
        self._shown = 0
        self.next_tokens_are_prompt = True

    def put(self, value: Any) -> None:
        """Take ids (T,) or (1, T). ValueError for several rows."""
        ids = np.asarray(value)
        if ids.ndim > 1 and len(ids) > 1:
            raise ValueError(f"value: expected one row of ids, got {len(ids)}")
        is_prompt, self.next_tokens_are_prompt = self.next_tokens_are_prompt, False
        if is_prompt and self.skip_prompt:
            return
        text = self._stream.feed(*ids.reshape(-1).tolist())
        if text is not None and len(text) > self._shown:
            new, self._shown = text[self._shown :], len(text)
            self.on_finalized_text(new)

    def end(self) -> None:
        """Show what is left, and be ready for another answer."""
        rest = self._stream.text[self._shown :]
        self._begin()
        self.on_finalized_text(rest, stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """What happens to new text: it is printed."""
        print(text, flush=True, end="\n" if stream_end else "")


class TextIteratorStreamer(TextStreamer):
    """Iterates over new texts while another thread generates. timeout: seconds to wait for a text,
    after which queue.Empty is raised; None waits for ever.
    """

    def __init__(
        self,
        tokenizer: Any,
        skip_prompt: bool = False,
        timeout: float | None = None,
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ):
        super().__init__(tokenizer, skip_prompt, skip_special_tokens=skip_special_tokens)
        self.timeout = timeout
        self.text_queue: Queue[str | None] = Queue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """New text goes to who iterates."""
        self.text_queue.put(text)
        if stream_end:
            self.text_queue.put(None)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        text = self.text_queue.get(timeout=self.timeout)
        if text is None:
            raise StopIteration
        return text


def check_streamer(streamer: Any, rows: int, num_beams: int) -> None:
    """TypeError for what is no streamer, ValueError where it cannot be used."""
    if streamer is None:
        return
    for name in ("put", "end"):
        if not callable(getattr(streamer, name, None)):
            raise TypeError(f"streamer: expected put and end, {streamer!r:.80} has no {name}")
    if num_beams > 1:
        raise ValueError(f"streamer: cannot follow {num_beams} beams, only num_beams=1")
    if rows > 1:
        raise ValueError(f"streamer: takes one row, got {rows}; stream_generate takes several")


@contextmanager
def ended(streamer: Any) -> Iterator[None]:
    """Within the block a streamer is used; whatever happens, who iterates over it gets an end."""
    try:
        yield
    finally:
        if callable(getattr(streamer, "end", None)):
            streamer.end()
