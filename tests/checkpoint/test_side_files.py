"""What travels beside the weights comes back as it was, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_amopo.checkpoint.convert import hf_to_megatron, megatron_to_hf
from megatron_amopo.checkpoint.hf_files import MORE_TEMPLATES, SIDE_FILES
from megatron_amopo.data.model_prompts import PROMPTS_FILE, ModelPrompts
from megatron_amopo.data.prompts import PromptStyle
from tests.support.checkpoints import MakeFolder, all_files

# Written out once more, so that one that is lost from the list is missed here.
KNOWN = """
    generation_config.json tokenizer.json tokenizer_config.json tokenizer.model tokenizer.model.v3 tekken.json
    special_tokens_map.json added_tokens.json vocab.json merges.txt chat_template.jinja chat_template.json LICENSE
    LICENSE.txt NOTICE USE_POLICY.md
""".split()  # noqa: SIM905
NAMES = sorted({*KNOWN, *SIDE_FILES} - {PROMPTS_FILE})
# With prompts beside it, a template is read, and extended if it can be: this one uses what it would get.
TEMPLATE = "{{ want }}{{ messages }}\r\n"


@pytest.mark.parametrize("prompts", [False, True], ids=["without prompts", "with prompts that the template can't take"])
def test_every_side_file_comes_back(make_folder: MakeFolder, tmp_path: Path, prompts: bool) -> None:
    original = make_folder()
    for name in NAMES:
        # Neither text nor line ends of this system: nothing may read and write it anew.
        (original / name).write_bytes(f"{name}\r\n".encode() + b"\xff\x00")
    (original / "chat_template.jinja").write_bytes(TEMPLATE.encode())
    if prompts:
        ModelPrompts(PromptStyle.load("published_system"), ("a", "b"), ("general", "a", "b")).save(original)
    more = original / MORE_TEMPLATES / "older"
    more.mkdir(parents=True)
    (more.parent / "tool_use.jinja").write_bytes(b"{{ tools }}\r\n")
    (more / "rag.jinja").write_bytes(b"{{ documents }}\xff")

    hf_to_megatron(original, tmp_path / "megatron")
    done = megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    files = all_files(original)
    assert files.keys() >= {*NAMES, f"{MORE_TEMPLATES}/tool_use.jinja"}
    assert (PROMPTS_FILE in files) == prompts
    assert ["left alone" in note for note in done.notes] == [True] * prompts
    assert all_files(tmp_path / "back") == files
    # An export may be replaced, whatever of these it holds.
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", force=True)
    assert all_files(tmp_path / "back") == files
