"""Reports of users on what lies in files: names, buffers, and the weights of merged models."""

import copy

import peft
import pytest
import timm
import torch
from exported import move
from foreign import ADAPTER, Foreign, loader, trainer
from safetensors import safe_open
from safetensors.torch import load_file
from small import Small
from tiny_text import save_tiny_model
from tolerance import NETWORK, close
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel
from trained import trained
from transformers import AutoModelForSequenceClassification

from geolora_pl import (
    AdapterConfig,
    AdapterLibrary,
    GeoLoRACallback,
    MergedAdapters,
    export_peft,
    import_peft,
    inject_adapters,
    load_adapter,
    merge_adapters,
    remove_adapters,
    save_adapter,
)
from geolora_pl.adapters.inject import find_adapters
from geolora_pl.errors import GeoLoRAWarning
from geolora_pl.lightning.export import export
from geolora_pl.storage.spectra import checkpoint_spectra
from geolora_pl.tasks import ImageClassification, TextClassification

# Names


class Net(nn.Module):
    """A block and a head."""

    def __init__(self, norm=True):
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential(
            nn.Linear(8, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Tanh(), nn.Linear(8, 8)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.block(x))


def compiled(module):
    return torch.compile(module, backend="eager")


def with_parts(wrap, *names):
    def wrapped(model):
        for name in names:
            model.set_submodule(name, wrap(model.get_submodule(name)))
        return model

    return wrapped


WRAPPERS = {
    "compiled": compiled,
    "a compiled block": with_parts(compiled, "block"),
    "a compiled layer": with_parts(compiled, "block.0"),
    "a compiled layer in a compiled model": lambda model: compiled(with_parts(compiled, "block.3", "head")(model)),
    "DataParallel": nn.DataParallel,
    "DataParallel in the middle": with_parts(nn.DataParallel, "block", "head"),
    "compiled DataParallel": lambda model: compiled(nn.DataParallel(model)),
    "a checkpointed block": with_parts(checkpoint_wrapper, "block"),
    "averaged": AveragedModel,
}
CONFIG = AdapterConfig(target_modules=["block.0", "block.3"], modules_to_save=["head"], dropout=0.0)


def checksum(path):
    with safe_open(path, "pt") as file:
        return file.metadata()["checksum"]


@torch.no_grad()
def moved(model):
    """A model with adapters as after some training."""
    for layer in find_adapters(model).values():
        trained(layer)
    for name, parameter in model.named_parameters():
        if "head" in name:
            parameter.normal_()
    model(torch.randn(4, 8))  # which moves running statistics
    return model.eval()


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("first", [True, False], ids=["wrapped before", "wrapped after"])
@torch.no_grad()  # between two graphs, torch.compile asks tensors for a .grad that none has, and warns
def test_an_adapter_of_a_wrapped_model_is_that_of_the_plain_one_and_back(wrap, first, tmp_path):
    """A user compiles a model, or puts it into DataParallel, and saves: the plain model refused the file.

    Names are those of the plain model, so that the content of the file is the same, and is loaded either way.
    """
    if first:
        wrapped = wrap(Net())
        assert list(inject_adapters(wrapped, CONFIG)) == ["block.0", "block.3"]
    else:
        plain = Net()
        inject_adapters(plain, CONFIG)
        wrapped = wrap(plain)
    torch.manual_seed(1)
    moved(wrapped)
    x = torch.randn(4, 8)
    expected = wrapped(x)
    save_adapter(wrapped, tmp_path / "wrapped.safetensors")
    plain = Net().eval()
    load_adapter(plain, tmp_path / "wrapped.safetensors")
    close(plain(x), expected, NETWORK)
    save_adapter(plain, tmp_path / "plain.safetensors")
    assert checksum(tmp_path / "plain.safetensors") == checksum(tmp_path / "wrapped.safetensors")
    again = wrap(Net()).eval()
    load_adapter(again, tmp_path / "plain.safetensors")
    assert list(find_adapters(again)) == ["block.0", "block.3"]
    close(again(x), expected, NETWORK)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@torch.no_grad()
def test_adapters_of_a_wrapped_model_compute_and_are_merged_and_taken_out(wrap):
    """A user adapts a layer that is compiled by itself: the adapter was never called, without a word."""
    x, wrapped = torch.randn(4, 8), wrap(Net()).eval()
    wrapped(x)  # compile what is compiled
    base = wrapped(x)
    layers = [type(module) for module in wrapped.modules()]
    inject_adapters(wrapped, CONFIG)
    assert torch.equal(wrapped(x), base)
    for layer in find_adapters(wrapped).values():
        layer.S.data.fill_diagonal_(1.0)
    adapted = wrapped(x)
    assert not torch.allclose(adapted, base)
    with MergedAdapters(wrapped):
        close(wrapped(x), adapted, NETWORK)
    close(wrapped(x), adapted, NETWORK)
    twin = copy.deepcopy(wrapped)
    merge_adapters(twin)
    close(twin(x), adapted, NETWORK)
    remove_adapters(wrapped)
    close(wrapped(x), base, NETWORK)
    assert [type(module) for module in wrapped.modules()] == layers


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@torch.no_grad()
def test_a_lora_of_a_wrapped_model_is_read_by_peft_and_back(wrap, tmp_path):
    """A user exports a compiled model: PEFT found no layer of the names in the file."""
    wrapped = wrap(Net(norm=False))
    inject_adapters(wrapped, CONFIG)
    moved(wrapped)
    export_peft(wrapped, tmp_path / "lora")
    x = torch.randn(4, 8)
    theirs, again = peft.PeftModel.from_pretrained(Net(norm=False), tmp_path / "lora"), wrap(Net(norm=False))
    import_peft(again, tmp_path / "lora")
    close(theirs.eval()(x), wrapped(x), NETWORK)
    close(again.eval()(x), wrapped(x), NETWORK)


@torch.no_grad()
def test_a_library_on_a_compiled_model(tmp_path):
    """A user serves several adapters on a compiled model; they were trained without."""
    trained_one = Net()
    inject_adapters(trained_one, CONFIG)
    save_adapter(moved(trained_one), tmp_path / "a.safetensors")
    x, model = torch.randn(4, 8), with_parts(compiled, "block", "head")(Net()).eval()
    base = model(x)
    library = AdapterLibrary(model)
    library.load("a", tmp_path / "a.safetensors")
    library.use("a")
    close(model(x), trained_one(x), NETWORK)
    library.use(None)
    close(model(x), base, NETWORK)


class Compiled(Foreign):
    def __init__(self):
        super().__init__()
        self.body = compiled(self.body)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize(("theirs", "ours"), [(Compiled, Foreign), (Foreign, Compiled), (Compiled, Compiled)])
def test_a_checkpoint_of_a_module_with_a_compiled_part(theirs, ours, small, tmp_path):
    """A user compiles a part of a module, trains it, and loads the checkpoint for use, with or without compiling."""
    module, model = theirs(), ours()
    runs = trainer(GeoLoRACallback(adapter=ADAPTER, small_checkpoints=small))
    runs.fit(module, loader())
    runs.save_checkpoint(tmp_path / "a.ckpt")
    load_adapter(model, tmp_path / "a.ckpt")
    x = torch.randn(4, 10)
    close(model.head(model.body(x)), module.head(module.body(x)), NETWORK)
    assert list(find_adapters(model)) == ["body.0", "body.2"]
    assert list(checkpoint_spectra(tmp_path / "a.ckpt")) == ["body.0", "body.2"]


def test_a_run_with_a_compiled_part_is_resumed(tmp_path):
    """A user resumes a run of a module that compiles a part of itself."""
    half = Compiled()
    runs = trainer(GeoLoRACallback(adapter=ADAPTER), max_epochs=1)
    runs.fit(half, loader())
    runs.save_checkpoint(tmp_path / "a.ckpt")
    resumed = Compiled()
    trainer(GeoLoRACallback(adapter=ADAPTER), max_epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / "a.ckpt")
    assert list(find_adapters(resumed)) == ["body.0", "body.2"]


def test_new_adapters_in_distributed_data_parallel_are_refused(monkeypatch):
    """A user wraps the model first: the processes would train apart, because no gradient of an adapter is sent."""
    monkeypatch.setattr(nn.parallel.DistributedDataParallel, "__init__", lambda self: nn.Module.__init__(self))
    wrapped = nn.parallel.DistributedDataParallel()
    wrapped.module = Net()
    with pytest.raises(ValueError, match="inject first and wrap the model then"):
        inject_adapters(wrapped, CONFIG)
    inject_adapters(wrapped.module, CONFIG)
    assert list(find_adapters(wrapped)) == ["block.0", "block.3"]


# Buffers


class Masked(nn.Module):
    """A layer with a causal mask and a codebook, of which the latter changes while it is trained."""

    def __init__(self, length=4):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 8)
        self.register_buffer("mask", torch.full((length, length), float("-inf")).triu(1))
        self.register_buffer("codebook", torch.zeros(3))
        self.register_buffer("graph", torch.eye(3).to_sparse())
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        if self.training:
            self.codebook += 1
        return self.norm(self.layer(x)) * self.codebook.sum()


@pytest.mark.parametrize("cast", [None, torch.bfloat16])
def test_a_file_holds_the_buffers_that_training_has_changed_and_no_more(cast, tmp_path):
    """A user's model has a causal mask with minus infinity as a buffer: it could never be saved."""
    model = Masked()
    inject_adapters(model)
    model(torch.randn(4, 8))
    model.cache += 1
    if cast is not None:
        model.to(cast)
    save_adapter(model, tmp_path / "a.safetensors")
    buffers = {name for name in load_file(tmp_path / "a.safetensors") if name.startswith("buffers/")}
    moved = {"codebook", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert buffers == {f"buffers/{name}" for name in moved}
    other = Masked(length=6).to(cast)  # a mask of another length does not matter
    load_adapter(other, tmp_path / "a.safetensors")
    assert other.codebook.tolist() == [1, 1, 1]
    x = torch.randn(4, 8, dtype=cast)
    assert torch.equal(other.eval()(x), model.eval()(x))
    save_adapter(other, tmp_path / "b.safetensors")
    assert load_file(tmp_path / "b.safetensors").keys() == load_file(tmp_path / "a.safetensors").keys()


def test_the_mask_of_a_copy_is_known_and_one_that_nobody_remembers_is_stored(tmp_path):
    """A user copies an adapted model, or puts a new module with a mask into it."""
    model = Masked()
    inject_adapters(model)
    twin = copy.deepcopy(model)
    save_adapter(twin, tmp_path / "twin.safetensors")
    assert "buffers/mask" not in load_file(tmp_path / "twin.safetensors")
    model.more = Masked().requires_grad_(False)
    model.more.graph += model.more.graph
    with pytest.raises(ValueError, match=r"buffers/more\.graph is sparse"):
        save_adapter(model, tmp_path / "more.safetensors")
    del model.more.graph
    save_adapter(model, tmp_path / "more.safetensors")
    stored = load_file(tmp_path / "more.safetensors")["buffers/more.mask"]
    assert torch.equal(stored, model.more.mask)


@pytest.mark.parametrize("name", ["norm.running_var", "codebook"])
def test_a_buffer_that_training_has_broken_is_not_saved(name, tmp_path):
    """A batch broke the running statistics, or a buffer: there is nothing to save."""
    model = Masked()
    inject_adapters(model)
    model.get_buffer(name).fill_(torch.nan)
    with pytest.raises(ValueError, match=f"{name} (holds values that are|is) not finite"):
        save_adapter(model, tmp_path / "a.safetensors")
    if name != "codebook":
        model.get_buffer(name).fill_(torch.inf)
        with pytest.raises(ValueError, match=f"{name} holds values that are not finite"):
            save_adapter(model, tmp_path / "a.safetensors")


def test_adapters_with_and_without_a_changed_buffer_are_switched_and_added(tmp_path):
    """A user keeps two adapters of which only one has changed a buffer of the base."""
    still, moving, base = Masked(), Masked(), Masked().eval()
    for model, name in ((still, "still"), (moving, "moving")):
        inject_adapters(model)
        if name == "moving":
            model(torch.randn(4, 8))
        save_adapter(model, tmp_path / f"{name}.safetensors")
    library = AdapterLibrary(base)
    for name in ("still", "moving"):
        library.load(name, tmp_path / f"{name}.safetensors")
    for name, expected in (("moving", 1.0), ("still", 0.0), ("moving", 1.0), (None, 0.0)):
        library.use(name)
        assert base.codebook.tolist() == [expected] * 3
    library.combine("both", {"still": 0.5, "moving": 0.5})
    library.use("both")
    assert base.codebook.tolist() == [0.5] * 3


def test_a_lora_without_a_buffer_that_has_changed_says_so(tmp_path):
    """A user's codebook moved in training, was in no LoRA, and nobody said it."""
    model = nn.Sequential(Masked())
    model[0].norm = nn.Identity()
    inject_adapters(model)
    export_peft(model, tmp_path / "still")
    model(torch.randn(4, 8))
    with pytest.warns(GeoLoRAWarning, match=r"^0\.codebook is a buffer that has changed .*merge instead"):
        export_peft(model, tmp_path / "moved")


# What else was trained


def test_a_model_that_was_frozen_is_not_written_without_its_head(tmp_path):
    """A user called freeze() before the export. The head was left out, for nothing said that it was trained."""
    model = Net(norm=False)
    inject_adapters(model, CONFIG)
    model.requires_grad_(False)
    for write in (save_adapter, export_peft):
        with pytest.raises(ValueError, match=r"nothing in the model requires gradients.* before freeze\(\)"):
            write(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())


class Beside(Small):
    """Its loss has a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.temperature.square()


@pytest.mark.parametrize("form", ["adapter", "peft", "merged"])
def test_what_was_trained_beside_the_model_is_named_where_an_export_leaves_it_out(form, tmp_path):
    """A user's module trained a part of its own beside self.model. The exports went without it, and said nothing."""
    callbacks = GeoLoRACallback(adapt_every=2)
    runs = trainer(callbacks)
    runs.fit(Beside(), loader())
    runs.save_checkpoint(tmp_path / "last.ckpt")
    (tmp_path / "c.yaml").write_text(f"model: {__name__}.Beside\n")
    with pytest.warns(GeoLoRAWarning, match="temperature was trained beside the model of Beside"):
        export(tmp_path / "last.ckpt", form, tmp_path / "out", config=tmp_path / "c.yaml")


# The weights of merged models


def test_weights_that_are_shared_or_lie_otherwise_are_exported(tmp_path):
    """A user exports timm's coat_tiny, whose blocks share parts, in channels_last: the file could not be written."""
    sizes = {"embed_dims": (16,) * 4, "serial_depths": (1,) * 4, "num_heads": 8, "mlp_ratios": (1,) * 4}
    task = ImageClassification("coat_tiny", pretrained=False, num_classes=3, model_args={**sizes, "img_size": 32})
    task.configure_model()
    move(task)
    task.model.to(memory_format=torch.channels_last)
    x = torch.randn(1, 3, 32, 32)
    expected = task(x)
    merge_adapters(task.model)
    task.save_model(tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    close(model(x), expected, NETWORK)


def test_texts_models_whose_layers_share_weights_are_exported(tmp_path):
    """A user ties two layers that the class of the model does not declare as tied: transformers refused to save."""
    task = TextClassification(save_tiny_model(tmp_path / "base"), num_classes=2)
    task.configure_model()
    merge_adapters(move(task).model)
    first, second = task.model.bert.encoder.layer[:2]
    second.output.dense.weight = first.output.dense.weight
    task.save_model(tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(6)[None]
    close(model(ids).logits, task.model(ids).logits, NETWORK)


class CompiledSmall(Small):
    def build_model(self):
        return compiled(with_parts(compiled, "0")(super().build_model()))


@pytest.mark.parametrize("form", ["adapter", "peft", "merged"])
@torch.no_grad()
def test_exports_of_a_module_that_compiles_itself_have_plain_names(form, tmp_path, monkeypatch):
    """A user's module compiles its model and a layer of it: every export is one of the plain model."""
    module = CompiledSmall()
    module.configure_model()
    move(module)
    x = torch.randn(4, 10)
    expected = module.model(x)
    monkeypatch.setattr("geolora_pl.lightning.loading.load_module", lambda path, config: module)
    export("run.ckpt", form, tmp_path / "out")
    plain = Small().build_model()
    if form == "adapter":
        load_adapter(plain, tmp_path / "out")
    elif form == "peft":
        import_peft(plain, tmp_path / "out")
    else:
        plain.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    close(plain.eval()(x), expected, NETWORK)
