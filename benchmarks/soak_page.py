"""The page of a soak: what was killed when, what it left, what starting again costs.

Takes the kills that ``benchmarks/soak.py`` recorded; gives ``README.md``, ``results.json`` and a plot in its folder.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from benchmarks.support import COLOURS, STYLE, Samples, markdown_table, write_results

if TYPE_CHECKING:
    from benchmarks.soak import Kill

PHASES = ("start", "load", "step", "save", "end")


def write(folder: Path, kills: "Sequence[Kill]", faults: Sequence[str], *, seed: int, setting: str) -> None:
    """Write the page into ``folder``; ``setting`` says in a sentence what run was killed."""
    command = f"python -m benchmarks.soak --kills {len(kills)} --output {folder} --seed {seed}"
    by = Counter((kill.manner, kill.phase) for kill in kills)
    manners = sorted({kill.manner for kill in kills})
    phases = [phase for phase in PHASES if any(kill.phase == phase for kill in kills)]
    hits = [
        [manner, *(by[manner, phase] for phase in phases), sum(by[manner, p] for p in phases)] for manner in manners
    ]
    hits.append(["all", *(sum(by[m, phase] for m in manners) for phase in phases), len(kills)])

    starts = [kill.start_seconds for kill in kills if kill.start_seconds is not None]
    one_dies = [k.seconds_to_end for k in kills if k.manner.startswith("SIGKILL to one") and k.phase != "start"]
    heard = [kill for kill in kills if kill.manner.startswith("SIGTERM") and kill.phase in ("step", "save")]
    requeued = [kill.seconds_to_end for kill in heard if set(kill.codes) == {75}]
    lost = [kill.step - kill.saved for kill in kills if kill.manner.startswith("SIGKILL") and kill.step >= kill.saved]
    costs = [
        [what, _text(values, unit)]
        for what, values, unit in (
            ("from a start to the end of its first step (without the import of Megatron)", starts, "s"),
            ("steps to do again after SIGKILL", lost, ""),
            ("from the death of one rank to the end of the other", one_dies, "s"),
            ("from SIGTERM to the end of both ranks, with a checkpoint", requeued, "s"),
        )
        if values
    ]
    unusable = sum(len(kill.unusable) for kill in kills)
    text = f"""\
{setting}

| | |
|---|---:|
| kills | {len(kills)} |
| checkpoints that were there and could not be loaded, over all kills | {unusable} |
| differences from the undisturbed run, and other faults | {len(faults) - unusable} |
| SIGTERM to one rank in training that ended both with a checkpoint and code 75 | {len(requeued)} of {len(heard)} |

What the first rank was doing when the signal came:

{markdown_table(["", *phases, "all"], hits)}
What it costs:

{markdown_table(["", "median (least – most)"], costs)}
"start" is all before a checkpoint is loaded, "load" reading it and what precedes the first step, "step" training,
during which asynchronous saves are written, "save" what training waits for. Before the first step there is nothing to
save, and SIGTERM ends the process at once. Deaths in "start" are left out of the last row but one: a rank that waits
for another to appear does so for as long as `--distributed-timeout-minutes` says, where no launcher ends it.
"""
    if faults:
        text += "\nFaults:\n\n" + "".join(f"- {fault}\n" for fault in faults)
    write_results(
        folder,
        title="A run that is killed, and killed again",
        command=command,
        text=text,
        data={"kills": [asdict(kill) for kill in kills], "faults": list(faults)},
        figures={"kills": _plot(kills, phases)},
    )


def _text(values: Sequence[float], unit: str) -> str:
    return f"{Samples(tuple(values)).text('.2f' if unit else '.0f')} {unit}".strip()


def _plot(kills: "Sequence[Kill]", phases: Sequence[str]) -> Figure:
    """What was reached and what was kept, kill by kill."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.5))
        axes = figure.subplots()
        numbers = range(1, len(kills) + 1)
        axes.step(numbers, [kill.saved for kill in kills], where="post", color=COLOURS[0], label="newest checkpoint")
        for phase, colour in zip(phases, COLOURS[1:], strict=False):
            chosen = [(n, kill.step) for n, kill in zip(numbers, kills, strict=True) if kill.phase == phase]
            axes.scatter(
                [n for n, _ in chosen],
                [step for _, step in chosen],
                s=14,
                color=colour,
                label=f"killed in: {phase}",
                zorder=3,
            )
        axes.set_xlabel("kill")
        axes.set_ylabel("step")
        axes.legend(loc="upper left", frameon=False, fontsize=8)
    return figure
