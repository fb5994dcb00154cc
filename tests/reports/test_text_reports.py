"""What users did with their own texts, tokenizers and models, and what must come of it."""

import csv
import json
import os
import shutil

import lightning as L
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, List, Value
from PIL import Image
from safetensors.torch import load_file, save_file
from text_files import attach, write, write_rows
from tiny_chat import chat_tokenizer, save_tiny_chat, turns, write_chats
from tiny_text import WORDS, make_tokenizer, save_tiny_decoder, save_tiny_model, save_tiny_seq2seq
from tolerance import NETWORK, rounding
from transformers import GenerationConfig

from geolora_pl import AdapterConfig, predict
from geolora_pl.adapters.inject import find_adapters
from geolora_pl.cli.dispatch import main
from geolora_pl.cli.messages import as_sentence
from geolora_pl.data import (
    AnswerFiles,
    ChatFiles,
    LanguageFiles,
    Seq2SeqFiles,
    TagHub,
    TextFiles,
    TextHub,
    UnlabelledImages,
    UnlabelledTexts,
)
from geolora_pl.errors import GeoLoRAWarning
from geolora_pl.lightning.export import export
from geolora_pl.tasks import (
    CausalLM,
    ImageClassification,
    QuestionAnswering,
    Seq2SeqLM,
    TextClassification,
    TokenClassification,
)
from geolora_pl.tasks.classes import make_loss, weight_of
from geolora_pl.tasks.text_models import load_config, token_limits

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def texts(tmp_path):
    return write(tmp_path / "train.csv", text=WORDS[:18], label=["yes", "no"] * 9)


def task_with(model_name, data, kind=TextClassification, **settings):
    """Connect a task with data as a trainer does, and set up the data."""
    task = kind(model_name, **settings)
    data.trainer = L.Trainer(enable_checkpointing=False, **QUIET)
    data.trainer.strategy.connect(task)
    data.setup("fit")
    return task


def fit(task, data, **settings):
    trainer = L.Trainer(max_steps=1, limit_val_batches=0, enable_checkpointing=False, **QUIET, **settings)
    trainer.fit(task, datamodule=data)
    return trainer


@pytest.mark.parametrize(
    ("column", "feature", "rows", "source", "kind"),
    [
        ("label", ClassLabel(names=["spam"]), [0] * 18, TextHub, TextClassification),
        ("tags", List(ClassLabel(names=["spam"])), [[0]] * 18, TagHub, TokenClassification),
    ],
)
def test_a_data_set_of_one_class_is_no_regression(tmp_path, model, column, feature, rows, source, kind):
    """A data set of the hub named one class: it was said that accuracy does not suit a regression, which it is not."""
    texts = {"text": WORDS[:18]} if kind is TextClassification else {"tokens": [[word] for word in WORDS[:18]]}
    value = Value("string") if kind is TextClassification else List(Value("string"))
    features = Features({**dict.fromkeys(texts, value), column: feature})
    Dataset.from_dict({**texts, column: rows}, features).to_parquet(tmp_path / "hub" / "train.parquet")
    data = source(str(tmp_path / "hub"), cache_dir=str(tmp_path / "cache"), num_workers=0)
    with pytest.raises(ValueError, match="the data have one class, 'spam': there must be two"):
        fit(kind(model), data)


def test_a_column_without_a_label_is_said_to_be_empty(tmp_path):
    """The column of labels was empty: it was said to hold numbers with decimals, and that row 1 is not a number."""
    for ending, empty in ((".csv", ""), (".jsonl", None)):
        file = write(tmp_path / f"train{ending}", text=WORDS[:4], label=[empty] * 4)
        with pytest.raises(ValueError, match=r"train\.\w+: label is empty in every row: name another column"):
            _ = TextFiles(file).class_names


def validation_loss(task, file, batch_size):
    data = TextFiles(file, val_file=file, batch_size=batch_size, num_workers=0, cache_dir=f"{file}.cache")
    (found,) = L.Trainer(enable_checkpointing=False, **QUIET).validate(task, datamodule=data, verbose=False)
    return found["val_loss"]


@pytest.mark.parametrize(("weights", "smoothing"), [([9.0, 1.0], 0.0), ([9.0, 1.0], 0.1), ([0.0, 1.0], 0.1)])
def test_a_validation_loss_with_weights_of_classes_does_not_depend_on_the_batches(tmp_path, model, weights, smoothing):
    """With class_weights each batch counted by its texts and not by their weights: other batches, another loss."""
    file = write(tmp_path / "train.csv", text=WORDS[:9], label=["no", *["yes"] * 6, "no", "no"])
    task = TextClassification(model, class_weights=weights, label_smoothing=smoothing)
    whole = validation_loss(task, file, 9)
    for batch_size in (1, 2, 4):
        assert validation_loss(task, file, batch_size) == pytest.approx(whole, rel=rounding(torch.float32, NETWORK))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_classes_are_summed_in_32_bits(dtype):
    """With ``16-true`` or ``bf16-true`` the sums over a batch were in 16 bits: infinite or imprecise."""
    weights, labels = [512.0, 1.0], torch.tensor([0] * 300 + [1] * 3)
    logits = torch.tensor([[0.0, 8.0]]).expand(len(labels), -1)
    loss = make_loss(2, False, weights, label_smoothing=0.1)
    exact = torch.nn.CrossEntropyLoss(torch.tensor(weights), label_smoothing=0.1)(logits, labels).item()
    within = rounding(torch.float32, len(labels))
    assert loss(logits, labels).item() == pytest.approx(exact, rel=within)
    assert loss.to(dtype)(logits.to(dtype), labels).item() == pytest.approx(exact, rel=within)
    assert weight_of(loss, labels) == 300 * 512 + 3


def test_a_batch_of_classes_that_do_not_count_teaches_nothing(tmp_path, model):
    """With a weight of 0 a batch of that class alone had a loss of NaN: its step was skipped, val_loss was NaN."""
    file = write(tmp_path / "train.csv", text=WORDS[:9], label=["yes", *["no"] * 8])
    task = TextClassification(model, class_weights=[0.0, 1.0])
    whole = validation_loss(task, file, 9)
    assert validation_loss(task, file, 2) == pytest.approx(whole, rel=rounding(torch.float32, NETWORK))
    outputs = torch.randn(3, 2, requires_grad=True)
    loss = task.loss(outputs, torch.zeros(3, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0
    assert not outputs.grad.any()


# The tokenizer, the model and its files


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "deberta-v2"])
def test_a_model_without_its_tokenizer_is_refused(tmp_path, family):
    """Only weights and configuration were copied: every word became the same id, and training ended well."""
    folder = save_tiny_model(tmp_path / family, family)
    for path in (tmp_path / family).glob("*token*"):
        path.unlink()
    with pytest.raises(
        ValueError, match=r"model_name='.*' has no tokenizer files, so that all words would be the same"
    ):
        _ = TextClassification(folder).tokenizer


def test_a_token_without_an_embedding_is_refused_before_the_first_step(tmp_path, texts):
    """Words were added to the tokenizer and not to the model: an IndexError came in some step."""
    folder = save_tiny_model(tmp_path / "model")
    make_tokenizer(words=[*[f"new{i}" for i in range(9)], *WORDS]).save_pretrained(folder)
    with pytest.raises(
        ValueError, match=r"train: the tokenizer gives the id \d+ .* embeddings for the ids 0 to 25 only"
    ):
        task_with(folder, TextFiles(texts, cache_dir=str(tmp_path / "cache")))


def test_a_token_of_a_target_without_an_embedding_is_refused_before_the_first_step(tmp_path):
    """A word of targets alone was added to the tokenizer and not to the model: an IndexError came in some step."""
    folder = save_tiny_seq2seq(tmp_path / "model")
    make_tokenizer("t5", words=[*WORDS, "new"]).save_pretrained(folder)
    file = write(tmp_path / "pairs.csv", text=["good film"] * 4, target=["one", "new"] * 2)
    data = Seq2SeqFiles(file, val_file=file, max_length=8, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(
        ValueError, match=r"train: the tokenizer gives the id 26 .* embeddings for the ids 0 to 25 only"
    ):
        task_with(folder, data, kind=Seq2SeqLM)


def test_a_padding_token_without_an_embedding_is_refused(tmp_path):
    """A decoder got a new [PAD] token and no new embedding, and the first batch ended in an IndexError."""
    folder = save_tiny_decoder(tmp_path / "model")
    tokenizer = make_tokenizer("gpt2")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"the tokenizer pads with the id 26, but the model has .* 0 to 25 only"):
        _ = CausalLM(folder).tokenizer


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", b"version https://git-lfs/spec/v1\noid sha256:0\n", "is a Git LFS pointer.*git lfs pull"),
        ("tokenizer.json", b"version https://git-lfs/spec/v1\noid sha256:0\n", "is a Git LFS pointer.*git lfs pull"),
        ("model.safetensors", None, "is cut short or broken .*copy it again"),
    ],
)
def test_a_broken_file_of_a_model_is_named(tmp_path, texts, file, content, message):
    """A clone without Git LFS, or a copy cut short, gave a SafetensorError that named no file."""
    folder = save_tiny_model(tmp_path / "model")
    path = tmp_path / "model" / file
    path.write_bytes(content or path.read_bytes()[:-9])
    task = TextClassification(folder, num_classes=2)
    with pytest.raises(ValueError, match=rf"model_name=.*{file} {message}"):
        _ = task.tokenizer, task.configure_model()


@pytest.mark.parametrize(
    ("family", "settings", "limit"),
    [
        ("openai-gpt", {"n_positions": 12}, 12),
        ("ctrl", {"n_positions": 12}, 12),
        ("gptj", {"n_positions": 12, "rotary_dim": 4}, 12),
        ("mpt", {"max_seq_len": 12}, 12),
        ("ibert", {"max_position_embeddings": 12}, 12),
        ("llama", {"max_position_embeddings": 12}, None),
        ("bloom", {}, None),
    ],
)
def test_positions_are_known_where_they_are_limited(family, settings, limit):
    """Long texts crashed in models whose positions are not a table with one of three names."""
    small = {"model_type": family, "num_attention_heads": 2, "num_hidden_layers": 1, "hidden_size": 16, **settings}
    small |= {"vocab_size": 40, "intermediate_size": 16, "dff": 16, "num_key_value_heads": 2, "head_dim": 8}
    config = load_config("small", small)
    auto_class = CausalLM.auto_class if family in {"gptj"} else TextClassification.auto_class
    assert token_limits(config, auto_class) == (limit, None if family == "ibert" else 40)


@pytest.mark.parametrize("text", ["", " \t"])
def test_a_batch_of_empty_texts_is_read(tmp_path, text, messages):
    """A GPT-2 classifier crashed on texts without a single token: each is read as an end of text, which is said."""
    folder = save_tiny_model(tmp_path / "gpt2", "gpt2")
    train = write(tmp_path / "train.csv", text=[text] * 4 + ["good"] * 4, label=["yes", "no"] * 4)
    data = TextFiles(train, val_file=train, batch_size=4, cache_dir=str(tmp_path / "cache"))
    messages()
    fit(TextClassification(folder), data)
    said = messages()
    assert "train: 4 of 8 texts have no tokens and are read as an end of text" in said
    assert "is empty in 4 rows, row 1 first" in said or text


def test_the_pooler_is_trained_in_full_and_said(tmp_path, model, texts, messages):
    """The pooler was trained in full, which only docstrings said; PEFT freezes it."""
    settings = {"train_file": texts, "cache_dir": str(tmp_path / "cache")}
    messages()
    task = TextClassification(model)
    fit(task, TextFiles(**settings))
    assert "trained in full beside the adapters: classifier (34), bert.pooler (272)" in messages()
    assert "trained in full beside the adapters: classifier (34), bert.pooler (272)" in task.notes
    task = TextClassification(model, train_pooler=False)
    fit(task, TextFiles(**settings))
    assert "trained in full beside the adapters: classifier (34)\n" in messages()
    assert not task.model.bert.pooler.dense.weight.requires_grad


def test_a_convolutional_model_is_told_what_to_adapt():
    """A ResNet was refused with 'all-linear matches no layer': the message names what to write, which works."""
    settings = {"pretrained": False, "num_classes": 2}
    with pytest.raises(ValueError, match=r"set target_modules to \['conv1', 'conv2'\]"):
        ImageClassification("resnet10t", adapter=AdapterConfig(), **settings).configure_model()
    task = ImageClassification("resnet10t", adapter=AdapterConfig(target_modules=["conv1", "conv2"]), **settings)
    task.configure_model()
    assert len(find_adapters(task.model)) >= 8


# Tables


def test_only_the_columns_that_are_named_are_read(tmp_path):
    """JSON lines were refused for a column of mixed types that nobody had named."""
    rows = [{"text": "good", "label": "yes", "id": 1}, {"text": "bad", "label": "no", "id": "x"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({**row, "more": {"a": [1, "b"]}}) + "\n" for row in rows))
    train = TextFiles(str(tmp_path / "train.jsonl")).load_splits()["train"]
    assert train["text"][:] == ["good", "bad"]


def test_a_named_column_of_mixed_types_is_refused(tmp_path):
    """A label that is a word in one row and a number in another is not guessed."""
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": 1}\n')
    with pytest.raises(ValueError, match=r"train.jsonl: label must hold values of one kind, and row 2 is of another"):
        TextFiles(str(tmp_path / "train.jsonl")).load_splits()


@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "train.jsonl", "train.txt"])
@pytest.mark.parametrize(
    ("encoding", "message"), [("utf-16", "is text in UTF-16"), ("latin-1", r"is not text in UTF-8 \(line 2")]
)
def test_a_text_file_in_another_encoding_is_named(tmp_path, name, encoding, message):
    """A UTF-16 table, as Excel saves Unicode text, ended in an ArrowInvalid without the name of the file."""
    (tmp_path / name).write_text("text,label\ncaf\u00e9,yes\n", encoding=encoding)
    data = UnlabelledTexts(str(tmp_path / name))
    with pytest.raises(ValueError, match=rf"{name} {message}.*save it as UTF-8"):
        data.load_splits()


@pytest.mark.parametrize("name", ["my.txt", "my.parquet", "my.png", "my.pth"])
def test_a_pointer_of_git_lfs_is_not_the_file(tmp_path, name):
    """A .txt that was a Git LFS pointer was predicted as three texts; tables, images and weights were called broken."""
    (tmp_path / name).write_text("version https://git-lfs/spec/v1\noid sha256:0\nsize 9\n")

    def read():
        if name == "my.png":
            return UnlabelledImages(str(tmp_path)).load_splits()
        if name == "my.pth":
            weights = str(tmp_path / name)
            return ImageClassification("resnet10t", checkpoint_path=weights, num_classes=2).configure_model()
        return UnlabelledTexts(str(tmp_path / name)).load_splits()

    with pytest.raises(ValueError, match=rf"{name} is a Git LFS pointer and not the file itself: run git lfs pull"):
        read()


def test_a_class_name_that_is_no_string_is_refused(model):
    """class_names: [no, yes] without quotes gave classes that are called False and True."""
    with pytest.raises(ValueError, match=r"class_names=\[False, True\] must be strings: in YAML put 'no' and 'yes'"):
        TextClassification(model, num_classes=2, class_names=[False, True]).configure_model()


def test_a_new_pooler_cannot_stay_frozen(tmp_path):
    """With train_pooler=False a pooler without weights would stay random for ever."""
    folder = save_tiny_model(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    rest = {name: weight for name, weight in weights.items() if "pooler" not in name}
    save_file(rest, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no fitting weights for .*pooler.*set train_pooler to true"):
        TextClassification(folder, num_classes=2, train_pooler=False).configure_model()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.csv", "text,label,text\ngood,yes,bad\nbad,no,good\n"),
        ("train.tsv", "text\tlabel\ttext\ngood\tyes\tbad\nbad\tno\tgood\n"),
        ("train.jsonl", '{"text": "good", "label": "yes", "text": "bad"}\n'),
    ],
)
def test_of_two_columns_with_one_name_none_is_taken(tmp_path, name, content):
    """Of two columns called text the first was taken without a word."""
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=r"has two columns 'text', and it is not known which is meant: rename one"):
        TextFiles(str(tmp_path / name)).load_splits()


def test_a_table_without_a_header_is_told_so(tmp_path):
    """A TSV without a header line ended in 30 lines of traceback: the message says what is missing."""
    (tmp_path / "train.tsv").write_text("good film\t1\nbad film\t0\n")
    with pytest.raises(
        ValueError,
        match=r"has no column 'text', 'label'; it has 'good film', '1'; its first line must name the columns",
    ):
        TextFiles(str(tmp_path / "train.tsv")).load_splits()


@pytest.mark.parametrize("labels", [[False, True], ["no", True]])
def test_labels_that_yaml_reads_as_booleans_are_explained(labels):
    """labels: [no, yes] in YAML arrived as booleans, and the message did not say so."""
    with pytest.raises(
        ValueError, match=r"YAML reads no, yes, .* without quotes as (False|True): put them into quotes"
    ):
        TextFiles("train.csv", labels=labels)


def test_booleans_of_yaml_are_explained_on_the_command_line():
    """The command line refused labels: [no, yes] with 'labels=False must be a string' alone."""
    said = as_sentence("Parser key \"data.labels\":\n  Expected a <class 'str'>. Got value: False", [])
    assert said == (
        "data.labels=False must be a string; YAML reads no, yes, on and off as booleans: put them into quotes"
    )


def test_texts_that_are_cut_are_counted(tmp_path, messages):
    """Every text was cut to max_length without a word, also when the token ids came from the cache."""
    train = write(tmp_path / "train.csv", text=["good film the plot"] * 3 + ["good a"] * 5, label=["yes", "no"] * 4)
    for _ in range(2):  # the second time from the cache
        messages()
        data = attach(TextFiles(train, val_file=train, max_length=4, cache_dir=str(tmp_path / "cache")))
        assert "train: 3 of 8 texts are cut to max_length=4 tokens" in messages()
        assert data.splits["train"].column_names == ["label", "input_ids", "token_type_ids", "length"]
    attach(TextFiles(train, val_file=train, max_length=6, cache_dir=str(tmp_path / "cache")))
    assert "are cut" not in messages()


@pytest.mark.parametrize("pairs", [False, True])
def test_texts_of_a_language_model_that_are_cut_are_counted(tmp_path, messages, pairs):
    """Prompts lost their beginning and texts their end without a word."""
    train = write(tmp_path / "train.csv", text=["good film the plot"] * 2 + ["bad"], more=["a", "the", "one"])
    columns = {"prompt_column": "text", "completion_column": "more"} if pairs else {"packed": False}
    data = LanguageFiles(train, val_file=train, max_length=4, cache_dir=str(tmp_path / "cache"), **columns)
    attach(data, make_tokenizer("gpt2", pad_token="[PAD]"))
    assert "train: 2 of 3 texts are cut to max_length=4 tokens" in messages()


def test_splits_of_the_hub_that_are_not_used_are_said_and_usual_names_are_found(tmp_path, messages):
    """A data set with the splits train, valid and unsupervised was split anew, and the others ignored."""
    for split in ("train", "valid", "unsupervised"):
        write(tmp_path / f"{split}.csv", text=["good", "bad"], label=["yes", "no"])
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {split}.csv\n" for split in ("train", "valid", "unsupervised"))
        + "---\n"
    )
    assert set(TextHub(str(tmp_path)).load_splits()) == {"train", "val"}
    assert "splits that are not used: unsupervised; name them in splits" in messages()


# The cache of token ids, and files of lines


def test_the_cache_knows_how_special_tokens_are_read(tmp_path, texts):
    """With split_special_tokens the ids differ, but those of the cache were used."""
    write(tmp_path / "train.csv", text=["good [SEP] bad"] * 4, label=["yes", "no"] * 2)
    read = []
    for split_them in (False, True):
        tokenizer = make_tokenizer(model_max_length=16, split_special_tokens=split_them)
        data = attach(TextFiles(texts, val_file=texts, cache_dir=str(tmp_path / "cache")), tokenizer)
        read.append(data.splits["train"]["input_ids"][0])
    assert read[0] != read[1]


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty"])
def test_a_broken_file_of_the_cache_is_made_again(tmp_path, texts, messages, damage):
    """A foreign file of the cache was used with one row of 18, and a truncated one stopped the run."""
    settings = {"val_file": texts, "cache_dir": str(tmp_path / "cache")}
    whole = attach(TextFiles(texts, **settings)).splits["train"].to_dict()
    (cached,) = (tmp_path / "cache").glob("*.arrow")
    if damage == "foreign":
        other = write(tmp_path / "other.csv", text=["good", "bad"], label=["yes", "no"])
        attach(TextFiles(other, val_file=other, cache_dir=str(tmp_path / "elsewhere")))
        shutil.copy(next((tmp_path / "elsewhere").glob("*.arrow")), cached)
    else:
        cached.write_bytes(cached.read_bytes()[:-300] if damage == "truncated" else b"")
    messages()
    assert attach(TextFiles(texts, **settings)).splits["train"].to_dict() == whole
    assert "is cut short or holds other texts, so the token ids are made again" in messages()


def test_a_carriage_return_does_not_split_a_line(tmp_path, messages):
    """A text with a lone carriage return became two texts, so that predictions were off by one from there on."""
    (tmp_path / "my.txt").write_bytes(b"good\rfilm\nbad\r\nfine\n")
    assert UnlabelledTexts(str(tmp_path / "my.txt")).load_splits()["predict"]["text"][:] == [
        "good\rfilm",
        "bad",
        "fine",
    ]
    (tmp_path / "my.tsv").write_bytes(b"text\ngood\rfilm\nbad\r\n")
    data = UnlabelledTexts(str(tmp_path / "my.tsv"))
    messages()
    assert data.load_splits()["predict"]["text"][:] == ["good film", "bad"]
    assert "carriage returns inside lines that are read as spaces: 1" in messages()
    (tmp_path / "old.csv").write_bytes(b"text,label\rgood,1\rbad,0\r")
    assert TextFiles(str(tmp_path / "old.csv")).load_splits()["train"]["text"][:] == ["good", "bad"]


# Predictions


class Echo(L.LightningModule):
    """Gives the probabilities that it is told to."""

    data_config = {"input_size": (3, 4, 4), "mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "nearest"}  # noqa: RUF012
    class_names = ("cat", "dog")

    def __init__(self, outputs):
        super().__init__()
        self.outputs = torch.tensor(outputs)

    def predict_step(self, batch):
        return self.outputs[: len(batch[0])]


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_a_file_name_that_is_not_text_is_written(tmp_path, ending):
    """One image with a Latin-1 name ended the prediction in a UnicodeEncodeError, after all the work."""
    (tmp_path / "in").mkdir()
    try:
        Image.new("RGB", (4, 4)).save(os.fsdecode(os.fsencode(tmp_path / "in") + b"/caf\xe9.png"))
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    output = tmp_path / f"out{ending}"
    predict(Echo([[0.25, 0.75]]), UnlabelledImages(str(tmp_path / "in")), output, **QUIET)
    assert r"caf\udce9.png" in output.read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore::geolora_pl.errors.GeoLoRAWarning")
def test_a_prediction_that_is_not_a_number_has_no_label(tmp_path):
    """Probabilities of NaN were labelled as the first class, and JSON lines held NaN, which is not JSON."""
    (tmp_path / "in").mkdir()
    for name in "ab":
        Image.new("RGB", (4, 4)).save(tmp_path / "in" / f"{name}.png")
    module, data = Echo([[float("nan")] * 2, [0.25, 0.75]]), UnlabelledImages(str(tmp_path / "in"))
    with pytest.warns(GeoLoRAWarning, match="1 of 2 predictions are not finite"):
        rows = predict(module, data, tmp_path / "out.jsonl", **QUIET)
    assert [row["label"] for row in rows] == [None, "dog"]
    written = [
        json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "out.jsonl").read_text().split("\n")[:2]
    ]
    assert written == rows
    predict(module, data, tmp_path / "out.csv", **QUIET)
    first = next(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert (first["label"], first["p_cat"]) == ("", "")


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_a_score_that_is_not_a_number_is_left_empty(tmp_path, ending):
    """A tagger that had diverged ended the prediction in an error of JSON, after all the work."""
    (tmp_path / "in").mkdir()
    for name in "ab":
        Image.new("RGB", (4, 4)).save(tmp_path / "in" / f"{name}.png")
    found = [{"tags": ["x", None], "score": float("inf"), "scores": [float("nan"), 0.5]}, {"tags": [], "score": 0.25}]
    module = Echo([[0.25, 0.75]])
    module.predict_step = lambda batch, batch_idx: [{"scores": [], **row} for row in found]
    data, output = UnlabelledImages(str(tmp_path / "in")), tmp_path / f"out{ending}"
    with pytest.warns(GeoLoRAWarning, match="1 of 2 predictions are not finite"):
        rows = predict(module, data, output, **QUIET)
    assert [(row["score"], row["scores"]) for row in rows] == [(None, [None, 0.5]), (0.25, [])]
    assert rows[0]["tags"] == ["x", None]
    if ending == ".jsonl":
        assert [json.loads(line, parse_constant=pytest.fail) for line in output.read_text().splitlines()] == rows
    else:
        first = next(csv.DictReader(output.read_text().splitlines()))
        assert (first["score"], first["scores"]) == ("", "[null, 0.5]")


def test_a_text_that_is_a_formula_is_not_run_by_a_spreadsheet(tmp_path):
    """A text to predict began with an equals sign, and a spreadsheet ran it when the CSV file was opened."""
    texts = ["=HYPERLINK(1)", "+1 is more", "@SUM(A1)", "-- a dash", "-1.5", "fine = good", '"=quoted"']
    (tmp_path / "texts.txt").write_text("".join(f"{text}\n" for text in texts))

    class OfTexts(Echo):
        class_names = ("-1", "=dog")

        def predict_step(self, batch):
            return self.outputs[: len(batch["input_ids"])]

    module = OfTexts([[0.25, 0.75]] * len(texts))
    module.tokenizer = make_tokenizer()
    data = UnlabelledTexts(str(tmp_path / "texts.txt"), max_length=8, cache_dir=str(tmp_path / "cache"))
    predict(module, data, tmp_path / "out.jsonl", **QUIET)
    exact = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["text"] for row in exact] == texts
    predict(module, data, tmp_path / "out.csv", **QUIET)
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == [f"'{text}" for text in texts[:4]] + texts[4:]
    assert set(rows[0]) == {"index", "text", "label", "p_-1", "p_=dog"}
    assert rows[0]["label"] == "'=dog"


def test_what_predictions_cannot_be_written_with_is_refused_before_the_work(tmp_path):
    """A folder as output, or two classes with one name, was refused after all images had been predicted."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    class Never(Echo):
        def predict_step(self, batch):
            pytest.fail("the work has begun")

    data = UnlabelledImages(str(tmp_path))
    (tmp_path / "out.csv").mkdir()
    with pytest.raises(ValueError, match=r"output='.*out.csv' cannot be written: name a file in a folder of yours"):
        predict(Never([[0.5, 0.5]]), data, tmp_path / "out.csv", **QUIET)
    never = Never([[0.5, 0.5]])
    never.class_names = ("cat", "cat")
    with pytest.raises(ValueError, match=r"class_names=\['cat', 'cat'\] must differ"):
        predict(never, data, tmp_path / "fine.csv", **QUIET)


def test_a_broken_file_of_a_hub_data_set_is_one_sentence(tmp_path):
    """A line of a file was broken, and the user got the traceback of datasets. The error says what is wrong."""
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": "x"}\n' * 3 + '{"text": broken\n')
    with pytest.raises(ValueError, match=r"^dataset='.*', subset=None cannot be loaded: (?!An error occurred)"):
        TextHub(str(tmp_path)).load_splits()


@pytest.mark.parametrize(
    ("answer", "start", "span"),
    [(" good", 0, [5, 5]), ("bad ", 14, [8, 8]), (" good film is bad ", 0, [5, 8]), ("film ", 6, [6, 6])],
)
def test_an_answer_with_spaces_around_it_is_learnt(tmp_path, answer, start, span):
    """An answer at an end of its context was marked with the space there, and was learnt as no answer at all."""
    answers = {"text": [answer], "answer_start": [start]}
    row = {"question": "the film is", "context": " good film is bad ", "answers": answers}
    file = write_rows(tmp_path / "train.jsonl", [row])
    data = attach(AnswerFiles(file, val_file=file, max_length=16, stride=2, cache_dir=str(tmp_path / "cache")))
    train = data.splits["train"][0]
    assert [train["start_positions"], train["end_positions"]] == span


def test_token_ids_of_a_tokenizer_whose_end_was_corrected_are_made_again(tmp_path):
    """The eos_token of a tokenizer was corrected, and conversations still ended with the old one, from the cache."""
    file = write_chats(tmp_path / "chats.jsonl", [turns("good film", "bad plot")])
    template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = chat_tokenizer(template + "{% if add_generation_prompt %}<assistant> {% endif %}")
    for eos in (tokenizer.eos_token, "<end>"):
        tokenizer.eos_token = eos
        data = ChatFiles(file, val_file=file, max_length=16, packed=False, cache_dir=str(tmp_path / "cache"))
        assert attach(data, tokenizer).splits["train"][0]["input_ids"][-1] == tokenizer.eos_token_id


def test_an_answer_does_not_depend_on_how_long_another_prompt_of_its_batch_is(tmp_path):
    """Beside a prompt that nearly fills the positions of GPT-2, the answers to short ones ended after a few tokens."""
    name = save_tiny_chat(tmp_path / "model", "gpt2")
    file = write_chats(tmp_path / "asked.jsonl", [turns("good film"), turns("good " * 20), turns("one two")])
    found = []
    for batch_size in (1, 3):
        data = ChatFiles(predict_file=file, batch_size=batch_size, cache_dir=str(tmp_path / "cache"))
        rows = predict(CausalLM(name, max_new_tokens=20), data, **QUIET)
        found.append([row["generated"] for row in rows])
    assert found[0] == found[1]
    assert len(found[0][0].split()) > len(found[0][1].split())


def test_a_conversation_without_room_for_an_answer_is_refused_before_any_is_answered(tmp_path):
    """A conversation had as many tokens as GPT-2 has positions: predict ended in an error when its batch came."""
    name = save_tiny_chat(tmp_path / "model", "gpt2")
    file = write_chats(tmp_path / "asked.jsonl", [turns("one"), turns("good " * 29)])
    data = ChatFiles(predict_file=file, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(
        ValueError, match=r"asked\.jsonl: line 2 has 32 tokens and the model 32 positions, which leaves no"
    ):
        task_with(name, data, kind=CausalLM)


def test_a_search_that_never_stops_early_stays_so_in_a_checkpoint(tmp_path):
    """A user searched with early_stopping: never, and what was loaded from the checkpoint wrote other texts."""
    settings = {"num_beams": 3, "early_stopping": "never"}
    module = Seq2SeqLM(save_tiny_seq2seq(tmp_path / "model"), max_new_tokens=4, generation=settings)
    file = write(tmp_path / "pairs.csv", text=["good film"] * 4, target=["one", "two"] * 2)
    data = Seq2SeqFiles(file, val_file=file, max_length=8, cache_dir=str(tmp_path / "cache"))
    fit(module, data).save_checkpoint(tmp_path / "run.ckpt")
    loaded = Seq2SeqLM.load_from_checkpoint(tmp_path / "run.ckpt")
    assert loaded.model.generation_config.early_stopping == "never"


def test_the_loss_of_many_words_is_finite_in_16_bits(tmp_path):
    """With precision 16-true, the losses of a batch of 64,000 words summed up to infinity, and no step was taken."""
    module = TokenClassification(save_tiny_model(tmp_path / "model"), num_classes=9)
    module.configure_model()
    batch = {"input_ids": torch.full((2000, 32), 5), "labels": torch.zeros(2000, 32, dtype=torch.long)}
    module.log = lambda *_, **__: None
    with torch.no_grad():
        assert module.half().training_step(batch).isfinite()


@pytest.mark.parametrize(
    ("own", "given", "expected"),
    [
        ({"num_beams": 4, "early_stopping": True, "length_penalty": 2.0}, {"num_beams": 1}, (1, None, None)),
        ({"num_beams": 4, "early_stopping": True, "length_penalty": 2.0}, {"num_beams": 2}, (2, True, 2.0)),
        ({"num_beams": 4, "early_stopping": True, "length_penalty": 2.0}, None, (4, True, 2.0)),
        ({"do_sample": True, "temperature": 0.5, "top_p": 0.9}, {"do_sample": False}, (None, None, None)),
    ],
)
def test_settings_that_came_with_a_model_do_not_forbid_another_way_of_writing(tmp_path, own, given, expected):
    """BART came with settings of a search of 4 beams, so that num_beams: 1 was refused as if the user had set them."""
    name = save_tiny_seq2seq(tmp_path / "model", "bart")
    GenerationConfig(**own, decoder_start_token_id=3, eos_token_id=3, pad_token_id=0).save_pretrained(name)
    module = Seq2SeqLM(name, max_new_tokens=4, generation=given)
    module.configure_model()
    config, usual = module.model.generation_config, GenerationConfig()
    for name, value in zip(("num_beams", "early_stopping", "length_penalty"), expected, strict=True):
        assert getattr(config, name) == (getattr(usual, name) if value is None else value)
    config.save_pretrained(tmp_path / "export")  # which refuses settings that do not go together


def test_an_export_takes_the_configuration_that_fit_takes(tmp_path, model, texts):
    """The YAML of init names its task alone: fit took it, and export said that there is no such class."""
    runs = fit(TextClassification(model), TextFiles(texts, val_file=texts, cache_dir=str(tmp_path / "cache")))
    runs.save_checkpoint(tmp_path / "run.ckpt")
    (tmp_path / "text.yaml").write_text(
        f"model: {{class_path: TextClassification, init_args: {{model_name: {model}}}}}"
    )
    export(tmp_path / "run.ckpt", "adapter", tmp_path / "adapter.safetensors", tmp_path / "text.yaml")
    assert (tmp_path / "adapter.safetensors").is_file()


def test_texts_to_predict_have_the_prefix_of_the_texts_in_training(tmp_path, capsys):
    """A T5 that had learnt behind its prefix got the lines of a file without it, though the configuration has one."""
    model, lines = save_tiny_seq2seq(tmp_path / "model"), tmp_path / "lines.txt"
    lines.write_text("good film\nbad plot\n")
    file = write(tmp_path / "pairs.csv", text=["good film", "bad plot"], target=["one", "two"])
    settings = {"prefix": "the ", "max_length": 8, "cache_dir": str(tmp_path / "cache")}
    trained, asked = Seq2SeqFiles(file, val_file=file, **settings), UnlabelledTexts(str(lines), **settings)
    task_with(model, trained, kind=Seq2SeqLM)
    task_with(model, asked, kind=Seq2SeqLM)
    assert asked.splits["predict"]["input_ids"][:] == trained.splits["train"]["input_ids"][:]
    assert asked.predict_inputs == {"text": ["good film", "bad plot"]}
    of_training = {"class_path": "Seq2SeqFiles", "init_args": {"train_file": "x.csv", "prefix": "the "}}
    of_model = {"class_path": "Seq2SeqLM", "init_args": {"model_name": "x"}}
    (tmp_path / "run.yaml").write_text(json.dumps({"model": of_model, "data": of_training}))
    more = ["--data=UnlabelledTexts", "--data.init_args.file=x.txt", "--print_config"]
    with pytest.raises(SystemExit):
        main(["predict", f"--config={tmp_path / 'run.yaml'}", *more])
    assert yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["prefix"] == "the "


@pytest.mark.parametrize("kind", [TokenClassification, QuestionAnswering])
def test_all_that_is_trained_for_tags_and_answers_has_a_gradient(tmp_path, kind):
    """BigBird makes a pooler for tags that it never calls: it was trained in full, and DDP waited for its gradient."""
    settings = {"model_type": "big_bird", "vocab_size": 26, "hidden_size": 16, "num_hidden_layers": 1}
    settings |= {"num_attention_heads": 2, "intermediate_size": 24, "attention_type": "original_full"}
    more = {} if kind is QuestionAnswering else {"num_classes": 3}
    module = kind("tiny", pretrained=False, model_args=settings, **more)
    module.configure_model()
    module({"input_ids": torch.full((2, 8), 5)}).square().sum().backward()
    assert [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None] == []
    assert [name for name, p in module.named_parameters() if p.requires_grad and "classifier" in name]
