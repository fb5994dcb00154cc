"""What users have reported of runs, files and the command line, each as it must be."""

import os
import threading

import pytest
import torch
from torch import nn

from geolora_pl import export_peft, inject_adapters
from geolora_pl.lightning.checkpoint_io import WholeFiles
from geolora_pl.storage.atomic import atomic


def adapted():
    model = nn.Sequential(nn.Linear(8, 8))
    inject_adapters(model)
    return model


# Files: what is written replaces nothing but what it stands for


def test_two_runs_in_one_folder_do_not_break_each_others_checkpoint(tmp_path):
    """Two runs saved last.ckpt into one folder at the same time. Neither fails, and the file is one of theirs."""
    files, errors = WholeFiles(nn.Linear(1, 1)), []

    def save(value):
        try:
            for _ in range(20):
                files.save_checkpoint({"a": torch.full((2000,), value)}, tmp_path / "last.ckpt")
        except OSError as error:
            errors.append(error)

    runs = [threading.Thread(target=save, args=(float(value),)) for value in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert not errors
    assert len(torch.load(tmp_path / "last.ckpt", weights_only=True)["a"].unique()) == 1
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_a_planted_link_is_not_followed(tmp_path):
    """Somebody put a link under the temporary name of a checkpoint. What it leads to stays as it is."""
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".last.ckpt.part").symlink_to(tmp_path / "precious")
    WholeFiles(nn.Linear(1, 1)).save_checkpoint({"a": 1}, tmp_path / "last.ckpt")
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_link_at_the_target_stays_a_link(tmp_path):
    """A user's output was a link to another disk. The file it leads to is written, and the link is kept."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    with atomic(tmp_path / "out") as unfinished:
        unfinished.write_text("whole")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "out").read_text() == "whole"


def test_overwriting_an_export_deletes_nothing_else(tmp_path):
    """A user gave overwrite=True and a folder of other files by mistake. It is refused, and an earlier export is not."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds thesis\.tex, which is no part of what is written .* another folder"):
        export_peft(adapted(), tmp_path / "docs", overwrite=True)
    assert os.listdir(tmp_path) == ["docs"]
    assert (tmp_path / "docs" / "thesis.tex").read_text() == "years of work"
    for _ in range(2):
        export_peft(adapted(), tmp_path / "lora", overwrite=True)


def test_the_folder_in_which_one_works_is_not_replaced(tmp_path, monkeypatch):
    """A user exported to ../work from within work. The folder was left hidden; now it is refused and stays."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(ValueError, match="is the folder in which you work"):
        export_peft(adapted(), "../work", overwrite=True)
    assert os.listdir(tmp_path) == ["work"]


def test_a_file_is_not_replaced_by_a_folder(tmp_path):
    """A user named a file as the output of an export with overwrite=True. It stays, and the message says so."""
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(ValueError, match="is a file, but a folder must be written"):
        export_peft(adapted(), tmp_path / "notes.txt", overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "notes"
