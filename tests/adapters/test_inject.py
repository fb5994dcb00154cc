import pytest
import timm
import torch
from tolerance import NETWORK, close
from torch import nn

from geolora_pl import AdapterConfig, GeoLoRALinear, inject_adapters, merge_adapters
from geolora_pl.adapters.inject import adapter_parameters, find_adapters


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.query, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x + self.value(torch.tanh(self.query(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.pooler = nn.Linear(8, 8)
        self.classifier = nn.Linear(8, 3)

    def forward(self, x):
        return self.classifier(torch.tanh(self.pooler(self.blocks(x))))


ALL = ["blocks.0.query", "blocks.0.value", "blocks.1.query", "blocks.1.value", "pooler"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ALL),
        ({"target_modules": ["query"]}, ["blocks.0.query", "blocks.1.query"]),
        ({"target_modules": ["0.query", "pooler"]}, ["blocks.0.query", "pooler"]),
        ({"target_modules": r".*\.(query|value)"}, ALL[:4]),
        ({"target_modules": ["classifier"]}, ["classifier"]),
        ({"exclude_modules": ["value"]}, ["blocks.0.query", "blocks.1.query", "pooler"]),
        ({"exclude_modules": r"blocks\..*"}, ["pooler"]),
        ({"modules_to_save": ["pooler"]}, ALL[:4]),
    ],
)
def test_targets(settings, expected):
    model = Model()
    assert list(inject_adapters(model, AdapterConfig(**settings))) == expected
    assert list(find_adapters(model)) == expected


def test_everything_else_is_frozen_and_the_output_is_unchanged():
    model, x = Model(), torch.randn(5, 8)
    expected = model(x)
    inject_adapters(model, AdapterConfig(target_modules=["query"], modules_to_save=["classifier"]))
    assert torch.equal(model(x), expected)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        *(f"blocks.{i}.query.{f}" for i in (0, 1) for f in "KL"),
        "classifier.weight",
        "classifier.bias",
    }


@pytest.mark.parametrize(("train_bias", "expected"), [(False, set()), (True, {"0.base.bias"}), ("all", None)])
def test_biases_of_the_adapted_layers_or_of_the_whole_model_are_trained(train_bias, expected):
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    inject_adapters(model, AdapterConfig(target_modules=["0"], train_bias=train_bias))
    trained = {name for name, p in model.named_parameters() if p.requires_grad} - {"0.K", "0.L"}
    assert trained == ({"0.base.bias", "1.bias", "2.bias"} if expected is None else expected)


def test_rank_pattern_by_name_and_by_expression():
    config = AdapterConfig(init_rank=2, max_rank=4, rank_pattern={"0.query": 3, r"blocks\.1\..*": 6})
    adapters = inject_adapters(Model(), config)
    assert {name: (layer.rank, layer.max_rank) for name, layer in adapters.items()} == {
        "blocks.0.query": (3, 4),
        "blocks.0.value": (2, 4),
        "blocks.1.query": (6, 6),
        "blocks.1.value": (6, 6),
        "pooler": (2, 4),
    }
    assert adapter_parameters(adapters) == (3 + 2 + 6 + 6 + 2) * 16


def test_a_vision_transformer_leaves_out_its_head():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2, num_classes=5)
    names = inject_adapters(model)
    assert {name.rpartition(".")[2] for name in names} == {"qkv", "proj", "fc1", "fc2"}
    assert len(names) == 8


def test_a_bert_leaves_out_its_classifier():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertForSequenceClassification(config)
    names = [name.removeprefix("bert.") for name in inject_adapters(model)]
    assert "classifier" not in names
    assert "encoder.layer.0.attention.self.query" in names


def test_no_match_lists_what_there_is():
    with pytest.raises(
        ValueError, match=r"target_modules=\['q_proj'\] matches no layer that can be adapted.*blocks.0.query, .*pooler"
    ):
        inject_adapters(Model(), AdapterConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["pooler", "uery"]}, "target_modules='uery' matches none of blocks.0.query, "),
        ({"exclude_modules": ["quary"]}, "exclude_modules='quary' matches none of"),
        ({"rank_pattern": {"classifier": 2}}, "rank_pattern='classifier' matches none of the adapted layers blocks.0"),
    ],
)
def test_a_pattern_that_means_nothing_is_refused_before_anything_changes(settings, message):
    model = Model()
    with pytest.raises(ValueError, match=message):
        inject_adapters(model, AdapterConfig(**settings))
    assert not find_adapters(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_bare_linear_layer_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"wrap it in nn\.Sequential"):
        inject_adapters(nn.Linear(4, 4))


def test_names_of_heads_inside_a_block_are_no_task_head():
    attention = nn.ModuleDict({"heads": nn.Linear(8, 8), "proj": nn.Linear(8, 8)})
    model = nn.ModuleDict({"blocks": nn.ModuleList([attention]), "head": nn.Linear(8, 2)})
    assert list(inject_adapters(model)) == ["blocks.0.heads", "blocks.0.proj"]


def test_unknown_modules_to_save_are_refused():
    with pytest.raises(ValueError, match=r"modules_to_save='head' matches no module.*classifier"):
        inject_adapters(Model(), AdapterConfig(modules_to_save=["head"]))


def test_a_target_that_is_also_saved_is_refused():
    with pytest.raises(ValueError, match="pooler is in target_modules and in modules_to_save"):
        inject_adapters(Model(), AdapterConfig(target_modules=["pooler"], modules_to_save=["pooler"]))


@pytest.mark.parametrize("targets", ["all-linear", ["out_proj"]])
def test_multihead_attention_is_refused_with_the_reason(targets):
    model = nn.TransformerEncoderLayer(8, 2)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"self_attn.out_proj belongs to nn.MultiheadAttention.*exclude_modules"):
        inject_adapters(model, AdapterConfig(target_modules=targets))
    assert not find_adapters(model)
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    assert list(inject_adapters(model, AdapterConfig(exclude_modules=["out_proj"]))) == ["linear1", "linear2"]


def test_a_second_injection_is_refused():
    model = Model()
    inject_adapters(model)
    with pytest.raises(ValueError, match="already has adapters"):
        inject_adapters(model)


def test_a_module_under_two_names_is_adapted_once():
    model = Model()
    model.blocks[1].query = model.blocks[0].query
    adapters = inject_adapters(model, AdapterConfig(target_modules=["query"]))
    assert list(adapters) == ["blocks.0.query"]
    assert model.blocks[1].query is model.blocks[0].query
    assert isinstance(model.blocks[0].query, GeoLoRALinear)
    merge_adapters(model)
    assert model.blocks[1].query is model.blocks[0].query
    assert type(model.blocks[0].query) is nn.Linear


def test_tied_weights_are_adapted_once():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False))
    model[2].weight = model[0].weight
    assert list(inject_adapters(model)) == ["0"]
    assert model[0] is model[2]


def test_tied_weights_with_two_biases_are_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="0 and 1 share a weight but not their bias"):
        inject_adapters(model)


def test_merging_leaves_a_tied_embedding_alone():
    model = nn.ModuleDict({"embedding": nn.Embedding(10, 8), "output": nn.Linear(8, 10, bias=False)})
    model["output"].weight = model["embedding"].weight
    before = model["embedding"].weight.clone()
    adapter = inject_adapters(model)["output"]
    nn.init.normal_(adapter.K)
    merge_adapters(model)
    assert torch.equal(model["embedding"].weight, before)
    assert not torch.equal(model["output"].weight, before)


def test_merge_puts_plain_layers_back_with_the_same_outputs():
    model, x = Model(), torch.randn(5, 8)
    base = {name: p.clone() for name, p in model.named_parameters()}
    for layer in inject_adapters(model, AdapterConfig(alpha=0.5, exclude_modules=["pooler"])).values():
        nn.init.normal_(layer.K)
        with torch.no_grad():
            layer.S[0, 0] = 1.0
    expected = model(x)
    changes = merge_adapters(model)
    assert set(changes) == set(ALL[:4])
    assert all(change > 0 for change in changes.values())
    assert {type(m) for m in model.modules()} == {Model, nn.Sequential, Block, nn.Linear, nn.LayerNorm}
    assert set(dict(model.named_parameters())) == set(base)
    close(model(x), expected, NETWORK)


def test_merge_refuses_what_is_not_finite_before_it_changes_anything():
    model = Model()
    adapters = inject_adapters(model)
    with torch.no_grad():
        adapters["pooler"].K[0, adapters["pooler"].probes] = float("inf")
    with pytest.raises(ValueError, match=r"pooler\.K is not finite"):
        merge_adapters(model)
    assert list(find_adapters(model)) == ALL


def test_merge_refuses_what_overflows_in_the_precision_of_the_base():
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.float16))
    nn.init.constant_(model[0].weight, 6e4)
    adapter = inject_adapters(model)["0"]
    with torch.no_grad():
        adapter.V[0, adapter.probes] = 1.0
        adapter.K[0, adapter.probes] = 1e5
    with pytest.raises(ValueError, match=r"not finite in torch.float16: .*cast the model to a wider type"):
        merge_adapters(model)


def test_merge_without_adapters_is_refused():
    with pytest.raises(ValueError, match="no adapters"):
        merge_adapters(Model())
