"""The whole path on one small machine: data, model, Megatron training on two ranks, exported model.

Each step is one of the repository's own commands, the same that a real run uses; this file only runs them one after
the other, shows how far it is, keeps each one's output in a log file, and says at the end what the figures show. It
stops at the first step that fails, with the end of that step's log.

Takes nothing but a folder to write to; gives data, model, checkpoints, exported model, tables and plots in it. Runs
on the CPU, also where a GPU is at hand.

    python examples/quickstart.py --layout tp2
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.data.rules import DIMENSIONS
from examples.demo_steps import Step, StepFailed, run_steps

ROOT = Path(__file__).resolve().parents[1]
RANKS = 2
LAYOUTS = {
    "tp2": "--tensor-model-parallel-size 2",
    "pp2": "--pipeline-model-parallel-size 2",
    "dp2": "",
}
TRAIN_STEPS, RECORDS_PER_STEP = 60, 16
# β larger and γ smaller than published, and the SFT term on: in so few steps at so large a learning rate, the published
# target margin would ruin what this small model says by itself.
OBJECTIVE = "--amopo-beta 10 --amopo-gamma 0.5 --amopo-ftx-gamma 1"
SCORES = "sampled_scores.json"
MARKER = ".megatron-amopo-demo"  # in a folder that a demo made, and that the next may replace


def demo_steps(folder: Path, layout: str, train_steps: int) -> list[Step]:
    """The commands in order. ``seconds`` are what they take on two cores; they only shape the progress bar."""
    data, tokenizer, prepared, tiny = (folder / name for name in ("data", "tokenizer", "prepared", "hf-tiny"))
    start, trained, aligned = (folder / name for name in ("megatron-start", "megatron-aligned", "aligned"))
    prompts, logps = ROOT / "examples/data/prompts.yaml", folder / "logps.jsonl"

    def python(text: str, *more: str | Path) -> list[str]:
        return [sys.executable, *text.split(), *(str(word) for word in more)]

    train = python(
        f"-m torch.distributed.run --standalone --nproc-per-node {RANKS} -m megatron_amopo.train "
        f"{LAYOUTS[layout]} --micro-batch-size 4 --global-batch-size {RECORDS_PER_STEP} --train-iters {train_steps} "
        "--lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 5 --weight-decay 0 --clip-grad 1 "
        f"--seed 1 --log-interval 1 --amopo-eval-at-start --finetune {OBJECTIVE}"
    )
    for flag, path in (
        ("--amopo-data", prepared),
        ("--pretrained-checkpoint", start),
        ("--save", trained),
        ("--amopo-dump-logps", logps),
        ("--tensorboard-dir", folder / "tensorboard"),
    ):
        train += [flag, str(path)]

    return [
        Step(
            "data",
            "generate preference data",
            1,
            data / "held_out.jsonl",
            python("examples/data/generate_preferences.py --output", data),
        ),
        Step(
            "tokenizer",
            "train a tokenizer",
            1,
            tokenizer / "tokenizer.json",
            python("examples/data/train_tokenizer.py --data", data / "train.jsonl", "--output", tokenizer),
        ),
        Step(
            "prepare",
            "prepare prompts per dimension and tokens",
            8,
            prepared / "manifest.json",
            python(
                f"tools/prepare_preferences.py --dimensions {','.join(DIMENSIONS)} --cutoff-len 256 --validation-file",
                *(data / "held_out.jsonl", "--prompts", prompts, "--tokenizer", tokenizer, "--output", prepared),
                data / "train.jsonl",
            ),
        ),
        Step(
            "fit",
            "make a tiny Qwen2 that speaks the task",
            45,
            tiny / "model.safetensors",
            python("examples/make_tiny_model.py --data", prepared, "--tokenizer", tokenizer, "--output", tiny),
        ),
        Step(
            "convert",
            "convert: Hugging Face to Megatron",
            5,
            start / "hf",
            python("tools/convert_checkpoint.py hf-to-megatron", tiny, start),
        ),
        Step("train", f"align with Megatron on {RANKS} ranks, {layout}", 70, logps, train),
        Step(
            "export",
            "export: Megatron to Hugging Face",
            6,
            aligned / "config.json",
            python("tools/convert_checkpoint.py megatron-to-hf", trained, aligned),
        ),
        Step(
            "check",
            "compare transformers with Megatron",
            12,
            None,
            python("examples/compare_logps.py --records 100 --model", aligned, "--data", prepared, "--logps", logps),
        ),
        Step(
            "sample",
            "let both models answer, score by rule",
            12,
            folder / SCORES,
            python(
                *("examples/score_samples.py --model", tiny, "--model", aligned),
                *("--data", data / "held_out.jsonl", "--json", folder / SCORES),
            ),
        ),
    ]


def child_environment() -> dict[str, str]:
    """The steps' environment: this repository's code, no GPU, no network, threads that don't fight for the cores."""
    environment = dict(os.environ)
    paths = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment |= {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    return environment


def new_folder(folder: Path) -> None:
    """Make an empty folder, in the place of an earlier demo's. Raises FileExistsError for anything else there."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise FileExistsError(f"--output {folder} exists and isn't a demo's folder; name another")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def show_results(console: Console, folder: Path) -> bool:
    """Print table, verdict, paths and next commands; gives whether accuracy rose on every dimension."""
    from examples.demo_report import RunMetrics, dimensions_that_rose, draw_plots, figures_table, verdict

    run = RunMetrics.load(folder / "megatron-aligned" / "metrics.jsonl")
    records = json.loads((folder / "prepared" / "manifest.json").read_text())["records"]["validation"]
    plots = draw_plots(run, folder / "plots")
    console.print()
    before, after = json.loads((folder / SCORES).read_text())
    console.print(figures_table(run, records, {name: (before[name], after[name]) for name in before}))
    console.print(verdict(run, records), style="bold")
    check = (folder / "logs" / "check.log").read_text(encoding="utf-8").strip().splitlines()[-1]
    console.print(f"Exported model in transformers against Megatron: {check}")
    console.print(f"\nPlots:  {'  '.join(_shown(path) for path in plots)}", soft_wrap=True)
    console.print(f"Model:  {_shown(folder / 'aligned')}  (a Hugging Face folder)\n", soft_wrap=True)
    console.print("Next:", style="bold")
    for command in next_commands(folder):
        console.print(f"  {command}", soft_wrap=True, highlight=False, markup=False)
    return dimensions_that_rose(run) == run.dimensions


def next_commands(folder: Path) -> list[str]:
    """What one may want to type now, from the repository's root."""
    python = _shown(Path(sys.executable))
    aligned, trained = _shown(folder / "aligned"), _shown(folder / "megatron-aligned")
    return [
        f"{python} tools/convert_checkpoint.py verify {aligned} {trained}",
        f"{python} tools/report.py {trained}   # all of the run on one page",
        f"{python} -m tensorboard.main --logdir {_shown(folder / 'tensorboard')}",
        "make demo LAYOUT=pp2",
        f"{python} tools/prepare_preferences.py --help   # your own data",
    ]


def _shown(path: Path) -> str:
    """A path as one would type it here."""
    absolute = Path(os.path.abspath(path))
    return shlex.quote(str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status is 0 only where every step succeeded and accuracy rose on every dimension."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "runs/demo", metavar="DIR", help="(default: runs/demo)")
    parser.add_argument("--layout", choices=list(LAYOUTS), default="tp2", help="of the ranks (default: %(default)s)")
    parser.add_argument("--train-steps", type=int, default=TRAIN_STEPS, help="optimizer steps (default: %(default)s)")
    options = parser.parse_args(arguments)
    folder = Path(os.path.abspath(options.output))
    try:
        new_folder(folder)
    except FileExistsError as error:
        parser.error(str(error))

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    steps = demo_steps(folder, options.layout, options.train_steps)
    try:
        run_steps(steps, folder / "logs", console, cwd=ROOT, environment=child_environment())
    except StepFailed as failure:
        console.print(str(failure), style="red", markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    return 0 if show_results(console, folder) else 1


if __name__ == "__main__":
    sys.exit(main())
