"""Encoding by pieces gives what encoding the whole text gives, and marks keep control tokens' names text."""

import random

import numpy as np
import pytest

from megatron_amopo.data import encoding
from megatron_amopo.data.encoding import MARK, TextEncoder
from megatron_amopo.data.problems import RecordProblem
from tests.data.conftest import SPECIAL


@pytest.fixture
def backend(tokenizer_dir):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))


def settled(backend):
    encoder = TextEncoder(backend)
    assert encoder.settle("<|im_start|>user\n", ["yes<|im_end|>", " no<|im_end|>"])
    return encoder


def random_texts(count, seed=0):
    rng = random.Random(seed)
    words = [*SPECIAL, "the response", " ", "\n\n", "é漢", "<|im_", "end|>", "answering", ""]
    return ["".join(rng.choices(words, k=rng.randrange(12))) for _ in range(count)]


def test_pieces_equal_the_whole(backend, monkeypatch):
    monkeypatch.setattr(encoding, "_CACHED_PIECES", 20)  # so that the cache is emptied now and then
    encoder = settled(backend)
    assert encoder._by_pieces
    for seed in range(200):
        texts = random_texts(5, seed)
        whole = encoder.backend.encode_batch(texts, add_special_tokens=False)
        for ids, expected in zip(encoder.encode(texts), whole, strict=True):
            assert ids.tolist() == expected.ids
            assert ids.dtype == np.int32
        assert len(encoder._cache) <= 20


def test_a_tokenizer_whose_control_tokens_take_spaces_along_is_not_cut(backend):
    from tokenizers import AddedToken

    backend.add_special_tokens([AddedToken("<|pad|>", lstrip=True, rstrip=True, normalized=False, special=True)])
    encoder = settled(backend)
    text = "<|im_start|>a  <|pad|>  b<|im_end|>"
    assert encoder.encode([text])[0].tolist() == encoder.backend.encode(text, add_special_tokens=False).ids


def test_marks_come_back_as_characters(backend):
    encoder = settled(backend)
    control = [encoder.added[name] for name in SPECIAL]
    for text in random_texts(200):
        marked = encoder.mark(text)
        assert not any(name in marked for name in SPECIAL)
        (ids,) = encoder.encode([f"<|im_start|>{marked}"])
        assert np.isin(ids, control).sum() == 1
        assert encoder.backend.decode(ids.tolist(), skip_special_tokens=False) == f"<|im_start|>{text}"


def test_a_name_that_has_no_spelling_of_its_own_is_refused(backend):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "stop": 1, "go": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["stop"])  # the characters s, t, o, p encode to the control token, too
    with pytest.raises(RecordProblem, match="contains 'stop'"):
        TextEncoder(words).mark("go stop go")
    with pytest.raises(RecordProblem, match="FDD0"):
        settled(backend).mark(f"x{MARK}")
