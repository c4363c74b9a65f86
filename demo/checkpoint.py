"""The checkpoint's form: its configuration, tokenizer and processor, and how it is saved.

Only training needs this (torch and transformers); making pictures and questions does not.
"""

from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

from .layout import SIDE, Photo, sample
from .questions import ask
from .words import TASKS

PATCH = 8
SHUFFLE = 2
IMAGE_TOKENS = (SIDE // PATCH // SHUFFLE) ** 2
START, PAD, END = "<|im_start|>", "<|im_end|>", "<end_of_utterance>"
IMAGE, AROUND, GLOBAL = "<image>", "<fake_token_around_image>", "<global-img>"
SPECIAL = ("<|endoftext|>", START, PAD, AROUND, IMAGE, GLOBAL, END)
# Transformers' own SmolVLM template, less the branch for video.
CHAT = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
BEFORE = f"{START}User:{AROUND}{GLOBAL}{IMAGE * IMAGE_TOKENS}{AROUND}"  # what the processor makes of the picture
AFTER = f"{END}\nAssistant:"


def config(vocabulary: int, pad: int, start: int, end: int, image: int) -> SmolVLMConfig:
    """A SmolVLM with heads of 64: 256 patches become 64 image tokens; three query heads share a key head."""
    return SmolVLMConfig(
        image_token_id=image,
        scale_factor=SHUFFLE,
        tie_word_embeddings=True,
        vision_config={
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 5,
            "num_attention_heads": 6,
            "image_size": SIDE,
            "patch_size": PATCH,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": 384,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "vocab_size": vocabulary,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": True,
            "pad_token_id": pad,
            "bos_token_id": start,
            "eos_token_id": end,
        },
        pad_token_id=pad,
        bos_token_id=start,
        eos_token_id=end,
    )


def tokenizer(texts: int = 20_000, size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `size` tokens, trained on questions and answers of throw-away layouts."""
    rng = Random("tokenizer")
    lines = []
    for _ in range(texts // len(TASKS)):
        layout = sample(rng, (Photo("none", "sea"),))
        for task in TASKS:
            question = ask(layout, task, rng)
            lines.append(f"{question.prompt}\nAssistant: {question.answer}")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        [*lines, *["User:"] * 500],
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens={
            "image_token": IMAGE,
            "fake_image_token": AROUND,
            "global_image_token": GLOBAL,
            "end_of_utterance_token": END,
        },
        model_max_length=512,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def processor(words: PreTrainedTokenizerFast) -> Idefics3Processor:
    """The first SmolVLM's processor (Idefics3's); unlike the second's, no torchvision is needed."""
    pictures = Idefics3ImageProcessorPil(
        do_image_splitting=False,
        size={"longest_edge": SIDE},
        max_image_size={"longest_edge": SIDE},
    )
    made: Idefics3Processor = Idefics3Processor(pictures, words, image_seq_len=IMAGE_TOKENS, chat_template=CHAT)
    return made


def fresh(words: PreTrainedTokenizerFast) -> SmolVLMForConditionalGeneration:
    """A model with random weights for this tokenizer; the vocabulary is rounded up to a multiple of 64."""
    ids: dict[str, Any] = {name: words.convert_tokens_to_ids(name) for name in (PAD, START, END, IMAGE)}
    rounded = (len(words) + 63) // 64 * 64
    return SmolVLMForConditionalGeneration(config(rounded, ids[PAD], ids[START], ids[END], ids[IMAGE]))


def save(model: SmolVLMForConditionalGeneration, words: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the checkpoint as float16 in shards under 16 MiB, with its tokenizer and processor."""
    weights: dict[str, Any] = {n: p.detach().to("cpu", torch.float16) for n, p in model.state_dict().items()}
    kept: Any = SmolVLMForConditionalGeneration(model.config)
    kept.half()
    text: Any = model.config.text_config
    kept.load_state_dict(weights)
    kept.tie_weights()
    kept.config.dtype = "float16"
    kept.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=64,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    )
    kept.save_pretrained(folder, max_shard_size="16MB")
    processor(words).save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors makes files only their owner can read
