"""The preparation as a whole: input files in, a prepared folder and a report out, in parallel and in bounded memory.

The parent reads and cuts files into chunks, workers do everything else, the parent writes what comes back in input
order and gives out record ids. At most a few chunks per worker are under way, so memory doesn't grow with the input
(beyond a few numbers per record).
"""

import importlib.metadata
import itertools
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from megatron_amopo import __version__
from megatron_amopo.data import worker
from megatron_amopo.data.formats import FORMATS, format_of
from megatron_amopo.data.grouping import Unit, units_of
from megatron_amopo.data.groups import GENERAL
from megatron_amopo.data.manifest import Manifest
from megatron_amopo.data.problems import FAULTS, MEANINGS, REPAIRS
from megatron_amopo.data.prompts import DEFAULT_STYLE, PromptStyle
from megatron_amopo.data.records import RecordRules, Scale, check_dimensions, check_names
from megatron_amopo.data.report import Report, describe
from megatron_amopo.data.shards import FolderWriter, schema_of, with_record_ids
from megatron_amopo.data.sources import check_input, labels
from megatron_amopo.data.tokenize import ChatTokenizer, TokenizerSource
from megatron_amopo.data.worker import Chunk, ChunkResult, ChunkRules, ChunkRunner, split_by_prompt
from megatron_amopo.errors import ConfigError, DataError

_CHUNK_UNITS = 128
_CHUNK_BYTES = 1 << 20
# A fork would copy the locks of whatever threads the parent runs.
_SPAWN = multiprocessing.get_context("spawn")
_TRAIN, _VALIDATION = "train", "validation"


@dataclass(frozen=True)
class PrepareOptions:
    """The flags of `tools/prepare_preferences.py`, by the same names. Raises ConfigError where they contradict one
    another.
    """

    inputs: tuple[Path, ...]
    output: Path
    tokenizer: Path
    dimensions: tuple[str, ...]
    rewards: tuple[str, ...] = ()
    format: str | None = None
    prompts: str = DEFAULT_STYLE
    cutoff_len: int | None = 1024
    cutoff_rule: Literal["proportional", "drop"] = "proportional"
    source_scale: Scale | None = None
    choose: Literal["given", "sum", "weighted"] | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    pairs: Literal["best-worst", "all"] = "best-worst"
    validation_fraction: float | None = None
    validation_file: Path | None = None
    workers: int = 1
    strict: bool = False
    seed: int = 0
    force: bool = False

    def __post_init__(self) -> None:
        check_dimensions(self.dimensions)
        check_names("--rewards", self.rewards)
        if self.format is not None and self.format not in FORMATS:
            raise ConfigError(f"--format {self.format}: known are {', '.join(FORMATS)}")
        if (self.choose == "weighted") != bool(self.weights):
            raise ConfigError("--weights a=1,b=2 and --choose weighted go together")
        if self.weights and set(self.weights) != set(self.dimensions):
            raise ConfigError(f"--weights must weigh each of --dimensions: {', '.join(self.dimensions)}")
        if self.cutoff_len is not None and self.cutoff_len < 2:
            raise ConfigError(f"--cutoff-len {self.cutoff_len}: at least 2 tokens, or 0 for no limit")
        if self.source_scale is not None and not self.source_scale[0] < self.source_scale[1]:
            raise ConfigError("--source-scale: the lowest score must be below the highest, as in 0-4")
        if self.validation_fraction is not None and not 0 < self.validation_fraction < 1:
            raise ConfigError(f"--validation-fraction {self.validation_fraction}: between 0 and 1, both excluded")
        if self.validation_fraction is not None and self.validation_file is not None:
            raise ConfigError("--validation-fraction and --validation-file exclude one another")
        if self.workers < 1:
            raise ConfigError(f"--workers {self.workers}: at least 1")


@dataclass(frozen=True)
class _Input:
    path: Path
    label: str
    size: int
    format: str
    validation: bool


def default_workers() -> int:
    """One per CPU that this process may use, at most 6: a worker takes some 260 MiB, and all together should stay
    below 2 GiB.
    """
    return min(6, len(os.sched_getaffinity(0)))


def prepare(
    options: PrepareOptions,
    progress: Callable[[int, int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> tuple[Manifest, Report]:
    """Prepare a folder; returns its manifest and the report.

    `progress(done, total, records)` is called with bytes of input and records kept; `say(line)` with remarks. Raises
    ConfigError or DataError; nothing is left behind then.
    """
    style = PromptStyle.load(options.prompts)
    inputs = _inspect(options)
    choose = _choose_rule(options, inputs, say)
    rules = ChunkRules(
        records=RecordRules(
            dimensions=options.dimensions,
            source_scale=options.source_scale or style.scale,
            prompt_scale=style.scale,
            choose=choose,
            weights=options.weights,
            pairs=options.pairs,
            rewards=options.rewards,
        ),
        style=style,
        cutoff=options.cutoff_len,
        cutoff_rule=options.cutoff_rule,
    )
    with FolderWriter(options.output, options.force) as writer:
        source = _load_tokenizer(options)
        tokenizer = ChatTokenizer(source)
        _check_prompts(tokenizer, style, options)
        report = Report(options.dimensions, options.rewards, {each.label: each.format for each in inputs})
        sink = _Sink(options, writer, report)
        total = sum(each.size for each in inputs)
        done = 0
        with closing(_results(_chunks(inputs), source, rules, options.workers)) as results:
            for chunk, result in results:
                sink.add(chunk, result)
                done += chunk.advance
                if progress:
                    progress(done, total, sink.next_id)
        sink.check()
        manifest = Manifest(
            dimensions=(GENERAL, *options.dimensions),
            tokenizer=tokenizer.fingerprint(),
            prompts=style.content,
            scale=style.scale,
            cutoff_len=options.cutoff_len,
            records=report.kept,
            length_percentiles=report.length_percentiles(),
            data_sha256=writer.data_sha256(),
            rewards=options.rewards,
            created_with=_versions(),
            settings={
                "inputs": report.inputs,
                "source_scale": rules.records.source_scale,
                "choose": choose,
                "weights": dict(options.weights),
                "pairs": options.pairs,
                "cutoff_rule": options.cutoff_rule,
                "validation_fraction": options.validation_fraction,
                "seed": options.seed,
            },
        )
        writer.finish(manifest, {"report.json": report.to_json()})
    return manifest, report


class _Sink:
    """Gives out record ids, parts train from validation, and hands rows to the writer."""

    def __init__(self, options: PrepareOptions, writer: FolderWriter, report: Report) -> None:
        self._options = options
        self._writer = writer
        self._report = report
        self._train_prompts: set[bytes] = set()
        self.next_id = 0
        splits = [_TRAIN, _VALIDATION] if options.validation_fraction or options.validation_file else [_TRAIN]
        report.kept = dict.fromkeys(splits, 0)

    def add(self, chunk: Chunk, result: ChunkResult) -> None:
        self._report.add(result)
        if self._options.strict:
            for issue in result.issues:
                if issue.reason in FAULTS or issue.reason in REPAIRS:
                    raise DataError(
                        f"{describe(issue)}: {issue.reason}, {MEANINGS[issue.reason]} (--strict stops here)"
                    )
        rows = len(result.digests)
        if not rows:
            return
        ids = np.arange(self.next_id, self.next_id + rows)
        self.next_id += rows
        schema = schema_of(len(self._options.rewards))
        batch = with_record_ids(pa.ipc.read_record_batch(pa.py_buffer(result.batch), schema), ids)
        held_out = np.full(rows, chunk.validation)
        if self._options.validation_fraction:
            held_out = split_by_prompt(result.prompt_keys, self._options.seed, self._options.validation_fraction)
        elif self._options.validation_file:
            # The training files come first, so all their prompts are known by now.
            if chunk.validation:
                self._report.shared_prompts += sum(key[:16] in self._train_prompts for key in result.prompt_keys)
            else:
                self._train_prompts.update(key[:16] for key in result.prompt_keys)
        for split, mask in ((_TRAIN, ~held_out), (_VALIDATION, held_out)):
            if mask.any():
                digests = list(itertools.compress(result.digests, mask))
                self._writer.add(split, batch.filter(pa.array(mask)), digests)
                self._report.kept[split] += len(digests)

    def check(self) -> None:
        """Raise DataError where a split stayed empty."""
        if not self.next_id:
            raise DataError(self._report.why_nothing_is_left())
        for split, count in self._report.kept.items():
            if not count:
                raise DataError(f"no record is left for {split} ({self.next_id} in all); {self._why_empty()}")

    def _why_empty(self) -> str:
        """Why a split has none, and what to do."""
        if self._options.validation_file:
            return f"see --validation-file {self._options.validation_file}"
        return (
            f"--validation-fraction {self._options.validation_fraction} is drawn for each prompt by --seed "
            f"{self._options.seed}, and there are few: take another fraction or seed, or name a --validation-file"
        )


def _inspect(options: PrepareOptions) -> list[_Input]:
    """Check every input file and find its format, before anything is written."""
    paths = [Path(path) for path in options.inputs]
    held_out = [Path(options.validation_file)] if options.validation_file else []
    if not paths:
        raise ConfigError("no input file is given")
    found = []
    names = labels([*paths, *held_out])
    for number, (path, label) in enumerate(zip([*paths, *held_out], names, strict=True)):
        size = check_input(path)
        name = options.format or format_of(path, label)
        found.append(_Input(path, label, size, name, validation=number >= len(paths)))
    return found


def _choose_rule(
    options: PrepareOptions, inputs: list[_Input], say: Callable[[str], None] | None
) -> Literal["given", "sum", "weighted"]:
    unordered = [each for each in inputs if not FORMATS[each.format].ordered]
    if options.choose is None and unordered:
        if say:
            say(f"{unordered[0].label} ({unordered[0].format}) doesn't say which response is preferred: --choose sum")
        return "sum"
    if options.choose == "given" and unordered:
        raise ConfigError(
            f"--choose given: {unordered[0].label} ({unordered[0].format}) doesn't say which response is preferred; "
            "use --choose sum or --choose weighted"
        )
    return options.choose or "given"


def _load_tokenizer(options: PrepareOptions) -> TokenizerSource:
    """Load the tokenizer; where memory counts, in a process that ends afterwards: transformers brings torch along,
    and this process would hold their several hundred MiB throughout.
    """
    if options.workers == 1 or "transformers" in sys.modules:
        return TokenizerSource.load(options.tokenizer)
    ignore_interrupts = (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(1, _SPAWN, signal.signal, ignore_interrupts) as pool:
        try:
            return pool.submit(TokenizerSource.load, options.tokenizer).result()
        except BrokenProcessPool as error:
            raise DataError(f"--tokenizer {options.tokenizer}: the process that loaded it died") from error


def _check_prompts(tokenizer: ChatTokenizer, style: PromptStyle, options: PrepareOptions) -> None:
    """Raise ConfigError where the chat template refuses or leaves out the dimension prompts."""
    probe = [{"role": "user", "content": "?"}]
    for conversation in style.conversations(probe, options.dimensions, [style.scale[1]] * len(options.dimensions)):
        problem = tokenizer.refuses(conversation)
        if problem:
            raise ConfigError(
                f"--prompts {options.prompts}: the chat template of --tokenizer {options.tokenizer} {problem}"
                + ("; try --prompts published_user" if style.placement == "system" else "")
            )


def _chunks(inputs: list[_Input]) -> Iterator[Chunk]:
    """Cut the inputs into chunks of about the same work. Depends on the input only."""
    for each in inputs:
        units: list[Unit] = []
        weight = reached = 0
        for unit in units_of(each.path, each.label, each.format):
            units.append(unit)
            weight += sum(len(item.raw) if isinstance(item.raw, bytes) else 4096 for item in unit)
            if len(units) >= _CHUNK_UNITS or weight >= _CHUNK_BYTES:
                position = max(reached, unit[-1].position)
                yield Chunk(each.format, each.validation, tuple(units), position - reached)
                units, weight, reached = [], 0, position
        if units or reached < each.size:
            yield Chunk(each.format, each.validation, tuple(units), each.size - reached)


def _results(
    chunks: Iterator[Chunk], source: TokenizerSource, rules: ChunkRules, workers: int
) -> Generator[tuple[Chunk, ChunkResult]]:
    """Results in the order of the chunks, whichever worker is done first."""
    if workers == 1:
        runner = ChunkRunner(source, rules)
        for chunk in chunks:
            yield chunk, runner(chunk)
        return
    pool = ProcessPoolExecutor(workers, _SPAWN, worker.start, (source, rules))
    pending: deque[tuple[Chunk, Future[ChunkResult]]] = deque()
    try:
        for chunk in chunks:
            pending.append((chunk, pool.submit(worker.run, chunk)))
            if len(pending) > 2 * workers:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    except BrokenProcessPool as error:
        raise DataError("a worker process died, perhaps for lack of memory; try fewer --workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _versions() -> dict[str, str]:
    packages = ("pyarrow", "tokenizers", "transformers")
    return {"megatron-amopo": __version__} | {name: importlib.metadata.version(name) for name in packages}
