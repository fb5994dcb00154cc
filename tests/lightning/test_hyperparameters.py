"""A checkpoint from a stranger decides neither what is imported nor what is fetched or run."""

import socket
import sys
import types
from pathlib import Path

import pytest
import timm
import torch
import yaml
from exported import SIZE, fails, move, save
from flags import FLAGS
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from tiny_text import save_tiny_model
from torch import nn
from transformers import AutoTokenizer

from geolora_pl import AdapterConfig, GeoLoRAModule
from geolora_pl.cli.dispatch import main
from geolora_pl.lightning.checkpoint_io import WholeFiles, forget_other_files
from geolora_pl.lightning.loading import load_module
from geolora_pl.tasks import CausalLM, ImageClassification, TextClassification

pytestmark = pytest.mark.usefixtures("one_parser")


@pytest.fixture(autouse=True)
def stranger(tmp_path, monkeypatch):
    """A module that leaves a mark when it is imported, in the working folder, and a network that nobody may ask."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "evil.py").write_text("from pathlib import Path\nPath('imported').touch()\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(folder)

    def connect(*args, **kwargs):
        (folder / "asked").touch()
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", connect)
    yield folder
    sys.modules.pop("evil", None)
    assert sorted(path.name for path in folder.iterdir() if path.name in {"imported", "asked", "executed"}) == []


def image_checkpoint(path, **changes):
    task = ImageClassification("vit_tiny_patch16_224", False, model_args=SIZE, num_classes=2, class_names=["no", "yes"])
    task.configure_model()
    return changed(save(move(task), path / "image.ckpt", "geolora_pl.tasks.ImageClassification"), **changes), task


def text_checkpoint(path, task=TextClassification, config=None, **changes):
    model = save_tiny_model(path / "base", *([] if task is TextClassification else ["gpt2"]))
    settings = {"num_classes": 2} if task is TextClassification else {}
    module = task(model, **settings)
    module.configure_model()
    return changed(
        save(move(module), path / "text.ckpt", f"geolora_pl.tasks.{task.__name__}"), config, **changes
    ), module


def changed(path, config=None, **changes):
    """A checkpoint with other hyperparameters; a value that is a function changes what was there."""
    checkpoint = torch.load(path, weights_only=True)
    given = checkpoint["hyper_parameters"]
    given |= {name: value(given[name]) if callable(value) else value for name, value in changes.items()}
    given["model_args"] |= config or {}
    torch.save(checkpoint, path)
    return str(path)


def export_fails(ckpt, message, capsys, *more):
    capsys.readouterr()
    fails(["export", f"--ckpt_path={ckpt}", "--format=merged", "--output=out", *more], message, capsys)


HOSTILE = {
    "auto_map": {"AutoConfig": "attacker/repo--evil.Evil"},
    "trust_remote_code": True,
    "attn_implementation": "attacker/kernel",
    "_attn_implementation_internal": "attacker/kernel",
    "attribute_map": {"hidden_act": "_attn_implementation_internal"},
    "quantization_config": {"quant_method": "evil"},
    "text_config": {"auto_map": {"AutoConfig": "evil.Evil"}},
    "transformers_version": '{"class_path": "evil.Evil"}',
    "_name_or_path": "{class_path: evil.Evil}",
    "architectures": ["evil.Evil"],
    "id2label": {"0": '{"class_path": "evil.Evil"}'},
    "hidden_act": {"class_path": "evil.Evil"},
    "problem_type": "https://attacker.example/x",
}
REFUSED = {"hidden_act", "problem_type"}  # settings of a BERT; what a BERT does not have is dropped


def configured(path, init_args, name="TextClassification"):
    """The user's own configuration."""
    settings = {"class_path": f"geolora_pl.tasks.{name}", "init_args": init_args}
    (path / "c.yaml").write_text(yaml.safe_dump({"model": settings}))
    return f"--config={path / 'c.yaml'}"


@pytest.mark.parametrize("key", HOSTILE)
def test_a_configuration_in_a_checkpoint_brings_neither_code_nor_places(tmp_path, capsys, key):
    """Whoever reads it: an export with and without a configuration, and Python."""
    ckpt, _ = text_checkpoint(tmp_path, config={key: HOSTILE[key]})
    own = configured(tmp_path, {"model_name": str(tmp_path / "base"), "num_classes": 2})
    if key in REFUSED:
        export_fails(ckpt, "model_args of the checkpoint is not taken from a file", capsys)
        with pytest.raises(
            ValueError, match=r"model_args of the checkpoint.*or model_args=\.\.\. to load_from_checkpoint"
        ):
            TextClassification.load_from_checkpoint(ckpt)
    else:
        assert not TextClassification.load_from_checkpoint(ckpt).model_args.keys() & HOSTILE.keys() - REFUSED
        main(["export", f"--ckpt_path={ckpt}", "--format=adapter", "--output=a"])
    main(["export", f"--ckpt_path={ckpt}", "--format=adapter", "--output=b", own])


def test_a_prediction_takes_neither_code_nor_places_from_its_checkpoint(tmp_path):
    ckpt, _ = text_checkpoint(tmp_path, config=HOSTILE)
    own = configured(tmp_path, {"model_name": str(tmp_path / "base"), "num_classes": 2})
    (tmp_path / "t.txt").write_text("good film\n")
    data = ["--data=geolora_pl.data.UnlabelledTexts", f"--data.file={tmp_path / 't.txt'}", "--data.cache_dir=cache"]
    main(["predict", own, *data, *FLAGS, "--trainer.logger=false", f"--ckpt_path={ckpt}", "--output=p.csv"])


@pytest.mark.parametrize("adapter", ["evil.Evil", "{class_path: evil.Evil}", {"class_path": "evil.Evil"}, {"r": 8}, 3])
def test_the_adapters_of_a_checkpoint_are_a_configuration_of_adapters(tmp_path, capsys, adapter):
    ckpt, _ = text_checkpoint(tmp_path, adapter=adapter)
    export_fails(ckpt, "adapter of the checkpoint is not taken from a file", capsys)
    own = configured(tmp_path, {"model_name": str(tmp_path / "base"), "num_classes": 2})
    main(["export", f"--ckpt_path={ckpt}", "--format=adapter", "--output=b", own])


@pytest.mark.parametrize("given", [[1], None, {3: 4}])
def test_hyperparameters_of_another_kind_are_refused_in_one_sentence(tmp_path, capsys, given):
    ckpt, _ = text_checkpoint(tmp_path)
    checkpoint = torch.load(ckpt, weights_only=True)
    checkpoint["hyper_parameters"] = given
    torch.save(checkpoint, ckpt)
    export_fails(ckpt, "hyper_parameters are not values by name", capsys)


def test_a_resumed_run_removes_no_file_outside_of_its_folder(tmp_path):
    state = {"dirpath": str(tmp_path / "run"), "kth_best_model_path": "x", "best_model_path": "x"}
    inside = str(tmp_path / "run" / "epoch=1.ckpt")
    state["best_k_models"] = {inside: 1.0, str(tmp_path / "run" / ".." / "mine.txt"): 9.0, "s3://mine/too": 9.0}
    ckpt, module = text_checkpoint(tmp_path)
    checkpoint = torch.load(ckpt, weights_only=True) | {"callbacks": {"ModelCheckpoint": state}}
    torch.save(checkpoint, ckpt)
    read = WholeFiles(module).load_checkpoint(ckpt)
    files = ModelCheckpoint(tmp_path / "run")
    read["callbacks"] = {files.state_key: read["callbacks"]["ModelCheckpoint"]}
    forget_other_files(read, [files])
    (state,) = read["callbacks"].values()
    assert (state["best_k_models"], state["kth_best_model_path"], state["best_model_path"]) == ({}, "", "")


def test_another_repository_and_its_code_are_not_fetched(tmp_path, capsys):
    ckpt, _ = text_checkpoint(tmp_path, model_name="attacker/repo", model_args={"trust_remote_code": True})
    export_fails(
        ckpt, "model_args of the checkpoint is not taken from a file: it is not a complete configuration", capsys
    )


@pytest.mark.parametrize("task", [TextClassification, CausalLM])
def test_a_name_of_the_hub_in_a_checkpoint_is_shown_and_never_asked_for(tmp_path, capsys, task):
    ckpt, _ = text_checkpoint(tmp_path, task, model_name="attacker/repo", pretrained=True)
    message = "the checkpoint says that its model is 'attacker/repo', and a file does not decide what is fetched"
    export_fails(ckpt, message, capsys)
    main(["export", f"--ckpt_path={ckpt}", "--format=peft", "--output=lora"])  # needs no tokenizer
    with pytest.raises(ValueError, match=message):
        _ = task.load_from_checkpoint(ckpt).tokenizer
    named = task.load_from_checkpoint(ckpt, model_name=str(tmp_path / "base"))
    assert isinstance(named.tokenizer, type(AutoTokenizer.from_pretrained(tmp_path / "base")))


def test_the_configuration_names_the_tokenizer_of_a_merged_export(tmp_path):
    ckpt, module = text_checkpoint(tmp_path, model_name="attacker/repo")
    settings = {
        "class_path": "geolora_pl.tasks.TextClassification",
        "init_args": {"model_name": str(tmp_path / "base")},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": settings}))
    main(["export", f"--ckpt_path={ckpt}", "--format=merged", "--output=out", f"--config={tmp_path / 'c.yaml'}"])
    assert AutoTokenizer.from_pretrained("out").vocab_size == module.tokenizer.vocab_size


@pytest.mark.parametrize(
    "model_args",
    [
        {**SIZE, "pretrained_cfg_overlay": {"url": "https://attacker.example/w.pth"}},
        {**SIZE, "pretrained_cfg_overlay": {"hf_hub_id": "attacker/repo"}},
        {**SIZE, "pretrained_cfg_overlay": {"file": "w.pth"}},
        {**SIZE, "pretrained_cfg": "attacker"},
        {**SIZE, "checkpoint_path": "w.pth"},
        {**SIZE, "norm_layer": {"class_path": "evil.Evil"}},
    ],
)
def test_an_image_model_in_a_checkpoint_is_sizes_and_what_images_look_like(tmp_path, capsys, model_args):
    ckpt, _ = image_checkpoint(tmp_path, model_args=model_args, pretrained=True)
    export_fails(ckpt, "model_args of the checkpoint is not taken from a file", capsys)


def test_a_whole_checkpoint_fetches_nothing_whatever_it_says_of_its_base(tmp_path):
    ckpt, task = image_checkpoint(tmp_path, pretrained=True, checkpoint_path="/dev/null")
    loaded = load_module(ckpt)
    assert (loaded.pretrained, loaded.checkpoint_path) == (False, None)
    main(["export", f"--ckpt_path={ckpt}", "--format=merged", "--output=out"])
    model = timm.create_model("local-dir:out", pretrained=True)
    torch.testing.assert_close(model.cls_token, task.model.cls_token)


@pytest.mark.parametrize("class_path", ["evil.Evil", "geolora_pl.tasks.evil.Evil", "os.system", 3])
def test_a_class_in_a_checkpoint_is_a_task_or_nothing(tmp_path, capsys, class_path):
    ckpt, _ = image_checkpoint(tmp_path, _class_path=class_path)
    export_fails(ckpt, "which is not a task of geolora_pl: give the run's configuration with --config", capsys)


@pytest.mark.parametrize(
    "changes",
    [
        {"_class_path": "evil.Evil"},
        {"_instantiator": "evil.Evil"},
        {"optimizer": "evil.Evil"},
        {"lr_scheduler": {"class_path": "evil.Evil"}},
        {"class_names": {"class_path": "evil.Evil"}},
        {"model_name": "hf-hub:attacker/repo"},
        {"pretrained": True},
    ],
)
def test_predict_builds_what_the_configuration_says(tmp_path, changes):
    """Whatever the checkpoint names: the user's own configuration names the class, a model and its sizes."""
    images = tmp_path / "images"
    images.mkdir()
    for index in range(2):
        Image.new("L", (28, 28), index).save(images / f"{index}.png")
    ckpt, _ = image_checkpoint(tmp_path, **changes)
    settings = {
        "model_name": "vit_tiny_patch16_224",
        "pretrained": False,
        "model_args": SIZE,
        "class_names": ["a", "b"],
    }
    model = {"class_path": "geolora_pl.tasks.ImageClassification", "init_args": settings}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": model}))
    data = ["--data=geolora_pl.data.UnlabelledImages", f"--data.folder={images}", "--data.num_workers=0"]
    common = [f"--config={tmp_path / 'c.yaml'}", *data, *FLAGS, "--trainer.logger=false"]
    output = tmp_path / "p.csv"
    main(["predict", *common, f"--ckpt_path={ckpt}", f"--output={output}"])
    assert output.read_text().count("\n") == 3


class Own(GeoLoRAModule):
    def __init__(self, width=4, layer=None, **kwargs):
        super().__init__(**kwargs)
        self.width, self.layer = width, layer

    def build_model(self):
        return nn.Sequential(nn.Linear(4, self.width), nn.Linear(self.width, 2))


def test_a_class_of_the_users_gets_values_and_no_classes(tmp_path):
    module = Own(width=6)
    module.configure_model()
    path = save(module, tmp_path / "own.ckpt")
    assert Own.load_from_checkpoint(path).width == 6
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"] |= {"layer": {"class_path": "evil.Evil"}, "_instantiator": "evil.Evil"}
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"layer of the checkpoint.*has class_path='evil.Evil', which names code"):
        Own.load_from_checkpoint(path)
    assert Own.load_from_checkpoint(path, layer="mine").layer == "mine"


class Fixed(Own):
    def __init__(self, depth=1):
        super().__init__(width=6 * depth, adapter=AdapterConfig(max_rank=2, alpha=2.0))


class Settled(Fixed):
    def __init__(self):
        super().__init__(depth=2)


@pytest.mark.parametrize("settled", [False, True])
def test_a_class_of_the_users_that_gives_its_base_values_of_its_own_is_loaded(tmp_path, monkeypatch, settled):
    """A user's constructor took no **kwargs. No checkpoint was loaded, for it was given what its base had taken."""
    kind, given = (Settled, {}) if settled else (Fixed, {"depth": 3})
    module = kind(**given)
    module.configure_model()
    path = save(module, tmp_path / "own.ckpt")
    monkeypatch.setitem(sys.modules, "mine", types.SimpleNamespace(Settled=Settled, Fixed=Fixed))
    monkeypatch.setattr(kind, "__module__", "mine")
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump({"model": {"class_path": f"mine.{kind.__name__}", "init_args": given}})
    )
    for loaded in (kind.load_from_checkpoint(path), load_module(path, tmp_path / "c.yaml")):
        assert loaded.width == module.width
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in module.state_dict().items())


def test_the_door_has_no_way_round(tmp_path):
    ckpt, _ = image_checkpoint(tmp_path)
    for settings in ({"weights_only": False}, {"hparams_file": "h.yaml"}):
        with pytest.raises(ValueError, match="takes neither hparams_file nor weights_only=False"):
            ImageClassification.load_from_checkpoint(ckpt, **settings)


class WithOptions(Own):
    def __init__(self, width=4, **options):
        super().__init__(width)
        self.options = options


def test_a_configuration_gives_what_only_the_users_class_takes(tmp_path, monkeypatch):
    module = WithOptions(width=6)
    module.configure_model()
    path = save(module, tmp_path / "own.ckpt")
    monkeypatch.setitem(sys.modules, "mine", types.SimpleNamespace(WithOptions=WithOptions))
    monkeypatch.setattr(WithOptions, "__module__", "mine")
    model = {"class_path": "mine.WithOptions", "init_args": {"width": 6}, "dict_kwargs": {"extra": 7}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": model}))
    assert load_module(path, tmp_path / "c.yaml").options["extra"] == 7


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"init_args": {"modl_name": "x"}}, "the configuration of the model: .*modl_name"),
        ({"init_args": 3}, "model.init_args must be settings by name"),
    ],
)
def test_a_configuration_that_is_wrong_is_blamed_itself(tmp_path, capsys, model, message):
    ckpt, _ = image_checkpoint(tmp_path)
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"model": {"class_path": "geolora_pl.tasks.ImageClassification", **model}}))
    with pytest.raises(ValueError, match=message):
        load_module(ckpt, path)


def test_sizes_that_make_no_sense_end_in_one_sentence(tmp_path, capsys):
    ckpt, _ = image_checkpoint(tmp_path, model_args={**SIZE, "weight_init": "stranger"})
    export_fails(ckpt, "cannot be loaded as ImageClassification", capsys)
    with pytest.raises(ValueError, match="needs the path of a checkpoint"):
        ImageClassification.load_from_checkpoint()
    ckpt, _ = image_checkpoint(tmp_path)
    assert ImageClassification.load_from_checkpoint(checkpoint_path=ckpt).num_classes == 2


def test_a_module_made_by_a_function_predicts_by_its_checkpoint(tmp_path):
    ckpt, _ = image_checkpoint(tmp_path)
    (tmp_path / "work" / "makes.py").write_text(
        "from geolora_pl.tasks import ImageClassification\n"
        f"SIZE = {SIZE!r}\n"
        "def make() -> ImageClassification:\n"
        "    return ImageClassification('vit_tiny_patch16_224', False, model_args=SIZE, num_classes=2)\n"
    )
    Image.new("L", (28, 28)).save(tmp_path / "0.png")
    data = ["--data=geolora_pl.data.UnlabelledImages", f"--data.folder={tmp_path}", "--data.num_workers=0"]
    common = ["--model=makes.make", *data, *FLAGS, "--trainer.logger=false"]
    main(["predict", *common, f"--ckpt_path={ckpt}", "--output=p.csv"])
    assert Path("p.csv").read_text().count("\n") == 2
