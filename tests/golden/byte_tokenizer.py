"""A tokenizer of single bytes with a chat template: 260 ids, nothing trained, for tiny models that talk."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = len(SPECIAL) + 256
END_OF_TEXT, PAD, TURN_END = 0, 1, 3
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(chat_template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Every byte of the text is a token."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=SPECIAL[END_OF_TEXT], pad_token=SPECIAL[PAD]
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def save_byte_tokenizer(folder: Path, chat_template: str | None = TEMPLATE) -> None:
    """Write the tokenizer's files into a checkpoint's folder, in place of what is there."""
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    byte_tokenizer(chat_template).save_pretrained(folder)
