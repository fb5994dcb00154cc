"""The data sources that a task takes, and those of other tasks, which it refuses."""

import pytest
from foreign import trainer
from text_files import write_rows
from tiny_chat import save_tiny_chat
from tiny_text import save_tiny_model, save_tiny_seq2seq

from geolora_pl import GeoLoRACallback
from geolora_pl.data import AnswerFiles, ChatFiles, LanguageFiles, Seq2SeqFiles, TagFiles, TextFiles, UnlabelledTexts
from geolora_pl.tasks import CausalLM, QuestionAnswering, Seq2SeqLM, TextClassification, TokenClassification

# A row that every source can read.
ROW = {
    "text": "the good film",
    "target": "good",
    "tokens": ["good", "film"],
    "tags": ["A", "B"],
    "question": "one",
    "context": "the good film",
    "answers": {"text": ["good"], "answer_start": [4]},
    "prompt": "one",
    "completion": "two",
}
SOURCES = {
    TextClassification: {TextFiles},
    TokenClassification: {TagFiles},
    QuestionAnswering: {AnswerFiles},
    Seq2SeqLM: {Seq2SeqFiles},
    CausalLM: {LanguageFiles, ChatFiles},
}
MODELS = {Seq2SeqLM: save_tiny_seq2seq, CausalLM: save_tiny_chat}


@pytest.mark.parametrize("task", SOURCES, ids=lambda task: task.__name__)
def test_the_source_of_another_task_is_refused_in_one_sentence_that_names_those_to_take(task, tmp_path):
    """Who tuned CausalLM on tagged words trained it on tags, and others saw an error of torch in the first step."""
    rows = [{**ROW, "context": f"{ROW['context']} {end}", "label": end} for end in ("bad", "fine") * 2]
    file = write_rows(tmp_path / "t.jsonl", rows)
    settings = {"cache_dir": str(tmp_path / "cache"), "batch_size": 2, "num_workers": 0, "max_length": 16}
    name = MODELS.get(task, save_tiny_model)(tmp_path / "model")
    for source in set().union(*SOURCES.values()):
        own = {"max_target_length": 8} if source is Seq2SeqFiles else {}
        data = source(file, file, **settings, **own)
        run = trainer(GeoLoRACallback(), max_steps=2)
        if source in SOURCES[task]:
            run.fit(task(name), data)
            continue
        with pytest.raises(
            ValueError, match=f"{source.__name__} does not make what {task.__name__} learns from: take "
        ):
            run.fit(task(name), data)


def test_lines_of_texts_are_not_answered_by_a_decoder(tmp_path):
    """They were padded behind their ends, so that what a model wrote there depended on the other lines."""
    (tmp_path / "t.txt").write_text("good film\nthe film was not very good\n")
    lines = UnlabelledTexts(str(tmp_path / "t.txt"), max_length=16, num_workers=0, cache_dir=str(tmp_path / "cache"))
    module = CausalLM(save_tiny_chat(tmp_path / "model"))
    with pytest.raises(
        ValueError, match="UnlabelledTexts does not make what CausalLM learns from: take LanguageFiles,"
    ):
        trainer(GeoLoRACallback()).predict(module, lines)
