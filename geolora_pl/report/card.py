"""The card of an adapter on the hub: its base, the ranks found, scores and settings of its run, and how to load it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import huggingface_hub
from PIL import Image

from geolora_pl.report.pictures import rank_map
from geolora_pl.report.printable import printable
from geolora_pl.report.public import DataSource, Score, public_settings, scores_of
from geolora_pl.report.rank_map import RankMap, spread
from geolora_pl.report.runs import Run
from geolora_pl.storage.adapter_state import AdapterState
from geolora_pl.storage.hub import PICTURE

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#!|~&$@:])")  # what Markdown, HTML and the hub's own marks are made of
Library = Literal["peft", "diffusers", "geolora_pl"]
_COLUMNS = 48  # layers of a kind in the table; the picture has them all


@dataclass(frozen=True)
class Contents:
    """What a repository holds, as its card says it.

    Attributes:
        repo_id: The name of the repository.
        base: The name of the base on the hub, if it has one.
        build: Lines of Python that make the base, as ``model`` or ``pipeline``.
        task: What the hub calls the task, if that is known.
        library: The library that its files are for besides this one.
        of_transformers: Whether the model is one of transformers.
        problem: Why it is for this library alone.
        data: What it was trained on, if that may be said.
    """

    repo_id: str
    base: str | None
    build: Sequence[str]
    task: str | None = None
    library: Library = "geolora_pl"
    of_transformers: bool = False
    problem: str | None = None
    data: DataSource | None = None


def rank_picture(state: AdapterState) -> Image.Image:
    """Draw the ranks of an adapter by kind of layer and depth."""
    return rank_map(RankMap.of(state.factors), _ranks(state))


def model_card(state: AdapterState, contents: Contents, run: Run | None = None, step: int | None = None) -> str:
    """The text of the card, with its metadata; whatever comes from names and files is escaped.

    Args:
        state: The adapter.
        contents: What the repository holds.
        run: The run that the adapter is of.
        step: The optimizer steps that the adapter was trained for, by which its scores are found.
    """
    scores = scores_of(run, step) if run else []
    name = contents.repo_id.partition("/")[2]
    parts = [
        f"# {_plain(name)}",
        _about(state, contents),
        "## Ranks",
        _ranks_section(state),
        *(["## Scores", _scores_section(scores, step)] if scores else []),
        "## How to load it",
        *_loading(contents),
        *_settings_section(state, run),
    ]
    data = _metadata(contents, name, scores)
    return str(huggingface_hub.ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def _metadata(contents: Contents, name: str, scores: Sequence[Score]) -> huggingface_hub.ModelCardData:
    source = contents.data
    counted = [score for score in scores if "loss" not in score.metric]
    results = [
        huggingface_hub.EvalResult(
            task_type=contents.task,
            dataset_type=(source.hub_name or source.name).lower().replace(" ", "/"),
            dataset_name=source.name,
            dataset_split=score.split,
            metric_type=score.metric,
            metric_value=score.value,
        )
        for score in counted
        if source is not None and contents.task is not None
    ]
    data = huggingface_hub.ModelCardData(
        library_name=contents.library,
        base_model=contents.base,
        datasets=[source.hub_name] if source and source.hub_name else None,
        pipeline_tag=contents.task,
        tags=["geolora", "geolora_pl", "lora"],
        metrics=sorted({score.metric for score in counted}) or None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    if contents.base is not None:
        data["base_model_relation"] = "adapter"
    return data


def _about(state: AdapterState, contents: Contents) -> str:
    ranks = _ranks(state)
    base = _plain(contents.base) if contents.base else "a base that has no name on the hub"
    said = [
        f"A low-rank adapter of {base}, made by geolora\\_pl, which finds the rank of every layer while it trains "
        "([GeoLoRA](https://arxiv.org/abs/2410.18720)).",
        f"It has {_parameters(state, ranks):,} parameters, in adapters of {len(ranks)} layer{'s'[: len(ranks) > 1]} "
        f"with ranks from {min(ranks.values())} to {max(ranks.values())} (at most {max(state.max_ranks.values())} were "
        "allowed).",
    ]
    if state.trained:
        said.append(f"Beside them this was trained in full: {', '.join(map(_plain, state.trained))}.")
    return " ".join(said)


def _ranks_section(state: AdapterState) -> str:
    ranks = _ranks(state)
    places = RankMap.of(ranks)
    rows = []
    for kind, label in places.short_kinds().items():
        names = places.of_kind(kind)
        drawn = ", ".join(str(ranks[name]) for name in spread(names, _COLUMNS))
        rows.append([label, drawn, f"{_parameters(state, names):,}"])
    table = _table(["kind of layer", "ranks from the first layer to the last", "parameters"], rows)
    return f"![The rank of every adapter, by kind of layer and depth]({PICTURE})\n\n{table}"


def _scores_section(scores: Sequence[Score], step: int | None) -> str:
    rows = [[score.name, f"{score.value:.4g}", str(score.step)] for score in scores]
    whose = "The last that the run logged." if step is None else f"The adapter is of step {step:,} of its run."
    return f"{whose}\n\n{_table(['metric', 'value', 'step'], rows)}"


def _settings_section(state: AdapterState, run: Run | None) -> list[str]:
    settings = public_settings(run.settings) if run else {}
    if not settings:  # those that the adapter itself knows
        settings = {name: str(getattr(state.config, name)) for name in ("alpha", "dropout", "probes")}
    return ["## Settings", _table(["setting", "value"], list(settings.items()))]


def _loading(contents: Contents) -> list[str]:
    """The code for each library; every name in it is one that the hub or Python allows."""
    repo_id, build = contents.repo_id, list(contents.build)
    if contents.library == "diffusers":
        return ["In diffusers:", _python(*build, f'pipeline.load_lora_weights("{repo_id}")')]
    parts = ["Here:", _python("from geolora_pl import load_adapter", *build, f'load_adapter(model, "{repo_id}")')]
    if contents.problem:
        parts.append(f"PEFT cannot hold it: {_plain(contents.problem)}.")
    if contents.library == "peft":
        load = f'model = PeftModel.from_pretrained(model, "{repo_id}")'
        parts += ["In PEFT:", _python("from peft import PeftModel", *build, load)]
    if contents.library == "peft" and contents.of_transformers:
        parts += ["In transformers, with PEFT installed:", _python(*build, f'model.load_adapter("{repo_id}")')]
    return parts


def _ranks(state: AdapterState) -> dict[str, int]:
    return {name: U.shape[1] for name, (U, _, _) in state.factors.items()}


def _parameters(state: AdapterState, names: Iterable[str]) -> int:
    return sum(U.shape[1] * (len(U) + len(V)) for U, _, V in (state.factors[name] for name in names))


def _python(*lines: str) -> str:
    imports = [line for line in lines if line.startswith("from ")]
    return "\n".join(["```python", *imports, "", *(line for line in lines if line not in imports), "```"])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *(map(_plain, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    r"""A text that Markdown and HTML show as it is.

    Example:
        >>> _plain("a_b|<c>")
        'a\\_b\\|\\<c\\>'
    """
    return _SPECIAL.sub(r"\\\1", printable(text))
