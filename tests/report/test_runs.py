import pytest
from foreign import ADAPTER, Foreign, loader, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from geolora_pl import GeoLoRACallback
from geolora_pl.loggers import CSVLogger as GrowingCSVLogger
from geolora_pl.report.runs import read_run, read_runs


def fit(folder, logger):
    made = logger(folder, name="", version="")
    checkpoint = ModelCheckpoint(folder / "checkpoints", save_last=True, every_n_train_steps=4, save_top_k=-1)
    callback = GeoLoRACallback(tau=0.05, adapter=ADAPTER)
    trainer(callback, checkpoint, logger=made, log_every_n_steps=2, max_epochs=2).fit(Foreign(), loader(), loader())
    return callback.integrator


def write(folder, text, name="metrics.csv"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger])
def test_a_run_is_read_from_its_table_or_its_events(tmp_path, logger):
    integrator = fit(tmp_path / "run", logger)
    (tmp_path / "run" / "checkpoints" / "sharded.ckpt").mkdir()
    run = read_run(tmp_path / "run")
    assert run.name == "run"
    assert {name: curve[-1][1] for name, curve in run.ranks.items()} == integrator.ranks()
    assert [step for step, _ in run.ranks["body.0"]] == [0, 0, *range(1, 12)]
    assert set(run.scores) == {"train_loss", "val_loss"}
    assert [step for step, _ in run.curves["val_loss"]] == [5, 11]
    assert run.curves["geolora/adapter_params"][-1] == (11, integrator.adapter_parameters())
    assert [path.name for path in run.checkpoints][-1] == "last.ckpt"
    assert len(run.checkpoints) == 4


def test_of_what_was_written_twice_the_later_counts(tmp_path):
    write(tmp_path, "step,train_loss\n0,9\n10,8\n20,7\n30,6\n", "metrics.1.csv")
    write(tmp_path, "step,train_loss,val_loss\n20,5,\n40,4,\n40,,3\n", "metrics.2.csv")
    write(tmp_path, "step,test_loss\n0,1\n", "metrics.csv")  # of a test, which is no training
    curves = read_run(tmp_path).curves
    assert curves["train_loss"] == [(0, 9), (10, 8), (20, 5), (40, 4)]
    assert curves["val_loss"] == [(40, 3)]
    assert curves["test_loss"] == [(0, 1)]


def test_another_run_in_the_same_folder_is_read_alone(tmp_path):
    write(
        tmp_path, "step,train_loss,geolora/mean_rank,rank/a,rank/dead\n0,,2,2,2\n1,9,,,\n40,8,3,3,3\n", "metrics.1.csv"
    )
    write(tmp_path, "step,train_loss,geolora/mean_rank,rank/a\n0,,4,4\n5,7,,\n10,6,5,5\n")
    run = read_run(tmp_path)
    assert run.curves["train_loss"] == [(5, 7), (10, 6)]
    assert run.ranks == {"a": [(0, 4), (10, 5)]}


def test_a_validation_or_a_test_after_the_fit_leaves_its_curves(tmp_path):
    write(tmp_path, "step,val_loss,geolora/mean_rank\n0,,2\n10,5,3\n20,4,3\n", "metrics.1.csv")
    write(tmp_path, "step,val_loss,val_score\n0,1,2\n", "metrics.2.csv")  # of ``validate``, which counts from 0
    write(tmp_path, "step,test_loss\n0,3\n")
    curves = read_run(tmp_path).curves
    assert curves["val_loss"] == [(10, 5), (20, 4)]
    assert curves["val_score"] == [(0, 2)]
    assert curves["test_loss"] == [(0, 3)]


@pytest.mark.parametrize("logger", [GrowingCSVLogger, TensorBoardLogger])
def test_a_run_and_what_follows_in_its_folder(tmp_path, logger):
    fit(tmp_path, logger)
    first = read_run(tmp_path).curves
    again = trainer(GeoLoRACallback(adapter=ADAPTER), logger=logger(tmp_path, name="", version=""))
    again.validate(Foreign(), loader(), verbose=False)
    assert read_run(tmp_path).curves == first
    callback = GeoLoRACallback(tau=0.05, adapter=ADAPTER)
    other = trainer(callback, logger=logger(tmp_path, name="", version=""), log_every_n_steps=3, max_epochs=1)
    other.fit(Foreign(), loader())
    assert [step for step, _ in read_run(tmp_path).ranks["body.0"]] == [0, 0, *range(1, 6)]
    assert "val_loss" not in read_run(tmp_path).curves


@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger])
def test_ranks_at_the_start_stay_where_the_first_step_is_logged_too(tmp_path, logger):
    callback = GeoLoRACallback(tau=0.05, adapter=ADAPTER, adapt_every=1)
    runs = trainer(callback, logger=logger(tmp_path, name="", version=""), log_every_n_steps=1, max_steps=3)
    runs.fit(Foreign(), loader())
    curves = read_run(tmp_path).curves
    assert curves["rank/body.0"][0] == (0, 2)
    assert [step for step, _ in curves["rank/body.0"]] == [0, 0, 1, 2]
    assert [step for step, _ in curves["train_loss"]] == [0, 1, 2]


def test_parts_are_taken_up_in_the_order_of_their_numbers(tmp_path):
    for number in range(1, 12):
        write(tmp_path, f"step,a\n0,{number}\n", f"metrics.{number}.csv")
    assert read_run(tmp_path).curves["a"] == [(0, 11)]


def test_values_that_are_not_finite_are_left_out(tmp_path):
    assert read_run(write(tmp_path, "step,a\n0,nan\n1,2\n2,inf\n")).curves == {"a": [(1, 2)]}


def test_settings_are_flat(tmp_path):
    write(tmp_path, "step,a\n0,1\n")
    text = "geolora: {tau: 0.2}\ntrainer:\n  callbacks: [{class_path: X}]\nlist: [1, 2]\nempty: {}\n"
    write(tmp_path, text, "config.yaml")
    expected = {"geolora.tau": 0.2, "trainer.callbacks.0.class_path": "X", "list": [1, 2], "empty": {}}
    assert read_run(tmp_path).settings == expected


def test_a_run_from_before_names_had_groups_is_read_by_those_of_today(tmp_path):
    write(tmp_path, "step,rank/mean,adapter_params,rank/a\n0,2,84,2\n0,3,90,3\n9,4,99,4\n")
    run = read_run(tmp_path)
    assert run.curves["geolora/mean_rank"] == [(0, 2), (0, 3), (9, 4)]
    assert run.curves["geolora/adapter_params"][-1] == (9, 99)
    assert list(run.ranks) == ["a"]


def test_names_tell_runs_apart(tmp_path):
    folders = [write(tmp_path / a / "version_0", "step,a\n0,1\n") for a in ("one", "two")]
    assert [run.name for run in read_runs(folders)] == ["one/version_0", "two/version_0"]
    assert [run.name for run in read_runs(folders[:1])] == ["version_0"]


@pytest.mark.parametrize("last", ["1", "1,", "10,0.", ",", "1e", "1,0"])
def test_a_last_line_cut_short_is_left_out(tmp_path, last):
    write(tmp_path, f"step,a,b\n0,1,2\n5,3,4\n{last}")
    assert read_run(tmp_path).curves == {"a": [(0, 1), (5, 3)], "b": [(0, 2), (5, 4)]}


def test_one_path_is_one_run(tmp_path):
    write(tmp_path, "step,a\n0,1\n")
    for path in (tmp_path, str(tmp_path)):
        assert [run.folder for run in read_runs(path)] == [tmp_path]
    with pytest.raises(ValueError, match=r"runs=\[\] names no run"):
        read_runs([])


def test_bad_folders_are_refused_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match="gone' is not a folder"):
        read_run(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"holds neither metrics.csv nor TensorBoard's events: train with the logger"):
        read_run(tmp_path)
    inside = write(tmp_path / "logs" / "version_3", "step,a\n0,1\n")
    with pytest.raises(ValueError, match=r"its folder 'version_3' does"):
        read_run(tmp_path / "logs")
    with pytest.raises(ValueError, match=r"its folder 'logs/version_3' does"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="is given twice"):
        read_runs([inside, inside / ".." / "version_3"])
    for text in ("a,b\n1,2\n", "step,a\n0,much\n", "step,a\nx,1\n"):
        with pytest.raises(ValueError, match=r"metrics.csv is not a table of metrics of Lightning"):
            read_run(write(inside, text))
    for content in (
        b"step,a\n0,\xff\n",
        b"step,a\n0," + b"1" * 200_000 + b"\n",
    ):  # no UTF-8; a field beyond what csv takes
        (inside / "metrics.csv").write_bytes(content)
        with pytest.raises(ValueError, match=r"metrics.csv is not a table of metrics of Lightning"):
            read_run(inside)
    write(inside, "step,a\n0,1\n")
    write(inside, "a: [", "config.yaml")
    with pytest.raises(ValueError, match=r"config.yaml is not YAML"):
        read_run(inside)
    (inside / "config.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ValueError, match=r"config.yaml is not YAML"):
        read_run(inside)
