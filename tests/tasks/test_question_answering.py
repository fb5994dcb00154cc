"""Extractive question answering: how contexts are cut and joined again, what is scored, written and exported."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from command_line import from_fit_to_export
from diverged import validation_loss
from exported import move, save
from flags import QUIET
from foreign import trainer
from peft import AutoPeftModelForQuestionAnswering
from text_files import attach, write, write_rows
from tiny_text import SEQ2SEQ, WORDS, make_tokenizer, save_tiny_model, save_tiny_seq2seq
from tolerance import NETWORK, close
from torch.nn import functional as F
from transformers import AutoModelForQuestionAnswering

from geolora_pl import GeoLoRACallback, predict
from geolora_pl.adapters.inject import find_adapters
from geolora_pl.data import AnswerFiles, AnswerHub
from geolora_pl.lightning.export import export
from geolora_pl.tasks import QuestionAnswering

NUMBERS, OTHERS = WORDS[-7:], WORDS[:14]


def draw(words, generator):
    return words[int(torch.randint(len(words), (1,), generator=generator))]


def rows(count, seed=0, length=9):
    """A context has one number among its words, and the question asks for it."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        words = [draw(OTHERS, generator) for _ in range(length)]
        place = int(torch.randint(length, (1,), generator=generator))
        words[place] = draw(NUMBERS, generator)
        start = len(" ".join(words[:place])) + (place > 0)
        made.append({"question": "was one", "context": " ".join(words),
                     "answers": {"text": [words[place]], "answer_start": [start]}})  # fmt: skip
    return made


def data(folder, of_file=None, **settings):
    folder = Path(folder)
    file = write_rows(folder / "train.jsonl", rows(24) if of_file is None else of_file)
    defaults = {"val_file": file, "test_file": file, "batch_size": 8, "num_workers": 0, "cache_dir": folder / "cache"}
    return AnswerFiles(file, **{**defaults, **settings})


@pytest.fixture
def model(tmp_path):
    return save_tiny_model(tmp_path / "model")


LONG = {
    "question": "the plot",
    "context": "one two three four five six seven good bad film plot the",
    "answers": {"text": ["good bad"], "answer_start": [34]},
}


def test_a_long_context_is_cut_into_pieces_that_overlap_and_each_knows_its_part_of_the_answer(tmp_path):
    """[CLS] the plot [SEP] and nine words of context [SEP]; two words are in two pieces."""
    of_file = attach(data(tmp_path, [LONG], max_length=14, stride=2))
    assert of_file.splits["train"].num_rows == 2
    train = of_file.splits["train"].to_dict()
    ids = make_tokenizer().convert_tokens_to_ids
    assert train["input_ids"] == [
        ids(["[CLS]", "the", "plot", "[SEP]", *words, "[SEP]"])
        for words in ([*WORDS[-7:], "good", "bad"], ["good", "bad", "film", "plot", "the"])
    ]
    assert (train["start_positions"], train["end_positions"]) == ([11, 4], [12, 5])
    (batch,) = of_file.val_dataloader()
    assert batch["question"].tolist() == [0, 0]
    assert batch["context"] == [LONG["context"]]
    assert batch["answers"] == [["good bad"]]
    assert batch["begins"][1].tolist() == [-1] * 4 + [34, 39, 43, 48, 53] + [-1] * 5
    assert batch["ends"][1].tolist() == [-1] * 4 + [38, 42, 47, 52, 56] + [-1] * 5
    short = {**LONG, "context": "good bad", "answers": {"text": ["good bad"], "answer_start": [0]}}
    of_file = attach(data(tmp_path, [LONG, short], max_length=14, stride=2))
    note = "train: 1 of 2 contexts are too long for max_length=14, so that there are 3 pieces"
    assert note in of_file.notes  # and not that both are cut


def test_a_piece_without_the_whole_answer_has_none(tmp_path):
    of_file = attach(data(tmp_path, [LONG], max_length=14, stride=1))
    train = of_file.splits["train"].to_dict()
    assert (train["start_positions"], train["end_positions"]) == ([11, 0], [12, 0])


def test_a_long_question_loses_its_end_and_leaves_room_for_the_context(tmp_path):
    long = {**LONG, "question": " ".join(["good"] * 20)}
    of_file = attach(data(tmp_path, [long, LONG], max_length=14, stride=2))
    assert max(of_file.splits["train"]["length"][:]) <= 14
    assert "train: 1 of 2 questions are cut to half of max_length=14" in of_file.notes
    (batch,) = of_file.val_dataloader()
    assert (batch["input_ids"][0][:10] == torch.tensor([2, *[5] * 7, 3, 19])).all()


def scripted(module, best):
    """Give the first and the last token of each piece a logit, and no answer another."""

    def forward(batch):
        logits = torch.zeros(*batch["input_ids"].shape, 2)
        for piece, (first, last, sure, null) in enumerate(best):
            logits[piece, first, 0] = logits[piece, last, 1] = sure
            logits[piece, 0] += null
        return logits

    module.forward = forward
    return module


@pytest.mark.parametrize(
    ("best", "unanswerable", "expected"),
    [
        ([(4, 5, 9.0, 0.0), (6, 7, 3.0, 0.0)], False, ("one two", 0)),
        ([(4, 5, 3.0, 0.0), (6, 8, 9.0, 0.0)], False, ("film plot the", 43)),
        ([(4, 5, 1.0, 9.0), (6, 7, 3.0, 9.0)], False, ("film plot", 43)),
        ([(4, 5, 1.0, 9.0), (6, 7, 3.0, 9.0)], True, ("", None)),
        ([(4, 5, 1.0, 9.0), (6, 7, 9.0, 0.0)], True, ("film plot", 43)),
    ],
)
def test_the_answer_is_the_best_span_of_all_pieces(tmp_path, model, best, unanswerable, expected):
    of_file = attach(data(tmp_path, [LONG], max_length=14, stride=2))
    (batch,) = of_file.val_dataloader()
    module = scripted(QuestionAnswering(model, unanswerable=unanswerable), best)
    (row,) = module.predict_step(batch, 0)
    assert (row["answer"], row["start"]) == expected
    assert 0 < row["score"] <= 1
    found = module.log_probabilities(batch)
    if expected[1] is not None:
        first, last = best[0 if expected[1] == 0 else 1][:2]
        piece = 0 if expected[1] == 0 else 1
        close(torch.tensor(row["score"]), (found[piece, first, 0] + found[piece, last, 1]).exp())


def test_a_span_is_no_longer_than_it_may_be_and_never_ends_before_it_begins(tmp_path, model):
    of_file = attach(data(tmp_path, [LONG], max_length=32))
    (batch,) = of_file.val_dataloader()
    logits = torch.zeros(1, batch["input_ids"].shape[1], 2)
    logits[0, 4, 0], logits[0, 9, 1], logits[0, 8, 0], logits[0, 6, 1] = 9, 9, 5, 5
    for longest, answer in ((30, "one two three four five six"), (3, "one two three")):
        module = QuestionAnswering(model, max_answer_length=longest)
        module.forward = lambda batch: logits
        assert module.predict_step(batch, 0)[0]["answer"] == answer


def test_the_file_of_squad_is_read_as_flat_rows_are(tmp_path):
    """Also questions that have no answer, and answers as one list."""
    first, second = rows(2)
    answers = [{"text": first["answers"]["text"][0], "answer_start": first["answers"]["answer_start"][0]}]
    questions = [{"id": "a", "question": first["question"], "answers": answers, "is_impossible": False}]
    other = [{"id": "b", "question": "what", "answers": [], "is_impossible": True}]
    nested = [{"title": "t", "paragraphs": [{"context": first["context"], "qas": questions},
                                            {"context": second["context"], "qas": other}]}]  # fmt: skip
    (tmp_path / "s.json").write_text(json.dumps({"version": "v2.0", "data": nested}, indent=1))
    flat = write_rows(tmp_path / "f.jsonl", [
        {"id": "a", **first, "answers": answers},
        {"id": "b", **second, "question": "what", "answers": []},
    ])  # fmt: skip
    of_squad, of_flat = (AnswerFiles(file, id_column="id") for file in (str(tmp_path / "s.json"), flat))
    assert of_squad.load_splits()["train"][:] == of_flat.load_splits()["train"][:]
    assert of_squad.load_splits()["train"]["id"][:] == ["a", "b"]
    assert of_squad.unanswerable
    assert of_flat.unanswerable


def test_a_data_set_of_the_hub_has_lists_of_texts_and_places(tmp_path):
    of_hub = datasets.Dataset.from_list(rows(4))
    of_hub.to_parquet(tmp_path / "hub" / "train.parquet")
    of_hub.to_parquet(tmp_path / "hub" / "validation.parquet")
    loaded = AnswerHub(str(tmp_path / "hub"))
    assert set(loaded.load_splits()) == {"train", "val"}
    assert loaded.load_splits()["train"]["answers"][:] == [row["answers"]["text"] for row in rows(4)]
    assert not loaded.unanswerable


def test_no_context_is_both_in_training_and_held_out(tmp_path):
    """Questions about one context share its answers, so that a score on the others would be too good."""
    of_rows = [{**row, "question": question} for row in rows(10) for question in ("was one", "is one", "a one")]
    of_file = attach(data(tmp_path, of_rows, val_file=None, val_fraction=0.2))
    held_out = set(of_file.splits["val"]["context"][:])
    assert len(of_file.splits["val"]) == 6
    assert len(of_file.splits["train"]) == 24
    tokenizer = make_tokenizer()
    for ids in of_file.splits["train"]["input_ids"][:]:
        assert tokenizer.decode(ids[4:-1]) not in held_out
    assert "6 of 30 training questions, those of 2 contexts, are held out for validation (val_fraction=0.2)" in (
        of_file.notes
    )
    with pytest.raises(ValueError, match="every question has the same context"):
        attach(data(tmp_path, of_rows[:3], val_file=None))


GOOD = {"question": "q", "context": "a good film", "answers": {"text": ["good"], "answer_start": [2]}}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GOOD, "answers": {"text": ["good"], "answer_start": [3]}},
         r"row 2 has the answer 'good' at answer_start=3, where its context has 'ood ': fix the row"),
        ({**GOOD, "answers": {"text": ["good"], "answer_start": [-9]}}, r"row 2 has the answer 'good' at .*=-9"),
        ({**GOOD, "answers": {"text": ["good"], "answer_start": [2, 3]}}, r"row 2 has answers=.* which are not a text"),
        ({**GOOD, "answers": {"text": ["good"], "answer_start": [None]}}, r"row 2 .* answer_start=None: it must be"),
        ({**GOOD, "answers": {"text": [""], "answer_start": [2]}}, r"row 2 has the answer '' at"),
        ({**GOOD, "answers": None}, r"row 2 has answers=None, which are not a text and an answer_start for each"),
        ({**GOOD, "context": "  "}, r"row 2 has context='  ', but must have a text: fix the row"),
        ({**GOOD, "question": None}, r"row 2 has question=None, but must have a text"),
        ({**GOOD, "question": 3}, r"question must hold values of one kind, and row 2 is of another"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_named_with_its_row(tmp_path, row, message):
    file = write_rows(tmp_path / "t.jsonl", [GOOD, row])
    with pytest.raises(ValueError, match=message) as error:
        AnswerFiles(file).load_splits()
    assert "t.jsonl" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_loss_of_a_model_that_has_diverged_is_nan(tmp_path, model):
    """It was the mean of the other losses, or of none, with a warning of torchmetrics."""
    assert validation_loss(QuestionAnswering(model), data(tmp_path)).isnan()


def test_mistakes_are_refused(tmp_path, model):
    file = write(tmp_path / "t.jsonl", question=["q"], context=["good"], found=["good"])
    with pytest.raises(ValueError, match="row 1 has found='good', which are not a text and an answer_start for each"):
        AnswerFiles(file, answers_column="found").load_splits()
    with pytest.raises(ValueError, match=r"t.jsonl has no column 'answers'; it has 'question', 'context'"):
        AnswerFiles(write(tmp_path / "t.jsonl", question=["q"], context=["c"])).load_splits()
    (tmp_path / "s.json").write_text('{"data": [{"paragraphs": [{"qas": []}, {"qas": [{"id": 1}]}]}]}')
    with pytest.raises(ValueError, match=r"s.json is not in the layout of SQuAD, data/paragraphs/qas: 'question' is"):
        AnswerFiles(str(tmp_path / "s.json")).load_splits()
    (tmp_path / "s.json").write_text('{"data": []}')
    with pytest.raises(ValueError, match=r"s.json holds no questions"):
        AnswerFiles(str(tmp_path / "s.json")).load_splits()
    with pytest.raises(ValueError, match="stride=-1 must be at least 0"):
        AnswerFiles("x.jsonl", stride=-1)
    with pytest.raises(ValueError, match="the columns q, q, answers must be different ones"):
        AnswerFiles("x.jsonl", question_column="q", context_column="q")
    with pytest.raises(
        ValueError, match=r"stride=3 must be below 3, the tokens that are left .* half of max_length=12"
    ):
        attach(data(tmp_path, stride=3, max_length=12))
    with pytest.raises(ValueError, match="max_answer_length=0 must be at least 1"):
        QuestionAnswering(model, max_answer_length=0)


@pytest.mark.parametrize("family", ["roberta", "distilbert", "deberta-v2", "modernbert", "gpt2", "qwen3", *SEQ2SEQ])
def test_every_family_is_trained_in_its_blocks_and_its_head(tmp_path, family):
    make = save_tiny_seq2seq if family in SEQ2SEQ else save_tiny_model
    module, runs = QuestionAnswering(make(tmp_path / "m", family)), trainer(GeoLoRACallback())
    runs.fit(module, data(tmp_path, max_length=30))
    assert {"train_loss", "val_loss", "val_exact_match", "val_f1"} <= set(runs.callback_metrics)
    trained = {name for name, p in module.model.named_parameters() if p.requires_grad and name[-2:] not in (".K", ".L")}
    assert trained
    assert all(name.startswith(("qa_outputs.", "classifier.", "head.")) for name in trained)
    assert len(find_adapters(module.model)) >= 6


def test_where_the_number_is_in_a_context_is_learnt(tmp_path):
    torch.manual_seed(0)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    module = QuestionAnswering(save_tiny_model(tmp_path / "m", initializer_range=0.2), head_lr=1e-2, model_args=still)
    runs = trainer(GeoLoRACallback(), max_epochs=5, check_val_every_n_epoch=5)
    of_file = data(tmp_path)
    of_file.files["train"] = write_rows(tmp_path / "more.jsonl", rows(192, seed=1))
    runs.fit(module, of_file)
    assert runs.callback_metrics["val_exact_match"] > 0.9
    assert runs.callback_metrics["val_f1"] > 0.9


def test_loss_and_scores_are_those_over_all_questions_whatever_the_batches(tmp_path, model):
    """A loss of a piece does not depend on the padding either."""
    found = []
    for size in (24, 1):
        torch.manual_seed(0)
        runs, module = trainer(GeoLoRACallback()), QuestionAnswering(model)
        runs.validate(module, data(tmp_path, rows(12) + rows(12, 1, length=5), batch_size=size), verbose=False)
        found.append(runs.callback_metrics)
    for name in ("val_loss", "val_exact_match", "val_f1"):
        close(found[0][name], found[1][name], NETWORK)
    losses, tokenizer = [], module.tokenizer
    for row in rows(12) + rows(12, 1, length=5):
        encoded = tokenizer(row["question"], row["context"], return_tensors="pt")
        place = len(row["context"][: row["answers"]["answer_start"][0]].split()) + 4
        with torch.no_grad():
            logits = module.eval()(encoded)[0]
        losses.append(F.cross_entropy(logits.T, torch.tensor([place, place])))
    close(found[0]["val_loss"], torch.stack(losses).mean(), NETWORK)


def test_a_question_without_an_answer_is_right_if_none_is_given(tmp_path, model):
    of_rows = [{**rows(1)[0], "answers": {"text": [], "answer_start": []}}, *rows(3)]
    runs, module = trainer(GeoLoRACallback()), scripted(QuestionAnswering(model), [(0, 0, 0.0, 9.0)] * 4)
    runs.validate(module, data(tmp_path, of_rows), verbose=False)
    assert module.unanswerable
    close(runs.callback_metrics["val_exact_match"], torch.tensor(0.25))
    close(runs.callback_metrics["val_f1"], torch.tensor(0.25))


@pytest.mark.filterwarnings("ignore:Using `DistributedSampler`")  # the samples are even
def test_two_processes_score_as_one_does(tmp_path, model, one_thread, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    of_rows = rows(8) + rows(8, 1, length=16)  # of one piece and of two
    found = []
    for devices, strategy in ((1, "auto"), (2, "ddp_fork")):
        torch.manual_seed(0)
        module = QuestionAnswering(model)
        module.configure_model()
        runs = trainer(GeoLoRACallback(), devices=devices, strategy=strategy)
        of_file = data(tmp_path, of_rows, max_length=20, batch_size=4)
        found.append(runs.validate(module, of_file, verbose=False)[0])
    for name in ("val_loss", "val_exact_match", "val_f1"):
        close(*(torch.tensor(metrics[name]) for metrics in found), NETWORK)


def test_predictions_are_one_row_per_question_in_their_order(tmp_path, model):
    of_rows = [{"id": f"n{i}", "question": row["question"], "context": row["context"]} for i, row in enumerate(rows(5))]
    file = write_rows(tmp_path / "new.jsonl", of_rows)
    module = QuestionAnswering(model)
    module.configure_model()
    module.eval()
    of_file = data(tmp_path, predict_file=file, id_column="id", max_length=16, batch_size=2)
    of_file.files = {"predict": file}
    found = predict(module, of_file, tmp_path / "p.jsonl", **QUIET)
    assert found == [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [row["id"] for row in found] == [row["id"] for row in of_rows]
    assert [list(row) for row in found] == [["index", "id", "question", "answer", "start", "score"]] * 5
    for row, given in zip(found, of_rows, strict=True):
        assert given["context"][row["start"] :].startswith(row["answer"])
        assert row["answer"]


def test_exports_are_what_transformers_and_peft_load(tmp_path, model):
    module = QuestionAnswering(model)
    module.configure_model()
    ckpt = save(move(module), tmp_path / "t.ckpt", "geolora_pl.tasks.QuestionAnswering")
    batch = module.tokenizer(["the film", "a"], ["good plot was", "bad"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = module(batch)
    export(ckpt, "merged", tmp_path / "merged")
    export(ckpt, "peft", tmp_path / "peft")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["task_type"] == "QUESTION_ANS"
    merged = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "merged").eval()
    theirs = AutoPeftModelForQuestionAnswering.from_pretrained(tmp_path / "peft").eval()
    for loaded in (merged, theirs.get_base_model()):  # PEFT's own forward loses token_type_ids
        with torch.no_grad():
            outputs = loaded(**batch)
        close(torch.stack([outputs.start_logits, outputs.end_logits], -1), expected, NETWORK)


def test_the_command_line_fits_resumes_tests_predicts_and_exports(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "train.jsonl", rows(24))
    last, first = from_fit_to_export("QuestionAnswering", model, "AnswerFiles", "train.jsonl")
    assert set(first) == {"index", "question", "answer", "start", "score"}
    assert QuestionAnswering.load_from_checkpoint(last).unanswerable is False
    AutoModelForQuestionAnswering.from_pretrained("merged")
