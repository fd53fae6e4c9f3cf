"""The report page: what a run recorded is on it, what it didn't is named with its flag, no file's text is markup."""

import json
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron_amopo.report.files import ReportError
from megatron_amopo.report.page import render_page
from megatron_amopo.report.words import wilson_interval
from tests.support.run_folders import DIMENSIONS, metrics_of, write_data, write_lines, write_run
from tools import report as command_line

VOID = {"meta", "br", "wbr", "path", "use", "line", "rect", "image"}
HEADINGS = (
    "Results",
    "Dimensions over training",
    "Conflict between dimensions",
    "Leakage between prompts",
    "Single records",
    "Data",
    "Configuration",
)


class Reader(HTMLParser):
    """Tags, ids, addresses and text of a page; fails where a tag isn't closed in its place."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.addresses: list[str] = []
        self.text = ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.ids.update(value for name, value in attrs if name == "id" and value)
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("complete")
    return render_page(write_run(folder / "run"), write_data(folder / "data"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> str:
    return render_page(write_run(tmp_path_factory.mktemp("bare"), steps=1, complete=False))


def text_of(page: str) -> str:
    return " ".join(Reader(page).text.split())


def test_every_part_of_a_complete_run(complete: str) -> None:
    text = text_of(complete)
    for expected in (
        *HEADINGS,
        *DIMENSIONS,
        "AMoPO over SimPO (β 10, γ 0.5), weights over dimensions: gaussian, SFT term × 1, margin floors",
        "60 of 60, 16 records each, last checkpoint: step 60",
        "+0.100 → +0.400",  # margin of the first dimension, before and after
        "55.0 → 85.0 (81.2–88.2)",  # Wilson's interval of 340 of 400
        "2,417 rows read from train.jsonl; kept 2,000 train, 400 validation. 3 records were cut",
        "a response has no text",
        "train.jsonl:12: rejected",
        "Write a response that deserves a score of 5 out of 5 for helpfulness.",
        "megatron-amopo=0.1.0, torch=2.15.0",
        "2026-11-21T11:30:00+00:00",  # the second start
        "helpfulness 301, instruction_following 302",
    ):
        assert expected in text, expected
    assert 'class="missing"' not in complete
    # five per dimension, five of the course, six of conflict, four of leakage, two of the ledger
    assert complete.count("<figure>") == 5 + 5 + 6 + 4 + 2


def test_what_is_missing_is_named_with_its_flag(bare: str) -> None:
    text = text_of(bare)
    for flag in (
        "--amopo-margin-floor",
        "--amopo-conflict-interval N",
        "--amopo-leakage",
        "--amopo-ledger",
        "--data DIR",
        "--eval-interval",
        "--save-interval",
    ):
        assert flag in text, flag
    for heading in HEADINGS:
        assert heading in text
    assert "means over the training batches of the log line of step 1" in text
    assert bare.count("<figure>") == 4 + 5


@pytest.mark.parametrize("page", ["complete", "bare"])
def test_the_page_stands_alone(page: str, request: pytest.FixtureRequest) -> None:
    content = request.getfixturevalue(page)
    reader = Reader(content)
    assert not {"script", "link", "img", "iframe", "object"} & set(reader.tags)
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in reader.addresses)
    assert not re.search(r"url\((?!#)|@import", content)
    assert [name for name, count in reader.ids.items() if count > 1] == []
    plots = re.findall(r"<svg xmlns.*?</svg>", content, re.DOTALL)
    assert len(plots) == content.count("<figure>")
    for plot in plots:
        ElementTree.fromstring(plot)


def test_many_dimensions_and_nothing_of_their_names_is_markup(tmp_path: Path) -> None:
    long = tuple("quality_of_the_answer_" * 4 + str(n) for n in range(5))
    names = ("general", "<script>alert(1)</script>", "cost in $ & $", "_</style>\"'", *long)
    run = write_run(tmp_path / "<b>run", names, steps=2)
    data = write_data(tmp_path / "data", names)
    report = json.loads((data / "report.json").read_text())
    report["dropped"]["<i>"] = {"count": 1, "meaning": "<u>", "examples": ["<img src=x onerror=alert(1)>"]}
    (data / "report.json").write_text(json.dumps(report))
    flags = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(flags | {"--amopo-pairwise": "<em>"}))
    page = render_page(run, data)
    reader = Reader(page)
    assert not {"script", "b", "i", "u", "em", "img"} & set(reader.tags)
    assert reader.tags["style"] == 1 + page.count("<figure>")  # matplotlib's own, one a plot
    for name in names:
        assert name in reader.text


def test_numbers_that_are_none(tmp_path: Path) -> None:
    write_run(tmp_path, steps=3)
    figures = {name: float("nan") for name in metrics_of(DIMENSIONS, 1.0)}
    lines = [(1, "train", metrics_of(DIMENSIONS, 0.3)), (2, "train", figures), (3, "validation", figures)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    text = text_of(render_page(tmp_path))
    assert "loss isn't a finite number at step 2" in text
    assert "NaN" in text


def test_bad_steps_are_not_overlooked(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    lines = [{"iteration": step, "split": "bad_step", "metrics": {"loss": None}} for step in (3, 4, 3, 9, 10, 11, 12)]
    told = [{**line, "reason": f"reason {line['iteration']}"} for line in lines]
    path.write_text(path.read_text() + "".join(json.dumps(line) + "\n" for line in told))
    named = ", ".join(f"{step} (reason {step})" for step in (3, 4, 9, 10, 11))
    assert f"6 bad steps left the weights as they were: {named} and 1 more." in text_of(render_page(tmp_path))


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:21]) + '\n{"iteration": 22, "spl')
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    text = text_of(render_page(tmp_path))
    assert "metrics.jsonl ends in half a line" in text
    assert "This run is unfinished: step 20 of 60." in text
    assert "no checkpoint" in text


def test_a_run_that_only_evaluated(tmp_path: Path) -> None:
    write_lines(tmp_path / "evaluation.jsonl", [(60, "validation", metrics_of(DIMENSIONS, 1.0))])
    text = text_of(render_page(tmp_path))
    assert "evaluated with --skip-train at step 60" in text
    assert "+0.400" in text
    assert "half a line" not in text
    with (tmp_path / "evaluation.jsonl").open("a") as file:
        file.write('{"iteration": 90, "split": "validation", "metr')
    text = text_of(render_page(tmp_path))
    assert "evaluated with --skip-train at step 60" in text
    assert "evaluation.jsonl ends in half a line" in text


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="nowhere: no such folder"):
        render_page(tmp_path / "nowhere")
    with pytest.raises(ReportError, match=r"holds none of metrics\.jsonl, evaluation\.jsonl and run\.json"):
        render_page(tmp_path)
    run = write_run(tmp_path / "run", steps=3)
    other = write_data(tmp_path / "other", data_hash="f" * 64)
    with pytest.raises(ReportError, match=r"other holds other data \(hash ffffffffffff\)"):
        render_page(run, other)
    with pytest.raises(ReportError, match=r"--data .*no such folder"):
        render_page(run, tmp_path / "nowhere")
    (other / "manifest.json").write_text(
        (other / "manifest.json").read_text().replace("f" * 64, "0123456789abcdef" * 4)
    )
    (other / "report.json").write_text('{"inputs": 3}')
    with pytest.raises(ReportError, match=r"report\.json: not a report"):
        render_page(run, other)
    (run / "ledger/part-000000001-000000001-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ReportError, match="ledger: not a readable ledger"):
        render_page(run)
    path = run / "metrics.jsonl"
    whole = path.read_text()
    path.write_text("[1]\n" + whole)
    with pytest.raises(ReportError, match=r"metrics\.jsonl, line 1: not a JSON object"):
        render_page(run)
    path.write_text(whole.replace('"split"', '"spilt"', 1))
    with pytest.raises(ReportError, match=r"metrics\.jsonl, line 1: not a line of metrics"):
        render_page(run)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", steps=2, complete=False)
    assert command_line.main([str(run)]) == 0
    assert capsys.readouterr().out.startswith(f"{run / 'report.html'}: ")
    assert (run / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert not list(run.glob(".report*"))
    assert command_line.main([str(run)]) == 0  # a page takes a page's place
    assert command_line.main([str(run), "--output", str(tmp_path / "no" / "page.html")]) == 2
    assert "page.html: can't be written (No such file or directory)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command_line.main([str(run), "--force"])


@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "run.json", "starts.jsonl", "hf/config.json", "ledger/part-000000001-000000001-00000.parquet"],
)
def test_a_page_replaces_nothing_but_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    run = write_run(tmp_path / "run", steps=2)
    before = (run / name).read_bytes()
    assert command_line.main([str(run), "--output", str(run / name)]) == 2
    assert f"{run / name} is there and isn't a page of this tool" in capsys.readouterr().err
    (run / "link.html").symlink_to(run / name)
    assert command_line.main([str(run), "--output", str(run / "link.html")]) == 2
    assert (run / name).read_bytes() == before


@pytest.mark.parametrize(
    ("share", "records", "expected"),
    [
        (1.0, 400, (0.9905, 1.0)),  # 1 / (1 + z² / n)
        (0.0, 10, (0.0, 0.2775)),
        (0.263, 1000, (0.2367, 0.2912)),
    ],
)
def test_wilsons_interval(share: float, records: int, expected: tuple[float, float]) -> None:
    """Recorded figures of scipy's ``binomtest(share * records, records).proportion_ci(0.95, "wilson")``."""
    assert wilson_interval(share, records) == pytest.approx(expected, abs=5e-5)


def test_reports_need_neither_torch_nor_megatron() -> None:
    code = (
        "import sys, megatron_amopo.report.page, megatron_amopo.report.card\n"
        "sys.exit(bool({'torch', 'megatron.core'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
