"""Stable Diffusion with adapters, on tiny pipelines with random weights."""

import json
import shutil
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import timm
import torch
from exported import move, save
from flags import FLAGS
from foreign import trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from tolerance import NETWORK, close
from torch import nn
from torch.nn import functional as F

from benchmarks.diffusion.tiny_pipeline import LENGTH, SIZE, draw_subject, save_tiny_pipeline
from geolora_pl import AdapterConfig, GeoLoRACallback, push_to_hub
from geolora_pl.adapters.inject import find_adapters
from geolora_pl.cli.dispatch import main
from geolora_pl.lightning.export import export
from geolora_pl.lightning.loading import load_module
from geolora_pl.lightning.predictions import predict
from geolora_pl.loggers import CSVLogger
from geolora_pl.report.drawn import drawn_pictures
from geolora_pl.report.write import write_report

diffusers = pytest.importorskip("diffusers")

from geolora_pl.data import DreamBooth, PromptFile  # noqa: E402
from geolora_pl.storage.plain_file import write_weights  # noqa: E402
from geolora_pl.tasks import TextToImage  # noqa: E402
from geolora_pl.tasks.denoising import snr_weights, step_generator, target  # noqa: E402
from geolora_pl.tasks.drawing import base_alone  # noqa: E402
from geolora_pl.tasks.internals import save_config_for_hf  # noqa: E402

ROOT = Path(__file__).parents[2]
PROMPT = "a photo of sks dog"
QUICK = {"inference_steps": 2, "size": SIZE}
CONVOLUTIONS = ["to_q", "to_v", "proj_in", "proj_out", "conv1", "conv2", "fc1", "q_proj"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pipelines by kind, and images."""
    root = tmp_path_factory.mktemp("diffusion")
    save_tiny_pipeline(root / "sd")
    save_tiny_pipeline(root / "v", prediction_type="v_prediction")
    save_tiny_pipeline(root / "xl", xl=True)
    draw_subject(root / "dog")
    draw_subject(root / "class", 3, "green")
    return root


def task(folders, kind="sd", **settings):
    return TextToImage(str(folders / kind), **{**QUICK, **settings})


def dogs(folders, **settings):
    return DreamBooth(str(folders / "dog"), PROMPT, **{"num_workers": 0, **settings})


def with_class(folders, **settings):
    class_folder = settings.pop("class_folder", str(folders / "class"))
    return dogs(folders, class_folder=class_folder, class_prompt="a photo of a dog", num_class_images=3, **settings)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def batch_of(module, data):
    """The first batch of a fit."""
    runs = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    runs.strategy.connect(module)
    data.trainer = module.trainer = runs
    data.setup("fit")
    module.log = lambda *args, **settings: None
    return next(iter(data.train_dataloader()))


@pytest.mark.parametrize("kind", ["sd", "v", "xl"])
def test_fit_with_everything_switched_on(folders, kind, tmp_path):
    module = task(
        folders,
        kind,
        train_text_encoder=True,
        min_snr_gamma=5.0,
        caption_dropout=0.2,
        gradient_checkpointing=True,
        prompts=[PROMPT],
    )
    runs = trainer(GeoLoRACallback(adapt_every=1), max_epochs=2, default_root_dir=tmp_path)
    runs.fit(module, with_class(folders))
    assert {"train_loss", "val_loss", "geolora/mean_rank"} <= set(runs.callback_metrics)
    names = find_adapters(module.model)
    assert any(name.startswith("unet.") for name in names)
    assert any(name.startswith("text_encoder.") for name in names)
    assert any(name.startswith("text_encoder_2.") for name in names) == (kind == "xl")
    assert not any(parameter.requires_grad for parameter in module.frozen.parameters())
    assert all(layer.K.abs().sum() + layer.S.abs().sum() > 0 for layer in names.values())


def test_the_loss_is_the_error_of_the_noise_and_class_images_have_a_weight(folders):
    module = task(folders, prior_weight=0.5)
    module.configure_model()
    batch = batch_of(module, with_class(folders, batch_size=2))
    assert batch["is_prior"].tolist() == [False, False, True, True]
    assert batch["prompts"] == [PROMPT, PROMPT, "a photo of a dog", "a photo of a dog"]
    loss = module.training_step(batch, 4)
    numbers = step_generator(rank=0, epoch=0, batch=4)
    pipeline, scheduler = module.pipeline, module.parts.scheduler
    with torch.no_grad():
        encoded = torch.cat([pipeline.vae.encode(image[None]).latent_dist.mean for image in batch["images"]])
        spread = torch.cat([pipeline.vae.encode(image[None]).latent_dist.std for image in batch["images"]])
        latents = (
            encoded + spread * torch.randn(encoded.shape, generator=numbers)
        ) * pipeline.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=numbers)
        timesteps = torch.randint(1000, (4,), generator=numbers)
        states = pipeline.encode_prompt(batch["prompts"], "cpu", 1, False)[0]
        predicted = pipeline.unet(scheduler.add_noise(latents, noise, timesteps), timesteps, states).sample
        expected = F.mse_loss(predicted[:2], noise[:2]) + 0.5 * F.mse_loss(predicted[2:], noise[2:])
    close(loss, expected, NETWORK)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_the_error_of_the_clean_latents(kind):
    """The weighted error of what is predicted equals min(SNR, gamma) times that of the latents that follow from it."""
    scheduler = diffusers.DDPMScheduler(prediction_type=kind)
    latents, noise = torch.randn(2, 50, 1, 1, 1).double()
    timesteps = torch.arange(0, 1000, 20)
    alpha = scheduler.alphas_cumprod.double()[timesteps][:, None, None, None]
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    wanted = target(scheduler, latents, noise, timesteps)
    predicted = wanted + 0.1 * torch.randn_like(wanted)
    if kind == "epsilon":
        clean = (noisy - (1 - alpha).sqrt() * predicted) / alpha.sqrt()
    else:
        clean = alpha.sqrt() * noisy - (1 - alpha).sqrt() * predicted
    snr = (alpha / (1 - alpha)).flatten()
    expected = snr.clamp_max(5) * (clean - latents).square().flatten()
    weighted = snr_weights(scheduler, timesteps, 5.0) * (predicted - wanted).square().flatten()
    close(weighted.double(), expected, within=1e-3)


@pytest.mark.parametrize(("kind", "expected"), [("epsilon", 1.0), ("v_prediction", 0.0)])
def test_min_snr_weights_are_finite_where_there_is_nothing_but_noise(kind, expected):
    scheduler = diffusers.DDPMScheduler(prediction_type=kind, rescale_betas_zero_snr=True)
    assert snr_weights(scheduler, torch.tensor([999]), 5.0).item() == pytest.approx(expected, abs=1e-3)


def test_every_process_epoch_and_batch_draws_numbers_of_its_own_and_draws_them_again(folders):
    """A user trains on several GPUs: processes that share a seed and a batch must not share the noise."""
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    drawn = [torch.rand(2, generator=step_generator(*place)).tolist() for place in places * 2]
    assert len({tuple(numbers) for numbers in drawn}) == len(places)
    assert drawn[:4] == drawn[4:]
    losses = []
    module = task(folders, caption_dropout=0.5)
    module.configure_model()
    batch = batch_of(module, dogs(folders))
    for rank in (0, 1, 0):
        torch.manual_seed(3)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TextToImage, "global_rank", rank)
            losses.append(module.training_step(batch, 0).item())
    assert losses[0] != losses[1]
    assert losses[0] == losses[2]


def test_latents_are_kept_only_where_nothing_random_precedes_them(folders):
    for settings, of_task, kept in (
        ({}, {}, 3),
        ({"flip": 0.5}, {}, 0),
        ({"crop": "random"}, {}, 0),
        ({}, {"cache_latents": False}, 0),
    ):
        module = task(folders, **of_task)
        module.configure_model()
        data = dogs(folders, batch_size=3, **settings)
        module.training_step(batch_of(module, data), 0)
        assert len(module._latents) == kept


def test_the_loss_of_held_out_images_is_a_number_of_the_model_alone(folders):
    values = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        module = task(folders)
        runs = trainer(GeoLoRACallback())
        values += [runs.validate(module, dogs(folders), verbose=False)[0]["val_loss"] for _ in range(2)]
    assert len(set(values)) == 1


def test_other_images_are_validated_by_their_own_latents(folders):
    """A user validates one model on two folders: the second loss is that of the second folder."""
    module, runs = task(folders), trainer(GeoLoRACallback())

    def loss(module, folder):
        data = DreamBooth(str(folders / folder), PROMPT, num_workers=0)
        return runs.validate(module, data, verbose=False)[0]["val_loss"]

    first, second = loss(module, "dog"), loss(module, "class")
    assert first != second
    assert second == loss(task(folders), "class")


def test_no_latents_are_kept_of_held_out_images_either_where_none_are_wanted(folders):
    for keep in (True, False):
        module = task(folders, cache_latents=keep)
        trainer(GeoLoRACallback()).validate(module, dogs(folders), verbose=False)
        assert bool(len(module._latents)) == keep


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_diffusers_loads_the_lora_and_the_merged_pipeline(folders, tmp_path, kind, compact):
    adapter = AdapterConfig(init_rank=3, target_modules=CONVOLUTIONS, rank_pattern={"to_q": 2, "conv1": 5}, alpha=1.5)
    module = task(folders, kind, train_text_encoder=True, adapter=adapter)
    module.configure_model()
    ckpt = save(move(module), tmp_path / "run.ckpt", "geolora_pl.tasks.TextToImage")
    expected = images(module.pipeline)
    of_base = load(module, folders / kind)
    assert np.abs(images(of_base) - expected).max() > 1e-2
    export(ckpt, "diffusers", tmp_path / "lora", compact=compact)
    of_base.load_lora_weights(tmp_path / "lora")
    np.testing.assert_allclose(images(of_base), expected, atol=1e-5)
    if not compact:
        export(ckpt, "merged", tmp_path / "merged")
        np.testing.assert_allclose(images(load(module, tmp_path / "merged")), expected, atol=1e-5)


def test_peft_loads_the_adapters_of_all_parts_convolutions_included(folders, tmp_path):
    module = task(folders, train_text_encoder=True, adapter=AdapterConfig(init_rank=3, target_modules=CONVOLUTIONS))
    module.configure_model()
    ckpt = save(move(module), tmp_path / "run.ckpt", "geolora_pl.tasks.TextToImage")
    expected = images(module.pipeline)
    export(ckpt, "peft", tmp_path / "lora")
    theirs = load(module, folders / "sd")
    parts = nn.ModuleDict({"unet": theirs.unet, "text_encoder": theirs.text_encoder})
    PeftModel.from_pretrained(parts, tmp_path / "lora").eval()  # which puts the LoRAs into the parts
    np.testing.assert_allclose(images(theirs), expected, atol=1e-5)


def test_diffusers_loads_a_pushed_run_by_its_name(folders, tmp_path, hub):
    """A user pushes a DreamBooth run, and others draw with it by the code on its card."""
    module = task(folders)
    module.configure_model()
    ckpt = save(move(module), tmp_path / "run.ckpt", "geolora_pl.tasks.TextToImage")
    push_to_hub(ckpt, "user/dog", base_model="user/base")
    card = hub.files("user/dog")["README.md"].decode()
    assert 'pipeline = DiffusionPipeline.from_pretrained("user/base")' in card
    assert "pipeline_tag: text-to-image" in card
    theirs = load(module, folders / "sd")
    theirs.load_lora_weights("user/dog")
    np.testing.assert_allclose(images(theirs), images(module.pipeline), atol=1e-5)


def test_weights_that_may_run_code_are_refused(folders, tmp_path):
    shutil.copytree(folders / "sd", tmp_path / "sd")
    (weights,) = (tmp_path / "sd" / "unet").glob("*.safetensors")
    torch.save(load_file(weights), weights.with_name("diffusion_pytorch_model.bin"))
    weights.unlink()
    refused(TextToImage(str(tmp_path / "sd")), "cannot be loaded")


def load(module, folder):
    without = {} if len(module.parts.encoders) == 2 else {"safety_checker": None}
    return module.parts.kind.pipeline.from_pretrained(folder, **without)


def images(pipeline):
    """What a pipeline draws with the sampler of the task."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    settings = {"height": SIZE, "width": SIZE, "num_inference_steps": 3, "output_type": "np"}
    return pipeline(PROMPT, generator=torch.Generator().manual_seed(3), **settings).images


def test_what_a_lora_file_cannot_hold_is_refused(folders, tmp_path):
    adapter = AdapterConfig(target_modules=["to_q"], train_bias="all")
    module = task(folders, adapter=adapter)
    module.configure_model()
    with torch.no_grad():
        module.model["unet"].conv_in.bias.add_(1)
    ckpt = save(module, tmp_path / "run.ckpt", "geolora_pl.tasks.TextToImage")
    with pytest.raises(ValueError, match=r"unet\..*bias was trained, which a LoRA file of diffusers cannot hold"):
        export(ckpt, "diffusers", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_what_was_trained_in_a_part_without_adapters_is_refused(folders, tmp_path):
    """A user trains layers of the text encoder in full beside a UNet with adapters: nothing is lost silently."""
    adapter = AdapterConfig(target_modules=["to_q"], modules_to_save=["final_layer_norm"])
    module = task(folders, adapter=adapter, train_text_encoder=True)
    module.configure_model()
    ckpt = save(module, tmp_path / "run.ckpt", "geolora_pl.tasks.TextToImage")
    with pytest.raises(ValueError, match=r"text_encoder\..*final_layer_norm.* was trained, which a LoRA file"):
        export(ckpt, "diffusers", tmp_path / "lora")


def test_a_resumed_run_equals_one_run(folders, tmp_path):
    def run(folder, ckpt_path=None, seed=0):
        L.seed_everything(seed, verbose=False)
        module = task(folders, train_text_encoder=True, caption_dropout=0.3)
        saved = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=2)
        runs = trainer(GeoLoRACallback(adapt_every=2), saved, max_epochs=2)
        runs.fit(module, with_class(folders), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return module.state_dict()

    whole = run(tmp_path)
    resumed = run(tmp_path / "again", tmp_path / "step=2.ckpt", seed=1)
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


def test_a_checkpoint_is_loaded_without_data_and_folder(folders, tmp_path):
    module = task(folders, train_text_encoder=True)
    module.configure_model()
    path = save(move(module), tmp_path / "run.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"] |= {"model_name": "nobody/has-this", "similarity_model": "hf-hub:nobody/has-this"}
    torch.save(checkpoint, path)
    loaded = TextToImage.load_from_checkpoint(path).eval()
    assert loaded.similarity_model is None
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([5, 900])
    condition = {"encoder_hidden_states": torch.randn(2, LENGTH, 16)}
    assert torch.equal(loaded(x, t, condition), module(x, t, condition))
    with pytest.raises(ValueError, match="a file does not decide what is fetched"):
        loaded.draw([PROMPT], [0])


def test_a_module_of_a_checkpoint_samples_at_the_same_timesteps(folders, tmp_path):
    """A pipeline of the hub need not say how its timesteps are spaced, and each scheduler has a default of its own."""
    shutil.copytree(folders / "sd", tmp_path / "sd")
    file = tmp_path / "sd" / "scheduler" / "scheduler_config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in said.items() if name != "timestep_spacing"}))
    module = TextToImage(str(tmp_path / "sd"), **QUICK)
    module.configure_model()
    path = save(module, tmp_path / "run.ckpt")
    loaded = TextToImage.load_from_checkpoint(path, model_name=str(tmp_path / "sd"))
    spacings = [one.pipeline.scheduler.config.timestep_spacing for one in (module, loaded)]
    assert spacings == ["linspace"] * 2


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        ("unet", {"act_fn": "https://host/x"}, "names a place to load from"),
        ("unet", None, "which is no configuration"),
        ("other", {}, "is not the configuration of every part"),
        ("text_encoder", {"model_type": "nothing"}, "not a complete configuration"),
    ],
)
def test_a_checkpoint_gives_sizes_and_nothing_else(folders, tmp_path, part, settings, message):
    module = task(folders)
    module.configure_model()
    path = save(module, tmp_path / "run.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    args = checkpoint["hyper_parameters"]["model_args"]
    args[part] = settings if settings is None else {**args.get(part, {}), **settings}
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=message):
        TextToImage.load_from_checkpoint(path)


def test_a_small_checkpoint_is_loaded_with_the_folder(folders, tmp_path):
    module = task(folders)
    runs = trainer(GeoLoRACallback(adapt_every=1, small_checkpoints=True), max_steps=2)
    runs.fit(module, dogs(folders))
    runs.save_checkpoint(tmp_path / "small.ckpt")
    assert not any(name.startswith("frozen") for name in torch.load(tmp_path / "small.ckpt")["state_dict"])
    loaded = TextToImage.load_from_checkpoint(tmp_path / "small.ckpt", model_name=str(folders / "sd"), pretrained=True)
    for name, tensor in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


EVERYTHING = r".*(to_.|conv\d|conv_in|conv_out|proj_in|proj_out|linear_\d|time_emb_proj|out\.0|net\.0\.proj|net\.2)"


def test_the_loss_of_two_images_falls(folders):
    """What training is for: the error of the noise of two images falls to less than a half."""
    subject = draw_subject(folders / "two", 2)
    module = task(folders, adapter=AdapterConfig(target_modules=EVERYTHING, max_rank=16), warmup=0.1)
    data = DreamBooth(subject, PROMPT, val_folder=subject, batch_size=2, num_workers=0)
    runs = trainer(GeoLoRACallback(adapt_every=5), max_epochs=40, check_val_every_n_epoch=40)
    before, after = runs.validate(module, data, verbose=False)[0], runs.fit(module, data) or runs.callback_metrics
    assert float(after["val_loss"]) < 0.5 * before["val_loss"]


def test_class_images_are_drawn_once_by_the_base_model(folders, tmp_path):
    """Those that an interrupted run has drawn stay, and those that follow are no copies of them."""
    class_folder = tmp_path / "class"
    data = with_class(folders, class_folder=str(class_folder))
    module = task(folders)
    trainer(GeoLoRACallback(adapt_every=1), max_steps=2).fit(module, data)
    drawn = sorted(class_folder.iterdir())
    assert [path.name for path in drawn] == ["drawn_0000.png", "drawn_0001.png", "drawn_0002.png"]
    content = [path.read_bytes() for path in drawn]
    assert len(set(content)) == 3
    with base_alone(module.model):
        again = module.draw(["a photo of a dog"] * 3, [0, 1, 2])
    assert all(np.array_equal(pixels(path), np.asarray(image)) for path, image in zip(drawn, again, strict=True))
    kept = drawn[0].stat().st_mtime_ns
    drawn[1].unlink()
    drawn[2].unlink()
    fresh = with_class(folders, class_folder=str(class_folder))
    trainer(GeoLoRACallback(adapt_every=1), max_steps=2).fit(task(folders), fresh)
    assert [path.read_bytes() for path in drawn] == content
    assert drawn[0].stat().st_mtime_ns == kept


@pytest.mark.parametrize("missing", [True, False])
def test_all_processes_share_the_list_of_the_class_images_that_the_first_misses(folders, tmp_path, missing):
    """A user trains on several GPUs: what a process finds when it looks late must not change what is drawn."""
    runs = trainer(GeoLoRACallback(adapt_every=1), max_steps=1)
    met = []
    of_first = {1: tmp_path / "drawn_0001.png"} if missing else {}
    broadcast, barrier = runs.strategy.broadcast, runs.strategy.barrier
    runs.strategy.broadcast = lambda value, src=0: of_first if isinstance(value, dict) else broadcast(value, src)
    runs.strategy.barrier = lambda name=None: met.append(name) or barrier(name)
    runs.fit(task(folders), with_class(folders))  # of which none is missing here
    assert [path.name for path in tmp_path.glob("*.png")] == ["drawn_0001.png"] * missing
    assert "class images" in met


def test_sharded_models_are_refused_in_one_sentence(folders, monkeypatch):
    monkeypatch.setattr(TextToImage, "device_mesh", object())
    with pytest.raises(ValueError, match=r"strategy=ModelParallelStrategy .*: take ddp$"):
        trainer(GeoLoRACallback()).fit(task(folders), dogs(folders))


def test_a_report_shows_prompts_with_any_character_and_passes_over_other_folders(tmp_path):
    steps = tmp_path / "drawn"
    for name in ("step_00000003", "step_old"):
        (steps / name).mkdir(parents=True)
        (steps / name / "metadata.jsonl").write_text(
            json.dumps({"file_name": "0.png", "text": "a\u2028dog"}, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        Image.new("RGB", (4, 4)).save(steps / name / "0.png")
    table = drawn_pictures(tmp_path)
    assert table.count("<img") == 1
    assert "a\u2028dog" in table


def test_prompts_are_drawn_while_it_trains_and_a_report_shows_them(folders, tmp_path):
    loggers = [TensorBoardLogger(tmp_path, "run", ""), CSVLogger(tmp_path, "run", "")]
    tiny = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", **tiny)
    (tmp_path / "timm").mkdir()
    write_weights(model, tmp_path / "timm" / "model.safetensors")
    save_config_for_hf(model, str(tmp_path / "timm" / "config.json"), None, tiny)
    module = task(folders, prompts=[PROMPT, "a dog"], similarity_model=f"local-dir:{tmp_path / 'timm'}")
    runs = trainer(GeoLoRACallback(adapt_every=1), max_epochs=2, logger=loggers, log_every_n_steps=1)
    runs.fit(module, dogs(folders))
    assert -1 <= float(runs.callback_metrics["val_similarity"]) <= 1
    steps = sorted((tmp_path / "run" / "drawn").iterdir())
    assert [step.name for step in steps] == ["step_00000003", "step_00000006"]
    assert sorted(path.name for path in steps[0].iterdir()) == ["00000.png", "00001.png", "metadata.jsonl"]
    assert pixels(steps[0] / "00000.png").shape == (SIZE, SIZE, 3)
    assert "similarity" not in " ".join(module.state_dict())
    page = write_report(tmp_path / "run").read_text()
    assert page.count('<img src="data:image/png') == 4
    assert "Drawn images" in page


def test_predict_draws_an_image_per_prompt_with_the_seed_of_its_number(folders, tmp_path):
    (tmp_path / "prompts.txt").write_text("a dog\n\na red disc\n")
    module = task(folders)
    rows = predict(module, PromptFile(str(tmp_path / "prompts.txt"), 2), tmp_path / "out", accelerator="cpu")
    assert rows == [{"index": 0, "prompt": "a dog"}, {"index": 1, "prompt": "a red disc"}]
    second = np.asarray(module.draw(["a red disc"], [1])[0])
    assert np.array_equal(pixels(tmp_path / "out" / "00001.png"), second)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert lines[0] == {"file_name": "00000.png", "text": "a dog"}
    with pytest.raises(ValueError, match="a folder that is not empty"):
        predict(module, PromptFile(str(tmp_path / "prompts.txt")), tmp_path / "out", accelerator="cpu")
    with pytest.raises(ValueError, match="is a file, and images need a folder"):
        predict(module, PromptFile(str(tmp_path / "prompts.txt")), tmp_path / "prompts.txt", accelerator="cpu")


@pytest.mark.usefixtures("one_parser")
def test_a_run_of_the_command_line_is_exported_and_draws_a_file_of_prompts(folders, tmp_path, monkeypatch):
    """What a user does: fit, export of a small checkpoint with the configuration of its run, predict."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    settings = {
        "model.init_args.model_name": folders / "sd",
        "model.init_args.size": SIZE,
        "model.init_args.inference_steps": 2,
        "data.init_args.folder": folders / "dog",
        "data.init_args.class_folder": folders / "class",
        "data.init_args.num_class_images": 3,
        "trainer.max_epochs": 1,
        "trainer.log_every_n_steps": 1,
    }
    config = ["--config=configs/diffusion/dreambooth.yaml", "--config=configs/trainer/cpu.yaml"]
    main(["fit", *config, *FLAGS, *[f"--{name}={value}" for name, value in settings.items()]])
    (last,) = tmp_path.rglob("last.ckpt")
    run = str(last.parent.parent / "config.yaml")
    for form in ("diffusers", "merged"):
        main(["export", f"--ckpt_path={last}", f"--config={run}", f"--format={form}", f"--output={form}"])
    assert (tmp_path / "diffusers" / "pytorch_lora_weights.safetensors").is_file()
    assert (tmp_path / "merged" / "model_index.json").is_file()
    (tmp_path / "prompts.txt").write_text("a dog\na red disc\n")
    data = ["--data=geolora_pl.data.PromptFile", "--data.init_args.file=prompts.txt"]
    main(["predict", f"--config={run}", *data, f"--ckpt_path={last}", "--output=images"])
    assert sorted(path.name for path in Path("images").iterdir()) == ["00000.png", "00001.png", "metadata.jsonl"]
    module = load_module(last, run)
    assert np.array_equal(pixels(tmp_path / "images" / "00001.png"), np.asarray(module.draw(["a red disc"], [1])[0]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size=0 must be at least 1"),
        ({"prior_weight": -1.0}, "prior_weight=-1.0 must be at least 0"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma=0.0 must be above 0"),
        ({"caption_dropout": 1.5}, r"caption_dropout=1.5 must lie in \[0, 1\]"),
        ({"inference_steps": 0}, "inference_steps=0 must be at least 1"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused_at_once(folders, settings, message):
    with pytest.raises(ValueError, match=message):
        task(folders, **settings)


def refused(module, message):
    with pytest.raises(ValueError, match=message) as caught:
        module.configure_model()
    assert "\n" not in str(caught.value)


def test_pipelines_that_cannot_be_adapted_are_refused_in_one_sentence(folders, tmp_path):
    refused(TextToImage(str(tmp_path / "gone")), "is not a folder")
    refused(TextToImage(str(folders / "dog")), "is no pipeline: the folder has no model_index.json")
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    refused(TextToImage(str(tmp_path / "flux")), "is a FluxPipeline, and only StableDiffusionPipeline and")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    refused(TextToImage(str(tmp_path / "empty")), "cannot be loaded")
    save_tiny_pipeline(tmp_path / "inpaint", in_channels=9)
    refused(TextToImage(str(tmp_path / "inpaint")), "the UNet takes 9 channels and the VAE makes 4")
    save_tiny_pipeline(tmp_path / "sample", prediction_type="sample")
    refused(TextToImage(str(tmp_path / "sample")), "it predicts 'sample', and only epsilon and v_prediction")
    for name, part, changed, message in (
        ("edm", "scheduler/scheduler_config.json", None, "has the schedule of a EDM, without betas"),
        ("shifted", "vae/config.json", {"latents_mean": [0.0] * 4}, "the VAE shifts its latents"),
    ):
        save_tiny_pipeline(tmp_path / name)
        config = json.loads((tmp_path / name / part).read_text())
        config = {"_class_name": "EDM", "sigma_data": 0.5} if changed is None else config | changed
        (tmp_path / name / part).write_text(json.dumps(config))
        refused(TextToImage(str(tmp_path / name)), message)
    refused(task(folders, size=15), "size=15 cannot be halved 1 times, as the VAE does: take a multiple of 2")
    refused(task(folders, pretrained=False), r"pretrained=False: model_args has configurations of \[\]")
    refused(task(folders, model_args={"u_net": {}}), r"model_args=\['u_net'\]: the parts of this pipeline are")
    weights = next((tmp_path / "inpaint" / "vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    refused(TextToImage(str(tmp_path / "inpaint")), f"{weights} is cut short or broken")


@pytest.mark.parametrize("prompts", [True, False], ids=["drawn", "of the data"])
def test_a_prompt_that_is_too_long_is_refused_before_training(folders, prompts):
    long = "a photo of a red dog on a white square of green on a disc"
    module = task(folders, prompts=[long] if prompts else None)
    data = DreamBooth(str(folders / "dog"), PROMPT if prompts else long, num_workers=0)
    with pytest.raises(ValueError, match=rf"the prompt 'a photo .*' has 20 tokens and the text encoder takes {LENGTH}"):
        trainer(GeoLoRACallback()).fit(module, data)


def test_only_the_layers_meant_are_adapted(folders):
    module = task(folders)
    module.configure_model()
    names = find_adapters(module.model)
    assert all(name.startswith("unet.") and isinstance(layer.base, nn.Linear) for name, layer in names.items())
    assert len({name.rpartition("transformer_blocks.0.")[2] for name in names}) == 10
    assert "time_embedding" not in " ".join(names)
    assert not any(parameter.requires_grad for parameter in module.frozen["text_encoder"].parameters())
