import argparse
import contextlib
import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from foreign import ADAPTER, Foreign, loader, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from geolora_pl import GeoLoRACallback
from geolora_pl.cli.dispatch import main
from geolora_pl.report.write import write_report

VOID = {"meta", "br", "img", "link", "use", "path"}


class Page(HTMLParser):
    """What a page holds; its elements must be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.elements, self.words = [], [], []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data):
        self.words.append(data.strip())

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of different tau."""
    folder = tmp_path_factory.mktemp("runs")
    for tau in (0.05, 0.5):
        home = folder / f"tau<{tau}>"
        checkpoint = ModelCheckpoint(home / "checkpoints", save_last=True, save_top_k=0)
        callback = GeoLoRACallback(tau=tau, adapter=ADAPTER)
        logger = CSVLogger(home, name="", version="")
        runs = trainer(callback, checkpoint, logger=logger, log_every_n_steps=2, max_epochs=3)
        runs.fit(Foreign(), loader(), loader())
        (home / "config.yaml").write_text(yaml.safe_dump({"geolora": {"tau": tau, "min_rank": 1}}))
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def about_one(runs, tmp_path_factory):
    """The page about the first run, which is made once because its pictures take a second."""
    return write_report(runs[:1], tmp_path_factory.mktemp("one") / "page.html").read_text()


@pytest.fixture(scope="module")
def about_two(runs, tmp_path_factory):
    """The page that compares the two runs, as the command makes it, and what the command prints."""
    target = tmp_path_factory.mktemp("two") / "page.html"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(["report", "--run", str(runs[0]), "--run", str(runs[1]), "--output", str(target)])
    assert f"{target}: open it" in printed.getvalue()
    return target.read_text()


@pytest.fixture
def plain(tmp_path):
    """Two runs of one metric each, whose page has few pictures."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
        (folder / "metrics.csv").write_text("step,accuracy\n0,0.5\n1,0.6\n")
    return folders


def test_a_page_about_one_run(about_one):
    text, page = about_one, Page(about_one)
    assert [len(page.all(tag)) for tag in ("html", "title", "h1", "main")] == [1, 1, 1, 1]
    assert "Run tau<0.05>" in page.words
    assert {"Learning curves", "Ranks", "Retractions", "Files", "last.ckpt", "geolora.tau", "0.05"} <= set(page.words)
    assert {"Foreign on TensorDataset", "tau 0.05", "Rounding errors"} <= set(page.words)
    pictures = page.all("svg")
    assert len(pictures) == len(page.all("figure")) == 1 + 2 + 6 + 3
    said = " ".join(picture["aria-label"] for picture in pictures)
    for part in (
        "train_loss from ",
        "val_loss from ",
        "Rank map at the end: from ",
        "Mean rank over steps",
        "Singular",
        "What each update would lose at a lower rank, with tau 0.05",
        "learning rate, by its highest over steps: pg1 0.01 from 1 at step 0 to 1 at step 17",
        "gradient norm, after clipping over steps: ",
    ):
        assert part in said
    assert "adapter parameters over steps: geolora/adapter_params from 84 at step 0 to " in said
    assert all(picture["role"] == "img" for picture in pictures)
    assert text.count("<caption>") == len(page.all("table")) >= 3
    assert "Comparison" not in page.words


def test_it_needs_nothing_from_elsewhere(about_two):
    text, page = about_two, Page(about_two)
    assert not re.search(r"://|@import|url\((?!#)", text)
    assert not [attrs for tag in ("script", "link", "iframe", "img") for attrs in page.all(tag)]
    inside = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
    for _, attrs in page.elements:
        for name in ("href", "xlink:href"):
            if name in attrs:
                assert attrs[name].removeprefix("#") in inside
    for name in re.findall(r"url\(#([^)]+)\)", text):
        assert name in inside


def test_colours_are_variables_with_a_dark_half(about_one):
    text = about_one
    light, _, dark = text.partition("@media (prefers-color-scheme: dark)")
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    assert used <= set(re.findall(r"(--[\w-]+):", light))
    assert used <= set(re.findall(r"(--[\w-]+):", dark.partition("* {")[0]))


def test_several_runs_are_compared(about_two):
    text, page = about_two, Page(about_two)
    assert {"2 runs", "Comparison", "tau<0.05>", "tau<0.5>"} <= set(page.words)
    table = text.partition("<table>")[2].partition("</table>")[0]
    head = re.findall(r'<th scope="col">(.*?)</th>', table)
    assert head == ["run", "val_loss", "adapter parameters", "mean rank", "steps", "geolora.tau"]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)][1:]
    assert [(row[0], row[-1]) for row in rows] == [("tau&lt;0.05&gt;", "0.05"), ("tau&lt;0.5&gt;", "0.5")]
    assert all(float(cell) > 0 for row in rows for cell in row[1:])
    assert rows[0][4] == "18"
    said = [picture["aria-label"] for picture in page.all("svg")]
    assert any(s.startswith("mean rank over steps: tau<0.05> from 2 ") and "; tau<0.5> from 2 " in s for s in said)


def test_a_list_is_several_and_the_page_lies_in_the_first(plain):
    main(["report", "--run", *map(str, plain)])
    assert "2 runs" in (plain[0] / "report.html").read_text()
    main(["report", "--run", str(plain[0])])  # a report may be made again
    assert "2 runs" not in (plain[0] / "report.html").read_text()


def test_a_run_of_metrics_alone_has_a_page(plain):
    page = Page(write_report(plain[:1]).read_text())
    assert "Ranks" not in page.words
    assert len(page.all("svg")) == 1


def tile(run, title):
    """What a page about one run says under a title."""
    text = write_report([run], run / "tile.html").read_text()
    return re.search(rf"<dt>{re.escape(title)}</dt><dd>(.*?)</dd>", text)[1]


@pytest.mark.parametrize("ranks", ["", "2"])
def test_a_test_after_the_fit_is_no_step(tmp_path, ranks):
    (tmp_path / "metrics.csv").write_text(
        f"step,loss,test_loss,geolora/mean_rank\n0,1,,{ranks}\n9,1,,{ranks}\n10,,1,\n"
    )
    assert tile(tmp_path, "steps") == "10"


def test_of_a_validation_both_ends_are_said_for_nobody_knows_which_is_better(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,val_calibration\n1,0.5\n2,0.1\n3,0.9\n4,0.4\n")
    assert tile(tmp_path, "val_calibration") == "0.4 <small>lowest 0.1 at step 2, highest 0.9 at step 3</small>"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("val_accuracy", "best 0.9 at step 3"),
        ("val_loss", "best 0.1 at step 2"),
        ("val_f1_mismatched", "best 0.9 at step 3"),
        ("validation/perplexity", "best 0.1 at step 2"),
    ],
)
def test_of_a_score_the_best_value_is_said(tmp_path, name, said):
    (tmp_path / "metrics.csv").write_text(f"step,{name}\n1,0.5\n2,0.1\n3,0.9\n4,0.4\n")
    assert tile(tmp_path, name) == f"0.4 <small>{said}</small>"


def test_what_chose_the_checkpoints_says_which_way_is_better(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,val_calibration\n1,0.5\n2,0.1\n3,0.9\n4,0.4\n")
    (tmp_path / "run.json").write_text('{"better.val_calibration": "min"}')
    assert tile(tmp_path, "val_calibration") == "0.4 <small>best 0.1 at step 2</small>"


def test_checkpoints_have_epoch_steps_and_score(runs):
    text = write_report([runs[0]], runs[0] / "kept.html").read_text()
    head, row = re.search(r"Checkpoints, oldest first</caption>(.*?)</table>", text)[1].split("<tbody>")
    assert re.findall(r'<th scope="col">(.*?)</th>', head) == ["checkpoint", "epoch", "steps", "val_loss", "size"]
    name, epoch, steps, loss, _ = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)
    assert (name, epoch, steps) == ("last.ckpt", "2", "18")
    assert loss == re.search(r"<dt>val_loss</dt><dd>([\d.]+)", text)[1]


def test_many_metrics_are_some_figures_and_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr("geolora_pl.report.page._FIGURES", 3)
    names = [f"train_{i}" for i in range(5)] + ["val_score"]
    for run in (tmp_path / "one", tmp_path / "two"):
        run.mkdir()
        rows = [",".join([str(step), *(str(step + i) for i in range(len(names)))]) for step in range(3)]
        (run / "metrics.csv").write_text("\n".join([",".join(["step", *names]), *rows, ""]))
    text = write_report(tmp_path / "one").read_text()
    page = Page(text)
    said = [picture["aria-label"] for picture in page.all("svg")]
    assert len(said) == 3
    assert any(label.startswith("score over steps") for label in said)  # before the rest
    assert '<th scope="row">train_4</th><td>4</td><td>6</td><td>4</td><td>6</td>' in text
    assert "3 further metrics" in page.words
    several = Page(write_report([tmp_path / "one", tmp_path / "two"], tmp_path / "page.html").read_text())
    assert len(several.all("svg")) == 3 * 3
    assert "3 further metrics are in the sections of the runs" in several.words


def test_a_checkpoint_that_cannot_be_read_costs_its_picture_alone(runs, tmp_path):
    whole = torch.load(runs[0] / "checkpoints" / "last.ckpt", weights_only=True)
    (tmp_path / "metrics.csv").write_text((runs[0] / "metrics.csv").read_text())
    (tmp_path / "checkpoints").mkdir()
    target = tmp_path / "checkpoints" / "last.ckpt"
    for spoil in (
        lambda: target.write_bytes(b"half of a checkpoint"),
        lambda: torch.save(whole | {"hyper_parameters": argparse.Namespace(width=3)}, target),
    ):
        spoil()
        page = Page(write_report([tmp_path]).read_text())
        assert (
            "last.ckpt cannot be read, or holds more than plain values: its singular values are left out" in page.words
        )
        said = [picture["aria-label"] for picture in page.all("svg")]
        assert any(s.startswith("Rank map at the end") for s in said)
        assert not any(s.startswith("Singular values") for s in said)


def refusal(arguments, capfd):
    with pytest.raises(SystemExit) as stop:
        main(["report", *arguments])
    assert stop.value.code == 1
    return capfd.readouterr().err


def test_the_users_mistakes_are_one_sentence(runs, tmp_path, capfd):
    assert refusal(["--run", "gone"], capfd).startswith("error: run='gone' is not a folder")
    own = tmp_path / "own.html"
    own.write_text("mine")
    assert "own.html' is there already and is not a report" in refusal(
        ["--run", str(runs[0]), "--output", str(own)], capfd
    )
    assert own.read_text() == "mine"


def test_what_the_system_refuses_is_one_sentence(plain, tmp_path, capfd, monkeypatch):
    closed = tmp_path / "closed"
    closed.mkdir()

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(closed))

    with monkeypatch.context() as patch:
        patch.setattr("tempfile.mkdtemp", refuse)
        said = refusal(["--run", str(plain[0]), "--output", str(closed / "page.html")], capfd)
    assert said == f"error: output='{closed / 'page.html'}' cannot be written (Permission denied): name another file\n"
    (tmp_path / "metrics.csv").touch()
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: refuse())
    said = refusal(["--run", str(tmp_path)], capfd)
    what = f"({closed}: Permission denied)"
    assert said == f"error: run='{tmp_path}' cannot be read {what}: correct that, or name another folder\n"


def test_without_matplotlib_the_remedy_is_said(runs, tmp_path, capfd, monkeypatch):
    for module in [m for m in sys.modules if m.partition(".")[0] == "matplotlib" or m in PICTURES]:
        monkeypatch.delitem(sys.modules, module)
    for name in PICTURES:
        monkeypatch.delattr(name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    err = refusal(["--run", str(runs[0]), "--output", str(tmp_path / "page.html")], capfd)
    assert err == "error: a report needs matplotlib: pip install 'geolora_pl[report]'\n"


PICTURES = {f"geolora_pl.report.{name}" for name in ("page", "figures", "html", "classes", "checkpoints")}
