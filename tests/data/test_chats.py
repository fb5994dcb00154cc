"""Conversations: which rows are read, which tokens are learnt, what is packed, what is said about the rest."""

import json
import re
from itertools import pairwise
from pathlib import Path

import datasets
import pytest
import torch
from text_files import attach
from tiny_chat import MARKED, TEMPLATE, THINKING, chat_tokenizer, turns, write_chats

from geolora_pl.data import ChatFiles, ChatHub

IGNORED = -100
LONG = turns("is the film good", "very good", "and the plot", "not bad", system="a film")
CHATS = [turns("one two", "three"), LONG, turns("the plot", "bad and poor")]


def ids(text):
    return chat_tokenizer()(text, add_special_tokens=False)["input_ids"]


@pytest.fixture
def file(tmp_path):
    return write_chats(tmp_path / "chats.jsonl", CHATS)


def made(file, folder, template=TEMPLATE, **settings):
    """The data module of a file, for training and validation."""
    data = ChatFiles(file, file, cache_dir=str(folder / "cache"), **{"max_length": 32, **settings})
    return attach(data, chat_tokenizer(template))


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
def test_only_the_turns_of_the_assistant_are_learnt_each_with_its_end(file, tmp_path, template):
    data = made(file, tmp_path, template, packed=False)
    for row, chat in zip(data.splits["train"], CHATS, strict=True):
        tokens, labels = [], []
        for message in chat:
            said = ids(f"{message['content']}<end>")
            tokens += ids(f"<{message['role']}>") + said
            learnt = message["role"] == "assistant"
            labels += [IGNORED] + (said if learnt else [IGNORED] * len(said))
        assert row["input_ids"] == tokens
        assert row["labels"] == labels
        assert row["length"] == len(tokens)


def test_every_form_of_a_conversation_is_the_same_conversation(tmp_path):
    sharegpt = {"conversations": [{"from": "human", "value": "one two"}, {"from": "gpt", "value": "three"}]}
    pair = {"prompt": "one two", "completion": "three"}
    unused = {"messages": [*turns("one two", "three"), {"role": "user", "content": "four"}]}
    file = write_chats(tmp_path / "chats.jsonl", [CHATS[0], sharegpt, pair, unused])
    read = ChatFiles(file).load_splits()["train"]
    assert len(set(read["chat"])) == 1
    assert read["where"][2] == f"{file}: line 3"
    rows = [json.loads(line) for line in (tmp_path / "chats.jsonl").read_text().splitlines()]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    assert ChatFiles(str(tmp_path / "list.json")).load_splits()["train"]["chat"][:] == read["chat"][:]
    datasets.Dataset.from_list([{"messages": chat} for chat in CHATS]).to_parquet(tmp_path / "hub" / "train.parquet")
    from_parquet = ChatFiles(str(tmp_path / "hub" / "train.parquet")).load_splits()["train"]["chat"][:]
    assert from_parquet == ChatHub(str(tmp_path / "hub")).load_splits()["train"]["chat"][:]
    assert [json.loads(chat)["messages"] for chat in from_parquet] == CHATS


def test_a_turn_that_the_template_rewrites_is_not_learnt_and_counted(tmp_path, messages):
    """Templates of models that think leave out the thinking of earlier turns, so that those cannot be learnt."""
    chats = [turns("one", "two but three", "four", "five but six"), CHATS[0]]
    data = made(write_chats(tmp_path / "chats.jsonl", chats), tmp_path, THINKING, packed=False)
    row = data.splits["train"][0]
    learnt = [label for label in row["labels"] if label != IGNORED]
    assert learnt == ids("five but six<end>")
    assert row["input_ids"] == ids("<user> one<end><assistant> three<end><user> four<end><assistant> five but six<end>")
    assert "train: 1 of 2 conversations have earlier turns that the chat template writes in another way" in messages()


def test_all_turns_are_learnt_where_the_template_ends_a_conversation_with_the_end_of_a_text(tmp_path, messages):
    """Templates of Phi end what is not to be answered with one more token, which no earlier turn has."""
    ending = TEMPLATE + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    data = made(write_chats(tmp_path / "chats.jsonl", [LONG]), tmp_path, ending, packed=False)
    learnt = [label for label in data.splits["train"][0]["labels"] if label != IGNORED]
    assert learnt == ids("very good<end>not bad<end>[SEP]")
    assert "special token" not in messages()


def test_a_template_without_an_end_of_a_turn_is_noted(file, tmp_path, messages):
    made(file, tmp_path, TEMPLATE.replace("<end>", " ."), packed=False)
    assert "train: 3 of 3 conversations end with no special token in the chat template" in messages()


def test_tools_and_calls_reach_the_template(tmp_path):
    template = (
        "{% for tool in tools %}{{ tool.function.name }} {% endfor %}"
        "{% for message in messages %}<user> {{ message.content }}"
        "{% for call in message.tool_calls %} {{ call.function.name }}{% endfor %}<end>{% endfor %}"
        "{% if add_generation_prompt %}<user> {% endif %}"
    )
    call = {"type": "function", "function": {"name": "film", "arguments": {}}}
    chat = {
        "messages": [
            {"role": "user", "content": "is it good"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "very"},
            {"role": "assistant", "content": "good"},
        ],
        "tools": [{"type": "function", "function": {"name": "plot"}}],
    }
    data = made(write_chats(tmp_path / "chats.jsonl", [chat]), tmp_path, template, packed=False)
    row = data.splits["train"][0]
    assert row["input_ids"] == ids("plot <user> is it good<end><user> film<end><user> very<end><user> good<end>")
    assert [label for label in row["labels"] if label != IGNORED] == ids("film<end> good<end>")


def test_a_call_has_only_its_own_arguments_in_a_file_of_columns(tmp_path):
    """Parquet and data sets of the hub fill all calls up with each other's arguments: the model learnt to give them."""
    calls = [("weather", {"city": "film"}), ("add", {"one": 1, "two": 2})]
    rows = [
        {
            "messages": [
                {"role": "user", "content": "good"},
                {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]},
            ],
            "tools": [{"function": {"name": name, "parameters": {"properties": {key: {} for key in arguments}}}}],
        }
        for name, arguments in calls
    ]
    for row in rows:  # an empty object has no columns
        for schema in row["tools"][0]["function"]["parameters"]["properties"].values():
            schema["type"] = "string"
    lines = ChatFiles(write_chats(tmp_path / "chats.jsonl", rows)).load_splits()["train"]["chat"][:]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "hub" / "train.parquet")
    for source in (ChatFiles(str(tmp_path / "hub" / "train.parquet")), ChatHub(str(tmp_path / "hub"))):
        read = source.load_splits()["train"]["chat"][:]
        assert list(map(json.loads, read)) == list(map(json.loads, lines))


def test_rows_that_teach_nothing_are_left_out_and_counted(tmp_path, messages):
    chats = [
        *CHATS,
        turns("one"),
        turns(),
        turns("one", " "),
        [{"role": "assistant", "content": "one"}, *turns("two", "three")],
        [{"role": "system", "content": ""}, *turns("one", "two")],
    ]
    file = write_chats(tmp_path / "chats.jsonl", chats)
    read = ChatFiles(file).load_splits()["train"]
    assert read["where"][:] == [f"{file}: line {line}" for line in (1, 2, 3, 8)]
    said = messages()
    assert f"left out because they have no turn of the assistant: 2, the first is {file}: line 4" in said
    assert f"left out because they have an empty turn: 1, the first is {file}: line 6" in said
    assert f"left out because they start with the assistant: 1, the first is {file}: line 7" in said
    with pytest.raises(ValueError, match="has no conversation to learn from"):
        ChatFiles(write_chats(tmp_path / "none.jsonl", [turns("one")])).load_splits()


def test_what_is_too_long_is_cut_and_what_has_no_answer_left_is_left_out(file, tmp_path, messages):
    data = made(file, tmp_path, max_length=7, packed=False)
    assert data.splits["train"]["length"][:] == [7, 7]
    said = messages()
    assert "train: 2 of 3 texts are cut to max_length=7 tokens" in said
    assert "train: 1 of 3 conversations have no answer in the first 7 tokens (max_length) and are left out" in said
    with pytest.raises(ValueError, match="max_length=4 leaves no token of an answer"):
        made(file, tmp_path, max_length=4)


@pytest.mark.parametrize("limit", [12, 20, 32])
def test_packed_conversations_are_whole_and_each_starts_at_its_own_position(tmp_path, limit):
    chats = [turns("one two", "three"), turns("four", "five"), turns("a film is", "very good and bad")] * 3
    file = write_chats(tmp_path / "chats.jsonl", chats)
    alone = made(file, tmp_path, max_length=limit, packed=False).splits["val"]
    data = made(file, tmp_path, max_length=limit, batch_size=2)
    found = []
    for batch in data.val_dataloader():
        assert set(batch) == {"input_ids", "labels", "position_ids"}
        assert batch["input_ids"].shape[1] <= limit
        for row, position, label in zip(batch["input_ids"], batch["position_ids"], batch["labels"], strict=True):
            starts = [*(position == 0).nonzero()[:, 0].tolist(), len(row)]
            for begin, end in pairwise(starts):
                assert position[begin:end].tolist() == list(range(end - begin))
                if (label[begin:end] != IGNORED).any():  # the rest is padding
                    found.append((row[begin:end].tolist(), label[begin:end].tolist()))
    assert sorted(found) == sorted((row["input_ids"], row["labels"]) for row in alone)
    assert len(data.splits["val"]) < len(chats)


def test_what_is_asked_ends_where_the_answer_begins_and_is_padded_before_it(file, tmp_path):
    data = ChatFiles(predict_file=file, max_length=32, batch_size=3, cache_dir=str(tmp_path / "cache"))
    attach(data, chat_tokenizer())
    batch = next(iter(data.predict_dataloader()))
    expected = [
        ids("<user> one two<end><assistant>"),
        ids("<system> a film<end><user> is the film good<end><assistant> very good<end><user> and the plot<end>")
        + ids("<assistant>"),
        ids("<user> the plot<end><assistant>"),
    ]
    assert set(batch) == {"input_ids", "attention_mask"}
    for row, mask, tokens in zip(batch["input_ids"], batch["attention_mask"], expected, strict=True):
        assert row[mask.bool()].tolist() == tokens
        assert mask.tolist() == [0] * (len(row) - len(tokens)) + [1] * len(tokens)
    assert data.predict_inputs == {"prompt": ["one two", "and the plot", "the plot"]}


def test_the_template_of_the_page_marks_what_the_assistant_says(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    template = re.search(r"```jinja\n(.*?)```", page, re.S)[1]
    chat = turns("one", "two", "three", "four", system="a film")
    tokenizer = chat_tokenizer(template)
    written = tokenizer.apply_chat_template(chat, tokenize=False)
    assert written == "system:\na film\nuser:\none\nassistant:\ntwo[SEP]\nuser:\nthree\nassistant:\nfour[SEP]\n"
    asked = tokenizer.apply_chat_template(chat[:4], tokenize=False, add_generation_prompt=True)
    assert written.startswith(asked)
    data = made(write_chats(tmp_path / "chats.jsonl", [chat]), tmp_path, template, packed=False)
    learnt = [label for label in data.splits["train"][0]["labels"] if label != IGNORED]
    assert learnt == ids("two[SEP]four[SEP]")


def test_token_ids_are_made_again_for_another_template(file, tmp_path):
    for template in (TEMPLATE, TEMPLATE, MARKED):
        made(file, tmp_path, template)
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 2


MISTAKES = {
    '{"text": "one"}': r"line 1 is not a conversation: it has 'text'; write",
    '{"messages": "one"}': "line 1 is not a conversation: it has 'messages'",
    '["one"': "chats.jsonl cannot be read",
    '{"messages"': "line 1 cannot be read",
    "3": "line 1 is not an object",
    '{"prompt": [], "completion": []}': "or prompt and completion as texts",
    '{"messages": ["one"]}': "line 1, message 1 is not an object",
    '{"prompt": "a", "prompt": "b"}': "line 1 cannot be read: an object has the key 'prompt' twice",
    '{"messages": [{"role": "bot", "content": "a"}]}': "message 1 has role='bot', which must be one of system",
    '{"conversations": [{"from": "bing", "value": "a"}]}': "message 1 has role='bing'",
    '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}': "message 1 has a content that is not a text",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_row_that_is_not_a_conversation_is_refused_with_its_place(tmp_path, line):
    (tmp_path / "chats.jsonl").write_text(line)
    with pytest.raises(ValueError, match=re.escape(MISTAKES[line]) if "\\" not in MISTAKES[line] else MISTAKES[line]):
        ChatFiles(str(tmp_path / "chats.jsonl")).load_splits()


def test_other_files_are_refused(tmp_path):
    (tmp_path / "chats.csv").write_text("messages\n")
    with pytest.raises(ValueError, match=r"must end in \.jsonl, \.json or \.parquet"):
        ChatFiles(str(tmp_path / "chats.csv")).load_splits()
    (tmp_path / "chats.parquet").write_text("no")
    with pytest.raises(ValueError, match="cannot be read"):
        ChatFiles(str(tmp_path / "chats.parquet")).load_splits()
    with pytest.raises(ValueError, match="give the file to train on"):
        ChatFiles()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"has no chat template.* give one as model\.chat_template"),
        ("{% if 1 %}{{ raise_exception('roles must alternate') }}{% endif %}", "line 1 is refused .* roles must alter"),
        (
            "{% for message in messages %}<{{ message.role }}> {{ message.content }}<end>{% endfor %}"
            "{% if add_generation_prompt %}<assistant> but {% endif %}",
            "line 1: the chat template writes the last turn of the assistant in another way",
        ),
        ("{% if 0 %}{% generation %}{% endgeneration %}{% endif %}{{ messages[0].content }}", "marks none"),
    ],
)
def test_a_template_that_is_missing_or_does_not_suit_is_refused(file, tmp_path, template, message):
    with pytest.raises(ValueError, match=message):
        made(file, tmp_path, template)


def test_a_question_that_is_too_long_or_missing_is_refused_before_it_is_answered(file, tmp_path):
    data = ChatFiles(predict_file=file, max_length=5, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="line 2 has 20 tokens, which is more than max_length=5"):
        attach(data, chat_tokenizer())
    with pytest.raises(ValueError, match="has no conversations to answer: give predict_file"):
        made(file, tmp_path).predict_dataloader()
    empty = write_chats(tmp_path / "empty.jsonl", [turns(" ")])
    with pytest.raises(ValueError, match="line 1 has an empty turn"):
        ChatFiles(predict_file=empty).load_splits()


def test_padding_of_packed_texts_is_a_text_of_its_own(file, tmp_path):
    data = made(file, tmp_path, max_length=21, batch_size=2)
    (batch,) = list(data.val_dataloader())
    sums = sorted(data.splits["val"]["length"][:])
    assert sums == [16, 21]
    short = int((batch["position_ids"] == torch.tensor(0)).sum(1).argmax())
    assert batch["position_ids"][short, 16:].tolist() == [0, 1, 2, 3, 4]
    assert set(batch["labels"][short, 16:].tolist()) == {IGNORED}
