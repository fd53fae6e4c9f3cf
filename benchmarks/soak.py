"""Kill a training run at random moments until it has been killed often, and compare what it became with the run that
was never touched.

    python -m benchmarks.soak --kills 100 --output runs/soak

A run of two ranks saves every few steps, with the ledger, margin floors and the newest checkpoints kept, synchronously
and asynchronously by turns. It is killed (SIGKILL to all ranks, to one of them, SIGTERM to one) while it starts, loads,
trains or saves, and started again by the same command. After each kill every checkpoint that is there is read to its
last byte, and exit codes are what docs/surviving.md says; in the end metrics, ledger and weights must equal the
undisturbed run's, bit by bit. A run that reaches its end early is followed by another. Moments are drawn from a seed;
what a kill hits also depends on the machine's speed.

``--minutes`` limits the time; the same command goes on where it was, with all kills counted.
"""

import argparse
import io
import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a process that is forked must have no threads
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from benchmarks.forked_runs import ForkedRun, Phase, import_all, in_a_fork

STEPS, SAVE_EVERY, KEPT = 240, 4, 3
TIMING = ("records_per_s", "tokens_per_s")
#: Where kills aim, with their shares.
AIMS = {Phase.START: 0.15, Phase.LOAD: 0.1, Phase.STEP: 0.3, Phase.SAVE: 0.45}
#: How runs are killed, with their shares.
MANNERS = {"SIGKILL to all ranks": 0.7, "SIGKILL to one rank": 0.15, "SIGTERM to one rank": 0.15}
_PATIENCE_S = 300
_LAUNCHER_S = 5


@dataclass(frozen=True)
class Kill:
    """One kill and what it left."""

    manner: str
    phase: str  # that the first rank was in
    step: int  # the newest in metrics.jsonl
    saved: int  # the step that the next start goes on from
    codes: tuple[int, ...]
    seconds_to_end: float  # from the signal to the end of the last rank
    start_seconds: float | None  # from the start to the end of the first step; None if it wasn't reached
    unusable: tuple[str, ...]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="for runs, and for the page of results"
    )
    parser.add_argument("--minutes", type=float, help="stop after so many; the same command goes on")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    import_all()
    soak = Soak(args.output, args.seed)
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    finished = soak.go_on(args.kills, deadline)
    if not finished:
        print(f"> {len(soak.kills)} of {args.kills} kills; the same command goes on")
        return 0
    in_a_fork(soak.write_page)
    return 1 if soak.faults else 0


class Soak:
    """The state of a soak, in its folder: a reference run, a series of runs that are killed, what was found."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed
        folder.mkdir(parents=True, exist_ok=True)
        self._record = folder / "kills.jsonl"
        lines = self._record.read_text().splitlines() if self._record.exists() else []
        self.kills = [Kill(**json.loads(line)) for line in lines]
        self._faults = folder / "faults.txt"

    @property
    def faults(self) -> list[str]:
        """What is wrong; nothing, one hopes."""
        return self._faults.read_text().splitlines() if self._faults.exists() else []

    def go_on(self, kills: int, deadline: float) -> bool:
        """Kill until there are so many, and let the last run come to its end; False if time was up before."""
        if not (self.folder / "data").exists():
            in_a_fork(lambda: _make_inputs(self.folder))
        reference = self.folder / "reference"
        if not (reference / "done").exists():
            shutil.rmtree(reference, ignore_errors=True)
            self._run_to_end(reference)
        for number in range(10**6):
            place = self.folder / f"killed-{number}"
            if (place / "done").exists():
                continue
            if len(self.kills) >= kills and not place.exists():
                return True
            while not (place / "done").exists():
                if time.monotonic() > deadline:
                    return False
                if len(self.kills) >= kills:
                    self._run_to_end(place)
                else:
                    self._kill_once(place)
            self._compare(place, reference)
        raise AssertionError("unreachable")

    def _start(self, place: Path, *, asynchronous: bool) -> ForkedRun:
        place.mkdir(exist_ok=True)
        flags = [*_flags(self.folder, place), *(["--async-save"] if asynchronous else [])]
        return ForkedRun(flags, place / "log.txt")

    def _run_to_end(self, place: Path) -> None:
        run = self._start(place, asynchronous=False)
        ended = run.wait(_PATIENCE_S)
        run.clean_up()
        if not ended or set(run.codes.values()) != {0}:
            self._fault(f"{place.name}: an undisturbed start ended with {run.codes}")
            raise SystemExit(f"{place / 'log.txt'}: a run failed by itself")
        (place / "done").touch()

    def _kill_once(self, place: Path) -> None:
        rng = random.Random(f"{self.seed}/{len(self.kills)}")
        aim = rng.choices(list(AIMS), list(AIMS.values()))[0]
        manner = rng.choices(list(MANNERS), list(MANNERS.values()))[0]
        times = rng.randint(1, 3) if aim is Phase.SAVE else rng.randint(1, 20) if aim is Phase.STEP else 1
        delay = rng.random() * {Phase.START: 0.8, Phase.LOAD: 0.5, Phase.STEP: 0.1, Phase.SAVE: 0.3}[aim]
        victim = None if manner.endswith("all ranks") else rng.randint(0, 1)
        asynchronous = rng.random() < 0.4

        run = self._start(place, asynchronous=asynchronous)
        first_step: float | None = None
        if aim is not Phase.START and run.wait_for(Phase.LOAD, 1) and aim is not Phase.LOAD:
            if run.wait_for(Phase.STEP, 2):
                first_step = time.monotonic() - run.started
            if aim is Phase.SAVE or times > 2:
                run.wait_for(aim, times)
        time.sleep(delay)
        phase = run.phase()[0]
        if run.poll() == 2:
            run.clean_up()
            if set(run.codes.values()) == {0}:
                (place / "done").touch()
            else:
                self._fault(f"{place.name}: a start that nobody disturbed ended with {run.codes}")
            return
        signalled = time.monotonic()
        run.kill(signal.SIGTERM if manner.startswith("SIGTERM") else signal.SIGKILL, victim)
        if phase is Phase.START and not run.wait(_LAUNCHER_S):
            run.kill(signal.SIGTERM)  # as a launcher does at once: a rank may wait for one that never appears
        if not run.wait(_PATIENCE_S):
            self._fault(f"kill {len(self.kills)}: ranks hang after {manner} in {phase.name}")
        ended = time.monotonic() - signalled
        run.clean_up()
        unusable, saved = in_a_fork(lambda: _verify(place))
        for what in unusable:
            self._fault(f"kill {len(self.kills)}: {what}")
        if what := wrong_codes(manner, phase, run.codes, victim, is_over=saved == STEPS):
            self._fault(f"kill {len(self.kills)}: {what}")
        kill = Kill(
            manner + (", asynchronous saves" if asynchronous else ""), phase.name.lower(), _newest_step(place), saved,
            tuple(run.codes[rank] for rank in sorted(run.codes)), ended, first_step, tuple(unusable),
        )  # fmt: skip
        self.kills.append(kill)
        with self._record.open("a") as file:
            file.write(json.dumps(asdict(kill)) + "\n")
        print(f"kill {len(self.kills)}: {kill}", flush=True)
        if set(run.codes.values()) == {0}:  # the signal came after the last moment at which it is heard
            (place / "done").touch()

    def _compare(self, place: Path, reference: Path) -> None:
        for what in in_a_fork(lambda: _differences(place, reference)):
            self._fault(f"{place.name}: {what} differs from the undisturbed run's")

    def _fault(self, what: str) -> None:
        print(f"FAULT {what}", file=sys.stderr, flush=True)
        with self._faults.open("a") as file:
            file.write(what + "\n")

    def write_page(self) -> None:
        """``README.md``, ``results.json`` and a plot in the soak's folder."""
        from benchmarks import soak_page

        rounds = len(list(self.folder.glob("killed-*")))
        setting = (
            f"{STEPS} steps of two data-parallel ranks (gloo, distributed optimizer, ledger, a margin floor), saved "
            f"every {SAVE_EVERY} steps, of which the newest {KEPT} stay; saves are asynchronous in some starts. "
            f"{rounds} such run(s) were started again and again until they came to their end, and compared bit by bit "
            "with one that nobody touched: metrics, ledger, weights, optimizer."
        )
        soak_page.write(self.folder, self.kills, self.faults, seed=self.seed, setting=setting)


def wrong_codes(manner: str, phase: Phase, codes: dict[int, int], victim: int | None, *, is_over: bool) -> str | None:
    """What is wrong with ranks' exit codes: once training has begun, all heed SIGTERM alike (75), and a rank that loses
    another says so (1). One that ``is_over`` by then may end as if nothing had happened.
    """
    if phase not in (Phase.STEP, Phase.SAVE) or victim is None:
        return None
    expected = 75 if manner.startswith("SIGTERM") else 1
    found = {rank: code for rank, code in codes.items() if expected == 75 or rank != victim}
    if set(found.values()) == {expected} or (is_over and set(found.values()) == {0}):
        return None
    return f"after {manner} in {phase.name}, ranks ended with {found}; expected {expected}"


def _flags(folder: Path, save: Path) -> list[str]:
    return [
        "--amopo-data", str(folder / "data"), "--pretrained-checkpoint", str(folder / "mcore"),
        "--save", str(save), "--load", str(save), "--save-interval", str(SAVE_EVERY), "--train-iters", str(STEPS),
        "--amopo-keep-checkpoints", str(KEPT), "--amopo-ledger", "--amopo-margin-floor", "quality_1=0.5",
        "--micro-batch-size", "2", "--global-batch-size", "4", "--use-distributed-optimizer", "--log-interval", "1",
        "--lr", "1e-4", "--lr-decay-style", "cosine", "--min-lr", "0", "--clip-grad", "1.0",
        "--eval-interval", "100", "--distributed-timeout-minutes", "2",
    ]  # fmt: skip


def _make_inputs(folder: Path) -> None:
    from megatron_amopo.certification.tiny import make_data, make_hf_model
    from megatron_amopo.checkpoint.convert import hf_to_megatron

    shutil.rmtree(folder / "hf", ignore_errors=True)
    shutil.rmtree(folder / "mcore", ignore_errors=True)
    make_hf_model(folder / "hf")
    hf_to_megatron(folder / "hf", folder / "mcore")
    make_data(folder / "data", train=300)


def _verify(place: Path) -> tuple[list[str], int]:
    """Every checkpoint that is there, read to its last byte: what can't be, and the step that a start goes on from."""
    from megatron_amopo.checkpoint.iterations import iteration_folder, iterations, newest_usable, tracked, why_unusable

    found = []
    for number in iterations(place):
        path = iteration_folder(place, number)
        if not any(path.iterdir()):
            continue  # Megatron makes the folder's name a moment before its content is begun elsewhere
        if reason := why_unusable(path):
            found.append(f"{path.name}: {reason}")
        else:
            try:
                _read_all(path)
            except Exception as error:  # damaged bytes raise nearly anything
                found.append(f"{path.name} can't be read: {error!r}")
    named = tracked(place)
    if named is not None and why_unusable(named):
        found.append(f"the tracker names {named.name}, which can't be loaded")
    return found, int(named.name.removeprefix("iter_")) if named is not None else newest_usable(place) or 0


def _read_all(path: Path) -> None:
    """Read everything that the metadata say is stored."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader

    for place in FileSystemReader(path).read_metadata().storage_data.values():
        torch.load(io.BytesIO(_stored(path, place)), weights_only=False)


def _stored(path: Path, place: Any) -> bytes:
    with (path / place.relative_path).open("rb") as file:
        file.seek(place.offset)
        data = file.read(place.length)
    if len(data) != place.length:
        raise EOFError(place.relative_path)
    return data


def _differences(place: Path, reference: Path) -> list[str]:
    """What isn't the same to the last bit: metrics, ledger, everything in the last checkpoint but its arguments."""
    import pyarrow.dataset
    import torch
    from torch.distributed.checkpoint import FileSystemReader

    def curve(folder: Path) -> list[dict[str, Any]]:
        return [
            line | {"metrics": {k: v for k, v in line["metrics"].items() if k not in TIMING}} for line in _lines(folder)
        ]

    def ledger(folder: Path) -> Any:
        table = pyarrow.dataset.dataset(folder / "ledger").to_table()
        return table.sort_by([(name, "ascending") for name in ("step", "record_id", "dimension")])

    def tensors(folder: Path) -> dict[str, Any]:
        path = folder / f"iter_{STEPS:07d}"
        found = {}
        for index, at in FileSystemReader(path).read_metadata().storage_data.items():
            value = torch.load(io.BytesIO(_stored(path, at)), weights_only=False)
            if isinstance(value, torch.Tensor):
                found[str(index)] = value
        return found

    found = []
    if curve(place) != curve(reference):
        found.append("metrics.jsonl")
    if not ledger(place).equals(ledger(reference)):
        found.append("the ledger")
    ours, theirs = tensors(place), tensors(reference)
    if ours.keys() != theirs.keys():
        found.append("the list of tensors")
    found += [name for name in ours.keys() & theirs.keys() if not torch.equal(ours[name], theirs[name])]
    return found


def _newest_step(place: Path) -> int:
    return max((line["iteration"] for line in _lines(place) if line["split"] == "train"), default=0)


def _lines(place: Path) -> list[dict[str, Any]]:
    path = place / "metrics.jsonl"
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # cut off by a kill; the next start drops it
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
