"""The pages say what the code says."""

import inspect
import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from geolora_pl import AdapterConfig, GeoLoRACallback, GeoLoRAModule, RiemannianAdam

ROOT = Path(__file__).parents[1]
SETTINGS = (ROOT / "docs" / "settings.md").read_text()
ELSEWHERE = {GeoLoRAModule: {"adapter", "optimizer", "lr_scheduler"}, RiemannianAdam: {"params"}}


def defaults(owner):
    if owner is AdapterConfig:
        return {f.name: f.default if f.default is not MISSING else f.default_factory() for f in fields(owner)}
    parameters = inspect.signature(owner).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in ELSEWHERE.get(owner, ())}


@pytest.mark.parametrize("owner", [GeoLoRACallback, AdapterConfig, RiemannianAdam, GeoLoRAModule])
def test_every_setting_is_on_the_page_with_its_default(owner):
    section = re.search(rf"^## {owner.__name__}\n(.*?)(?=^## |\Z)", SETTINGS, re.M | re.S)[1]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", section, re.M))
    assert rows == {name: str(default) for name, default in defaults(owner).items()}


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_inside_the_project_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
