"""A tiny language model that knows a chat template, and conversations of words that it knows."""

from pathlib import Path

from text_files import write_rows
from tiny_text import SPECIAL, WORDS, make_tokenizer, save_tiny_decoder
from transformers import PreTrainedTokenizerFast

MARKS = ["<user>", "<assistant>", "<system>", "<end>"]
SIZE = len(SPECIAL) + len(WORDS) + len(MARKS)
# As ChatML, with a line feed after each turn, which the tokenizer drops.
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
MARKED = (
    "{% for message in messages %}<{{ message.role }}> {% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<end>{% endgeneration %}{% else %}{{ message.content }}<end>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
# Leaves out the thinking of all turns but the last.
THINKING = (
    "{% for message in messages %}<{{ message.role }}> "
    "{{ message.content if loop.last else message.content.split('but')[-1] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def chat_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, in which the marks of the template are special tokens."""
    tokenizer = make_tokenizer("llama")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.chat_template = template
    return tokenizer


def save_tiny_chat(folder: Path, family: str = "llama", template: str | None = TEMPLATE, **settings) -> str:
    """A language model with random weights, and its tokenizer."""
    name = save_tiny_decoder(folder, family, vocab_size=SIZE, **settings)
    chat_tokenizer(template).save_pretrained(folder)
    return name


def write_chats(path: Path, chats) -> str:
    """Write conversations as JSON lines: messages, or whole rows."""
    return write_rows(path, [chat if isinstance(chat, dict) else {"messages": chat} for chat in chats])


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages of a user and the assistant, in turn."""
    said = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(contents)]
    return ([] if system is None else [{"role": "system", "content": system}]) + said
