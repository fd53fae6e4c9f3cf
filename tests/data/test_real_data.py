"""Other people's data and the real Qwen2.5 tokenizer, where they are present beside the project."""

import json

import numpy as np
import pytest

from megatron_amopo.data.dataset import PreparedGroups
from megatron_amopo.data.prepare import PrepareOptions, prepare
from megatron_amopo.errors import DataError
from tests.support.shared import SHARED_DATA

TOKENIZER = SHARED_DATA / "qwen2.5-tokenizer"
DIMENSIONS = ("helpfulness", "correctness", "instruction_following")

pytestmark = pytest.mark.skipif(
    not TOKENIZER.is_dir(), reason="no ../shared/data with sample files and the Qwen2.5 tokenizer"
)


def options(tmp_path, name, **changes):
    given = {
        "inputs": (SHARED_DATA / name,),
        "output": tmp_path / "out",
        "tokenizer": TOKENIZER,
        "dimensions": DIMENSIONS,
        "source_scale": (0.0, 4.0),
    }
    return PrepareOptions(**{**given, **changes})


def test_hellobench(tmp_path):
    lines = (SHARED_DATA / "hellobench/train.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    manifest, _ = prepare(options(tmp_path, path))
    assert manifest.records == {"train": 60}
    assert manifest.tokenizer.end_of_turn_id == 151645
    assert manifest.tokenizer.pad_id == 151643
    assert manifest.tokenizer.vocab_size == 151665
    groups = PreparedGroups.open(tmp_path / "out")
    assert (groups.lengths[:, :, 0] + groups.lengths[:, :, 1:].max(axis=2)).max() == 1024
    header = [151645, 198, 151644, 77091, 198]
    for i, line in enumerate(lines):
        record = json.loads(line)
        group = groups[i]
        assert all(prompt[-5:].tolist() == header for prompt in group.prompts)
        expected = [[record[side][name] + 1 for name in DIMENSIONS] for side in ("chosen", "rejected")]
        np.testing.assert_array_equal(groups.scores(i), expected)


def test_whole_sequences_equal_transformers(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    record = json.loads((SHARED_DATA / "hellobench/train.jsonl").open(encoding="utf-8").readline())
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(record), encoding="utf-8")
    manifest, _ = prepare(options(tmp_path, path, cutoff_len=None))
    group = PreparedGroups.open(tmp_path / "out")[0]
    general = tokenizer.decode(group.prompts[0])
    assert general.startswith("<|im_start|>system\nYou are an expert at answering.")
    assert general.count("<|im_start|>") == 3
    for side, responses in (("chosen", group.chosen), ("rejected", group.rejected)):
        for prompt, response in zip(group.prompts, responses, strict=True):
            system = tokenizer.decode(prompt).split("<|im_end|>")[0].removeprefix("<|im_start|>system\n")
            turns = [
                {"role": "system", "content": system},
                {"role": "user", "content": record["prompt"]},
                {"role": "assistant", "content": record[side]["content"]},
            ]
            whole = tokenizer.apply_chat_template(turns, return_dict=False)
            assert [*prompt, *response, 198] == whole
    assert manifest.dimensions == ("general", *DIMENSIONS)


def test_helpsteer2(tmp_path):
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    lines = (SHARED_DATA / "helpsteer2_format/helpsteer2_3rows.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    rows[1]["prompt"] = rows[0]["prompt"]  # the sample holds one row of each of three prompts
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    manifest, report = prepare(options(tmp_path, path, dimensions=names, cutoff_len=None))
    assert manifest.records == {"train": 1}
    assert report.content()["dropped"]["unpaired"]["examples"] == ["rows.jsonl:3: 1 of 1 responses usable"]
    totals = [sum(row[name] for name in names) for row in rows[:2]]
    better = totals.index(max(totals))
    groups = PreparedGroups.open(tmp_path / "out")
    assert groups.source(0) == f"rows.jsonl:{better + 1} / rows.jsonl:{2 - better}"
    np.testing.assert_array_equal(groups.scores(0)[0], [rows[better][name] + 1 for name in names])


def test_pairs_without_scores_say_so(tmp_path):
    with pytest.raises(DataError, match=r"300 dropped, missing_score: .*dpo_en_demo.json\[0\]"):
        prepare(options(tmp_path, "pairwise_demo/dpo_en_demo.json"))


def test_single_responses_say_so(tmp_path):
    with pytest.raises(DataError, match="dropped, unpaired"):
        prepare(options(tmp_path, "steerlm512/responses.jsonl"))
