import pytest

from geolora_pl.report.public import data_of, public_settings, scores_of
from geolora_pl.report.runs import read_run

OURS = {"model.class_path": "geolora_pl.tasks.TextClassification", "data.class_path": "geolora_pl.data.GLUE"}
THEIRS = {"model.class_path": "mine.Model", "data.class_path": "mine.Data"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("trainer.default_root_dir", "/home/me"),
        ("trainer.logger.init_args.api_key", "abc"),
        ("trainer.logger.0.init_args.version", 3),
        ("data.init_args.train_file", "mine.csv"),
        ("data.init_args.text_column", "complaint"),
        ("data.init_args.labels", ["guilty", "not guilty"]),
        ("model.init_args.model_name", "user/private_base"),
        ("model.init_args.adapter.target_modules", "/home/me"),
        ("model.class_path", "mine.Secret"),
        ("model.init_args.optimizer", "mine.Secret"),
        ("model.init_args./home/me", 3),
        ("model.init_args.class_weights.guilty", 3.0),
        ("geolora.budget", None),
        ("ckpt_path", "last.ckpt"),
    ],
)
def test_what_is_left_out(name, value):
    assert public_settings({name: value}) == {}


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("seed_everything", 0, "0"),
        ("trainer.precision", "bf16-mixed", "bf16-mixed"),
        ("geolora.small_checkpoints", True, "True"),
        ("model.class_path", "geolora_pl.tasks.CausalLM", "CausalLM"),
        ("model.init_args.optimizer.class_path", "torch.optim.AdamW", "AdamW"),
        ("model.init_args.optimizer.init_args.betas", [0.9, 0.95], "0.9, 0.95"),
        ("model.init_args.adapter.target_modules", ["query", "value"], "query, value"),
        ("data.init_args.task", "sst2", "sst2"),
    ],
)
def test_what_is_shown(name, value, text):
    assert public_settings({**OURS, name: value})[name] == text


@pytest.mark.parametrize(
    "name", ["data.init_args.task", "model.init_args.precision", "model.init_args.adapter.geometry"]
)
def test_texts_of_a_class_of_ones_own_are_left_out(name):
    """A user's own data module has an argument that is called as one of ours: what it says went onto the card."""
    assert public_settings({**THEIRS, name: "secret"}) == {}
    assert public_settings({**THEIRS, name: 3}) == {name: "3"}


def test_the_scores_of_a_checkpoint_are_not_those_of_the_step_after_it(tmp_path):
    """A run validates after every step: the card of its second checkpoint had the score of the third step."""
    (tmp_path / "metrics.csv").write_text("step,val_accuracy,test_accuracy\n0,0.1,\n1,0.2,\n2,0.3,\n3,,0.4\n")
    run = read_run(tmp_path)
    assert [(score.value, score.step) for score in scores_of(run, 2)] == [(0.2, 1)]
    assert [score.value for score in scores_of(run, 3)] == [0.4, 0.3]


def test_the_data_source_is_named_if_it_is_one_of_this_package():
    assert data_of({"data.class_path": "mine.Data"}) is None
    assert data_of({}) is None
    glue = data_of({"data.class_path": "geolora_pl.data.GLUE", "data.init_args.task": "sst2"})
    assert (glue.name, glue.hub_name) == ("GLUE sst2", None)
    settings = {"data.class_path": "geolora_pl.data.TextHub", "data.init_args.dataset": "stanfordnlp/imdb"}
    assert data_of(settings).hub_name == "stanfordnlp/imdb"
    assert data_of({**settings, "data.init_args.dataset": "/home/me/imdb"}).hub_name is None
