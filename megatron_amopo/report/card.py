"""The model card of an exported model: a README.md in the format that the Hugging Face hub reads.

Takes a run's folder, its prepared data and the exported folder; writes the card there. Text from files can't end a code
block, make a table's cell or become markup. No path of the machine goes into a card.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup, escape

from megatron_amopo import __version__
from megatron_amopo.data.model_prompts import ModelPrompts
from megatron_amopo.data.prompts import format_score
from megatron_amopo.data.template_extension import original_template
from megatron_amopo.errors import AmopoError
from megatron_amopo.report.files import ReportError, read_json_object, write_text
from megatron_amopo.report.prepared import PreparedData, find_data, prompt_texts
from megatron_amopo.report.rendering import render
from megatron_amopo.report.run import Run
from megatron_amopo.report.summary import results, validation_records
from megatron_amopo.report.words import as_text, objective_in_words

CARD = "README.md"
_MARK = "<!-- written by tools/report.py of megatron-amopo -->"
_CONFIG = "config.json"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_NOT_SETTINGS = ("--amopo-data", "reference")  # of run.json
_STARTING_MODEL = ("amopo_hf_model", "pretrained_checkpoint")  # Megatron's arguments that name a folder
_QUESTION = "Why is the sky blue?"
#: Megatron's arguments that belong to the method, and what to call them.
_HYPERPARAMETERS = {
    "lr": "learning rate",
    "min_lr": "lowest learning rate",
    "lr_decay_style": "learning rate's decay",
    "optimizer": "optimizer",
    "weight_decay": "weight decay",
    "clip_grad": "gradient clipping, L2",
    "params_dtype": "type of the weights",
    "global_batch_size": "records per step",
}


def write_card(
    folder: Path, model: Path, data_folder: Path | None = None, base_model: str | None = None, *, force: bool = False
) -> Path:
    """Write the card of a run's exported model.

    Args:
        folder: the run's ``--save`` folder.
        model: the exported Hugging Face folder.
        data_folder: of the prepared data; None for the one that the run recorded, if it is still there.
        base_model: name on the hub of the model that training began with; None for what the run recorded.
        force: replace a README.md that isn't a card of ours.

    Returns:
        The file that was written.

    Raises:
        ReportError: a folder isn't what it should be, or a README.md of others is there.
    """
    run = Run.load(folder)
    if not (model / _CONFIG).is_file():
        raise ReportError(f"--model-card {model}: not an exported model (no {_CONFIG})")
    if base_model is not None and not _HUB_NAME.fullmatch(base_model):
        raise ReportError(f"--base-model {base_model}: not a name on the hub (ORGANISATION/MODEL)")
    path = model / CARD
    if path.exists() and not force and _MARK not in _text(path):
        raise ReportError(f"{path} is there and wasn't written by this tool; --force replaces it")
    data = find_data(run, data_folder)
    try:
        prompts = ModelPrompts.load(model)
        if prompts is None and data is not None:  # an export of before, when it didn't carry them
            prompts = ModelPrompts.of_run(data.manifest, run.dimensions)
    except AmopoError as error:
        raise ReportError(f"--model-card {model}: {error}") from error
    text = _render(run, data, prompts, base_model or _recorded_base(run), offered=_offers_prompts(model))
    write_text(path, text)
    return path


def _render(
    run: Run, data: PreparedData | None, prompts: ModelPrompts | None, base_model: str | None, *, offered: bool
) -> str:
    """The card's text; ``offered`` says that the chat template knows the prompts."""
    records = validation_records(data)
    return render(
        "card.md.jinja",
        {"cell": _cell, "block": _block, "as_text": as_text},
        header=Markup(yaml.safe_dump(_header(run, base_model), sort_keys=False, allow_unicode=True)),
        mark=Markup(_MARK),
        run=run,
        data=data,
        base_model=base_model,
        objective=objective_in_words(run.flags, len(run.dimensions)),
        steps=run.last_step if run.saved_step is None else run.saved_step,
        flags={flag: value for flag, value in run.flags.items() if value is not None and flag not in _NOT_SETTINGS},
        settings=[(title, run.arguments[name]) for name, title in _HYPERPARAMETERS.items() if name in run.arguments],
        results=results(run, records) if run.evaluations else [],
        records=records,
        prompts=prompt_texts(prompts) if prompts else {},
        scale=[format_score(bound) for bound in prompts.style.scale] if prompts else [],
        example=_example(prompts) if prompts else None,
        want=_want(prompts) if prompts and prompts.offered and offered else None,
        version=__version__,
    )


def _header(run: Run, base_model: str | None) -> dict[str, Any]:
    """The card's YAML, without what isn't known."""
    pairwise = run.flags.get("--amopo-pairwise")
    tags = ["preference-optimization", "multi-objective", "megatron-amopo"]
    if run.flags.get("--amopo-weighting") == "gaussian" and len(run.dimensions) > 1:
        tags.append("amopo")
    if isinstance(pairwise, str):
        tags.append(pairwise)
    header: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    return header if base_model is None else {"base_model": base_model} | header


def _recorded_base(run: Run) -> str | None:
    """The starting model's name, where the run recorded one that isn't a path on this machine: neither a folder that is
    here nor the one that the run was started from.
    """
    name = run.model.get("_name_or_path")
    if not isinstance(name, str) or not _HUB_NAME.fullmatch(name) or Path(name).exists():
        return None
    started_from = {start.arguments.get(flag) for start in run.starts for flag in _STARTING_MODEL}
    return None if name in started_from else name


def _example(prompts: ModelPrompts) -> str:
    """Messages under the last trained dimension's prompt, or the general one, as Python code."""
    want = dict.fromkeys(prompts.offered[-1:], prompts.style.scale[1])
    conversation = prompts.conversation([{"role": "user", "content": _QUESTION}], want)
    return json.dumps(conversation, indent=4, ensure_ascii=False)


def _want(prompts: ModelPrompts) -> str:
    """What the chat template is told for the same, as Python code."""
    score = prompts.style.scale[1]
    return json.dumps({prompts.offered[-1]: int(score) if score.is_integer() else score}, ensure_ascii=False)


def _offers_prompts(model: Path) -> bool:
    """Whether the folder's chat template puts messages under the prompts by itself."""
    source = _text(model / "chat_template.jinja") if (model / "chat_template.jinja").is_file() else None
    if source is None:
        source = (read_json_object(model / "tokenizer_config.json") or {}).get("chat_template")
    return isinstance(source, str) and original_template(source) != source


def _cell(value: Any) -> Markup:
    """Text for a table's cell, or in a line: no markup of HTML or Markdown, no line's end."""
    text = " ".join(str(value).split())
    # In this order: an entity of HTML holds a character of Markdown.
    return Markup(escape(re.sub(r"([\\`*_{}\[\]|#~$])", r"\\\1", text)))


def _block(text: str, language: str = "") -> Markup:
    """Text as a code block that nothing in it can end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}{language}\n{text}\n{fence}")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ReportError(f"{path}: can't be read ({error.strerror})") from error
