"""The pages say what the code says."""

import inspect
import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from layout import FILES, ORDER, PACKAGE

import geolora_pl.data
from geolora_pl import (
    AdapterConfig,
    GeoLoRACallback,
    GeoLoRAEMAWeightAveraging,
    GeoLoRAModule,
    GeoLoRATrainerCallback,
    RiemannianAdam,
)
from geolora_pl.cli import commands, start
from geolora_pl.data.images.base import ImageDataModule
from geolora_pl.data.images.prompted import PromptedImages
from geolora_pl.data.texts.answers import AnswerDataModule
from geolora_pl.data.texts.base import TokenDataModule
from geolora_pl.data.texts.chats import ChatDataModule
from geolora_pl.data.texts.language import LanguageDataModule
from geolora_pl.data.texts.seq2seq import Seq2SeqDataModule
from geolora_pl.data.texts.sources import LabelledTexts
from geolora_pl.data.texts.tags import TagDataModule
from geolora_pl.tasks import (
    CausalLM,
    ImageClassification,
    QuestionAnswering,
    Seq2SeqLM,
    TextClassification,
    TextToImage,
    TokenClassification,
)
from geolora_pl.tasks.transformer import TransformerTask

ROOT = Path(__file__).parents[2]
SETTINGS = (ROOT / "docs" / "settings.md").read_text()
ELSEWHERE = {GeoLoRAModule: {"adapter", "optimizer", "lr_scheduler"}, RiemannianAdam: {"params"}}
OWNERS = [
    GeoLoRACallback,
    GeoLoRAEMAWeightAveraging,
    AdapterConfig,
    RiemannianAdam,
    GeoLoRAModule,
    ImageClassification,
    TransformerTask,
    TextClassification,
    TokenClassification,
    QuestionAnswering,
    Seq2SeqLM,
    CausalLM,
    TextToImage,
    ImageDataModule,
    PromptedImages,
    TokenDataModule,
    LabelledTexts,
    LanguageDataModule,
    TagDataModule,
    AnswerDataModule,
    Seq2SeqDataModule,
    ChatDataModule,
]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
BASES = {
    "ImageDataModule",
    "PromptedImages",
    "TextDataModule",
    "LanguageDataModule",
    "ChatDataModule",
    "TagDataModule",
    "AnswerDataModule",
    "Seq2SeqDataModule",
}


def defaults(owner):
    """The settings that a class has of its own, as the page writes their defaults."""
    if owner is AdapterConfig:
        return {f.name: f.default if f.default is not MISSING else f.default_factory() for f in fields(owner)}
    own = [p for p in inspect.signature(owner).parameters.values() if p.kind is not p.VAR_KEYWORD]
    written = {p.name: "required" if p.default is p.empty else p.default for p in own}
    of_config = {name: value.target_modules for name, value in written.items() if isinstance(value, AdapterConfig)}
    return {name: of_config.get(name, value) for name, value in written.items() if name not in ELSEWHERE.get(owner, ())}


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", SETTINGS, re.M | re.S)[1]


@pytest.mark.parametrize("owner", OWNERS, ids=lambda owner: owner.__name__)
def test_every_setting_is_on_the_page_with_its_default(owner):
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", section(owner.__name__), re.M)
    assert rows == [(name, str(default)) for name, default in defaults(owner).items()]


def test_the_two_callbacks_share_their_settings():
    missing = {"on_divergence", "small_checkpoints", "adapter"}
    assert defaults(GeoLoRATrainerCallback) == {k: v for k, v in defaults(GeoLoRACallback).items() if k not in missing}


def test_every_source_is_on_the_page_with_its_settings():
    rows = re.findall(r"^\| (`.*?`) \| (.*?) \|$", section("Sources"), re.M)
    said = {name: set(re.findall(r"`(\w+)`", what)) for names, what in rows for name in re.findall(r"`(\w+)`", names)}
    assert set(said) == set(geolora_pl.data.__all__) - BASES
    shared = {
        name
        for base in (ImageDataModule, PromptedImages, TokenDataModule)
        for name in inspect.signature(base).parameters
    }
    for name, settings in said.items():
        own = set(inspect.signature(getattr(geolora_pl.data, name)).parameters) - shared - {"kwargs"}
        assert own <= settings, name


@pytest.mark.parametrize("command", ["init", "report", "ranks", "export", "push", "shrink"])
def test_every_option_of_a_command_is_on_the_page(command, capsys):
    """A user looks for the options of a command on the page of settings: it has those that ``--help`` has."""
    with pytest.raises(SystemExit):
        (start if command == "init" else commands).main([command, "--help"])
    options = set(re.findall(r"^  (--\w+)", capsys.readouterr().out, re.M))
    rows = re.findall(rf"^\| `{command}` \| `?([\w-]+)`? \|.*?\| (.*) \|$", section("Command line"), re.M)
    assert options == {name for name, _ in rows if name.startswith("--")}
    if command == "init":
        assert set(re.findall(r"`(\w+)`", dict(rows)["task"])) == set(start.STARTS)


def test_the_picture_of_the_architecture_is_that_of_the_imports():
    page = (ROOT / "docs" / "architecture.md").read_text()
    drawn = re.search(r"^    (math --> .*)$", page, re.M)[1]
    assert tuple(tuple(group.split(" & ")) for group in drawn.split(" --> ")) == ORDER


def test_every_file_of_the_package_has_its_job_on_the_page_of_the_architecture():
    page = (ROOT / "docs" / "architecture.md").read_text()
    for folder in {path.parent for path in FILES}:
        name = folder.relative_to(PACKAGE).as_posix()
        described = (
            set(re.findall(r"`(\w+)`", re.search(rf"^\| `{name}/` \|(.*)$", page, re.M)[1])) if name != "." else None
        )
        files = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}
        assert described is None or files <= described, f"{name}: {files - described}"


def test_the_index_has_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


def anchors(page):
    """What a page's headings are called in links."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_project_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        file = page.parent / target if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_sentence_stands_twice_on_a_page(page):
    """Two branches changed one paragraph, and the page had both versions after their merge: each line stands once."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    lines = [line for line in prose.splitlines() if len(line) > 60 and not re.match(r"[|!*]", line)]
    assert len(lines) == len(set(lines)), {line for line in lines if lines.count(line) > 1}
    assert "\n@@" not in prose
