"""A plan as tables for people and as JSON for machines; every number with its unit."""

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_amopo.planning.command import Places, launch_command, shown
from megatron_amopo.planning.efficiency import Efficiency
from megatron_amopo.planning.hardware import GIB
from megatron_amopo.planning.planner import CLOSE, Estimate, Plan, Question, ranked, shortage
from megatron_amopo.planning.scaling import Growth, Row

_SHOWN_REFUSALS = 12


def assumptions(question: Question) -> list[str]:
    """What the figures rest on, one sentence each."""
    constants: Efficiency = question.efficiency
    gpu, options = question.gpu, question.options
    fp8 = f", FP8 {gpu.fp8_flops / 1e12:,.0f}" if gpu.fp8_flops else ""
    lines = [
        "Nothing here is measured: memory is counted from shapes, time from operations and bytes (docs/planning.md).",
        f"{gpu.source}: bf16 {gpu.bf16_flops / 1e12:,.0f}{fp8} TFLOP/s dense, {gpu.memory_bandwidth / 1e12:.2f} TB/s, "
        f"NVLink {gpu.nvlink_bandwidth / 1e9:.0f} and network {gpu.network_bandwidth / 1e9:.0f} GB/s per direction.",
        f"Large matrix products reach {constants.gemm_bf16:.0%} of bf16's peak and {constants.gemm_fp8:.0%} of FP8's "
        "(calibrated on published runs, benchmarks/results/planner), memory and links "
        f"{constants.memory:.0%}; overlapped communication costs {constants.exposed:.0%} of its time.",
        f"Attention is {options.attention}; the head is bf16; tensor parallelism's communication isn't overlapped in "
        "the forward pass (--tp-comm-overlap is refused).",
        "Every micro-batch in flight is as long as the longest; keys and values aren't repeated for query heads.",
        f"{question.headroom:.0%} of the GPU's memory stays free, beside a stated reserve for CUDA, NCCL and "
        "fragmentation.",
    ]
    if options.is_fp8:
        lines.append("FP8: weights are cast once a step and kept twice; micro-batches are padded to its multiple.")
    return lines


def print_plan(console: Console, question: Question, plan: Plan, places: Places, *, most: int) -> None:
    """Tables of the best layouts, the recommended one's parts, reasons against the others, and the launch command."""
    sizes, records = question.sizes, question.records
    console.print(
        f"[bold]{sizes.parameters / 1e9:.2f} billion parameters[/bold], {question.gpus:,} × {question.gpu.name}, "
        f"{question.options.precision}, global batch of {question.options.global_batch:,} records, "
        f"{question.options.micro_batch} per micro-batch"
    )
    console.print(f"Data, {escape(records.description)}")
    best = ranked(plan.fitting)
    console.print(
        f"{plan.considered:,} layouts: {len(plan.fitting):,} fit, {len(plan.too_large):,} are too large, "
        f"{plan.considered - len(plan.fitting) - len(plan.too_large):,} are refused"
    )
    if best:
        console.print(_layouts_table(question, best[:most]))
        console.print(
            f"The first is recommended: of those within {CLOSE:.0%} of the quickest's step time it takes the least "
            "memory."
        )
        _print_details(console, question, best[0], places)
    else:
        console.print("[bold]No layout can be run.[/bold]")
        if too_large := shortage(plan, question):
            console.print(escape(too_large))
    if plan.refused:
        console.print(_refusals_table(plan))
    console.print("[bold]Assumptions[/bold]")
    for line in assumptions(question):
        console.print(f"  {escape(line)}")


def _layouts_table(question: Question, estimates: tuple[Estimate, ...]) -> Table:
    table = Table(title="Best layouts (estimates)", title_justify="left")
    for name in (
        "layout",
        "recompute",
        "micro-batches",
        "step, s",
        "records/s",
        "TFLOP/s per GPU",
        "GiB per GPU",
        "to spare",
    ):
        table.add_column(name, justify="left" if name in ("layout", "recompute") else "right")
    for one in estimates:
        ends = " (ends as layers)" if one.layout.count_ends else ""
        table.add_row(
            f"{one.layout}{ends}", one.layout.recompute, str(one.work.micro_batches), f"{one.time.total:.2f}",
            f"{one.records_per_second:.1f}", f"{one.model_flops_per_gpu / 1e12:.0f}", f"{one.peak_memory / GIB:.1f}",
            f"{_spare(question, one) / GIB:.1f}",
        )  # fmt: skip
    return table


def _spare(question: Question, one: Estimate) -> float:
    """Bytes of a GPU that the layout leaves, beside the headroom."""
    return question.usable_memory - one.peak_memory


def _print_details(console: Console, question: Question, best: Estimate, places: Places) -> None:
    work = best.work
    console.print(
        f"[bold]{best.layout}[/bold]: {work.micro_batches} micro-batches per rank and step, {work.mean.tokens:,.0f} "
        f"tokens on average and {work.longest.tokens:,.0f} in the longest; the fullest rank has {work.imbalance:.3f} "
        f"times the mean tokens; {best.peak_memory / GIB:.1f} of {question.usable_memory / GIB:.1f} usable GiB are "
        f"taken, {_spare(question, best) / GIB:.1f} to spare"
    )
    times = Table(title="Step time, slowest stage (estimate)", title_justify="left")
    times.add_column("part")
    times.add_column("s", justify="right")
    times.add_column("%", justify="right")
    for name, seconds in sorted(best.time.parts().items(), key=lambda item: -item[1]):
        if seconds:
            times.add_row(name.replace("_", " "), f"{seconds:.3f}", f"{seconds / best.time.total:.1%}")
    times.add_row("step", f"{best.time.total:.3f}", "")
    console.print(times)

    stages = sorted({0, best.fullest, best.layout.pp - 1})
    memory = Table(title="Memory of a rank (estimate)", title_justify="left")
    memory.add_column("part")
    for stage in stages:
        memory.add_column(f"stage {stage}, GiB", justify="right")
    for name in best.memory[0].parts():
        memory.add_row(name, *(f"{best.memory[stage].parts()[name] / GIB:.2f}" for stage in stages))
    memory.add_row("sum", *(f"{best.memory[stage].total / GIB:.2f}" for stage in stages))
    console.print(memory)
    if best.host_memory:
        console.print(f"and {best.host_memory / GIB:.1f} GiB of the host's memory per rank for the optimizer")
    command = launch_command(question.sizes, best.layout, question.options, places, gpus_per_node=question.gpu.per_node)
    console.print("[bold]Launch[/bold]" + (" (on every node)" if best.layout.gpus > question.gpu.per_node else ""))
    console.print(shown(command), markup=False, highlight=False, soft_wrap=True)


def _refusals_table(plan: Plan) -> Table:
    table = Table(title="Refused", title_justify="left")
    table.add_column("layouts", justify="right")
    table.add_column("reason")
    for refusal, count in plan.refused[:_SHOWN_REFUSALS]:
        table.add_row(f"{count:,}", escape(str(refusal)))
    if len(plan.refused) > _SHOWN_REFUSALS:
        table.add_row("", f"… and {len(plan.refused) - _SHOWN_REFUSALS} more reasons (--json has all)")
    return table


def print_growth(console: Console, growth: Growth) -> None:
    """Two tables: the same batch, and one that grows."""
    for title, rows in (("Same global batch", growth.fixed), ("Batch grows with the GPUs", growth.growing)):
        table = Table(title=f"{title} (estimates)", title_justify="left")
        for name in (
            "GPUs",
            "batch",
            "layout",
            "recompute",
            "step, s",
            "records/s",
            "TFLOP/s per GPU",
            "GiB",
            "scaling",
        ):
            table.add_column(name, justify="left" if name in ("layout", "recompute") else "right")
        first = next((row for row in rows if row.best is not None), None)
        for row in rows:
            if row.best is None or first is None:
                table.add_row(f"{row.gpus:,}", f"{row.global_batch:,}", escape(row.reason))
                continue
            one = row.best
            table.add_row(
                f"{row.gpus:,}", f"{row.global_batch:,}", str(one.layout), one.layout.recompute,
                f"{one.time.total:.2f}", f"{one.records_per_second:.1f}", f"{one.model_flops_per_gpu / 1e12:.0f}",
                f"{one.peak_memory / GIB:.1f}", f"{row.efficiency(first):.0%}",
            )  # fmt: skip
        console.print(table)


def estimate_json(question: Question, one: Estimate, places: Places) -> dict[str, Any]:
    """One layout; keys name their units."""
    command = launch_command(question.sizes, one.layout, question.options, places, gpus_per_node=question.gpu.per_node)
    return {
        "layout": asdict(one.layout),
        "step_seconds": one.time.total,
        "step_parts_seconds": one.time.parts(),
        "records_per_second": one.records_per_second,
        "model_flops_per_second_per_gpu": one.model_flops_per_gpu,
        "memory_bytes_by_stage": [{**stage.parts(), "total": stage.total} for stage in one.memory],
        "peak_memory_bytes": one.peak_memory,
        "spare_memory_bytes": _spare(question, one),
        "host_memory_bytes_per_rank": one.host_memory,
        "work": asdict(one.work),
        "command": command,
    }


def plan_json(question: Question, plan: Plan, places: Places, *, most: int) -> dict[str, Any]:
    """The whole plan."""
    return {
        "estimates": True,
        "model": {**asdict(question.sizes), "parameters": question.sizes.parameters},
        "gpu": asdict(question.gpu),
        "gpus": question.gpus,
        "options": asdict(question.options),
        "data": question.records.description,
        "efficiency": asdict(question.efficiency),
        "assumptions": assumptions(question),
        "layouts_considered": plan.considered,
        "layouts_fitting": len(plan.fitting),
        "layouts_too_large": len(plan.too_large),
        "best": [estimate_json(question, one, places) for one in ranked(plan.fitting)[:most]],
        "shortage": None if plan.fitting else shortage(plan, question),
        "refused": [{"by": refusal.by, "reason": refusal.reason, "layouts": n} for refusal, n in plan.refused],
    }


def growth_json(growth: Growth) -> dict[str, Any]:
    """Rows of both tables."""

    def row(one: Row) -> dict[str, Any]:
        if one.best is None:
            return {"gpus": one.gpus, "global_batch": one.global_batch, "reason": one.reason}
        return {
            "gpus": one.gpus,
            "global_batch": one.global_batch,
            "layout": asdict(one.best.layout),
            "step_seconds": one.best.time.total,
            "records_per_second": one.best.records_per_second,
            "model_flops_per_second_per_gpu": one.best.model_flops_per_gpu,
            "peak_memory_bytes": one.best.peak_memory,
        }

    return {"fixed_batch": [row(one) for one in growth.fixed], "growing_batch": [row(one) for one in growth.growing]}
