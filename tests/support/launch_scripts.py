"""The launch scripts for clusters as tests see them: what they would start, and the models that they are for."""

from __future__ import annotations

import json
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: layers, hidden, ffn, heads, key-value heads of what each script trains, as the models' config.json say.
SHAPES = {
    "qwen2.5_7b": (28, 3584, 18944, 28, 4),
    "qwen2.5_14b": (48, 5120, 13824, 40, 8),
    "qwen2.5_32b": (64, 5120, 27648, 40, 8),
}
VOCABULARY = 152_064


def write_config(folder: Path, name: str) -> None:
    """A Hugging Face folder of the model that script ``name`` is for, without its weights."""
    layers, hidden, ffn, heads, groups = SHAPES[name]
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": VOCABULARY,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@dataclass(frozen=True)
class Shown:
    """What a script under DRY_RUN=1 says that it would start."""

    commands: list[list[str]]
    titles: list[str]

    def command(self, program: str) -> list[str]:
        """The one command that has the word."""
        (found,) = [command for command in self.commands if any(program in word for word in command)]
        return found

    @property
    def training_flags(self) -> list[str]:
        """What the training command is given."""
        words = self.command("torchrun")
        return words[words.index("megatron_amopo.train") + 1 :]

    @property
    def world_size(self) -> int:
        """Ranks that torchrun starts on all nodes."""
        words = self.command("torchrun")
        nodes = 1 if "--standalone" in words else int(words[words.index("--nnodes") + 1])
        return nodes * int(words[words.index("--nproc-per-node") + 1])


def dry_run(script: str, *arguments: str, **variables: str) -> Shown:
    """Run ``examples/SCRIPT`` under DRY_RUN=1 with a PATH that has neither python nor torchrun."""
    done = subprocess.run(
        ["/bin/bash", str(ROOT / "examples" / script), *arguments],
        env={"PATH": "/usr/bin:/bin", "DRY_RUN": "1", **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    return Shown(
        commands=[shlex.split(line) for line in lines if not line.startswith("#")],
        titles=[line.removeprefix("# ") for line in lines if line.startswith("#")],
    )
