import copy
import io
import re

import pytest
import torch
from torch import nn

from geolora_pl import (
    AdapterConfig,
    AdapterLibrary,
    export_peft,
    import_peft,
    inject_adapters,
    load_adapter,
    save_adapter,
)
from geolora_pl.adapters.inject import find_adapters, has_adapters
from geolora_pl.storage.hub import is_repo_id

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
OURS, CONFIG, WEIGHTS = "geolora_adapter.safetensors", "adapter_config.json", "adapter_model.safetensors"


def base():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


@pytest.fixture
def model():
    adapted = base()
    inject_adapters(adapted, AdapterConfig(target_modules=["0"], modules_to_save=["2"], init_rank=3))
    with torch.no_grad():
        adapted[0].S.fill_diagonal_(0.5)
        adapted[2].weight.add_(1)
    return adapted


@pytest.fixture
def ours(model, tmp_path):
    """The content of an adapter file."""
    save_adapter(model, tmp_path / "mine.safetensors")
    return (tmp_path / "mine.safetensors").read_bytes()


@pytest.fixture
def lora(model, tmp_path):
    """The files of a LoRA of PEFT."""
    export_peft(model, tmp_path / "lora")
    return {name: (tmp_path / "lora" / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def test_a_file_on_the_hub_is_loaded_by_its_name_and_nothing_else_is_fetched(hub, model, ours, lora):
    """Whatever else somebody has put into a repository, of all kinds that could run code, stays there."""
    hub.add("user/name", {OURS: ours, **lora, "adapter_model.bin": b"x", "modeling.py": b"x", "README.md": b"x"})
    fresh = base()
    load_adapter(fresh, "user/name")
    assert torch.equal(fresh(X), model(X))
    assert hub.downloaded == [OURS]


@pytest.mark.parametrize("is_polyglot", [False, True])
def test_a_pickle_under_the_name_of_our_file_is_not_opened(hub, ours, monkeypatch, is_polyglot):
    """A stranger puts a checkpoint into the place of the adapter file, or at its end, where torch would look for it."""
    checkpoint = io.BytesIO()
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2"}, checkpoint)
    hub.add("user/name", {OURS: (ours if is_polyglot else b"") + checkpoint.getvalue()})
    monkeypatch.setattr("torch.load", None)
    with pytest.raises(ValueError, match="is corrupt or not a safetensors file"):
        load_adapter(base(), "user/name")


@pytest.mark.parametrize("load", [load_adapter, import_peft])
def test_a_lora_of_peft_on_the_hub_is_a_start(hub, model, lora, load):
    """A user starts from a LoRA that somebody has made with PEFT."""
    hub.add("user/lora", {**lora, "adapter_model.bin": b"x", "modeling.py": b"x"})
    fresh = base()
    load(fresh, "user/lora")
    torch.testing.assert_close(fresh(X), model(X))
    assert set(hub.downloaded) == {CONFIG, WEIGHTS}
    assert find_adapters(fresh)["0"].rank == 3


def test_a_start_by_peft_takes_the_lora_though_there_is_a_file_of_ours(hub, ours, lora):
    hub.add("user/name", {OURS: ours, **lora})
    fresh = base()
    import_peft(fresh, "user/name", max_rank=5)
    assert find_adapters(fresh)["0"].max_rank == 5
    assert set(hub.downloaded) == {CONFIG, WEIGHTS}


def test_a_folder_is_taken_like_a_repository(model, lora, tmp_path):
    fresh = base()
    load_adapter(fresh, tmp_path / "lora")
    torch.testing.assert_close(fresh(X), model(X))
    save_adapter(model, tmp_path / "lora" / OURS)
    fresh = base()
    load_adapter(fresh, str(tmp_path / "lora"))
    assert torch.equal(fresh(X), model(X))


def test_a_path_goes_before_a_name(hub, model, ours, tmp_path, monkeypatch):
    """A user's own folder has the name of a stranger's repository."""
    hub.add("user/name", {OURS: b"of a stranger"})
    (tmp_path / "user" / "name").mkdir(parents=True)
    (tmp_path / "user" / "name" / OURS).write_bytes(ours)
    monkeypatch.chdir(tmp_path)
    fresh = base()
    load_adapter(fresh, "user/name")
    assert torch.equal(fresh(X), model(X))
    assert hub.requests == []


def test_a_library_loads_from_the_hub(hub, model, ours):
    hub.add("user/name", {OURS: ours}, revision="v1")
    library = AdapterLibrary(base())
    library.load("mine", "user/name", revision="v1")
    library.use("mine")
    assert torch.equal(library.model(X), model(X))


@pytest.mark.parametrize("kind", ["ours", "lora"])
def test_offline_the_cache_serves(hub, model, ours, lora, monkeypatch, kind):
    hub.add("user/name", {OURS: ours} if kind == "ours" else lora)
    load_adapter(base(), "user/name")
    asked = len(hub.requests)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fresh = base()
    load_adapter(fresh, "user/name")
    torch.testing.assert_close(fresh(X), model(X))
    with pytest.raises(
        ValueError, match=r"user/other is not a path here .*HF_HUB_OFFLINE is set.* cache does not hold"
    ):
        load_adapter(base(), "user/other")
    assert len(hub.requests) == asked


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"path": "user/gone"}, "user/gone is no repository of the hub that you may see (and no path from "),
        ({"path": "user/name", "revision": "v2"}, "user/name has no revision='v2': name a branch, a tag or a commit"),
        ({"path": "user/other"}, f"user/other has no {OURS}, nor {CONFIG} with {WEIGHTS}: name the repository of an"),
        ({"path": "user/half"}, f"user/half has no {OURS}, nor {CONFIG} with {WEIGHTS}"),
        ({"path": "user/gated"}, "user/gated is gated: accept its terms on the hub, and log in with 'hf auth login'"),
        ({"path": "user/broken"}, "is corrupt or not a safetensors file"),
        (
            {"path": "user/of_another"},
            "user/of_another does not fit the model: the adapter was trained on another base",
        ),
        ({"path": "./user/name"}, "./user/name is not a file or folder (from "),
        ({"path": "user"}, "user is not a file or folder"),
        ({"path": "hf://user/name"}, "hf://user/name is not a file or folder (from "),
        ({"path": "runs/gone.safetensors"}, "nor a repository of the hub, user/name"),
        ({"path": __file__, "revision": "v1"}, "revision='v1' is for a repository of the hub, and "),
    ],
)
def test_mistakes_are_one_sentence_and_the_model_stays(hub, ours, lora, how, message):
    other = base()
    hub.add("user/name", {OURS: ours})
    hub.add("user/other", {"README.md": b"x", "adapter_model.bin": b"x"})
    hub.add("user/half", {CONFIG: lora[CONFIG]})
    hub.add("user/broken", {OURS: ours[:100]})
    hub.add("user/gated", {OURS: ours})
    hub.gated.add("user/gated")
    hub.add("user/of_another", {OURS: ours})
    if "another" in how["path"]:
        with torch.no_grad():
            other[0].weight.add_(1)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_adapter(other, how.pop("path"), **how)
    assert "\n" not in str(caught.value)
    assert not has_adapters(other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_a_hub_that_is_down_is_one_sentence(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client tries again, later and later
    hub.down = True
    with pytest.raises(ValueError, match=r"user/name is not a path here .*the hub cannot be reached"):
        load_adapter(base(), "user/name")


@pytest.mark.parametrize(
    "name",
    ["", "a", "a/b/c", "/a", "a/", "../a", "~/a", "a b/c", "a/b.safetensors", "runs/last.ckpt", "a/..", "a/b..c"],
)
def test_what_is_no_name_of_a_repository(name):
    assert not is_repo_id(name)
