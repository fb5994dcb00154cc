import pytest

from geolora_pl.report.public import data_of, public_settings


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
    assert public_settings({name: value}) == {name: text}


def test_the_data_source_is_named_if_it_is_one_of_this_package():
    assert data_of({"data.class_path": "mine.Data"}) is None
    assert data_of({}) is None
    glue = data_of({"data.class_path": "geolora_pl.data.GLUE", "data.init_args.task": "sst2"})
    assert (glue.name, glue.hub_name) == ("GLUE sst2", None)
    settings = {"data.class_path": "geolora_pl.data.TextHub", "data.init_args.dataset": "stanfordnlp/imdb"}
    assert data_of(settings).hub_name == "stanfordnlp/imdb"
    assert data_of({**settings, "data.init_args.dataset": "/home/me/imdb"}).hub_name is None
