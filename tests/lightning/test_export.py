import json
from importlib import import_module
from pathlib import Path

import pytest
import timm
import torch
import yaml
from exported import SIZE, fails, move, save
from peft import PeftModel
from safetensors.torch import load_file
from tiny_text import save_tiny_model
from tolerance import NETWORK, close
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from geolora_pl import load_adapter
from geolora_pl.adapters.inject import find_adapters
from geolora_pl.cli.dispatch import main
from geolora_pl.lightning.export import export
from geolora_pl.lightning.loading import load_module
from geolora_pl.report.rank_map import RankMap
from geolora_pl.tasks import ImageClassification, TextClassification

ROOT = Path(__file__).parents[2]
IMAGES = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def image(tmp_path):
    module = ImageClassification(
        "vit_tiny_patch16_224", False, model_args=SIZE, class_names=["no", "yes"], num_classes=2
    )
    module.configure_model()
    return move(module), save(module, tmp_path / "image.ckpt", "geolora_pl.tasks.ImageClassification")


@pytest.fixture
def text(tmp_path):
    module = TextClassification(save_tiny_model(tmp_path / "bert"), class_names=["no", "yes"], num_classes=2)
    module.configure_model()
    return move(module), save(module, tmp_path / "text.ckpt", "geolora_pl.tasks.TextClassification")


def logits(model, x):
    with torch.no_grad():
        out = model(x)
    return out if isinstance(out, torch.Tensor) else out.logits


def plain(module):
    """The base that a run began with."""
    fresh = type(module)(**{k: v for k, v in module.hparams.items() if k[0] != "_"})
    fresh.configure_model()
    model = fresh.build_model()
    layers = find_adapters(module.model)
    of_base = {name.replace(".base.", "."): tensor for name, tensor in module.model.state_dict().items()}
    model.load_state_dict({name: of_base[name] for name in model.state_dict()})
    assert layers
    return model.eval()


@pytest.mark.parametrize("kind", ["image", "text"])
def test_an_adapter_and_a_peft_folder_of_a_checkpoint_give_its_logits(kind, request, tmp_path):
    module, ckpt = request.getfixturevalue(kind)
    x = IMAGES if kind == "image" else torch.randint(5, 20, (3, 7))
    main(["export", "--ckpt_path", ckpt, "--format", "adapter", "--output", str(tmp_path / "a.safetensors")])
    model = plain(module)
    load_adapter(model, tmp_path / "a.safetensors")
    close(logits(model, x), logits(module.model, x), NETWORK)
    main(["export", "--ckpt_path", ckpt, "--format", "peft", "--output", str(tmp_path / "peft")])
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    name = str(tmp_path / "bert") if kind == "text" else "vit_tiny_patch16_224"
    assert config["base_model_name_or_path"].startswith(name)
    theirs = PeftModel.from_pretrained(plain(module), tmp_path / "peft").eval()
    close(logits(theirs, x), logits(module.model, x), NETWORK)


def test_a_merged_image_model_is_what_timm_loads(image, tmp_path, capsys):
    module, ckpt = image
    folder = tmp_path / "merged"
    main(["export", "--ckpt_path", ckpt, "--format", "merged", "--output", str(folder)])
    assert "outputs of single layers differ by at most" in capsys.readouterr().out
    weights = str(folder / "model.safetensors")
    model = timm.create_model("vit_tiny_patch16_224", checkpoint_path=weights, num_classes=2, **SIZE).eval()
    close(logits(model, IMAGES), logits(module.model, IMAGES), NETWORK)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    close(logits(model, IMAGES), logits(module.model, IMAGES), NETWORK)
    assert json.loads((folder / "config.json").read_text())["label_names"] == ["no", "yes"]


def test_a_merged_text_model_is_what_from_pretrained_loads_with_its_tokenizer(text, tmp_path):
    module, ckpt = text
    folder = tmp_path / "merged"
    main(["export", "--ckpt_path", ckpt, "--format", "merged", "--output", str(folder)])
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = AutoTokenizer.from_pretrained(folder)(["the film was good", "bad"], padding=True, return_tensors="pt")
    expected = module.tokenizer(["the film was good", "bad"], padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    with torch.no_grad():
        close(model(**batch).logits, module(expected), NETWORK)
    assert model.config.id2label == {0: "no", 1: "yes"}


def test_an_existing_output_is_refused_before_the_work_unless_it_may_be_overwritten(image, tmp_path, capsys):
    _, ckpt = image
    for name in ("adapter", "peft", "merged"):
        (tmp_path / name).write_text("mine")
        command = ["export", "--ckpt_path", ckpt, "--format", name, "--output", str(tmp_path / name)]
        fails(command, "exists already", capsys)
        assert (tmp_path / name).read_text() == "mine"
        if name == "adapter":
            main([*command, "--overwrite"])
        else:
            fails([*command, "--overwrite"], "is a file, but a folder must be written", capsys)
            (tmp_path / name).unlink()
            main(command)
        assert (tmp_path / name).is_file() == (name == "adapter")
        main([*command, "--overwrite"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "image.ckpt", "merged", "peft"]


def test_compact_is_for_peft(image, tmp_path, capsys):
    module, ckpt = image
    for layer in (module.model.blocks[0].attn.qkv,):
        for factor in (layer.U, layer.V, layer.K, layer.L):
            factor.data.zero_()
    ckpt = save(module, ckpt, "geolora_pl.tasks.ImageClassification")
    main(["export", "--ckpt_path", ckpt, "--format", "peft", "--output", str(tmp_path / "p"), "--compact"])
    assert not [name for name in load_file(tmp_path / "p" / "adapter_model.safetensors") if "blocks.0.attn.qkv" in name]
    fails(["export", "--ckpt_path", ckpt, "--format=merged", "--output=x", "--compact"], "compact is for", capsys)
    with pytest.raises(ValueError, match="format='onnx' must be one of"):
        export(ckpt, "onnx", tmp_path / "x")


def test_broken_and_foreign_checkpoints_are_refused_in_one_sentence(image, tmp_path, capsys):
    module, ckpt = image

    def refused(path, message, *more):
        fails(["export", "--ckpt_path", str(path), "--format=adapter", "--output=x", *more], message, capsys)

    refused(tmp_path / "gone", "is not a file")
    (tmp_path / "half.ckpt").write_bytes(Path(ckpt).read_bytes()[:3000])
    refused(tmp_path / "half.ckpt", "cannot be read")
    torch.save({"state_dict": Path}, tmp_path / "unsafe.ckpt")
    refused(tmp_path / "unsafe.ckpt", "holds objects that are not loaded with weights_only=True")
    torch.save([1], tmp_path / "list.ckpt")
    refused(tmp_path / "list.ckpt", "is not a checkpoint of a run")
    checkpoint = torch.load(ckpt, weights_only=True)
    checkpoint["state_dict"].pop("model.cls_token")
    torch.save(checkpoint, tmp_path / "part.ckpt")
    refused(tmp_path / "part.ckpt", "the weights do not fit this ImageClassification: model.cls_token is missing")
    for class_path, message in (
        ("os.system", "is of os.system, which is not a task of geolora_pl: give the run's configuration"),
        ("geolora_pl.tasks.Gone", "which is not a task of geolora_pl"),
        ("geolora_pl.data.Digits", "which is not a task of geolora_pl"),
    ):
        refused(save(module, tmp_path / "other.ckpt", class_path), message)
    for config, message in (
        ("[", "cannot be read"),
        ("data: x", "has no model.class_path"),
        ("model: x", "cannot be imported"),
    ):
        (tmp_path / "c.yaml").write_text(config)
        refused(ckpt, message, f"--config={tmp_path / 'c.yaml'}")
    fails(["ranks", f"--ckpt_path={tmp_path / 'gone'}"], "is not a file", capsys)
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6"}, tmp_path / "plain.ckpt")
    fails(["ranks", f"--ckpt_path={tmp_path / 'plain.ckpt'}"], "holds no adapters", capsys)
    assert not Path("x").exists()


def test_a_module_of_your_own_needs_the_configuration_and_is_merged_to_plain_weights(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_module.py").write_text(
        "from geolora_pl import GeoLoRAModule\nfrom torch import nn\n\n\n"
        "class Own(GeoLoRAModule):\n    def build_model(self):\n"
        "        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = import_module("own_module").Own()
    module.configure_model()
    move(module)
    ckpt = save(module, tmp_path / "own.ckpt")
    command = ["export", "--ckpt_path", ckpt, "--format=merged", f"--output={tmp_path / 'merged'}"]
    fails(command, "does not name its module: give the run's configuration with --config", capsys)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": {"class_path": "own_module.Own"}}))
    main([*command, "--config", str(tmp_path / "c.yaml")])
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    x = torch.randn(3, 4)
    close(model(x), module.model(x), NETWORK)


def test_ranks_shows_every_adapter(image, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    module, ckpt = image
    layers = find_adapters(module)
    rank_4 = layers["model.blocks.0.attn.qkv"]
    rank_4.U.data[:, rank_4.probes : rank_4.probes + 4] = torch.eye(len(rank_4.U), 4)
    rank_4.V.data[:, rank_4.probes : rank_4.probes + 4] = torch.eye(len(rank_4.V), 4)
    rank_4.read_rank()
    rank_4.S.data[:4, :4] = torch.diag(torch.tensor([8.0, 3.4, 0.1, 0.0]))
    main(["ranks", "--ckpt_path", save(module, ckpt)])
    out = capsys.readouterr().out
    by_depth, _, singly = out.partition("99% energy")
    assert by_depth.index("layers of model.blocks") < by_depth.index("attn.qkv")
    assert all(RankMap.of(layers).short_names()[name] in singly for name in layers)
    assert max(map(len, out.splitlines())) <= 80
    (row,) = [line for line in out.splitlines() if "attn.qkv 0" in line]
    assert [cell.strip() for cell in row.split("│")[2:-1]] == ["4", "256", "2", "8", "█▄▁▁"]
    total = sum(layer.rank * (layer.in_features + layer.out_features) for layer in layers.values())
    assert f"{total:,}" in out


@pytest.mark.filterwarnings("ignore:.*could not find the monitored key:UserWarning")  # the run ends before a validation
def test_a_run_of_the_command_line_is_exported_by_its_checkpoint_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    quick = ["--trainer.max_steps=3", "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false"]
    logger = ["--trainer.logger=false", "--trainer.default_root_dir=run", "--test_after_fit=false"]
    main(["fit", "--config=configs/quickstart.yaml", *quick, *logger, "--trainer.accelerator=cpu"])
    (last,) = Path("run").rglob("last.ckpt")
    (tmp_path / "configs").unlink()  # the base's weights are in the checkpoint
    capsys.readouterr()
    main(["export", "--ckpt_path", str(last), "--format=merged", "--output=merged"])
    model = timm.create_model("local-dir:merged", pretrained=True).eval()
    close(model(IMAGES), load_module(last)(IMAGES), NETWORK)
    assert json.loads(Path("merged/config.json").read_text())["label_names"] == [str(digit) for digit in range(10)]
