import copy
import io
import json
import re

import pytest
import torch
import yaml
from exported import SIZE, fails, move, save
from hub_server import READER, TOKEN
from huggingface_hub import ModelCard
from peft import PeftModel
from PIL import Image
from tiny_text import save_tiny_decoder, save_tiny_model
from tolerance import NETWORK, close, rounding
from torch import nn

from geolora_pl import (
    AdapterConfig,
    GeoLoRAWarning,
    inject_adapters,
    load_adapter,
    merge_adapters,
    push_to_hub,
    save_adapter,
)
from geolora_pl.adapters.quantised import keep_trainable
from geolora_pl.cli.dispatch import main
from geolora_pl.storage.adapter_file import read_adapter
from geolora_pl.tasks import CausalLM, ImageClassification, TextClassification

IDS = torch.randint(5, 20, (3, 9), generator=torch.Generator().manual_seed(0))
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
WHOLE = {"README.md", "adapter_config.json", "adapter_model.safetensors", "geolora_adapter.safetensors", "ranks.png"}
SETTINGS = """\
seed_everything: 7
trainer: {max_epochs: 3, precision: null, default_root_dir: HERE/secret, logger: {init_args: {api_key: hf_secret}}}
geolora: {tau: 0.3, on_divergence: rollback}
model:
  class_path: geolora_pl.tasks.TextClassification
  init_args:
    model_name: user/base
    pretrained: true
    class_names: [secret_class]
    adapter: {init_rank: 2, target_modules: auto}
    optimizer: {class_path: secret_module.SecretOptimizer, init_args: {lr: 0.25}}
data:
  class_path: geolora_pl.data.TextFiles
  init_args: {train_file: HERE/secret.csv, text_column: secret_column, batch_size: 16}
"""
METRICS = """\
step,rank/mean,val_accuracy,val_loss,test_accuracy
0,2.0,,,
9,,0.5,0.7,
19,,0.75,0.6,
29,,0.875,0.5,
30,,,,0.8125
"""


def plain_model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


@pytest.fixture
def model():
    adapted = plain_model()
    inject_adapters(adapted, AdapterConfig(target_modules=["0"], modules_to_save=["2"], init_rank=3))
    return move(adapted)


def folder_of(hub, repo, folder):
    """A pretrained model, put on the stand-in."""
    hub.add(repo, {file.name: file.read_bytes() for file in folder.iterdir()})


def text_run(hub, tmp_path, step=30):
    """The folder of a run with a text model from the hub, with scores, and settings that are nobody's business."""
    save_tiny_model(tmp_path / "secret_bert")
    folder_of(hub, "user/base", tmp_path / "secret_bert")
    module = TextClassification("user/base", num_classes=3, class_names=["a", "b", "c"])
    module.configure_model()
    run = tmp_path / "secret_runs" / "version_0"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(SETTINGS.replace("HERE", str(tmp_path)))
    (run / "metrics.csv").write_text(METRICS)
    path = save(move(module), run / "checkpoints" / "last.ckpt", "geolora_pl.tasks.TextClassification")
    torch.save({**torch.load(path, weights_only=True), "global_step": step}, path)
    return module.model, run


def card_of(hub, repo="user/name"):
    return ModelCard(hub.files(repo)["README.md"].decode())


def code_of(card):
    return re.findall(r"^```python\n(.*?)^```", card, re.M | re.S)


def loaded_by(code):
    """What the code on a card makes."""
    names = {}
    exec(code, names)
    return names["model"].eval()


def logits(model, x):
    with torch.no_grad():
        out = model(x)
    return out if isinstance(out, torch.Tensor) else out.logits


def test_the_code_on_the_card_loads_the_run_here_in_peft_and_in_transformers(hub, tmp_path):
    """A user pushes a run, and others copy the code from its card: all three libraries compute what was trained."""
    model, run = text_run(hub, tmp_path)
    assert push_to_hub(run, "user/name") == f"{hub.address}/user/name"
    files = hub.files("user/name")
    assert set(files) == WHOLE | {".gitattributes"}
    codes = code_of(files["README.md"].decode())
    assert ["load_adapter(model" in code for code in codes] == [True, False, False]
    assert ["PeftModel" in code for code in codes] == [False, True, False]
    for code in codes:
        close(logits(loaded_by(code), IDS), logits(model, IDS), within=rounding(torch.float32, NETWORK))


def test_a_decoder_is_loaded_by_all_three(hub, tmp_path):
    save_tiny_decoder(tmp_path / "llama", "llama")
    folder_of(hub, "user/decoder", tmp_path / "llama")
    module = CausalLM("user/decoder")
    module.configure_model()
    path = save(move(module), tmp_path / "last.ckpt", "geolora_pl.tasks.CausalLM")
    push_to_hub(path, "user/name")
    card = hub.files("user/name")["README.md"].decode()
    assert ModelCard(card).data.pipeline_tag == "text-generation"
    assert len(code_of(card)) == 3
    for code in code_of(card):
        close(logits(loaded_by(code), IDS), logits(module.model, IDS), within=rounding(torch.float32, NETWORK))


def test_peft_loads_a_model_of_ones_own_whose_base_has_no_name(hub, model):
    push_to_hub(model, "user/name")
    theirs = PeftModel.from_pretrained(plain_model(), "user/name").eval()
    close(logits(theirs, X), logits(model, X), within=rounding(torch.float32, NETWORK))
    assert b'"auto_mapping": null' in hub.files("user/name")["adapter_config.json"]


def test_the_card_says_what_the_run_found(hub, tmp_path):
    _, run = text_run(hub, tmp_path)
    push_to_hub(run, "user/name")
    card = card_of(hub)
    data = card.data.to_dict()
    assert data["base_model"] == "user/base"
    assert data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft"
    assert data["pipeline_tag"] == "text-classification"
    assert data["metrics"] == ["accuracy"]
    values = {(result.dataset_split, result.metric_value) for result in card.data.eval_results}
    assert values == {("validation", 0.875), ("test", 0.8125)}
    for said in ("| val\\_accuracy | 0.875 | 29 |", "| val\\_loss | 0.5 | 29 |", "| geolora.tau | 0.3 |"):
        assert said in card.text
    for setting in ("seed\\_everything | 7", "lr | 0.25", "init\\_rank | 2", "batch\\_size | 16", "epochs | 3"):
        assert setting in card.text
    state = read_adapter(files_at(tmp_path, hub)["geolora_adapter.safetensors"])
    assert f"from {min(ranks(state))} to {max(ranks(state))}" in card.text
    assert Image.open(io.BytesIO(hub.files("user/name")["ranks.png"])).format == "PNG"


def ranks(state):
    return [U.shape[1] for U, _, _ in state.factors.values()]


def files_at(tmp_path, hub, repo="user/name"):
    """The files of a repository, on the disk."""
    (tmp_path / "there").mkdir()
    for name, content in hub.files(repo).items():
        (tmp_path / "there" / name).write_bytes(content)
    return {name: tmp_path / "there" / name for name in hub.files(repo)}


def test_scores_of_other_steps_are_not_those_of_the_checkpoint(hub, tmp_path):
    """The best checkpoint is of the middle of the run, and the test after the fit was one of its end."""
    _, run = text_run(hub, tmp_path, step=20)
    push_to_hub(run / "checkpoints" / "last.ckpt", "user/name")
    results = card_of(hub).data.eval_results
    assert [(result.dataset_split, result.metric_value) for result in results] == [("validation", 0.75)]


def test_nothing_of_this_machine_goes_out(hub, tmp_path, monkeypatch):
    """A user's paths, column names, classes and tokens stay here, in whatever file they might have been."""
    monkeypatch.chdir(tmp_path)
    _, run = text_run(hub, tmp_path)
    settings = (run / "config.yaml").read_text().replace("user/base", str(tmp_path / "secret_bert"))
    (run / "config.yaml").write_text(settings)
    local = TextClassification(str(tmp_path / "secret_bert"), num_classes=3)
    local.configure_model()
    path = save(move(local), run / "checkpoints" / "last.ckpt", "geolora_pl.tasks.TextClassification")
    push_to_hub(path, "user/of_a_folder")
    push_to_hub(local.model, "user/of_a_model", run=run)
    save_adapter(local.model, tmp_path / "a.safetensors")
    with pytest.warns(GeoLoRAWarning, match="it comes from an adapter file"):
        push_to_hub(tmp_path / "a.safetensors", "user/of_a_file", run=run)
    for repo in ("user/of_a_folder", "user/of_a_model", "user/of_a_file"):
        for name, content in hub.files(repo).items():
            for secret in (str(tmp_path), "secret", "hf_"):
                assert secret.encode() not in content, (repo, name)


def test_a_relative_path_that_looks_like_a_name_does_not_go_out(hub, tmp_path, monkeypatch):
    """A user trained with the folders secret_models/bert and secret_sets/x, and pushed the run from another folder."""
    _, run = text_run(hub, tmp_path)
    sources = SETTINGS.replace("user/base", "secret_models/bert").replace("data.TextFiles", "data.TextHub")
    sources = sources.replace("train_file: HERE/secret.csv", "dataset: secret_sets/x").replace("HERE", str(tmp_path))
    (run / "config.yaml").write_text(sources)
    (tmp_path / "secret_models").mkdir()
    (tmp_path / "secret_bert").rename(tmp_path / "secret_models" / "bert")
    monkeypatch.chdir(tmp_path)
    local = TextClassification("secret_models/bert", num_classes=3)
    local.configure_model()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    push_to_hub(run, "user/of_a_folder")
    push_to_hub(local.model, "user/of_a_model")
    for repo in ("user/of_a_folder", "user/of_a_model"):
        assert not [name for name, content in hub.files(repo).items() if b"secret" in content]


def test_the_data_set_of_the_hub_is_named(hub, tmp_path):
    _, run = text_run(hub, tmp_path)
    hub.add("user/reviews", {})
    sources = SETTINGS.replace("data.TextFiles", "data.TextHub").replace(
        "train_file: HERE/s", "dataset: user/reviews, x: s"
    )
    (run / "config.yaml").write_text(sources)
    push_to_hub(run, "user/name")
    assert card_of(hub).data.datasets == ["user/reviews"]


def test_names_on_the_card_are_no_markup(hub):
    """Names of layers and of a repository that Markdown or HTML would read as something else are shown as they are."""
    model = nn.ModuleDict({"<script>|`x`[a](b)": nn.Linear(6, 6)})
    inject_adapters(model)
    push_to_hub(model, "user/a_b_c")
    text = card_of(hub, "user/a_b_c").text
    assert "# a\\_b\\_c" in text
    assert "| \\<script\\>\\|\\`x\\`\\[a\\]\\(b\\) | 2 |" in text


def test_a_model_that_peft_cannot_hold_is_pushed_for_this_library(hub, tmp_path):
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    base = copy.deepcopy(model)
    inject_adapters(model, AdapterConfig(target_modules=["0"]))
    with pytest.warns(GeoLoRAWarning, match="user/name gets no LoRA of PEFT: 1 has running statistics"):
        push_to_hub(move(model), "user/name")
    files = hub.files("user/name")
    assert set(files) == WHOLE - {"adapter_config.json", "adapter_model.safetensors"} | {".gitattributes"}
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "geolora_pl"
    assert "PEFT cannot hold it: 1 has running statistics" in card.text
    load_adapter(base, "user/name")
    assert torch.equal(base.eval()(X), model.eval()(X))


def test_a_further_push_replaces_the_files_of_the_first_and_no_other(hub, model, tmp_path):
    push_to_hub(model, "user/name")
    hub.add("user/name", {**hub.files("user/name"), "notes.txt": b"mine"})
    save_adapter(model, tmp_path / "a.safetensors")
    with pytest.warns(GeoLoRAWarning, match="it comes from an adapter file"):
        push_to_hub(tmp_path / "a.safetensors", "user/name", commit_message="again")
    files = hub.files("user/name")
    assert set(files) == {".gitattributes", "notes.txt", "README.md", "geolora_adapter.safetensors", "ranks.png"}


def test_a_branch_is_made_and_loaded_by_its_name(hub, model):
    push_to_hub(model, "user/name")
    with torch.no_grad():
        model[2].weight.add_(1)
    push_to_hub(model, "user/name", revision="second")
    fresh = plain_model()
    load_adapter(fresh, "user/name", revision="second")
    assert torch.equal(fresh(X), model(X))
    load_adapter(fresh, "user/name")
    assert not torch.equal(fresh(X), model(X))


def test_a_private_repository_is_private(hub, model, monkeypatch):
    push_to_hub(model, "user/name", private=True)
    assert hub.private == {"user/name": True}
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="user/name is no repository of the hub that you may see"):
        load_adapter(plain_model(), "user/name")
    load_adapter(plain_model(), "user/name", token=TOKEN)


def test_what_was_meant_to_be_private_does_not_go_into_a_public_repository(hub, model):
    hub.add("user/name", {"README.md": b"mine"})
    with pytest.raises(ValueError, match="is a public repository already, and private=True was asked for"):
        push_to_hub(model, "user/name", private=True)
    assert hub.files("user/name") == {"README.md": b"mine"}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"repo_id": "name"}, "repo_id='name' cannot be the name of a repository: write user/name"),
        ({"repo_id": "user/na me"}, "repo_id='user/na me' cannot be the name"),
        ({"base_model": "/home/me/bert"}, "base_model='/home/me/bert' must be the name of a model on the hub"),
        ({"source": "gone.ckpt"}, "source='gone.ckpt' is neither a file nor a folder"),
        ({"run": "gone"}, "run='gone' is not a folder"),
    ],
)
def test_mistakes_are_one_sentence_and_nothing_is_uploaded(hub, model, how, message):
    given = {"source": model, "repo_id": "user/name", **how}
    with pytest.raises(ValueError, match=re.escape(message)):
        push_to_hub(given.pop("source"), given.pop("repo_id"), **given)
    assert hub.requests == []


def test_an_adapter_that_is_not_finite_leaves_no_repository(hub, model):
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="is not finite"):
        push_to_hub(model, "user/name")
    assert hub.requests == []
    assert hub.commits == {}


def test_without_a_token_nothing_is_asked_for(hub, model, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="cannot be pushed to without a token of the hub: log in with 'hf auth login'"):
        push_to_hub(model, "user/name")
    assert hub.requests == []


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize(("token", "status"), [("hf_wrong", 401), (READER, 403)])
def test_a_token_that_the_hub_refuses(hub, model, token, status, is_there):
    """A user's token is wrong or may only read, or the repository is somebody else's."""
    if is_there:
        hub.add("user/name", {"README.md": b"mine"})
    with pytest.raises(ValueError, match=rf"the hub refuses user/name \({status}\): log in .* that may write to it"):
        push_to_hub(model, "user/name", token=token)
    assert not is_there or hub.files("user/name") == {"README.md": b"mine"}
    assert is_there or hub.commits == {}


@pytest.mark.parametrize("token", ["hf_secret\n", "hf_secret ", "hf_\x00secret", "hf_sécret"])
def test_a_token_as_it_was_read_from_a_file_is_refused_and_not_shown(hub, model, token):
    """A user passed the content of a file, with its line end: the error printed the token, and so did the log of CI."""
    for call in (push_to_hub, load_adapter):
        with pytest.raises(ValueError, match=r"^token=\.\.\. .*pass token\.strip\(\)$") as stop:
            call(model, "user/name", token=token)
        assert stop.value.__cause__ is None
    assert hub.requests == []


def test_a_hub_that_breaks_down_is_one_sentence(hub, model, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client tries again, later and later
    hub.down = True
    with pytest.raises(ValueError, match=r"user/name: the hub cannot do this \(.*500.*\): look at the connection"):
        push_to_hub(model, "user/name")


@pytest.mark.parametrize(
    ("weights", "base"),
    [
        ("pretrained: true", "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"),
        ("pretrained: false", None),
        ("checkpoint_path: pkg://geolora_pl/configs/vit_fashion_mnist.safetensors", None),
    ],
)
def test_a_base_of_timm_is_named_where_its_weights_are_those_of_the_hub(hub, tmp_path, weights, base):
    """The quickstart's weights are a file, so that the name of their architecture is not that of their base."""
    module = ImageClassification("vit_tiny_patch16_224", False, model_args=SIZE, num_classes=2)
    module.configure_model()
    (tmp_path / "metrics.csv").write_text(METRICS)
    settings = f"model: {{init_args: {{model_name: vit_tiny_patch16_224, {weights}}}}}"
    (tmp_path / "config.yaml").write_text(settings)
    push_to_hub(move(module).model, "user/name", run=tmp_path)
    card = card_of(hub)
    assert card.data.base_model == base
    assert card.data.pipeline_tag == "image-classification"
    code = f'create_model("hf-hub:{base}", pretrained=True, num_classes=2)'
    assert (code in card.text) == (base is not None)


def test_the_code_on_the_card_makes_a_base_of_timm_of_the_size_that_was_trained(hub, tmp_path):
    """A user trains on grey images of another size: the code on the card made the base for those of its pretraining."""
    name, grey = "test_vit.r160_in1k", {"in_chans": 1, "img_size": 64}
    pretrained = ImageClassification(name, False, num_classes=5)
    pretrained.configure_model()
    merge_adapters(pretrained.model)
    (tmp_path / "base").mkdir()
    pretrained.save_model(tmp_path / "base")
    folder_of(hub, f"timm/{name}", tmp_path / "base")
    module = ImageClassification(name, model_args=grey, num_classes=2)
    module.configure_model()
    path = save(move(module), tmp_path / "last.ckpt", "geolora_pl.tasks.ImageClassification")
    (tmp_path / "metrics.csv").write_text(METRICS)
    model = {"class_path": "ImageClassification", "init_args": {"model_name": name, "model_args": grey}}
    (tmp_path / "config.yaml").write_text(json.dumps({"model": model}))
    x = torch.randn(3, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    for source in (path, module.model):
        push_to_hub(source, "user/name", run=tmp_path)
        codes = code_of(str(card_of(hub)))
        assert len(codes) == 2
        for code in codes:
            close(logits(loaded_by(code), x), logits(module.model, x), within=rounding(torch.float32, NETWORK))


@pytest.mark.parametrize(("setting", "is_shown"), [("num_hidden_layers: 1", True), ("hidden_act: relu", False)])
def test_the_code_on_the_card_makes_a_part_of_a_base_where_a_part_was_trained(hub, tmp_path, setting, is_shown):
    """A user trains the first layer of a base: the code on the card made all layers. A text stays private."""
    _, run = text_run(hub, tmp_path)
    name, _, value = setting.partition(": ")
    module = TextClassification("user/base", num_classes=3, model_args={name: yaml.safe_load(value)})
    module.configure_model()
    save(move(module), run / "checkpoints" / "last.ckpt", "geolora_pl.tasks.TextClassification")
    settings = yaml.safe_load(SETTINGS)
    settings["model"]["init_args"]["model_args"] = module.model_args
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    push_to_hub(run, "user/name")
    for code in code_of(str(card_of(hub))):
        assert value not in code or is_shown
        if is_shown:
            close(logits(loaded_by(code), IDS), logits(module.model, IDS), within=rounding(torch.float32, NETWORK))


def test_a_base_is_named_by_the_user(hub, model):
    push_to_hub(model, "user/name", base_model="user/base")
    assert card_of(hub).data.base_model == "user/base"
    assert b'"base_model_name_or_path": "user/base"' in hub.files("user/name")["adapter_config.json"]


def test_the_command_pushes_a_run(hub, tmp_path, capsys):
    _, run = text_run(hub, tmp_path)
    main(["push", "--source", str(run), "--repo_id", "user/name", "--private", "--commit_message", "first"])
    assert capsys.readouterr().out == f"{hub.address}/user/name: load it with load_adapter(model, 'user/name')\n"
    assert hub.private["user/name"]
    assert set(hub.files("user/name")) == WHOLE | {".gitattributes"}


def test_the_command_says_a_mistake_in_one_line(hub, tmp_path, capsys, monkeypatch):
    (tmp_path / "a.safetensors").write_bytes(b"x")
    fails(["push", "--source", "gone", "--repo_id", "user/name"], "source='gone' is neither a file nor", capsys)
    command = ["push", "--source", str(tmp_path / "a.safetensors"), "--repo_id", "user/name"]
    fails(command, "is corrupt or not a safetensors file", capsys)
    monkeypatch.delenv("HF_TOKEN")
    fails(command, "without a token of the hub: log in with 'hf auth login', or set HF_TOKEN", capsys)


def test_a_run_without_a_checkpoint_is_told_so(hub, tmp_path):
    (tmp_path / "metrics.csv").write_text(METRICS)
    with pytest.raises(ValueError, match="holds no checkpoint"):
        push_to_hub(tmp_path, "user/name")


@pytest.mark.parametrize("bits", [4, 8])
def test_the_code_on_the_card_quantises_a_base_of_few_bits(hub, tmp_path, bits):
    """A user pushes a run on a base of 4 bits: the code on its card loaded the base as it is, which does not fit."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("torchao")
    save_tiny_decoder(tmp_path / "decoder", "llama", hidden_size=64, intermediate_size=96)
    folder_of(hub, "user/decoder", tmp_path / "decoder")
    module = CausalLM("user/decoder", quantization={"bits": bits})
    module.configure_model()
    model = move(module).model
    push_to_hub(model, "user/name", base_model="user/decoder")
    codes = code_of(str(card_of(hub)))
    assert len(codes) == 3
    for code in codes:
        loaded = loaded_by(code)
        keep_trainable(loaded)  # some CPUs would compute with less digits in PEFT
        close(logits(loaded, IDS), logits(model, IDS), within=rounding(torch.float32, NETWORK))
