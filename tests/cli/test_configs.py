"""Every YAML of configs/: parsed by the command line, run for two steps with tiny stand-ins, set as in the paper."""

import contextlib
import copy
import csv
import functools
import io
import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from glue_files import write_glue
from image_files import write_cifar, write_image_folder, write_image_table, write_tiny_imagenet
from tiny_chat import save_tiny_chat
from tiny_text import save_tiny_decoder, save_tiny_model, save_tiny_seq2seq

from benchmarks.diffusion.tiny_pipeline import SIZE, draw_subject, save_tiny_pipeline
from geolora_pl.cli.dispatch import main
from geolora_pl.data import CIFAR10, CIFAR100

pytestmark = pytest.mark.usefixtures("one_parser")
ROOT = Path(__file__).parents[2]
OVERLAYS = sorted(ROOT.glob("configs/trainer/*.y*ml"))
EXPERIMENTS = sorted(set(ROOT.glob("configs/**/*.y*ml")) - set(OVERLAYS))
LANGUAGE = {"text/chat", "text/causal_lm", "text/causal_lm_4bit", "text/causal_lm_prompts", "text/causal_lm_wikitext2"}
NOT_OF_THE_PAPER = {
    "quickstart",
    "image/folder",
    "image/multi_label",
    "image/regression",
    "text/multi_label",
    "text/quickstart",
    "text/glue_wnli",
    "diffusion/dreambooth",
    "diffusion/captions",
    "text/tags",
    "text/qa",
    "text/seq2seq",
    *LANGUAGE,
}
DECODER = {
    "HuggingFaceTB/SmolLM2-135M": "llama",
    "Qwen/Qwen2.5-0.5B": "qwen3",
    "Qwen/Qwen2.5-7B": "qwen3",
    "openai-community/gpt2": "gpt2",
}

TWO_STEPS = {
    "trainer.accumulate_grad_batches": 1,
    "trainer.max_epochs": 1,
    "trainer.limit_train_batches": 2,
    "trainer.limit_val_batches": 1,
    "trainer.limit_test_batches": 1,
    "trainer.log_every_n_steps": 1,
    "trainer.enable_progress_bar": False,
    "trainer.enable_model_summary": False,
    "data.init_args.batch_size": 4,
}
SMALL_VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}

# The paper's settings, by the names of the configuration.
IMAGES = {
    "model.init_args.model_name": "vit_base_patch16_224.orig_in21k_ft_in1k",
    "model.init_args.pretrained": True,
    "model.init_args.optimizer.class_path": "torch.optim.AdamW",
    "model.init_args.optimizer.init_args.lr": 1e-3,
    "model.init_args.head_lr": None,
    "model.init_args.lr_scheduler.class_path": "torch.optim.lr_scheduler.ConstantLR",
    "model.init_args.lr_scheduler.init_args.factor": 0.8,
    "model.init_args.lr_scheduler.init_args.total_iters": 10,
    "model.init_args.adapter.train_bias": "all",
    "model.init_args.adapter.probes": 0,
    "data.init_args.batch_size": 256,
    "geolora.tau": 0.15,
    "geolora.adapt_every": 1,
    "geolora.coefficient_steps": 37,
    "geolora.adapt_until": 0.8,
    "trainer.max_epochs": 5,
}

# Task, lr, epochs, weight decay, warm-up, length, rank at the start and at most, alpha over that rank, tau, coefficient
# steps, dropout.
GLUE = """
    cola  8e-4   25  0    100   null  8   16  0.125  0.15  20   0.1
    mnli  5e-4   7   0.01 1000  256   10  32  1.6    0.1   10   0.2
    mrpc  1e-3   40  0.01 0.1   320   8   16  0.125  0.15  30   0.2
    qnli  5e-4   10  0.01 500   512   10  32  1.6    0.15  10   0.2
    qqp   8e-4   5   0.01 2000  320   10  32  1.6    0.2   10   0.2
    rte   1.2e-3 80  0.01 200   320   10  32  1.6    0.15  10   0.1
    sst2  8e-4   24  0.01 1000  128   10  32  1.6    0.1   100  0.1
    stsb  1e-3   25  0.1  100   128   8   16  0.125  0.15  30   0.2
"""
TARGETS = ["query_proj", "key_proj", "value_proj", "intermediate.dense", "output.dense"]


def glue_settings(row: str) -> tuple[str, dict[str, Any]]:
    task, lr, epochs, decay, warmup, length, start, most, alpha, tau, coefficients, dropout = row.split()
    return f"text/glue_{task}", {
        "model.init_args.model_name": "microsoft/deberta-v3-base",
        "model.init_args.optimizer.class_path": "torch.optim.AdamW",
        "model.init_args.optimizer.init_args.lr": float(lr),
        "model.init_args.optimizer.init_args.weight_decay": float(decay),
        "model.init_args.head_lr": None,
        "model.init_args.warmup": float(warmup),
        "model.init_args.head_warmup": float(warmup),
        "model.init_args.adapter.init_rank": int(start),
        "model.init_args.adapter.max_rank": int(most),
        "model.init_args.adapter.alpha": float(alpha),
        "model.init_args.adapter.dropout": float(dropout),
        "model.init_args.adapter.target_modules": TARGETS,
        "data.init_args.task": task,
        "data.init_args.batch_size": 32,
        "data.init_args.max_length": None if length == "null" else int(length),
        "geolora.tau": float(tau),
        "model.init_args.adapter.probes": 0,
        "geolora.adapt_every": 1,
        "geolora.coefficient_steps": int(coefficients),
        "trainer.max_epochs": int(epochs),
        "trainer.precision": "32-true" if task == "sst2" else "16-mixed",
    }


DREAMBOOTH = {
    "model.init_args.model_name": "CompVis/stable-diffusion-v1-4",
    "model.init_args.size": 512,
    "model.init_args.train_text_encoder": True,
    "model.init_args.prior_weight": 1.0,
    "model.init_args.adapter.init_rank": 8,
    "model.init_args.adapter.max_rank": 16,
    "model.init_args.adapter.alpha": 1.0,
    "model.init_args.optimizer.class_path": "torch.optim.AdamW",
    "model.init_args.optimizer.init_args.lr": 5e-6,
    "model.init_args.optimizer.init_args.weight_decay": 0.01,
    "model.init_args.lr_scheduler.class_path": "torch.optim.lr_scheduler.ConstantLR",
    "model.init_args.lr_scheduler.init_args.factor": 1.0,
    "data.init_args.batch_size": 1,
    "data.init_args.num_class_images": 200,
    "geolora.tau": 0.1,
    "geolora.adapt_every": 1,
    "geolora.coefficient_steps": 1,
    "model.init_args.adapter.probes": 0,
    "trainer.max_epochs": 5,
    "trainer.precision": "32-true",
    "trainer.gradient_clip_val": 1.0,
}

SETTINGS = {
    "diffusion/dreambooth_sd14": DREAMBOOTH,
    "image/tiny_imagenet": IMAGES,
    **{f"image/{name}": IMAGES | {"data.init_args.crop_padding": 4} for name in ("cifar10", "cifar100")},
    **dict(glue_settings(row) for row in GLUE.strip().splitlines()),
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT / "configs").with_suffix("").as_posix()


@functools.cache
def parsed(*paths: Path) -> dict[str, Any]:
    """The configuration as the command line understands the files, with every default."""
    if any(path.parent.name == "diffusion" for path in paths):
        pytest.importorskip("diffusers")
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
        main(["fit", *[f"--config={path}" for path in paths], "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(out.getvalue())


def setting(config: dict[str, Any], name: str) -> Any:
    return functools.reduce(lambda node, key: node[key], name.split("."), config)


def tiny_model(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Settings that put a small model in the place of one from the hub."""
    settings = config["model"]["init_args"]
    if config["model"]["class_path"].endswith((".TextClassification", ".TokenClassification", ".QuestionAnswering")):
        return {"model.init_args.model_name": save_tiny_model(folder / "model", "deberta-v2")}
    if config["data"]["class_path"].endswith(".ChatFiles"):
        return {"model.init_args.model_name": save_tiny_chat(folder / "model")}
    if config["model"]["class_path"].endswith(".CausalLM"):
        return {"model.init_args.model_name": save_tiny_decoder(folder / "model", DECODER[settings["model_name"]])}
    if config["model"]["class_path"].endswith(".Seq2SeqLM"):
        return {"model.init_args.model_name": save_tiny_seq2seq(folder / "model"), "model.init_args.max_new_tokens": 4}
    if config["model"]["class_path"].endswith(".TextToImage"):
        return {
            "model.init_args.model_name": save_tiny_pipeline(folder / "model"),
            "model.init_args.size": SIZE,
            "model.init_args.inference_steps": 2,
        }
    if settings["checkpoint_path"]:  # a file of the project
        return {}
    return {
        "model.init_args.pretrained": False,
        "model.init_args.model_args": json.dumps({**(settings["model_args"] or {}), **SMALL_VIT}),
    }


SHORT = {"max_length": 16, "stride": 2, "max_target_length": 8}


def tiny_rows(source: str, settings: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Two rows for the sources of texts that read a row by its columns."""
    if source == "TextFiles":
        columns = [settings["text_column"], settings["label_column"]]
        labels = ("praise|cinema", "") if settings["label_separator"] else ("1", "0")
        return [dict(zip(columns, row, strict=True)) for row in zip(("good film", "bad plot"), labels, strict=True)]
    answers = {"text": ["good"], "answer_start": [4]}
    return {
        "TagFiles": [{"tokens": ["good", "film"], "tags": ["B-X", "O"]}] * 2,
        "AnswerFiles": [
            {"question": "is", "context": context, "answers": answers} for context in ("the good film", "the good plot")
        ],
        "Seq2SeqFiles": [{"text": "the good film", "target": "good"}] * 2,
    }.get(source)


def tiny_data(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Settings that put a few samples, in the official layout, in the place of the data set."""
    source, settings = config["data"]["class_path"].rpartition(".")[2], config["data"]["init_args"]
    if source == "Digits":
        return {}
    if source in ("DreamBooth", "CaptionedImages"):
        images = Path(draw_subject(folder / "images", 9))
        if source == "CaptionedImages":
            for path in images.glob("*.png"):
                path.with_suffix(".txt").write_text("a red square")
            return {"data.init_args.folder": images}
        return {
            "data.init_args.folder": images,
            "data.init_args.class_folder": folder / "class",
            "data.init_args.num_class_images": 2,
        }
    if rows := tiny_rows(source, settings):
        datasets.Dataset.from_list(rows * 10).to_parquet(folder / "train.parquet")
        lengths = {f"data.init_args.{name}": length for name, length in SHORT.items() if settings.get(name) is not None}
        files = {"data.init_args.train_file": folder / "train.parquet", "data.init_args.cache_dir": folder / "cache"}
        return {**files, **lengths}
    if source in ("LanguageFiles", "ChatFiles"):
        ours = ["prompt", "completion"]
        columns = ours if source == "ChatFiles" else [name for ending in ours if (name := settings[f"{ending}_column"])]
        rows = {name: ["a good film", "the plot was not bad"] * 20 for name in columns or [settings["text_column"]]}
        datasets.Dataset.from_dict(rows).to_parquet(folder / "train.parquet")
        return {
            "data.init_args.train_file": folder / "train.parquet",
            "data.init_args.cache_dir": folder / "cache",
            "data.init_args.max_length": 8,
        }
    if source == "LanguageHub":
        for split in ("train", "validation"):
            rows = {settings["text_column"]: ["", "a good film", "the plot was not bad"] * 20}
            datasets.Dataset.from_dict(rows).to_parquet(folder / "hub" / f"{split}.parquet")
        return {
            "data.init_args.dataset": folder / "hub",
            "data.init_args.subset": "null",
            "data.init_args.cache_dir": folder / "cache",
            "data.init_args.max_length": 8,
        }
    if source == "GLUE":
        write_glue(folder, settings["task"], times=4)
        return {"data.init_args.folder": folder, "data.init_args.cache_dir": folder / "cache"}
    {
        "ImageFolder": write_image_folder,
        "ImageTable": functools.partial(write_image_table, separator=settings.get("label_separator")),
        "CIFAR10": functools.partial(write_cifar, source=CIFAR10),
        "CIFAR100": functools.partial(write_cifar, source=CIFAR100),
        "TinyImageNet": write_tiny_imagenet,
    }[source](folder)
    return {"data.init_args.folder": folder}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_two_steps_of_every_experiment(path, tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)  # of the real files
    config = parsed(path)
    if config["model"]["init_args"].get("quantization"):
        pytest.importorskip("bitsandbytes")
    settings = {**TWO_STEPS, **tiny_model(config, tmp_path), **tiny_data(config, tmp_path)}
    if config["geolora"]["adapt_every"] is not None:  # else it is shortened to the run, as the user's would be
        settings["geolora.adapt_every"] = 1
    files = [f"--config={path.relative_to(ROOT)}", "--config=configs/trainer/cpu.yaml"]
    main(["fit", *files, *[f"--{name}={value}" for name, value in settings.items()]])

    (metrics,) = Path("lightning_logs").rglob("metrics.csv")
    rows = list(csv.DictReader(metrics.read_text().splitlines()))
    for name, count in (("train_loss", 2), ("val_loss", 1)):
        values = [float(row[name]) for row in rows if row[name]]
        assert len(values) == count, name
        assert all(math.isfinite(value) and value > 0 for value in values), name
    assert any(row["geolora/mean_rank"] for row in rows)
    assert list(metrics.parent.glob("events.out.tfevents.*"))
    assert (metrics.parent / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: str(path.relative_to(ROOT / "configs").with_suffix("")))
def test_every_epoch_writes_the_last_checkpoint_and_the_best_has_a_name_of_its_own(path):
    best, last = [callback["init_args"] for callback in parsed(path)["trainer"]["callbacks"]]
    assert last["filename"] == "last"
    assert last["monitor"] is None
    assert best["monitor"].startswith("val_")
    assert not best["save_last"]
    assert best["filename"] is None


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_tensorboard_shows_no_metric_of_minus_one(path):
    """A user saw ``hp_metric`` -1 in TensorBoard, which Lightning writes unless it is told not to."""
    loggers = parsed(path)["trainer"]["logger"]
    boards = [logger["init_args"] for logger in loggers if logger["class_path"].endswith("TensorBoardLogger")]
    assert [board["default_hp_metric"] for board in boards] == [False]


def test_no_two_experiments_share_a_folder():
    folders = [
        {(logger["init_args"]["name"], logger["init_args"]["version"]) for logger in parsed(path)["trainer"]["logger"]}
        for path in EXPERIMENTS
    ]
    assert all(len(of_one) == 1 for of_one in folders)
    assert len(set.union(*folders)) == len(EXPERIMENTS)


@pytest.mark.parametrize("path", sorted(ROOT.glob("geolora_pl/configs/init/*.yaml")), ids=lambda path: path.stem)
def test_a_run_lies_in_the_folder_that_has_the_name_of_its_configuration(path):
    """Who writes lm.yaml by ``init lm`` looks for the run in lightning_logs/lm."""
    loggers = yaml.safe_load(path.read_text())["trainer"]["logger"]
    assert {logger["init_args"]["name"] for logger in loggers} == {path.stem}


def test_what_is_not_of_the_paper_is_known():
    assert {name_of(path) for path in EXPERIMENTS} == set(SETTINGS) | NOT_OF_THE_PAPER


@pytest.mark.parametrize("name", SETTINGS)
def test_the_settings_are_those_of_the_paper(name):
    config, expected = parsed(ROOT / "configs" / f"{name}.yaml"), SETTINGS[name]
    assert {key: setting(config, key) for key in expected} == expected


@pytest.mark.parametrize("path", OVERLAYS, ids=name_of)
def test_an_overlay_changes_the_trainer_and_keeps_loggers_and_callbacks(path):
    overlay = yaml.safe_load(path.read_text())
    experiment = ROOT / "configs" / "image" / "cifar10.yaml"
    expected = copy.deepcopy(parsed(experiment))
    expected["trainer"].update(overlay.pop("trainer"))
    assert not overlay
    assert len(expected["trainer"]["logger"]) == 2
    assert parsed(experiment, path) == expected
