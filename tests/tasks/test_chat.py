"""Chats: what a model learns of a dialogue, what it sees of a neighbour, what it writes while it trains."""

import json

import pytest
import torch
from exported import settings_of
from flags import QUIET
from foreign import trainer
from lightning.pytorch.loggers import TensorBoardLogger
from processes import in_two_processes, of_two, sharded
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from text_files import write, write_rows
from tiny_chat import SIZE, TEMPLATE, chat_tokenizer, save_tiny_chat, turns, write_chats
from tiny_text import save_tiny_decoder
from tokenizers.processors import TemplateProcessing
from tolerance import NETWORK, close, rounding
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from geolora_pl import AdapterConfig, GeoLoRACallback, RiemannianAdam, predict
from geolora_pl.data import ChatFiles, LanguageFiles
from geolora_pl.lightning.export import export
from geolora_pl.tasks import CausalLM
from geolora_pl.tasks.answers import answer, encode_asked, stop_tokens, turn_end
from geolora_pl.tasks.packing import check_isolation

IGNORED = -100
DIALOGUE = turns("is the film good", "very good", "and the plot", "not bad")
OTHER = turns("one two", "three four")


def chats(folder, rows=(DIALOGUE, OTHER), **settings):
    file = write_chats(folder / "chats.jsonl", rows)
    return ChatFiles(file, file, **{"max_length": 32, "batch_size": 2, "cache_dir": str(folder / "cache"), **settings})


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_text_is_read_as_if_it_were_alone(tmp_path, family, attention):
    module = CausalLM(save_tiny_decoder(tmp_path / "model", family, initializer_range=0.5))
    module.configure_model()
    module.eval()
    module.model.set_attn_implementation(attention)
    texts = [torch.arange(4, 4 + length) for length in (7, 3, 5)]
    row = {"input_ids": torch.cat(texts)[None], "position_ids": torch.cat([torch.arange(len(t)) for t in texts])[None]}
    packed = module(row)[0].split([len(text) for text in texts])
    for text, logits in zip(texts, packed, strict=True):
        close(logits, module({"input_ids": text[None]})[0], NETWORK)
    seen = module({"input_ids": row["input_ids"]})[0, 7:10]
    assert (seen - packed[1]).abs().max() > 0.01 * packed[1].abs().max()
    for dtype in (torch.float32, torch.bfloat16):
        check_isolation(module.model.to(dtype), module, 26, torch.device("cpu"))


def test_flash_attention_gets_the_rows_joined_as_it_finds_texts_in_one_row_alone(tmp_path, monkeypatch):
    """Flash attention looks for positions that restart only in a batch of one row, and would see neighbours in more."""
    module = CausalLM(save_tiny_decoder(tmp_path / "model", "llama"))
    module.configure_model()
    module.eval()
    batch = {"input_ids": torch.arange(4, 20).view(2, 8), "position_ids": torch.arange(4).repeat(2, 2)}
    expected = module(batch)
    monkeypatch.setattr("geolora_pl.tasks.causal_lm.is_flash_attention_requested", lambda config: True)
    given = []
    module.model.register_forward_pre_hook(lambda _, args, named: given.append(named), with_kwargs=True)
    close(module(batch), expected, NETWORK)
    assert given[0]["input_ids"].shape == (1, 16)
    (begins, _), _ = prepare_fa_kwargs_from_position_ids(given[0]["position_ids"])  # as flash attention finds the texts
    assert begins.tolist() == [0, 4, 8, 12, 16]


class SeesAll(nn.Module):
    """Takes position ids and does nothing with them."""

    def forward(self, batch):
        mean = batch["input_ids"].cumsum(1) / torch.arange(1, batch["input_ids"].shape[1] + 1)
        return mean[..., None].expand(-1, -1, 4)


def test_a_model_that_sees_the_neighbour_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"SeesAll would see the neighbours .* do not keep texts apart"):
        check_isolation(SeesAll(), SeesAll(), 26, torch.device("cpu"))
    config = {"model_type": "bloom", "vocab_size": SIZE, "hidden_size": 16, "n_layer": 1, "n_head": 2}
    chat_tokenizer().save_pretrained(tmp_path / "model")
    module = CausalLM(str(tmp_path / "model"), pretrained=False, model_args=config)
    module.train()
    with pytest.raises(ValueError, match=r"BloomForCausalLM would see the neighbours .* set packed to false"):
        trainer(GeoLoRACallback(), max_steps=1).fit(module, chats(tmp_path))
    assert module.model.training
    trainer(GeoLoRACallback(), max_steps=1).fit(module, chats(tmp_path, packed=False))
    file = write(tmp_path / "texts.csv", text=["one two", "a film"])
    texts = LanguageFiles(
        file, val_file=file, test_file=file, isolated=True, max_length=16, cache_dir=tmp_path / "cache"
    )
    with pytest.raises(ValueError, match=r"BloomForCausalLM would see the neighbours .* set packed to false"):
        predict(module, texts, **QUIET)
    asked = chats(tmp_path, predict_file=write_chats(tmp_path / "asked.jsonl", [turns("one")]))
    assert len(predict(module, asked, **QUIET)) == 1  # which are not packed


def test_packed_pairs_and_isolated_texts_do_not_see_their_neighbours(tmp_path):
    rows = [{"q": "is the film good", "a": "very good"}, {"q": "the plot", "a": "bad and poor"}] * 2
    file = write_rows(tmp_path / "pairs.jsonl", rows)
    module = CausalLM(save_tiny_decoder(tmp_path / "model", "llama"))
    pairs = {"prompt_column": "q", "completion_column": "a"}
    for columns in (pairs, {"text_column": "q"}):
        found = {}
        for packed in (True, False):
            isolated = True if packed and columns is not pairs else None
            data = LanguageFiles(
                file,
                file,
                max_length=16,
                packed=packed,
                isolated=isolated,
                cache_dir=str(tmp_path / "cache"),
                **columns,
            )
            (found[packed],) = trainer(GeoLoRACallback(), max_steps=1).validate(module, data, verbose=False)
            assert data.isolated is packed
        assert found[True]["val_loss"] == pytest.approx(found[False]["val_loss"], rel=rounding(torch.float32, NETWORK))
    with pytest.raises(ValueError, match="isolated=True is for packed sequences"):
        LanguageFiles(file, packed=False, isolated=True)


@pytest.mark.parametrize("packed", [True, False])
def test_a_tiny_model_learns_a_dialogue_and_nothing_of_the_user(tmp_path, packed):
    module = CausalLM(
        save_tiny_chat(tmp_path / "model", initializer_range=0.6),
        adapter=AdapterConfig(target_modules="auto", init_rank=8, max_rank=8),
        optimizer=lambda groups: RiemannianAdam(groups, lr=3.0),
        warmup=0,
        prompts=["is the film good", "one two"],
        max_new_tokens=6,
    )
    data = chats(tmp_path, packed=packed)
    runs = trainer(
        GeoLoRACallback(tau=0.1, adapt_every=20),
        max_epochs=80,
        check_val_every_n_epoch=40,
        logger=TensorBoardLogger(tmp_path, "logs"),
        log_every_n_steps=1,
    )
    runs.fit(module, data)
    assert runs.callback_metrics["val_loss"] < 0.2

    rows = [json.loads(line) for line in (tmp_path / "logs" / "version_0" / "generated.jsonl").read_text().splitlines()]
    assert rows[-2:] == [
        {"step": 80, "prompt": "is the film good", "generated": "very good"},
        {"step": 80, "prompt": "one two", "generated": "three four"},
    ]
    events = EventAccumulator(str(tmp_path / "logs" / "version_0")).Reload()
    shown = events.Tensors("generated/0/text_summary")[-1]
    assert shown.step == 80
    assert b"very good" in shown.tensor_proto.string_val[0]

    batch = next(iter(data.val_dataloader()))
    logits = module(batch).detach().requires_grad_()
    module.forward = lambda batch: logits
    losses, learnt = module.token_losses(batch)
    (losses.sum() / learnt.sum()).backward()
    moved = logits.grad.abs().sum(-1) > 0
    successors = torch.cat([batch["labels"][:, 1:], torch.full((len(logits), 1), IGNORED)], 1)
    assert torch.equal(moved, successors != IGNORED)
    assert int(moved.sum()) == 3 + 3 + 3  # words and ends of the assistant


def test_writing_while_it_trains_changes_nothing_else(tmp_path):
    states = []
    name = save_tiny_chat(tmp_path / "model", attention_dropout=0.5)
    for prompts in (None, ["one"]):
        torch.manual_seed(0)
        module = CausalLM(name, prompts=prompts)
        trainer(GeoLoRACallback(), max_epochs=4, default_root_dir=tmp_path).fit(module, chats(tmp_path))
        states.append((module.state_dict(), torch.get_rng_state(), [part.training for part in module.modules()]))
    assert all(torch.equal(one, other) for one, other in zip(*(s[0].values() for s in states), strict=True))
    assert torch.equal(states[0][1], states[1][1])
    assert states[0][2] == states[1][2]


def test_what_another_run_wrote_in_the_folder_goes_and_what_this_one_wrote_stays(tmp_path):
    path = tmp_path / "generated.jsonl"
    path.write_text('{"step": 1, "prompt": "old", "generated": ""}\n')
    name = save_tiny_chat(tmp_path / "model")
    for steps, ckpt in ((1, None), (2, tmp_path / "run.ckpt")):
        runs = trainer(GeoLoRACallback(adapt_every=1), max_epochs=steps, default_root_dir=tmp_path)
        runs.fit(CausalLM(name, prompts=["a"]), chats(tmp_path, packed=False), ckpt_path=ckpt)
        runs.save_checkpoint(tmp_path / "run.ckpt")
    assert [(row["step"], row["prompt"]) for row in map(json.loads, path.read_text().splitlines())] == [
        (1, "a"),
        (2, "a"),
    ]


def test_predict_gives_the_answers_in_their_order(tmp_path):
    module = CausalLM(save_tiny_chat(tmp_path / "model", initializer_range=0.5), max_new_tokens=5)
    module.configure_model()
    file = write_chats(tmp_path / "asked.jsonl", [DIALOGUE, OTHER, DIALOGUE[:3]])
    data = ChatFiles(predict_file=file, max_length=20, batch_size=2, cache_dir=str(tmp_path / "cache"))
    rows = predict(module, data, tmp_path / "answers.jsonl", accelerator="cpu")
    assert [row["prompt"] for row in rows] == ["and the plot", "one two", "and the plot"]
    assert rows[0]["generated"] == rows[2]["generated"]
    tokenizer = chat_tokenizer()
    one = tokenizer.apply_chat_template(OTHER[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = module.model.generate(
        input_ids=one["input_ids"],
        attention_mask=one["attention_mask"],
        generation_config=GenerationConfig(
            max_new_tokens=5, do_sample=False, eos_token_id=tokenizer("<end>")["input_ids"], pad_token_id=3
        ),
    )
    expected = tokenizer.decode(written[0, one["input_ids"].shape[1] :], skip_special_tokens=True)
    assert rows[1]["generated"] == expected
    assert [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()] == rows


def test_a_template_of_a_file_stays_with_the_checkpoint_and_its_export(tmp_path):
    """A base model without a template gets one, and whoever loads the merged model has it, and its end of a turn."""
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    name = save_tiny_chat(tmp_path / "model", template=None)
    module = CausalLM(name, chat_template=str(tmp_path / "chat.jinja"))
    runs = trainer(GeoLoRACallback(adapt_every=1), max_steps=1)
    runs.fit(module, chats(tmp_path))
    runs.save_checkpoint(tmp_path / "run.ckpt")
    template = (tmp_path / "chat.jinja").rename(tmp_path / "elsewhere.jinja")
    config = settings_of(tmp_path, "CausalLM", model_name=name, chat_template=str(tmp_path / "chat.jinja"))
    export(tmp_path / "run.ckpt", "merged", tmp_path / "merged", config)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == TEMPLATE
    end = tokenizer.convert_tokens_to_ids("<end>")
    assert end in AutoModelForCausalLM.from_pretrained(tmp_path / "merged").generation_config.eos_token_id
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["chat_template"] = str(template)
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match="chat_template"):
        CausalLM.load_from_checkpoint(tmp_path / "bad.ckpt")


def test_the_end_of_a_turn_ends_an_answer():
    assert turn_end(chat_tokenizer()) == chat_tokenizer().convert_tokens_to_ids("<end>")
    assert turn_end(chat_tokenizer(None)) is None
    assert turn_end(chat_tokenizer(TEMPLATE.replace("<end>", " film"))) is None
    assert turn_end(chat_tokenizer("<end>{% for message in messages %}one<end>{% endfor %}")) is None


def test_a_prompt_that_the_tokenizer_would_end_goes_on():
    tokenizer = chat_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 3)])
    expected = tokenizer("one two", add_special_tokens=False)["input_ids"]
    assert encode_asked(tokenizer, ["one two"], as_chat=False)["input_ids"].tolist() == [expected]


def test_sampling_settings_of_the_model_do_not_matter_and_are_kept(tmp_path):
    name = save_tiny_chat(tmp_path / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), chat_tokenizer()
    asked = encode_asked(tokenizer, ["one", "one two three"], as_chat=True)
    expected = answer(model, tokenizer, asked, 4)
    own = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.5, top_k=20, eos_token_id=[3])
    model.generation_config = own
    assert answer(model, tokenizer, asked, 4) == expected
    assert model.generation_config is own
    assert stop_tokens(model, tokenizer) == [3, turn_end(tokenizer)]


def test_mistakes_are_refused(tmp_path):
    name = save_tiny_chat(tmp_path / "model")
    with pytest.raises(ValueError, match="max_new_tokens=0 must be at least 1"):
        CausalLM(name, max_new_tokens=0)
    with pytest.raises(ValueError, match="one is empty"):
        CausalLM(name, prompts=["a", " "])
    with pytest.raises(ValueError, match=r"chat_template='no\.jinja' is not a file"):
        CausalLM(name, chat_template="no.jinja")
    (tmp_path / "text.jinja").write_text("hello")
    with pytest.raises(ValueError, match="is not a Jinja template"):
        CausalLM(name, chat_template=str(tmp_path / "text.jinja"))
    runs = trainer(GeoLoRACallback(), max_steps=1, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match="a prompt has 33 tokens and the model 32 positions"):
        runs.fit(CausalLM(save_tiny_chat(tmp_path / "gpt2", "gpt2"), prompts=["one " * 30]), chats(tmp_path))


def in_process(rank, strategy, folder):
    settings = {"strategy": sharded() if strategy == "fsdp2" else "ddp", "default_root_dir": folder}
    runs = trainer(GeoLoRACallback(), max_epochs=2, **of_two(), **settings)
    runs.fit(CausalLM(str(folder / "model"), prompts=["one", "a film"], max_new_tokens=3), chats(folder))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_write_while_they_train_and_neither_waits_for_the_other(tmp_path, strategy):
    """A model that is sharded hangs if the first process alone lets it write."""
    save_tiny_chat(tmp_path / "model")
    in_two_processes(in_process, strategy, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "generated.jsonl").read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in rows] == [(n, p) for n in (1, 2) for p in ("one", "a film")]
