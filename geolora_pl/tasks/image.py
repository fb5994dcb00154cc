"""Define the task of classes, several labels and numbers of images, with timm models."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any

import timm
from timm.data import resolve_data_config
from timm.models import load_state_dict
from torch import Tensor, nn
from torchmetrics import Metric
from torchvision.transforms import v2

from geolora_pl.adapters.config import AdapterConfig
from geolora_pl.adapters.inject import find_adapters
from geolora_pl.adapters.targets import convolutions, linear_layers
from geolora_pl.errors import in_one_line
from geolora_pl.lfs import refuse_pointer
from geolora_pl.lightning.hyperparameters import check_sizes
from geolora_pl.lightning.internals import datamodule_of
from geolora_pl.lightning.module import GeoLoRAModule
from geolora_pl.notes import keep_notes
from geolora_pl.packaged import in_package
from geolora_pl.storage.plain_file import write_weights
from geolora_pl.tasks.classes import (
    make_loss,
    probabilities,
    problem_type,
    settle_class_names,
    settle_multi_label,
    settle_num_classes,
)
from geolora_pl.tasks.confusion import confusion_matrix, keep_confusion
from geolora_pl.tasks.internals import save_config_for_hf
from geolora_pl.tasks.metrics import check_metrics, for_metrics, make_metrics, usual_metrics
from geolora_pl.tasks.trained import note_adapted, note_trained_in_full

_OF_TIMM = {name for name in inspect.signature(timm.create_model).parameters if name != "pretrained_cfg_overlay"}
# The properties of the images that a checkpoint may set.
_OF_IMAGES = {"input_size", "test_input_size", "fixed_input_size", "mean", "std", "interpolation", "crop_pct"}
_OF_IMAGES |= {"test_crop_pct", "crop_mode", "num_classes", "pool_size"}


class ImageClassification(GeoLoRAModule):
    """Adapt a pretrained timm model to the classes of a data set, to several labels per image, or to numbers.

    The model gets a new head, which is trained in full. One class means a regression, with the squared error as loss.
    With several labels per image the loss is the binary cross-entropy of every label.

    Args:
        model_name: A name that ``timm.create_model`` knows, such as ``vit_base_patch16_224``.
        pretrained: Whether to fetch the pretrained weights of that name from the hub.
        checkpoint_path: A file of weights on this machine to use instead of the hub (``.safetensors``, ``.pth`` or
            another format that timm loads), or ``pkg://package/file`` for one of an installed package; the weights of
            its head are dropped.
        model_args: More arguments for ``timm.create_model``, such as ``img_size`` or ``in_chans``.
        num_classes: Number of classes, 1 for a regression; by default that of the data module.
        label_smoothing: Share of the target that is spread over all classes, in [0, 1).
        class_names: Names of the classes; by default those of the data module.
        mixup: Parameter of the Beta distribution by which each training batch is mixed with itself (Zhang et al. 2018),
            at least 0; 0 is off. With ``cutmix`` each batch gets one of the two, at random.
        cutmix: The same for parts of images that are exchanged (Yun et al. 2019).
        multi_label: Whether an image may have several labels or none; by default as the data module says.
        metrics: Metrics to log: by default ``accuracy``, or ``f1_macro``, ``f1_micro`` and ``average_precision`` for
            several labels, or ``pearson``, ``spearman`` and ``mae`` for a regression; also ``f1`` and ``matthews``.
        adapter: What to adapt; by default (``target_modules: auto``) every linear layer but the head, or the
            convolutions of a model that has no such layer.
        **kwargs: Arguments of :class:`GeoLoRAModule`.

    Raises:
        ValueError: An argument is out of range, the model or file is unknown, or the classes do not fit the data.

    Example:
        >>> import torch
        >>> task = ImageClassification("vit_tiny_patch16_224", pretrained=False, num_classes=3)
        >>> task.configure_model()
        >>> task(torch.zeros(2, 3, 224, 224)).shape
        torch.Size([2, 3])
    """

    base_arguments = MappingProxyType({"pretrained": False, "checkpoint_path": None})

    def __init__(
        self,
        model_name: str,
        pretrained: bool = True,
        checkpoint_path: str | None = None,
        model_args: dict[str, Any] | None = None,
        num_classes: int | None = None,
        label_smoothing: float = 0.0,
        class_names: list[str] | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        multi_label: bool | None = None,
        metrics: list[str] | None = None,
        adapter: AdapterConfig = AdapterConfig(target_modules="auto"),
        **kwargs: Any,
    ) -> None:
        super().__init__(adapter=adapter, **kwargs)
        if not timm.is_model(model_name.partition(".")[0]):
            near = ", ".join(get_close_matches(model_name, timm.list_models(), n=5, cutoff=0.5)) or "none"
            raise ValueError(f"model_name={model_name!r} is not known to timm; similar names are: {near}")
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes={num_classes} must be at least 1")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 1)")
        for name, alpha in (("mixup", mixup), ("cutmix", cutmix)):
            if not alpha >= 0:
                raise ValueError(f"{name}={alpha} must be at least 0, which is off")
        check_metrics(metrics)
        self.model_name = model_name
        self.pretrained = pretrained
        self.checkpoint_path = checkpoint_path
        self.model_args = model_args or {}
        self.num_classes = num_classes
        self.class_names = class_names
        self.mixup = mixup
        self.cutmix = cutmix
        self.multi_label = multi_label
        self.metric_names = metrics
        self.label_smoothing = label_smoothing
        self.notes: list[str] = []  # what the user is told about the model

    @classmethod
    def argument_from_checkpoint(cls, name: str, value: Any) -> Any:
        """Accept names of timm models, and ``model_args`` that only say sizes and what an image must look like.

        Raises:
            ValueError: The checkpoint says more.
        """
        if name == "model_name":
            check_sizes({name: value})
        if name == "model_args" and value:
            if not isinstance(value, Mapping):
                raise ValueError("is not a mapping")
            overlay = value.get("pretrained_cfg_overlay") or {}
            if not isinstance(overlay, Mapping):
                raise ValueError("has a pretrained_cfg_overlay that is not a mapping")
            check_sizes(value, never=_OF_TIMM | (set(overlay) - _OF_IMAGES))
        return super().argument_from_checkpoint(name, value)

    def configure_model(self) -> None:
        """Take the classes from the data, build the model, put the adapters in, make loss and metrics."""
        if not hasattr(self, "model"):
            self._settle_classes()
        super().configure_model()

    def _settle_classes(self) -> None:
        data = datamodule_of(self)
        classes = self.num_classes = settle_num_classes(self.num_classes, data)
        self.multi_label = settle_multi_label(self.multi_label, classes, data)
        if classes > 1:
            self.class_names = settle_class_names(self.class_names, classes, data)
        if (self.mixup or self.cutmix) and (self.multi_label or classes == 1):
            raise ValueError("mixup and cutmix are for images of one class each: leave them out")
        self.loss = make_loss(classes, self.multi_label, None, self.label_smoothing)
        names = self.metric_names or usual_metrics(classes, self.multi_label)
        self.metrics = nn.ModuleDict(
            {split: nn.ModuleDict(make_metrics(names, classes, self.multi_label)) for split in ("val", "test")}
        )
        self.confusion = confusion_matrix(classes, self.multi_label)
        # A checkpoint can then be loaded without the data.
        self.hparams["num_classes"], self.hparams["class_names"] = self.num_classes, self.class_names
        self.hparams["multi_label"] = self.multi_label

    def setup(self, stage: str) -> None:
        """Say what is adapted and what is trained in full."""
        if stage == "fit" and hasattr(self, "model"):
            with keep_notes(self.notes):
                if self.adapter.target_modules == "auto":
                    note_adapted(find_adapters(self.model))
                note_trained_in_full(self.model, self.new_modules())

    def build_model(self) -> nn.Module:
        """Create the timm model with a new head and pretrained weights in the rest."""
        weights = None if self.checkpoint_path is None else find_weights(self.checkpoint_path)
        try:
            model: nn.Module = timm.create_model(
                self.model_name,
                pretrained=self.pretrained and weights is None,
                num_classes=self.num_classes,
                **self.model_args,
            )
        except TypeError as error:  # an unknown name, or a value of a wrong type
            raise ValueError(
                f"model_args={self.model_args!r} do not suit model_name={self.model_name!r}: {error}; drop or fix them"
            ) from error
        except OSError as error:  # of the hub, with or without a connection
            raise ValueError(
                f"model_name={self.model_name!r}: its weights cannot be fetched: {in_one_line(error)} Check "
                "the connection, or name a file on this machine as checkpoint_path"
            ) from error
        if weights is not None:
            load_backbone(model, weights)
        # From now on the checkpoints hold the weights, and must load without the file and without the hub.
        self.hparams["checkpoint_path"], self.hparams["pretrained"] = None, False
        return model

    def save_model(self, folder: Path) -> None:
        """Write weights and configuration as timm does, for ``timm.create_model``.

        Load it by ``timm.create_model("local-dir:folder", pretrained=True)``, or with the model's own name and
        arguments and ``checkpoint_path="folder/model.safetensors"``.
        """
        assert self.num_classes is not None
        described: dict[str, Any] = {"problem_type": problem_type(self.num_classes, bool(self.multi_label))}
        if self.class_names is not None:
            described["label_names"] = self.class_names
        arguments = {name: value for name, value in self.model_args.items() if name != "pretrained_cfg_overlay"}
        write_weights(self.model, folder / "model.safetensors")
        save_config_for_hf(self.model, str(folder / "config.json"), described, arguments)

    def default_targets(self) -> str | Sequence[str]:
        """Return every linear layer but the head, or the convolutions of a model that has no such layer."""
        return "all-linear" if linear_layers(self.model) else convolutions(self.model) or "all-linear"

    def new_modules(self) -> Sequence[str]:
        """Return the names of the head, which is new."""
        return head_names(self.model)

    @property
    def data_config(self) -> Mapping[str, Any]:
        """Input size, normalisation and interpolation with which the model was pretrained."""
        size = {key: self.model_args[key] for key in ("img_size", "in_chans") if key in self.model_args}
        config: dict[str, Any] = resolve_data_config(size, model=self.model)
        channels = config["input_size"][0]
        for name in ("mean", "std"):
            if len(config[name]) != channels:  # pretrained on colour, used on another number of channels
                config[name] = (sum(config[name]) / len(config[name]),) * channels
        return config

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (batch, classes), or numbers (batch,), of images (batch, channels, height, width)."""
        logits: Tensor = self.model(images)
        return logits.squeeze(-1) if self.num_classes == 1 else logits

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss: cross-entropy, of mixed images if that is asked for, or the squared error."""
        images, labels = self._mix(batch)
        loss: Tensor = self.loss(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def _mix(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Mix a batch with itself; the labels become probabilities (batch, classes)."""
        # Those of torchvision take their random numbers from torch, and timm's refuse the odd batch that ends an epoch.
        kinds = (v2.MixUp, self.mixup), (v2.CutMix, self.cutmix)
        ways = [kind(alpha=alpha, num_classes=self.num_classes) for kind, alpha in kinds if alpha]
        if not ways:
            return batch
        mixed: tuple[Tensor, Tensor] = v2.RandomChoice(ways)(*batch)
        return mixed

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Log loss and metrics on the validation images."""
        outputs, labels = self._evaluate("val", batch)
        if self.confusion is not None:
            self.confusion.update(outputs, labels)

    def on_validation_epoch_end(self) -> None:
        """Keep for the report which classes were taken for which."""
        keep_confusion(self, self.confusion, self.class_names)

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Log loss and metrics on the test images."""
        self._evaluate("test", batch)

    def _evaluate(self, split: str, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, labels = batch
        outputs, of_split = self(images), self.metrics[split]
        assert self.num_classes is not None
        assert isinstance(of_split, nn.ModuleDict)
        self.log(f"{split}_loss", self.loss(outputs, labels), batch_size=len(labels), sync_dist=True)
        compared = for_metrics(outputs, labels, self.num_classes, bool(self.multi_label))
        for name, metric in of_split.items():
            assert isinstance(metric, Metric)
            metric.update(*compared)  # calling it would also compute this batch alone, which may be undefined
            self.log(f"{split}_{name}", metric, prog_bar=True)
        return outputs, labels

    def predict_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the probabilities of the classes (batch, classes), or numbers (batch,) in a regression."""
        assert self.num_classes is not None
        return probabilities(self(batch[0]), self.num_classes, bool(self.multi_label))


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the classifier of a timm model: one, or two for a distilled model."""
    names = model.pretrained_cfg["classifier"]  # type: ignore[index]
    return (names,) if isinstance(names, str) else tuple(names)


def find_weights(checkpoint_path: str) -> str:
    """The file of weights that the user named, which must be there."""
    path = in_package(checkpoint_path, "checkpoint_path") or Path(checkpoint_path)
    if not path.is_file():
        raise ValueError(f"checkpoint_path={checkpoint_path!r} is not a file (from {Path.cwd()})")
    return str(path)


def load_backbone(model: nn.Module, path: str) -> None:
    """Load a file of weights into a timm model, except for the head.

    Args:
        model: A timm model.
        path: A file that ``timm.models.load_state_dict`` reads.

    Raises:
        ValueError: The file is broken, or holds the weights of another model.
    """
    refuse_pointer(Path(path))
    try:
        weights = load_state_dict(path, weights_only=True)
    except Exception as error:  # each format raises its own errors
        raise ValueError(f"checkpoint_path={path!r} cannot be read: {in_one_line(error)}") from error
    heads = head_names(model)
    own = model.state_dict()

    def is_head(name: str) -> bool:
        return any(name.startswith(f"{head}.") for head in heads)

    wrong = [f"{name} is missing" for name in own if name not in weights and not is_head(name)]
    wrong += [f"{name} is unknown" for name in weights if name not in own and not is_head(name)]
    wrong += [
        f"{name} is {tuple(weights[name].shape)} in the file and {tuple(own[name].shape)} in the model"
        for name in own
        if name in weights and weights[name].shape != own[name].shape and not is_head(name)
    ]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise ValueError(
            f"checkpoint_path={path!r} does not fit the model: {'; '.join(wrong[:3])}{more}; choose the model_name and "
            "model_args that the weights were made with"
        )
    model.load_state_dict({name: weight for name, weight in weights.items() if not is_head(name)}, strict=False)
