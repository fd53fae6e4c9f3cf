"""Text to token ids, fast and with control tokens only where they are meant.

Takes rendered text; gives int32 arrays. Around the `tokenizers` library's encoder it adds what preparing preference
data needs: control tokens' names inside people's text stay text (`mark`), a text that continues a sequence gets no
space in front that a first word would get, and pieces between control tokens are encoded once however many prompts
share them.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from megatron_amopo.data.problems import RecordProblem

# A Unicode noncharacter stands for control tokens' names found in the text while a template renders it.
MARK = "\ufdd0"
_MARKED = re.compile(f"{MARK}([0-9]+){MARK}")
_CACHED_PIECES = 512
_CACHED_CHARACTERS = 4096


class TextEncoder:
    """An encoder around `backend`, a `tokenizers.Tokenizer` of its own: truncation and padding are switched off there.

    `added` maps the texts of added tokens (control tokens among them) to their ids.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.backend.no_truncation()
        self.backend.no_padding()
        tokens = self.backend.get_added_tokens_decoder()
        self.added = {token.content: int(index) for index, token in tokens.items()}
        self._added_ids = np.array(sorted(self.added.values()), dtype=np.int32)
        self._special = [token.content for token in tokens.values() if token.special]
        self._find_special = _any_of(self._special)
        self._continuing = backend  # encodes texts that continue a sequence
        # The library cuts a text at these before anything else, so the pieces between can be encoded one by one.
        separators = [t.content for t in tokens.values() if not (t.normalized or t.lstrip or t.rstrip or t.single_word)]
        self._separator = _any_of(separators)
        self._by_pieces = False
        self._cache: dict[str, np.ndarray] = {}
        self._as_text = self._spelled()

    def settle(self, prompt: str, responses: Sequence[str]) -> bool:
        """Find out, from sample texts, how a response has to be encoded so that prompt + response equals the whole:
        as it is (byte-level tokenizers), or without the space that SentencePiece's tokenizers put in front of a first
        word. False: in neither way.
        """
        whole = self.encode([prompt + response for response in responses])
        start = self.encode([prompt])[0]
        for backend in (self.backend, _without_first_space(self.backend)):
            self._continuing = backend
            parts = self.encode(responses, inner=True)
            if _all_equal([np.concatenate([start, part]) for part in parts], whole):
                break
        else:
            return False
        self._as_text = self._spelled()
        self._by_pieces = self._continuing is self.backend
        self._by_pieces = self._by_pieces and _all_equal(self.encode([prompt + r for r in responses]), whole)
        return True

    def _spelled(self) -> dict[str, np.ndarray]:
        """Control tokens' names and the ids of their characters."""
        self._continuing.encode_special_tokens = True
        encodings = self._continuing.encode_batch_fast(self._special, add_special_tokens=False)
        self._continuing.encode_special_tokens = False
        return {name: np.array(e.ids, dtype=np.int32) for name, e in zip(self._special, encodings, strict=True)}

    def mark(self, text: str) -> str:
        """Replace control tokens' names by marks, which `encode` turns into the ids of the names' characters.

        Raises RecordProblem where those ids would be control tokens after all.
        """
        if MARK in text:
            raise RecordProblem("special_token_text", "contains the noncharacter U+FDD0")
        return self._find_special.sub(self._mark_one, text)

    def _mark_one(self, match: re.Match[str]) -> str:
        if np.isin(self._as_text[match[0]], self._added_ids).any():
            raise RecordProblem("special_token_text", f"contains {match[0]!r}")
        return f"{MARK}{self._special.index(match[0])}{MARK}"

    def encode(self, texts: Sequence[str], inner: bool = False) -> list[np.ndarray]:
        """Ids of each text, int32, marks included. `inner` texts continue a sequence."""
        return [self._encode_marked(text, inner) if MARK in text else ids for text, ids in self._plain(texts, inner)]

    def _encode_marked(self, text: str, inner: bool) -> np.ndarray:
        between = _MARKED.split(text)  # text, index, text, index, …, text
        ((_, first),) = self._plain(between[:1], inner)
        parts = [first]
        for index, (_, ids) in zip(between[1::2], self._plain(between[2::2], inner=True), strict=True):
            parts += [self._as_text[self._special[int(index)]], ids]
        return np.concatenate(parts)

    def _plain(self, texts: Sequence[str], inner: bool) -> list[tuple[str, np.ndarray]]:
        """Texts with their ids; those with marks get none yet."""
        wanted = [text for text in texts if MARK not in text]
        if self._by_pieces:
            found = iter(self._encode_by_pieces(wanted))
        else:
            found = iter(self._encode_continuing(wanted) if inner else _encode(self.backend, wanted))
        nothing = np.empty(0, np.int32)
        return [(text, nothing if MARK in text else next(found)) for text in texts]

    def _encode_continuing(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Up to its first control token a text continues what stands before it; what follows that token doesn't."""
        if self._continuing is self.backend:
            return _encode(self.backend, texts)
        cuts = [found.start() if (found := self._separator.search(text)) else len(text) for text in texts]
        heads = _encode(self._continuing, [text[:cut] for text, cut in zip(texts, cuts, strict=True)])
        rests = _encode(self.backend, [text[cut:] for text, cut in zip(texts, cuts, strict=True)])
        return [np.concatenate(parts) for parts in zip(heads, rests, strict=True)]

    def _encode_by_pieces(self, texts: Sequence[str]) -> list[np.ndarray]:
        split = [self._separator.split(text) for text in texts]  # piece, separator, piece, …, piece
        known = self._cache
        new = list(dict.fromkeys(piece for pieces in split for piece in pieces[::2] if piece not in known))
        fresh = dict(zip(new, _encode(self.backend, new), strict=True))
        result = []
        for pieces in split:
            parts = []
            for number, piece in enumerate(pieces):
                if number % 2:
                    parts.append(np.array([self.added[piece]], dtype=np.int32))
                else:
                    parts.append(fresh[piece] if piece in fresh else known[piece])
            result.append(np.concatenate(parts))
        # Dimension prompts come back with every record; a long prompt or a response won't.
        known.update((piece, ids) for piece, ids in fresh.items() if len(piece) <= _CACHED_CHARACTERS)
        if len(known) > _CACHED_PIECES:
            known.clear()
        return result


def _encode(backend: Any, texts: Sequence[str]) -> list[np.ndarray]:
    encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]


def _without_first_space(backend: Any) -> Any:
    """The same `tokenizers.Tokenizer`, but for the space that it puts in front of a first word. Of SentencePiece's
    models it is a `Prepend` normalizer (of releases that do so after each control token, too: "legacy") or a setting
    of `Metaspace`, of others a setting of `ByteLevel`.
    """
    fields = json.loads(backend.to_str())
    normalizer = fields["normalizer"]
    if normalizer and normalizer["type"] == "Prepend":
        fields["normalizer"] = None
    elif normalizer and normalizer["type"] == "Sequence":
        normalizer["normalizers"] = [step for step in normalizer["normalizers"] if step["type"] != "Prepend"]
    for step in _steps(fields["pre_tokenizer"]):
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
        elif step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
    return type(backend).from_str(json.dumps(fields))


def _steps(pre_tokenizer: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A pre-tokenizer's steps, as tokenizer.json describes them."""
    if pre_tokenizer is None:
        return
    if pre_tokenizer["type"] != "Sequence":
        yield pre_tokenizer
        return
    for step in pre_tokenizer["pretokenizers"]:
        yield from _steps(step)


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    """Matches the longest of the texts at its place; nothing where there are none."""
    if not texts:
        return re.compile("((?!))")
    return re.compile(f"({'|'.join(re.escape(text) for text in sorted(texts, key=len, reverse=True))})")


def _all_equal(left: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))
