# ruff: noqa: PLC0415 - the engine's libraries take seconds to import, the usage message should not
"""Make a tiny random Llama with its own tokenizer, for tests against a real engine. Nothing is downloaded.

Run it with the engine's interpreter (it needs torch, transformers and tokenizers): ``make_tiny_model.py OUTPUT_DIR``,
with a number behind it for a model that answers otherwise, and behind that ``small`` for a larger one. The result is
deterministic: 2.4 million random parameters (9 MB; ``small``: 8.7 million), a byte-level BPE of 2,048 tokens trained on
text that is generated here, and a chat template. Idempotent: an output directory that is complete is left as it is.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

VOCABULARY = 2048
POSITIONS = 2048
DEFAULT_SEED = 7
# Width, width of the feed-forward part, layers, heads.
SIZES = {"tiny": (256, 512, 2, 4), "small": (384, 1024, 4, 6)}
SPECIALS = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeio"]


def sentences(count: int, seed: int = 7) -> Iterator[str]:
    """Pronounceable nonsense with punctuation and numbers: enough variety for the tokenizer to fill its vocabulary."""
    source = random.Random(seed)
    words = ["".join(source.choices(SYLLABLES, k=source.randint(1, 4))) for _ in range(4000)]
    for _ in range(count):
        line = " ".join(source.choices(words, k=source.randint(4, 14)))
        yield f"{line.capitalize()}{source.choice('.!?')} {source.randint(0, 9999)}"


def make_tokenizer(out: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(8000), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=POSITIONS
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(out)


def make_model(out: Path, seed: int, size: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    width, inner, layers, heads = SIZES[size]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=POSITIONS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        torch_dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(out)


def main(argv: list[str]) -> int:
    size = argv[3] if len(argv) == 4 else "tiny"
    if len(argv) not in (2, 3, 4) or size not in SIZES:
        print("usage: make_tiny_model.py OUTPUT_DIR [SEED [tiny|small]]", file=sys.stderr)
        return 2
    out, seed = Path(argv[1]), int(argv[2]) if len(argv) > 2 else DEFAULT_SEED
    complete = out / ".complete"
    if not complete.exists():
        out.mkdir(parents=True, exist_ok=True)
        make_tokenizer(out)
        make_model(out, seed, size)
        complete.touch()
    print(out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv))
