"""What is broken is refused before the first step, in one sentence that says what, and nothing is left behind."""

import errno
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from flags import LIMITS
from image_files import write_idx
from PIL import Image
from safetensors.torch import save_file
from tiny_text import save_tiny_model
from torch import nn

from geolora_pl import (
    AdapterConfig,
    GeoLoRACallback,
    GeoLoRAModule,
    GeoLoRAWarning,
    RankAdaptiveIntegrator,
    inject_adapters,
)
from geolora_pl.cli.configuration import check_configuration
from geolora_pl.cli.dispatch import main
from geolora_pl.storage.checkpoint import read_checkpoint

pytestmark = pytest.mark.usefixtures("one_parser")
ROOT = Path(__file__).parents[2]
# Loggers and callbacks are classes of their own to parse: without them, a command takes two thirds of the time.
TRAINER = {"trainer": {**LIMITS, "logger": False, "default_root_dir": "lightning_logs"}, "test_after_fit": False}
SMALL = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text()) | TRAINER
MODEL, ADAPTER, DATA = "--model.init_args.", "--model.init_args.adapter.", "--data.init_args."
OPTIMIZER = "--model.init_args.optimizer"
RIEMANNIAN = f"{OPTIMIZER}=geolora_pl.RiemannianAdam"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder that sees the configurations and keeps its runs to itself."""
    monkeypatch.chdir(prepared(tmp_path))
    return tmp_path


def prepared(folder: Path) -> Path:
    """Put the project's configurations, and those that are quick to parse, into a folder."""
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL))
    (folder / "trainer.yaml").write_text(yaml.safe_dump(TRAINER))
    return folder


def refuse(capfd, message: str, arguments: list[str]) -> None:
    """Run the command line and hold it to the promise."""
    with pytest.raises((SystemExit, ValueError)) as stop:
        main(arguments)
    if isinstance(stop.value, SystemExit):
        assert stop.value.code == 2
        said, see = capfd.readouterr().err.strip().removeprefix("error: ").rsplit("\n", 1)
        assert see.startswith("see: ")
    else:
        said = str(stop.value)
    assert re.search(message, said), said
    assert "\n" not in said
    files = [path.name for path in Path("lightning_logs").rglob("*") if path.is_file()]
    left = [name for name in files if not name.startswith("events.out") and name not in ("config.yaml", "hparams.yaml")]
    assert not left, "training began, or a file was left"


def quickstart(*more: str) -> list[str]:
    limits = [f"--trainer.{name}={str(value).lower()}" for name, value in LIMITS.items()]
    return ["fit", "--config", "configs/quickstart.yaml", *limits, "--test_after_fit=false", *more]


def small(*more: str) -> list[str]:
    """The quickstart without loggers and callbacks."""
    return ["fit", "--config=small.yaml", *more]


SETTINGS = [
    # names
    pytest.param(["--geolora.tua=0.1"], r"'geolora\.tua': did you mean 'geolora\.tau'\?", id="unknown-geolora"),
    pytest.param(["--geolra.tau=0.1"], r"did you mean 'geolora\.tau'\?", id="unknown-group"),
    pytest.param(["--geolora.t=0.1"], r"no setting 'geolora\.t'", id="no-abbreviations"),
    pytest.param(["--trainer.max_epoch=3"], r"did you mean 'trainer\.max_epochs'\?", id="unknown-trainer"),
    pytest.param([f"{MODEL}lable_smoothing=0.1"], r"did you mean 'label_smoothing'\?", id="unknown-model"),
    pytest.param([f"{ADAPTER}max_rnk=3"], r"did you mean 'adapter\.max_rank'\?", id="unknown-adapter"),
    pytest.param([f"{DATA}batchsize=3"], r"did you mean 'batch_size'\?", id="unknown-data"),
    pytest.param(
        [RIEMANNIAN, f"{OPTIMIZER}.init_args.larning_rate=1"],
        r"no setting 'larning_rate' in .*optimizer.*there are params, lr, betas, eps, weight_decay, geometry",
        id="unknown-optimizer-argument",
    ),
    pytest.param(["--data=geolora_pl.data.Digit"], r"data: .* did you mean 'Digits'\?", id="unknown-data-class"),
    pytest.param(["--model=geolora_pl.tasks.Nope"], r"no Nope in geolora_pl\.tasks: .*Image", id="unknown-task"),
    pytest.param(["--trainer.max_epochs"], r"max_epochs: expected one argument", id="value-left-out"),
    # geolora
    pytest.param(["--geolora.tau=high"], r"geolora\.tau=high must be a finite number", id="tau-word"),
    pytest.param(["--geolora.tau=nan"], r"geolora\.tau=nan must be a finite number", id="tau-nan"),
    pytest.param(["--geolora.tau=null"], r"geolora\.tau=None must be a finite number", id="tau-null"),
    pytest.param(["--geolora.tau=-0.1"], r"tau=-0\.1 must lie in \[0, 1\)", id="tau-negative"),
    pytest.param(["--geolora.tau=1"], r"tau=1\.0 must lie in \[0, 1\)", id="tau-one"),
    pytest.param(["--geolora.budget=0"], r"budget=0 must be a whole number", id="budget-zero"),
    pytest.param(["--geolora.budget=1.5"], r"geolora\.budget=1\.5 must be a whole number", id="budget-fraction"),
    pytest.param(["--geolora.budget=lots"], r"geolora\.budget=lots must be a whole number", id="budget-word"),
    pytest.param(["--geolora.budget=10"], r"budget=10 is below the floor of \d+.*raise budget", id="budget-floor"),
    pytest.param(["--geolora.min_rank=-1"], r"min_rank=-1 must be .* at least 0", id="min-rank-negative"),
    pytest.param(["--geolora.min_rank=17"], r"min_rank=17 is above .* 16: lower it", id="min-rank-above"),
    pytest.param(["--geolora.min_rank=1.5"], r"geolora\.min_rank=1\.5 must be a whole", id="min-rank-fraction"),
    pytest.param(["--geolora.adapt_every=0"], r"adapt_every=0 must be .* at least 1", id="cadence-zero"),
    pytest.param(["--geolora.adapt_every=3"], r"adapt_every=3 is longer .* lower it to at most 2", id="cadence-long"),
    pytest.param(["--geolora.adapt_until=0"], r"adapt_until=0\.0 must lie in \(0, 1\]", id="until-zero"),
    pytest.param(["--geolora.adapt_until=2"], r"adapt_until=2\.0 must lie in \(0, 1\]", id="until-two"),
    pytest.param(
        ["--geolora.adapt_until=0.5", "--trainer.max_epochs=-1"], r"without an end: set max_steps", id="until-no-end"
    ),
    pytest.param(["--geolora.adapter.max_rank=8"], r"say what to adapt in one of the two places", id="adapter-twice"),
    # adapter
    pytest.param([f"{ADAPTER}max_rank=0"], r"^max_rank=0 must be .* at least 1", id="max-rank-zero"),
    pytest.param([f"{ADAPTER}init_rank=0"], r"^init_rank=0 must be .* at least 1", id="init-rank-zero"),
    pytest.param([f"{ADAPTER}init_rank=20"], r"init_rank=20 is above max_rank=16: lower", id="init-above-max"),
    pytest.param([f"{ADAPTER}init_rank=two"], r"adapter\.init_rank=two must be a whole number", id="init-rank-word"),
    pytest.param([f"{ADAPTER}alpha=0"], r"^alpha=0\.0 must be a finite number above 0", id="alpha-zero"),
    pytest.param([f"{ADAPTER}alpha=nan"], r"adapter\.alpha=nan must be a finite number", id="alpha-nan"),
    pytest.param([f"{ADAPTER}dropout=1"], r"^dropout=1\.0 must lie in \[0, 1\)", id="dropout-one"),
    pytest.param([f"{ADAPTER}target_modules=[]"], r"target_modules=\[\] is empty: name layers", id="no-targets"),
    pytest.param(
        [f"{ADAPTER}target_modules=[gone]"],
        r"\['gone'\] matches no layer that can be adapted.*qkv",
        id="target-unknown",
    ),
    pytest.param([f"{ADAPTER}target_modules=[qkv,gone]"], r"'gone' matches none of .*qkv.*correct it", id="one-target"),
    pytest.param(
        [f"{ADAPTER}target_modules=(["], r"target_modules='\(\[' is not a regular expression", id="targets-regex"
    ),
    pytest.param([f"{ADAPTER}exclude_modules=[gone]"], r"exclude_modules='gone' matches none", id="exclude-unknown"),
    pytest.param([f"{ADAPTER}modules_to_save=[gone]"], r"modules_to_save='gone' matches no module.*head", id="saved"),
    pytest.param([f"{ADAPTER}modules_to_save=head"], r"modules_to_save=head must be a list", id="saved-no-list"),
    pytest.param(
        [f"{ADAPTER}target_modules=[qkv]", f"{ADAPTER}modules_to_save=[blocks.0.attn.qkv]"],
        r"qkv is in target_modules and in modules_to_save=.*drop one",
        id="adapted-and-saved",
    ),
    pytest.param([f"{ADAPTER}train_bias=some"], r"train_bias=some must be true or false or 'all'", id="train-bias"),
    pytest.param([f"{ADAPTER}rank_pattern={{qkv: 0}}"], r"rank_pattern\['qkv'\]=0 must be", id="pattern-zero"),
    pytest.param([f"{ADAPTER}rank_pattern={{gone: 2}}"], r"rank_pattern='gone' matches none", id="pattern-unknown"),
    # optimizer and schedule
    pytest.param([f"{MODEL}warmup=-1"], r"^warmup=-1\.0 must be at least 0", id="warmup-negative"),
    pytest.param([f"{MODEL}warmup=long"], r"model\.init_args\.warmup=long must be a finite number", id="warmup-word"),
    pytest.param([f"{MODEL}head_warmup=-1"], r"^head_warmup=-1\.0 must be at least 0", id="head-warmup"),
    pytest.param([f"{MODEL}head_lr=0"], r"^head_lr=0\.0 must be above 0", id="head-lr-zero"),
    pytest.param([f"{MODEL}head_lr=inf"], r"head_lr=inf must be a finite number", id="head-lr-infinite"),
    pytest.param([f"{OPTIMIZER}=torch.optim.Adamm"], r"no Adamm in torch\.optim: did you mean 'Adam'", id="optimizer"),
    pytest.param([f"{OPTIMIZER}=adam"], r"optimizer=adam is not a class .* give its path", id="optimizer-no-path"),
    pytest.param([f"{OPTIMIZER}=torch.nn.Linear"], r"'torch\.nn\.Linear' to be a subclass", id="optimizer-is-none"),
    pytest.param([f"{OPTIMIZER}=torch.optim.LBFGS"], r"optimizer: LBFGS .* use another", id="optimizer-lbfgs"),
    pytest.param([f"{OPTIMIZER}=torch.optim.Rprop"], r"Rprop keeps a history .* Adam family", id="optimizer-rprop"),
    pytest.param(
        [f"{OPTIMIZER}=torch.optim.SGD", f"{OPTIMIZER}.init_args.lr=-1"], r"optimizer: .* rate: -1\.0", id="lr-negative"
    ),
    pytest.param([RIEMANNIAN, f"{OPTIMIZER}.init_args.lr=nan"], r"init_args\.lr=nan must be a finite", id="lr-nan"),
    pytest.param([RIEMANNIAN, f"{OPTIMIZER}.init_args.lr=-1"], r"lr=-1\.0 must be at least 0", id="lr-below-zero"),
    pytest.param([RIEMANNIAN, f"{OPTIMIZER}.init_args.betas=[0.9,2]"], r"betas=\(0\.9, 2\.0\) must lie", id="betas"),
    pytest.param([RIEMANNIAN, f"{OPTIMIZER}.init_args.eps=-1"], r"eps=-1\.0 must be above 0", id="eps"),
    pytest.param([RIEMANNIAN, f"{OPTIMIZER}.init_args.weight_decay=-1"], r"weight_decay=-1\.0 must be", id="decay"),
    pytest.param(
        [RIEMANNIAN, f"{OPTIMIZER}.init_args.geometry=round"], r"geometry=round must be one of 'row", id="geometry"
    ),
    pytest.param(
        [f"{MODEL}lr_scheduler=torch.optim.lr_scheduler.StepLR"], r"lr_scheduler: .*required: step_size", id="scheduler"
    ),
    # task
    pytest.param([f"{MODEL}label_smoothing=3"], r"^label_smoothing=3\.0 must lie in \[0, 1\)", id="smoothing"),
    pytest.param([f"{MODEL}num_classes=0"], r"^num_classes=0 must be at least 1", id="no-classes"),
    pytest.param([f"{MODEL}num_classes=3"], r"num_classes=3 does not fit .* 10 classes: leave it out", id="classes"),
    pytest.param([f"{MODEL}model_name=vit_tinny"], r"model_name='vit_tinny' is not known to timm.*vit_", id="model"),
    pytest.param([f"{MODEL}model_args.depth=5"], r"does not fit the model: blocks\.4.* choose", id="weights-of-other"),
    pytest.param([f"{MODEL}model_args={{size: 3}}"], r"model_args=.* unexpected .*'size'; drop", id="model-args"),
    pytest.param([f"{MODEL}checkpoint_path=gone.pth"], r"checkpoint_path='gone\.pth' is not a file", id="weights-gone"),
    pytest.param([f"{MODEL}checkpoint_path=configs/quickstart.yaml"], r"cannot be read", id="weights-are-text"),
    # data
    pytest.param([f"{DATA}batch_size=0"], r"^batch_size=0 must be at least 1", id="batch-zero"),
    pytest.param([f"{DATA}batch_size=big"], r"data\.init_args\.batch_size=big must be a whole", id="batch-word"),
    pytest.param([f"{DATA}val_fraction=0"], r"val_fraction=0\.0 must lie between", id="fraction-zero"),
    pytest.param([f"{DATA}val_fraction=1e-9"], r"val_fraction=1e-09 of 1297 images is 0: choose", id="fraction-tiny"),
    pytest.param([f"{DATA}num_workers=-1"], r"num_workers=-1 must be at least 0", id="workers"),
    pytest.param([f"{DATA}augment={{flip: 3}}"], r"augment=.* does not suit .*'flip'", id="augment"),
    # trainer; -3 is -3.0 where a library asked typing for Union[float, int] before Lightning did for Union[int, float]
    pytest.param(["--trainer.precision=12"], r"trainer\.precision=12 must be .*'bf16-mixed'", id="precision"),
    pytest.param(["--trainer.max_epochs=x"], r"trainer\.max_epochs=x must be a whole number", id="epochs-word"),
    pytest.param(["--trainer.max_epochs=0"], r"max_epochs=0 leaves nothing to train: raise it", id="no-epochs"),
    pytest.param(["--trainer.max_steps=0"], r"max_steps=0 leaves nothing to train: raise it", id="no-steps"),
    pytest.param(["--trainer.limit_train_batches=0"], r"limit_train_batches=0 leaves nothing", id="no-batches"),
    pytest.param(["--trainer.limit_train_batches=-3"], r"-3(\.0)? for limit_train_batches", id="batches-negative"),
    pytest.param(["--trainer.val_check_interval=0"], r"val_check_interval=0 must be above 0", id="interval"),
    pytest.param(["--trainer.accumulate_grad_batches=0"], r"accumulate_grad_batches=0 must be at least 1", id="sums"),
    pytest.param(
        ["--trainer.gradient_clip_val=-1"], r"gradient_clip_val=-1(\.0)? must be at least 0", id="clip-negative"
    ),
    pytest.param(["--trainer.accelerator=abacus"], r"accelerator='abacus'.*Available", id="accelerator"),
    pytest.param(["--trainer.devices=0"], r"devices='0'", id="devices"),
    pytest.param(["--trainer.strategy=nope"], r"strategy='nope'", id="strategy"),
    pytest.param(["--seed_everything=-5"], r"seed_everything=-5 must be at least 0", id="seed-negative"),
    pytest.param(["--seed_everything=x"], r"seed_everything=x must be", id="seed-word"),
    pytest.param(["--test_after_fit=maybe"], r"test_after_fit=maybe must be true or false", id="test-after-fit"),
    # files
    pytest.param(["--config=gone.yaml"], r"gone\.yaml", id="config-gone"),
    pytest.param(["--config=configs"], r"Path is not a file", id="config-is-a-folder"),
    pytest.param(["--ckpt_path=gone.ckpt"], r"ckpt_path='gone\.ckpt' is not a file", id="checkpoint-gone"),
    pytest.param(["--ckpt_path=configs"], r"ckpt_path='configs' is a folder", id="checkpoint-is-a-folder"),
    pytest.param(["--ckpt_path=configs/quickstart.yaml"], r"ckpt_path=.* cannot be read", id="checkpoint-is-text"),
]


@pytest.mark.parametrize(("arguments", "message"), SETTINGS)
def test_a_setting_that_is_wrong(folder, capfd, arguments, message):
    refuse(capfd, message, small(*arguments))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("trainer: {max_epoch: 3}", r"did you mean 'trainer\.max_epochs'", id="unknown-trainer"),
        pytest.param("modle: 3", r"there is no setting 'modle': did you mean 'model'", id="unknown-section"),
        pytest.param("model: {init_args: {lable_smoothing: 3}}", r"did you mean 'label_smoothing'", id="unknown-model"),
        pytest.param("model: {init_args: {adapter: {max_rnk: 3}}}", r"'adapter\.max_rank'", id="unknown-adapter"),
        pytest.param("data: {init_args: {batch_size: many}}", r"batch_size=many must be a whole", id="wrong-type"),
        pytest.param("trainer: [1", r"own\.yaml is not YAML: .*line 1", id="no-yaml"),
        pytest.param(
            "trainer: {max_epochs: 3}\nmodel: {}\ntrainer: {precision: 16-mixed}\n",
            r"own\.yaml has 'trainer' in line 1 and again in line 3: .* join them",
            id="twice",
        ),
        pytest.param(
            "trainer:\n  max_epochs: 3\n  max_epochs: 4\n",
            r"'max_epochs' in line 2 and again in line 3",
            id="twice-inside",
        ),
        pytest.param(
            "trainer: {max_epochs: 3, max_epochs: 4}",
            r"'max_epochs' in line 1 and again in line 1",
            id="twice-in-a-line",
        ),
        pytest.param("", r"must hold settings by name, and not ''", id="empty"),
        pytest.param("- 1", r"must hold settings by name, and not '- 1'", id="a-list"),
    ],
)
def test_a_configuration_that_is_wrong(folder, capfd, text, message):
    Path("own.yaml").write_text(text)
    refuse(capfd, message, quickstart("--config=own.yaml"))


def test_a_configuration_may_merge_several_mappings_and_replace_what_they_say(tmp_path):
    """YAML's ``<<`` may come more than once, all of them count, and a key beside it is no second one."""
    file = tmp_path / "own.yaml"
    file.write_text("few: &few {max_epochs: 3}\nquiet: &quiet {logger: false}\ntrainer:\n  <<: *few\n  <<: *quiet\n")
    check_configuration(file)
    assert yaml.safe_load(file.read_text())["trainer"] == {"max_epochs": 3, "logger": False}
    file.write_text("few: &few {max_epochs: 3}\ntrainer:\n  <<: *few\n  max_epochs: 4\n")
    check_configuration(file)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_configuration_in_another_encoding_is_named(folder, capfd, encoding):
    """An editor saved a comment with an umlaut in Latin-1: it was said that byte 0xe4 cannot be decoded, of no file."""
    Path("own.yaml").write_text("# für uns\ntrainer: {max_epochs: 1}\n", encoding=encoding)
    refuse(capfd, r"own\.yaml is .* save it as UTF-8", quickstart("--config=own.yaml"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param([], r"no command: name one of quickstart, .*, fit, .*, completion", id="nothing"),
        pytest.param(["fitt"], r"'fitt' is not a command: did you mean 'fit'\?", id="unknown-command"),
        pytest.param(
            ["reprot", "--run", "x"], r"'reprot' is not a command: did you mean 'report'\?", id="not-lightnings"
        ),
        pytest.param(
            ["nonsense"], r"'nonsense' is not a command: name one of quickstart, init, fit, ", id="unlike-any"
        ),
        pytest.param(["fit"], r"required: fit\.data, fit\.model", id="no-model"),
        pytest.param(["fit", "--model=geolora_pl.tasks.ImageClassification"], r"required: model_name", id="no-name"),
    ],
)
def test_a_command_that_is_incomplete(folder, capfd, arguments, message):
    refuse(capfd, message, arguments)


@pytest.mark.slow
def test_the_process_ends_with_another_status_than_0(folder):
    command = [sys.executable, "-m", "geolora_pl", *quickstart("--geolora.tau=2")]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines()[-2] == (
        "error: tau=2.0 must lie in [0, 1): it is the relative part of an update that may be dropped"
    )


# Checkpoints


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run that went well."""
    made = tmp_path_factory.mktemp("run")
    before = Path.cwd()
    os.chdir(prepared(made))
    try:
        main(small("--trainer.default_root_dir=good"))
    finally:
        os.chdir(before)
    return made


def _truncated(good: Path, path: Path) -> None:
    path.write_bytes(good.read_bytes()[: good.stat().st_size // 2])


def _flipped(good: Path, path: Path) -> None:
    """One bit in the middle of the largest tensor."""
    content = bytearray(good.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _other_model(good: Path, path: Path) -> None:
    checkpoint = torch.load(good, weights_only=True)
    checkpoint["state_dict"] = {f"other.{name}": value for name, value in checkpoint["state_dict"].items()}
    torch.save(checkpoint, path)


def _other_shape(good: Path, path: Path) -> None:
    checkpoint = torch.load(good, weights_only=True)
    checkpoint["state_dict"]["model.head.weight"] = torch.zeros(3, 64)
    torch.save(checkpoint, path)


def _other_optimizer(good: Path, path: Path) -> None:
    checkpoint = torch.load(good, weights_only=True)
    (state,) = (state for name, state in checkpoint["callbacks"].items() if "GeoLoRA" in name)
    state["optimizer"] = "SGD"
    torch.save(checkpoint, path)


class Unsafe:
    """What a pickle may run code for."""


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda good, path: path.touch(), r"cannot be read: it is cut short", id="empty"),
        pytest.param(_truncated, r"bad\.ckpt' cannot be read: it is cut short.*earlier", id="truncated"),
        pytest.param(_flipped, r"bad\.ckpt' cannot be read: .* changed", id="one-bit-flipped"),
        pytest.param(
            lambda good, path: torch.save({"a": 1}, path), r"holds a and is not a checkpoint", id="other-dict"
        ),
        pytest.param(lambda good, path: torch.save([1], path), r"holds list and is not a checkpoint", id="a-list"),
        pytest.param(
            lambda good, path: torch.save(Unsafe(), path), r"holds objects that are not loaded", id="unsafe-pickle"
        ),
        pytest.param(
            lambda good, path: save_file({"0.U": torch.zeros(2, 2)}, path),
            r"not a checkpoint at all",
            id="adapter-file",
        ),
    ],
)
def test_a_checkpoint_that_is_broken(folder, capfd, run_folder, make, message, command):
    (good,) = (run_folder / "good").rglob("*.ckpt")
    make(good, folder / "bad.ckpt")
    refuse(capfd, message, [command, *small("--ckpt_path=bad.ckpt")[1:]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(_other_model, r"is missing.*; choose the checkpoint of such a model", id="other-names"),
        pytest.param(_other_shape, r"head\.weight is \(3, 64\) there and \(10, 64\) here", id="other-shape"),
        pytest.param(_other_optimizer, r"optimizer SGD and this run has RiemannianAdam", id="other-optimizer"),
    ],
)
def test_a_checkpoint_of_another_model(folder, capfd, run_folder, make, message):
    (good,) = (run_folder / "good").rglob("*.ckpt")
    make(good, folder / "other.ckpt")
    refuse(capfd, message, small("--trainer.max_epochs=2", "--ckpt_path=other.ckpt"))


class Regression(GeoLoRAModule):
    """The smallest module."""

    def build_model(self):
        return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))


def test_weights_that_do_not_fit_are_not_loaded_in_part():
    module = Regression(AdapterConfig(max_rank=4))
    module.configure_model()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for name, value in (("model.2.base.weight", torch.ones(2, 6)), ("unknown", torch.ones(1))):
        theirs = {key: torch.ones_like(old) for key, old in before.items()} | {name: value}
        with pytest.raises(ValueError, match="the weights do not fit this Regression"):
            module.load_state_dict(theirs)
        assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_a_good_checkpoint_is_read(run_folder):
    (good,) = (run_folder / "good").rglob("*.ckpt")
    assert read_checkpoint(good)["global_step"] == 2


def test_processes_of_torchrun_that_would_each_train_by_themselves(folder, capfd, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuse(capfd, r"torchrun started 2 processes and the trainer has 1: .* set trainer\.strategy=ddp", small())


@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available:UserWarning")  # Lightning would go on
@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_last_where_there_is_no_checkpoint_is_not_untrained_adapters(folder, command):
    message = r"ckpt_path='last': there is no last\.ckpt in lightning_logs/quickstart/checkpoints: give the path"
    with pytest.raises(ValueError, match=message):
        main([command, *quickstart("--ckpt_path=last")[1:], *(["--output=p.csv"] if command == "predict" else [])])


def test_a_checkpoint_without_permission(folder, run_folder, monkeypatch):
    (good,) = (run_folder / "good").rglob("*.ckpt")

    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # root may read everything
    with pytest.raises(ValueError, match=r"cannot be opened \(Permission denied\)"):
        read_checkpoint(good)


def test_no_space_left_while_saving_ends_the_run_and_leaves_the_checkpoint_before_it_whole(folder):
    main(quickstart())
    last = folder / "lightning_logs" / "quickstart" / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (len(before) // 2, limits[1])
    )  # a write stops half way, as on a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            main(quickstart("--trainer.max_epochs=2", "--ckpt_path=last"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert last.read_bytes() == before
    names = sorted(path.name for path in last.parent.iterdir())
    assert names == ["epoch=0-step=2.ckpt", "last.ckpt"]


# Images


def _tree(folder: Path, *splits: str) -> Path:
    for split in splits:
        for label in ("cat", "dog"):
            (folder / "tree" / split / label).mkdir(parents=True)
            for i in range(4):
                Image.new("L", (28, 28), i * 60).save(folder / "tree" / split / label / f"{i}.png")
    return folder / "tree"


def _without(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


def images(*more: str) -> list[str]:
    return small(
        "--data=geolora_pl.data.ImageFolder", "--data.init_args.folder=tree", "--data.init_args.val_fraction=0.5", *more
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(lambda tree: tree.rename("elsewhere"), r"folder='tree' must hold a folder 'train'", id="gone"),
        pytest.param(lambda tree: (tree / "train").rename("x"), r"must hold a folder 'train'", id="no-train"),
        pytest.param(
            lambda tree: [(tree / "train" / name).rename(name) for name in ("cat", "dog")],
            r"train is empty: it must hold one folder",
            id="no-classes",
        ),
        pytest.param(
            lambda tree: _without(tree / "train" / "cat"),
            r"train/cat holds no image: remove the folder",
            id="class-without-images",
        ),
        pytest.param(
            lambda tree: (tree / "val" / "cat").rename("x"),
            r"val and train have different classes: cat",
            id="other-classes",
        ),
    ],
)
def test_an_image_folder_that_is_broken(folder, capfd, spoil, message):
    spoil(_tree(folder, "train", "val"))
    refuse(capfd, message, images())


@pytest.mark.parametrize("content", [b"no image", b""], ids=["text", "empty"])
def test_an_image_that_cannot_be_read_is_named(folder, content):
    tree = _tree(folder, "train", "val")
    for path in (tree / "train").rglob("*.png"):
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train/(cat|dog)/\d\.png cannot be read as an image: .*replace or remove"):
        main(images())
    assert not list(folder.glob("lightning_logs/**/*.ckpt"))


def test_an_image_that_is_cut_short_is_named(folder):
    tree = _tree(folder, "train", "val")
    noise = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    for path in (tree / "val").rglob("*.png"):
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"val/(cat|dog)/\d\.png cannot be read as an image"):
        main(images())


def test_a_folder_without_permission(folder, capfd, monkeypatch):
    _tree(folder, "train")
    real = Path.iterdir

    def denied(path):
        if path.name == "train":  # root may list everything
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "iterdir", denied)
    refuse(capfd, r"train cannot be read: give yourself the permission", images())


def test_a_test_after_the_fit_that_there_is_nothing_for(folder, capfd):
    _tree(folder, "train", "val")
    refuse(
        capfd,
        r"test_after_fit=true and ImageFolder has no test split, it has train, val: set test_after_fit",
        images("--test_after_fit=true"),
    )


def _spoil_idx(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        pytest.param("train-images-idx3-ubyte", lambda b: b[:-1], r"cut short: .*; fetch it again", id="cut-short"),
        pytest.param("train-images-idx3-ubyte", lambda b: b[:6], r"cut short in its header: fetch", id="header"),
        pytest.param("train-images-idx3-ubyte", lambda b: b"", r"not an IDX file of bytes: fetch it again", id="empty"),
        pytest.param("train-images-idx3-ubyte", lambda b: b"PK" + b[2:], r"not an IDX file of bytes", id="other-kind"),
        pytest.param(
            "train-labels-idx1-ubyte",
            lambda b: b[:-1] + b"\x0a",
            r"train image 39 has label 10, and the 10 classes are 0 to 9: fix",
            id="label-range",
        ),
        pytest.param(
            "t10k-labels-idx1-ubyte",
            lambda b: b[:4] + b"\0\0\0\x0b" + b[8:-1],
            r"12 images and 11 labels: the files do not belong",
            id="label-missing",
        ),
        pytest.param(
            "t10k-images-idx3-ubyte",
            lambda b: b"\0\0\x08\x01\0\0\0\x0c" + b"\0" * 12,
            r"shape \(12,\) does not hold images",
            id="labels-for-images",
        ),
        pytest.param("train-images-idx3-ubyte", None, r"is missing, with and without \.gz", id="file-gone"),
        pytest.param("train-images-idx3-ubyte.gz", None, r"\.gz cannot be unpacked .*fetch it again", id="no-gzip"),
    ],
)
def test_idx_files_that_are_broken(folder, capfd, name, change, message):
    (folder / "idx").mkdir()
    for prefix, n in (("train", 40), ("t10k", 12)):
        write_idx(folder / "idx" / f"{prefix}-images-idx3-ubyte", np.zeros((n, 28, 28), dtype=np.uint8), False)
        write_idx(folder / "idx" / f"{prefix}-labels-idx1-ubyte", (np.arange(n) % 10).astype(np.uint8), False)
    plain = folder / "idx" / name.removesuffix(".gz")
    if change is None:
        plain.unlink()
        if name.endswith(".gz"):
            (folder / "idx" / name).write_bytes(b"no gzip")
    else:
        _spoil_idx(plain, change)
    refuse(capfd, message, small("--data=geolora_pl.data.FashionMNIST", "--data.init_args.folder=idx"))


def test_an_empty_split(folder, capfd):
    (folder / "idx").mkdir()
    for prefix, n in (("train", 40), ("t10k", 0)):
        write_idx(folder / "idx" / f"{prefix}-images-idx3-ubyte", np.zeros((n, 28, 28), dtype=np.uint8), False)
        write_idx(folder / "idx" / f"{prefix}-labels-idx1-ubyte", np.zeros(n, dtype=np.uint8), False)
    arguments = small("--data=geolora_pl.data.FashionMNIST", "--data.init_args.folder=idx")
    refuse(capfd, r"FashionMNIST has no test images: the split is empty", arguments)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param("CIFAR10", r"folder='gone': there is no gone/cifar-10-batches-py", id="cifar"),
        pytest.param("FashionMNIST", r"there is no folder gone; install", id="fashion-mnist"),
        pytest.param("TinyImageNet", r"folder='gone' has no wnids\.txt.*unpack", id="tiny-imagenet"),
    ],
)
def test_a_data_set_that_is_not_there(folder, capfd, data, message):
    refuse(capfd, message, small(f"--data=geolora_pl.data.{data}", "--data.init_args.folder=gone"))


def test_cifar_whose_files_are_broken(folder, capfd):
    (folder / "cifar" / "cifar-10-batches-py").mkdir(parents=True)
    arguments = small("--data=geolora_pl.data.CIFAR10", "--data.init_args.folder=cifar")
    refuse(capfd, r"cifar-10-batches-py is missing or broken; set download to true", arguments)


# Texts


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


GOOD = "text,label\n" + "good film,yes\nbad plot,no\n" * 8


def texts(tiny: str, *more: str) -> list[str]:
    return [
        "fit",
        "--config=trainer.yaml",
        "--model=geolora_pl.tasks.TextClassification",
        f"--model.init_args.model_name={tiny}",
        "--data=geolora_pl.data.TextFiles",
        "--data.init_args.train_file=train.csv",
        "--data.init_args.cache_dir=cache",
        "--data.init_args.val_fraction=0.5",
        *more,
    ]


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        pytest.param(None, [], r"train\.csv is not a file", id="gone"),
        pytest.param("", [], r"train\.csv is empty", id="empty"),
        pytest.param("text,label\n", [], r"train\.csv holds no rows", id="no-rows"),
        pytest.param("text,stars\na,b\n", [], r"has no column 'label'; it has 'text', 'stars'", id="no-label-column"),
        pytest.param("review,label\na,b\n", [], r"has no column 'text'; it has 'review'", id="no-text-column"),
        pytest.param(GOOD + "fine\n", [], r"train\.csv cannot be read: .*2 columns, got 1", id="field-missing"),
        pytest.param(GOOD + "fine,\n", [], r"row 17 has label='', which is none of the labels", id="label-missing"),
        pytest.param(
            "text,label\n" + "a,1.5\nb,2.5\n" * 8 + "c,nan\n",
            [],
            r"row 17 has label='nan', which is not a fin",
            id="label-nan",
        ),
        pytest.param("text,label\n" + "a,1.5\nb,2.5\n" * 8 + "c,inf\n", [], r"row 17 has label='inf'", id="label-inf"),
        pytest.param(
            GOOD,
            [f"{DATA}labels=[good,poor]"],
            r"row 1 has label='yes', which is none of the labels good",
            id="label-out-of-range",
        ),
        pytest.param(
            GOOD, [f"{DATA}labels=[good,good]"], r"labels=.* must name two or more classes", id="labels-twice"
        ),
        pytest.param("text,label\n" + "a,yes\n" * 8, [], r"every label is 'yes': there must be two", id="one-class"),
        pytest.param(GOOD + "fine,maybe\n", [], r"class 'maybe' has one text", id="class-of-one-text"),
        pytest.param(GOOD, [f"{DATA}text_column=label"], r"must be different columns", id="same-columns"),
        pytest.param(GOOD, [f"{DATA}train_file=configs/quickstart.yaml"], r"must end in one of \.csv", id="other-kind"),
        pytest.param(GOOD, [f"{DATA}val_file=gone.csv"], r"gone\.csv is not a file", id="val-gone"),
        pytest.param(GOOD, [f"{DATA}max_length=0"], r"max_length=0 must be at least 1", id="length-zero"),
        pytest.param(GOOD, [f"{DATA}max_length=2"], r"max_length=2 leaves no room .* 2 special", id="length-two"),
        pytest.param(GOOD, [f"{DATA}max_length=99"], r"max_length=99 is more than the 32 positions", id="too-long"),
        pytest.param(GOOD, [f"{DATA}val_fraction=0.01"], r"val_fraction=0\.01 of 16 texts is 0", id="fraction"),
        pytest.param(
            GOOD, [f"{MODEL}model_name=./gone"], r"model_name='\./gone': gone is not a folder", id="model-gone"
        ),
        pytest.param(GOOD, [f"{MODEL}model_name=configs"], r"model_name='configs' cannot be loaded", id="no-model"),
        pytest.param(GOOD, [f"{MODEL}metrics=[acuracy]"], r"metrics=\['acuracy'\] are not known: choose", id="metric"),
        pytest.param(GOOD, [f"{MODEL}metrics=[pearson]"], r"'pearson' does not suit 2 classes: choose", id="metrics"),
        pytest.param(GOOD, [f"{MODEL}class_weights=[1]"], r"class_weights=\[1\.0\] must be one weight", id="weights"),
        pytest.param(GOOD, [f"{MODEL}class_weights=[-1,1]"], r"class_weights=.* at least 0", id="weight-negative"),
        pytest.param(GOOD, [f"{MODEL}num_classes=3"], r"num_classes=3 does not fit .* 2 classes", id="classes"),
        pytest.param(GOOD, [f"{MODEL}model_args={{layers: 3}}"], r"no such settings", id="model-args"),
        pytest.param(GOOD, ["--test_after_fit=true"], r"TextFiles has no test split, it has train, val", id="no-test"),
        pytest.param(GOOD, [f"{DATA}seed=-1"], r"seed=-1 must be at least 0", id="seed"),
    ],
)
def test_texts_that_are_broken(folder, capfd, tiny, content, more, message):
    if content is not None:
        Path("train.csv").write_text(content)
    refuse(capfd, message, texts(tiny, *more))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("a.csv", b"text,label\n\xff\xfe,yes\n", r"a\.csv is not text in UTF-8 \(line 2: ", id="no-utf8"),
        pytest.param("a.parquet", b"PAR1 cut short", r"a\.parquet cannot be read: .*", id="parquet-truncated"),
        pytest.param("a.jsonl", b'{"text": "a", "label": ', r"one object per line", id="json-cut-short"),
        pytest.param("a.jsonl", json.dumps({"text": ["a"], "label": "b"}).encode(), r"must hold strings", id="nested"),
        pytest.param("a.jsonl", json.dumps({"text": "a"}).encode(), r"has no column 'label'", id="json-no-label"),
    ],
)
def test_tables_that_are_broken(folder, capfd, tiny, name, content, message):
    Path(name).write_bytes(content)
    refuse(capfd, message, texts(tiny, f"{DATA}train_file={name}"))


def test_a_table_without_permission(folder, capfd, tiny, monkeypatch):
    Path("train.csv").write_text(GOOD)
    real = os.access  # by which root may read everything
    monkeypatch.setattr(os, "access", lambda path, *mode: Path(path).name != "train.csv" and real(path, *mode))
    refuse(capfd, r"train\.csv cannot be read: give yourself the permission", texts(tiny))


def test_glue_without_its_files(folder, capfd, tiny):
    data = ["--data=geolora_pl.data.GLUE", "--data.init_args.task=rte", "--data.init_args.folder=gone"]
    refuse(capfd, r"folder='gone' must hold RTE/train\.tsv", texts(tiny, *data))


# In Python


class Plain(L.LightningModule):
    """A module that knows nothing of adapters."""

    def __init__(self, optimizers=1):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 1)
        self.count = optimizers
        self.automatic_optimization = optimizers == 1

    def training_step(self, batch):
        raise AssertionError("training began")

    def configure_optimizers(self):
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.count == 0:
            return torch.optim.SGD(self.head.parameters(), lr=0.1)
        parts = [trained] if self.count == 1 else [trained[:1], trained[1:]]
        return [torch.optim.SGD(part, lr=0.1) for part in parts]


def fit(module, callback, *others) -> None:
    trainer = L.Trainer(
        max_steps=4,
        callbacks=[callback, *others],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(8, 4), batch_size=2))


@pytest.mark.parametrize(
    ("optimizers", "adapter", "message"),
    [
        pytest.param(
            1, {"target_modules": ["gone"]}, r"matches no layer that can be adapted.*body, head", id="targets"
        ),
        pytest.param(1, {"target_modules": ["body"], "modules_to_save": ["haed"]}, r"'haed' matches .*head", id="head"),
        pytest.param(1, {"target_modules": ["head"], "modules_to_save": ["head"]}, r"drop one", id="head-adapted"),
        pytest.param(1, {"target_modules": "auto"}, r"'auto' is for a GeoLoRAModule", id="auto"),
        pytest.param(
            1,
            {"exclude_modules": ["body"]},
            r"matches no layer that can be adapted \(exclude_modules",
            id="all-excluded",
        ),
        pytest.param(0, {}, r"0 of the 1 optimizers hold adapters", id="optimizer-without-adapters"),
        pytest.param(2, {"target_modules": ["body", "head"]}, r"2 of the 2 optimizers hold", id="two-optimizers"),
    ],
)
def test_a_module_that_cannot_be_adapted(optimizers, adapter, message):
    with pytest.raises(ValueError, match=message):
        fit(Plain(optimizers), GeoLoRACallback(adapter=AdapterConfig(**adapter)))


def test_a_gradient_whose_square_overflows_is_named():
    model = nn.Sequential(nn.Linear(4, 4))
    layer = inject_adapters(model)["0"]
    integrator = RankAdaptiveIntegrator(model)
    optimizer = torch.optim.SGD([layer.K, layer.L], lr=0.1)
    layer.K.grad, layer.L.grad = torch.full_like(layer.K, 1e25), torch.zeros_like(layer.L)
    with pytest.warns(GeoLoRAWarning, match=r"gradient of 0\.K is so large that its square is not finite: .* skipped"):
        optimizer.step()
    assert not layer.K.any()
    assert not integrator.step(optimizer)
    assert integrator.skipped_steps == 1


def test_averaged_weights_are_refused():
    with pytest.raises(ValueError, match="averages the orthonormal factors"):
        fit(Plain(), GeoLoRACallback(), L.pytorch.callbacks.StochasticWeightAveraging(0.1))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        pytest.param(nn.Linear(3, 3), r"wrap it in nn\.Sequential", id="itself-linear"),
        pytest.param(nn.Sequential(nn.ReLU()), r"the model has none at all", id="no-linear"),
        pytest.param(
            nn.MultiheadAttention(4, 2), r"belongs to nn\.MultiheadAttention.*exclude_modules", id="attention"
        ),
    ],
)
def test_a_model_that_cannot_be_adapted(model, message):
    with pytest.raises(ValueError, match=message):
        inject_adapters(model)
