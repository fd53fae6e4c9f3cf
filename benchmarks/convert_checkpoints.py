"""How fast and in how much memory checkpoints are converted, against `cp` of the same bytes.

Makes a model of random bfloat16 weights in the exact shape of a published one, then, round after round: copies it with
`cp`, converts it to Megatron's format, copies that, converts it back. Every copy and conversion starts with a cold page
cache and ends when its bytes are on the disk; the converter runs as people run it, by its command line. Once, the two
sides are verified and the exported files compared with the originals byte by byte. Gives a folder of results.

    python -m benchmarks.convert_checkpoints --work DIR [--model 7b|3b|tiny | --config FILE] [--rounds 2] [--workers 2]

DIR needs three times the model's size (7b: 46 GB); everything in it is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.support import COLOURS, GIB, RESULTS, Samples, markdown_table, write_results
from megatron_amopo.checkpoint.families import parameter_table
from megatron_amopo.checkpoint.hf_writer import HfWriter, plan_files
from megatron_amopo.checkpoint.parameters import hf_shapes
from megatron_amopo.checkpoint.streaming import DEFAULT_WORKERS, PART_NUMBERS
from megatron_amopo.checkpoint.tensor_files import TensorInfo

ROOT = Path(__file__).resolve().parent.parent
_CONVERTER = ROOT / "tools" / "convert_checkpoint.py"
_SAMPLE_EVERY_S = 0.02
_BLOCK = 16 * 2**20
_HEADER = ("", "cp, s", "converting, s", "whole command, s", "of cp's speed", "whole command", "RSS, GiB", "own, GiB")

_QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
}


def _qwen(hidden: int, ffn: int, layers: int, heads: int, groups: int, vocabulary: int, tied: bool) -> dict[str, Any]:
    return {
        **_QWEN,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


# Qwen2.5's shapes; the third is for trying the benchmark itself.
MODELS: Mapping[str, dict[str, Any]] = {
    "7b": _qwen(3584, 18944, 28, 28, 4, 152064, tied=False),
    "3b": _qwen(2048, 11008, 36, 16, 2, 151936, tied=True),
    "tiny": _qwen(256, 1024, 4, 4, 2, 151936, tied=True),
}


@dataclass(frozen=True)
class ProcessRun:
    """A command that ended well: how long it took and the most memory that it held."""

    seconds: float
    resident_bytes: int
    """Peak of all resident pages, those of mapped files (libraries, above all) included."""
    anonymous_bytes: int
    """Peak, sampled, of the pages that are the process's own."""
    printed: str


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the files, removed at the end")
    parser.add_argument("--model", choices=list(MODELS), default="7b")
    parser.add_argument("--config", type=Path, help="config.json of another model, instead of --model")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=DEFAULT_WORKERS)
    parser.add_argument("--results", type=Path, default=RESULTS / "convert_checkpoints", help="folder of the results")
    args = parser.parse_args()
    config = json.loads(args.config.read_text()) if args.config else MODELS[args.model]
    if args.work.exists():
        parser.error(f"--work {args.work} exists")
    args.work.mkdir(parents=True)
    try:
        data = measure(args.work, config, args.rounds, args.workers)
    finally:
        shutil.rmtree(args.work)
    name = args.config.stem if args.config else f"Qwen2.5-{args.model.upper()}"
    text, figure = report(name, data)
    write_results(
        args.results,
        title=f"Converting checkpoints: {name}",
        command="python -m benchmarks.convert_checkpoints --work DIR "
        + (f"--config {args.config.name} " if args.config else f"--model {args.model} ")
        + f"--rounds {args.rounds} --workers {args.workers}",
        text=text,
        data=data,
        figures={"speed": figure},
    )
    print(text)
    return 0


def measure(work: Path, config: Mapping[str, Any], rounds: int, workers: int) -> dict[str, Any]:
    """Seconds and bytes of everything, round by round."""
    original, megatron, copy, back = (work / name for name in ("original", "megatron", "copy", "back"))
    print("making the model", flush=True)
    make_model(original, config)
    size = sum(path.stat().st_size for path in _files(original))
    found: dict[str, list[float]] = defaultdict(list)

    def timed_copy(source: Path, name: str) -> None:
        _forget(source)
        start = time.perf_counter()
        subprocess.run(["cp", "-r", "--reflink=never", source, copy], check=True)
        for path in _files(copy):
            _sync(path)
        found[f"{name} seconds"].append(time.perf_counter() - start)
        shutil.rmtree(copy)

    def timed_conversion(command: str, source: Path, target: Path) -> None:
        _forget(source)
        done = run([sys.executable, str(_CONVERTER), command, str(source), str(target), "--workers", str(workers)])
        inside = re.search(r"in ([\d.]+) s$", done.printed.strip())
        assert inside is not None, done.printed
        found[f"{command} seconds"].append(done.seconds)
        found[f"{command} seconds without start"].append(float(inside[1]))
        found[f"{command} resident bytes"].append(done.resident_bytes)
        found[f"{command} anonymous bytes"].append(done.anonymous_bytes)

    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", flush=True)
        timed_copy(original, "cp of the Hugging Face folder")
        timed_conversion("hf-to-megatron", original, megatron)
        timed_copy(megatron, "cp of the Megatron folder")
        timed_conversion("megatron-to-hf", megatron, back)
        if number == 0:
            _forget(original)
            _forget(megatron)
            verified = run([sys.executable, str(_CONVERTER), "verify", str(original), str(megatron)])
            found["verify seconds"].append(verified.seconds)
            found["verify resident bytes"].append(verified.resident_bytes)
            found["verify anonymous bytes"].append(verified.anonymous_bytes)
            assert _same_files(original, back), "the exported files differ from the originals"
        shutil.rmtree(back)
        shutil.rmtree(megatron)
    return {"bytes": size, "rounds": rounds, "workers": workers, "config": dict(config), **found}


def make_model(folder: Path, config: Mapping[str, Any]) -> None:
    """A Hugging Face folder of seeded normal numbers."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    table = parameter_table(config)
    infos = {name: TensorInfo(torch.bfloat16, shape) for name, shape in hf_shapes(table).items()}
    generator = torch.Generator().manual_seed(1)
    with HfWriter(folder, infos, plan_files(infos, "4GB")) as writer:
        for part in (part for parameter in table for part in parameter.parts(PART_NUMBERS)):
            for rows in part.pieces:
                shape = (rows.count, *infos[rows.name].shape[1:])
                writer.write(rows.name, torch.randn(shape, generator=generator).bfloat16(), rows.first)


def run(command: list[str]) -> ProcessRun:
    """Run a command and watch its memory by what the kernel says in /proc."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    resident = anonymous = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            continue
        values = {key: int(value) * 1024 for key, value in re.findall(r"^(VmHWM|RssAnon):\s+(\d+) kB", status, re.M)}
        resident = max(resident, values.get("VmHWM", 0))
        anonymous = max(anonymous, values.get("RssAnon", 0))
        time.sleep(_SAMPLE_EVERY_S)
    seconds = time.perf_counter() - start
    assert process.stdout is not None
    printed = process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}: {printed}")
    return ProcessRun(seconds, resident, anonymous, printed)


def report(name: str, data: Mapping[str, Any]) -> tuple[str, Figure]:
    """Markdown and a figure of what was measured."""
    size = data["bytes"]
    pairs = (
        ("import", "hf-to-megatron", "cp of the Hugging Face folder"),
        ("export", "megatron-to-hf", "cp of the Megatron folder"),
    )
    rows = []
    figure = Figure(figsize=(6.4, 2.6))
    axes = figure.subplots()
    for place, (label, command, copy) in enumerate(pairs):
        copied, whole, inside = (
            Samples(tuple(data[key]))
            for key in (f"{copy} seconds", f"{command} seconds", f"{command} seconds without start")
        )
        memory = [max(data[f"{command} {kind} bytes"]) / GIB for kind in ("resident", "anonymous")]
        rows.append(
            [
                label,
                copied.text(".3g"),
                inside.text(".3g"),
                whole.text(".3g"),
                f"{100 * copied.per(inside).median:.0f} %",
                f"{100 * copied.per(whole).median:.0f} %",
                *(f"{gib:.2f}" for gib in memory),
            ]
        )
        for bar, (what, seconds) in enumerate((("cp", copied), (label, inside))):
            rate = size / seconds.median / 1e6
            axes.barh(3 * place + bar, rate, color=COLOURS[bar])
            axes.text(rate, 3 * place + bar, f" {what}, {rate:.0f} MB/s", va="center")
    axes.set_yticks([])
    axes.set_xlim(right=1.35 * axes.get_xlim()[1])
    axes.invert_yaxis()
    axes.set_xlabel("MB/s, cold page cache to synced disk")
    axes.spines[["top", "right"]].set_visible(False)
    disk = size / Samples(tuple(data["cp of the Hugging Face folder seconds"])).median / 1e6
    verify_gib = data["verify resident bytes"][0] / GIB
    text = f"""
{name}'s shape with random bfloat16 weights, {size / 1e9:.2f} GB.
{data["workers"]} workers, {data["rounds"]} rounds: median (smallest – largest). Each copy and conversion reads from
a cold page cache and ends when its files are synced; `cp` reaches {disk:.0f} MB/s on this disk. The whole command
starts Python and torch, too. RSS is the peak of all resident pages, shared libraries included; own are anonymous pages.

{markdown_table(_HEADER, rows)}
`verify` took {data["verify seconds"][0]:.0f} s to read both sides, in {verify_gib:.2f} GiB. It found
every tensor equal, and the exported files were the original ones byte for byte.
"""
    return text, figure


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _forget(folder: Path) -> None:
    """Have the page cache drop a folder's files, so that they are read from the disk."""
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _same_files(left: Path, right: Path) -> bool:
    if [path.relative_to(left) for path in _files(left)] != [path.relative_to(right) for path in _files(right)]:
        return False
    for one, other in zip(_files(left), _files(right), strict=True):
        with one.open("rb") as first, other.open("rb") as second:
            while block := first.read(_BLOCK):
                if second.read(_BLOCK) != block:
                    return False
            if second.read(1):
                return False
    return True


if __name__ == "__main__":
    sys.exit(main())
