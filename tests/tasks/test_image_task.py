import pytest
import timm
import torch
from foreign import trainer
from safetensors.torch import save_file
from tiny_vit import OVERLAY, SIZE
from tolerance import NETWORK, close

from geolora_pl import AdapterConfig, GeoLoRACallback, inject_adapters
from geolora_pl.adapters.inject import has_adapters
from geolora_pl.adapters.targets import convolutions, linear_layers
from geolora_pl.data import Digits
from geolora_pl.tasks import ImageClassification
from geolora_pl.tasks.image import head_names


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(5)
    model = timm.create_model("vit_tiny_patch16_224", **SIZE, num_classes=7)
    path = tmp_path / "weights.safetensors"
    save_file({name: weight.half() for name, weight in model.state_dict().items()}, path)
    return path


def task(**settings):
    defaults = {"pretrained": False, "model_args": {**SIZE, "pretrained_cfg_overlay": OVERLAY}}
    return ImageClassification("vit_tiny_patch16_224", **{**defaults, **settings})


def test_fit_and_test_on_digits(weights):
    module, callback = task(checkpoint_path=str(weights)), GeoLoRACallback()
    runs = trainer(callback, max_steps=4, val_check_interval=2)
    runs.fit(module, Digits())
    assert module.num_classes == 10
    assert {"train_loss", "val_loss", "val_accuracy"} <= set(runs.callback_metrics)
    result = runs.test(module, datamodule=Digits(), verbose=False)[0]
    assert set(result) == {"test_loss", "test_accuracy"}
    predictions = runs.predict(module, datamodule=Digits())
    assert sum(len(p) for p in predictions) == 500
    close(predictions[0].sum(1), torch.ones(64))


@pytest.mark.parametrize("settings", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_training_images_and_their_labels_are_mixed_alike(settings):
    """Of images that are one colour each, the mean over a mixed image says how much of each label there must be."""
    module = task(num_classes=3, **settings)
    batch = torch.arange(3.0)[:, None, None, None].expand(3, 1, 16, 16), torch.arange(3)
    mixes = [module._mix(batch) for _ in range(30)]
    assert len({labels[0].tolist()[0] for _, labels in mixes}) > 10, "another part each time"
    parts_exchanged = 0
    for images, labels in mixes:
        close(labels.sum(1), torch.ones(3))
        close(images.mean((1, 2, 3)), labels @ torch.arange(3.0), within=1e-5)
        parts_exchanged += images[0].unique().numel() > 1
    assert (parts_exchanged > 0) == ("cutmix" in settings)
    if len(settings) == 2:
        assert parts_exchanged < 30, "each batch gets one of the two"


def test_a_run_with_mixed_images_trains_and_one_without_leaves_the_batch_alone():
    module = task(mixup=0.2, cutmix=1.0, label_smoothing=0.1)
    runs = trainer(GeoLoRACallback(), max_steps=2)
    runs.fit(module, Digits(batch_size=7))
    assert runs.callback_metrics["train_loss"].isfinite()
    batch = torch.zeros(2, 1, 16, 16), torch.zeros(2, dtype=torch.long)
    assert task(num_classes=3)._mix(batch) is batch


def test_the_backbone_is_loaded_and_the_head_is_new_and_trained(weights):
    module = task(checkpoint_path=str(weights), num_classes=3)
    module.configure_model()
    expected = timm.create_model("vit_tiny_patch16_224", **SIZE, num_classes=7)
    timm.models.load_checkpoint(expected, str(weights))
    x = torch.randn(2, 1, 16, 16)
    close(module.model.forward_features(x), expected.forward_features(x), NETWORK)
    assert module.model.head.weight.shape == (3, 24)
    assert module.model.head.weight.requires_grad
    assert not module.model.patch_embed.proj.weight.requires_grad
    assert module.model.blocks[0].attn.qkv.K.requires_grad


def test_the_head_is_said_to_be_trained_in_full():
    module = task()
    trainer(GeoLoRACallback(), max_steps=1).fit(module, Digits())
    assert module.notes == [
        "target_modules=auto: 8 linear layers are adapted, blocks.0.attn.qkv to blocks.1.mlp.fc2",
        "trained in full beside the adapters: head (250)",
    ]


def test_a_model_of_convolutions_is_adapted_without_being_told():
    """A ResNet with the defaults: the convolutions of its blocks get adapters, a note says so, and they are trained."""
    images = {"in_chans": 1, "pretrained_cfg_overlay": {"input_size": (1, 32, 32), "mean": (0.4,), "std": (0.3,)}}
    module = ImageClassification("resnet18", pretrained=False, model_args=images)
    callback = GeoLoRACallback()
    runs = trainer(callback, max_steps=2, limit_val_batches=1)
    runs.fit(module, Digits(batch_size=8))
    assert len(callback.integrator.adapters) == 19  # 8 blocks of two, and 3 on shortcuts
    assert not any(layer.is_linear for layer in callback.integrator.adapters.values())
    assert module.notes[0] == (
        "target_modules=auto: 19 convolutions are adapted, layer1.0.conv1 to layer4.1.conv2, because the model has no "
        "linear layer but its head"
    )
    again = ImageClassification("resnet18", pretrained=False, model_args=images, num_classes=10)
    again.configure_model()
    assert has_adapters(again)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "vgg11", "densenet121"])
def test_what_auto_means_for_other_models_of_convolutions(name):
    model = timm.create_model(name, num_classes=3)
    names = convolutions(model)
    assert not linear_layers(model)
    assert len(names) > 7
    assert not any(model.get_submodule(found).groups > 1 for found in names)  # depthwise ones are thin already
    assert inject_adapters(model, AdapterConfig(target_modules=names)).keys() == set(names)


def test_the_data_config_is_the_models_own():
    module = task(num_classes=2)
    module.configure_model()
    assert module.data_config["input_size"] == (1, 16, 16)
    assert module.data_config["mean"] == (0.4,)


def test_a_checkpoint_is_loaded_without_the_data(tmp_path):
    module = task(adapter=AdapterConfig(max_rank=6), label_smoothing=0.1)
    runs = trainer(GeoLoRACallback(), max_steps=2)
    runs.fit(module, Digits())
    runs.save_checkpoint(tmp_path / "run.ckpt")
    loaded = ImageClassification.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    x = torch.randn(2, 1, 16, 16)
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    assert loaded.loss.label_smoothing == 0.1


def test_a_checkpoint_needs_neither_the_file_nor_the_hub(tmp_path, weights):
    runs = trainer(GeoLoRACallback(), max_steps=2)
    runs.fit(task(checkpoint_path=str(weights)), Digits())
    runs.save_checkpoint(tmp_path / "run.ckpt")
    weights.unlink()
    loaded = ImageClassification.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    assert loaded.num_classes == 10
    assert loaded.class_names == [str(digit) for digit in range(10)]


def test_size_and_channels_of_the_model_reach_the_images_without_an_overlay():
    module = task(model_args=SIZE, num_classes=2)
    module.configure_model()
    assert module.data_config["input_size"] == (1, 16, 16)
    assert module.data_config["mean"] == (0.5,)


def test_a_file_of_weights_that_is_not_there_is_refused_before_training():
    with pytest.raises(ValueError, match=r"checkpoint_path='nowhere.safetensors' is not a file"):
        trainer(GeoLoRACallback()).fit(task(checkpoint_path="nowhere.safetensors"), Digits())


def test_weights_that_cannot_be_fetched_are_told_in_one_sentence(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    unknown = {"pretrained_cfg_overlay": {"hf_hub_id": "nobody/has-this", "url": ""}}  # in no cache
    with pytest.raises(
        ValueError, match=r"model_name='vit_tiny_patch16_224': its weights cannot be fetched: .*as checkpoint_path"
    ):
        ImageClassification("vit_tiny_patch16_224", model_args=unknown, num_classes=3).configure_model()


def test_any_timm_model_knows_its_head():
    for name, heads in (("resnet18", ("fc",)), ("deit_tiny_distilled_patch16_224", ("head", "head_dist"))):
        assert head_names(timm.create_model(name)) == heads


def test_weights_of_another_model_are_refused(weights):
    deeper = task(checkpoint_path=str(weights), num_classes=2, model_args={**SIZE, "depth": 3})
    with pytest.raises(ValueError, match=r"does not fit the model: .*blocks.2.* is missing"):
        deeper.configure_model()
    larger = task(checkpoint_path=str(weights), num_classes=2, model_args={**SIZE, "img_size": 32})
    with pytest.raises(ValueError, match=r"is \(1, 5, 24\) in the file and \(1, 17, 24\) in the model"):
        larger.configure_model()


def test_a_broken_file_of_weights_is_refused(tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"\x10\0\0\0")
    with pytest.raises(ValueError, match=r"checkpoint_path=.*broken.safetensors.* cannot be read"):
        task(checkpoint_path=str(path), num_classes=2).configure_model()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 0}, "num_classes=0"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"mixup": -0.1}, "mixup=-0.1"),
        ({"cutmix": float("nan")}, "cutmix=nan"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        task(**settings)


def test_an_unknown_model_is_refused_and_similar_ones_are_named():
    with pytest.raises(ValueError, match=r"model_name='vit_tiny_patch61' is not known to timm.*vit_"):
        ImageClassification("vit_tiny_patch61")


def test_a_class_count_that_does_not_fit_is_refused_before_training():
    with pytest.raises(ValueError, match="num_classes=3 does not fit the data, which has 10 classes"):
        trainer(GeoLoRACallback()).fit(task(num_classes=3), Digits())


@pytest.mark.parametrize(
    ("names", "message"),
    [(["a"], "one name per class, and there are 10 classes"), (list("9876543210"), "do not fit the data")],
)
def test_names_of_classes_that_are_not_those_of_the_data_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        trainer(GeoLoRACallback()).fit(task(class_names=names), Digits())


def test_no_class_count_at_all_is_refused():
    with pytest.raises(ValueError, match="num_classes=None"):
        task().configure_model()
