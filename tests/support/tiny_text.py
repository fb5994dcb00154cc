"""Tiny transformers with a tokenizer, as a folder that save_pretrained wrote."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
)

WORDS = [
    "good",
    "bad",
    "fine",
    "poor",
    "film",
    "plot",
    "the",
    "a",
    "is",
    "was",
    "not",
    "very",
    "and",
    "but",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SIZE = len(SPECIAL) + len(WORDS)

_COMMON = {
    "vocab_size": SIZE,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
FAMILIES = {
    "bert": _COMMON,
    "roberta": {**_COMMON, "type_vocab_size": 1},
    "deberta-v2": {
        **_COMMON,
        "relative_attention": True,
        "position_biased_input": False,
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "type_vocab_size": 0,
    },
    "distilbert": {
        "vocab_size": SIZE,
        "dim": 16,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 24,
        "max_position_embeddings": 32,
    },
    "modernbert": {**_COMMON, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3},
    "electra": {**_COMMON, "embedding_size": 12},
    "albert": {**_COMMON, "embedding_size": 12},
    "llama": {**_COMMON, "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": 2, "eos_token_id": 3},
    "gpt2": {
        "vocab_size": SIZE,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 32,
        "bos_token_id": 3,
        "eos_token_id": 3,
    },
    "gpt_neox": {**_COMMON, "pad_token_id": None, "bos_token_id": 2, "eos_token_id": 3},
    "qwen3": {**_COMMON, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None, "eos_token_id": 3},
}
SEQ2SEQ = {
    "t5": {
        "vocab_size": SIZE,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 2,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 3,
    },
    "bart": {
        "vocab_size": SIZE,
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "max_position_embeddings": 32,
        "decoder_start_token_id": 3,
        "forced_eos_token_id": 3,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    },
}
DECODERS = {"llama", "gpt2", "qwen3", "gpt_neox"}


def make_tokenizer(family: str = "bert", words=WORDS, **settings) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words; that of a decoder knows no padding, as those of real ones."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if family in DECODERS:
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token="[CLS]",
            eos_token="[SEP]",
            model_input_names=["input_ids", "attention_mask"],
            **settings,
        )
    single = family in {"roberta", "distilbert", "modernbert", *SEQ2SEQ}
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]" if single else "[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ["input_ids", "attention_mask"] if single else ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=names,
        **({"eos_token": "[SEP]"} if family in SEQ2SEQ else {}),
        **settings,
    )


def save_tiny_model(folder: Path, family: str = "bert", **settings) -> str:
    """A pretrained body with random weights, and its tokenizer."""
    return _save(folder, AutoModel, family, {**FAMILIES[family], **settings})


def save_tiny_decoder(folder: Path, family: str = "gpt2", **settings) -> str:
    """A pretrained language model with random weights, and its tokenizer."""
    return _save(folder, AutoModelForCausalLM, family, {**FAMILIES[family], **settings})


def save_tiny_seq2seq(folder: Path, family: str = "t5", **settings) -> str:
    """A pretrained encoder and decoder with random weights, and its tokenizer."""
    return _save(folder, AutoModelForSeq2SeqLM, family, {**SEQ2SEQ[family], **settings})


def _save(folder, kind, family, settings):
    torch.manual_seed(1)
    kind.from_config(AutoConfig.for_model(family, **settings)).save_pretrained(folder)
    make_tokenizer(family).save_pretrained(folder)
    return str(folder)
