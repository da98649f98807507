"""The same model and rows for every side: a random Llama, a tokenizer of exactly its size, rows about series, texts."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mlx_training.data.corpus import corpus_documents
from mlx_training.data.rows import Row
from mlx_training.data.tokenizer import train_bpe
from mlx_training.quantize import quantize_directory

WORDS = 3000  # made up; a BPE of them fills a vocabulary of 4,096
STD = 0.05


def llama(
    directory: Path, *, hidden: int = 256, layers: int = 4, vocab: int = 4096, head_dim: int = 32, bits: int = 0
) -> Path:
    """Write a Llama (float32 that bfloat16 holds exactly, 4 queries a key) with its tokenizer; quantised if `bits`."""
    if (directory / "config.json").is_file():
        return directory
    if bits:
        with TemporaryDirectory() as folder:
            dense = llama(Path(folder), hidden=hidden, layers=layers, vocab=vocab, head_dim=head_dim)
            quantize_directory(dense, directory, bits)
        return directory
    rng = np.random.default_rng(0)
    words = vocabulary()
    texts = [
        " ".join(rng.choice(words, 40)) + " " + " ".join(f"{x:.4f}" for x in rng.normal(size=9)) for _ in range(800)
    ]
    tokenizer = train_bpe(texts, min(vocab, 4096), directory)
    pad_tokenizer(directory / "tokenizer.json", vocab)
    heads, inner = hidden // head_dim, 4 * hidden
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "head_dim": head_dim,
        "max_position_embeddings": 16384,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
    }
    (directory / "config.json").write_text(json.dumps(config))
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 4, hidden),
        "self_attn.v_proj": (hidden // 4, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    arrays = {"model.embed_tokens.weight": normal(rng, vocab, hidden), "model.norm.weight": np.ones(hidden, np.float32)}
    for layer in range(layers):
        for name, shape in shapes.items():
            arrays[f"model.layers.{layer}.{name}.weight"] = normal(rng, *shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            arrays[f"model.layers.{layer}.{norm}.weight"] = np.ones(hidden, np.float32)
    save_file(arrays, directory / "model.safetensors", {"format": "pt"})
    return directory


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Normal float32 whose lower 16 bits are zero."""
    values = (STD * rng.standard_normal(shape, np.float32)).view(np.uint32)
    return (values & np.uint32(0xFFFF0000)).view(np.float32)


def vocabulary() -> list[str]:
    """Made-up words, always the same."""
    rng = np.random.default_rng(42)
    syllables = [c + v for c in "bcdfghjklmnprstvz" for v in "aeiou"]
    return ["".join(rng.choice(syllables, rng.integers(2, 5))) for _ in range(WORDS)]


def pad_tokenizer(file: Path, vocab: int) -> None:
    """Add entries that no text has, until the vocabulary has this size."""
    data = json.loads(file.read_text(encoding="utf-8"))
    known = data["model"]["vocab"]
    used = {*known.values(), *(token["id"] for token in data["added_tokens"])}
    assert max(used) + 1 == len(used) <= vocab, f"{len(used)} ids, {vocab} wanted"
    known |= {f"<unused{i}>": i for i in range(len(used), vocab)}
    file.write_text(json.dumps(data), encoding="utf-8")


def rows(
    num_rows: int, *, num_series: int = 1, samples: int = 128, instruction: int = 0, question: int = 30, seed: int = 1
) -> list[Row]:
    """Questions about random walks: `instruction` constant words before the series, `question` words of the row's own.

    With an instruction the row's own words stand after the series, else before them, as OpenTSLM's datasets do.
    """
    rng, words = np.random.default_rng(seed), vocabulary()
    constant = " ".join(np.random.default_rng(7).choice(words, instruction)) if instruction else ""
    found = []
    for _ in range(num_rows):
        walks = [(rng.normal(3, 2) + np.cumsum(rng.normal(size=samples))).astype(np.float32) for _ in range(num_series)]
        texts = tuple(
            f"Series {i}, it has mean {w.mean():.4f} and std {w.std(ddof=1):.4f}:" for i, w in enumerate(walks)
        )
        own, answer = (" ".join(rng.choice(words, n)) for n in (question, 4))
        before, after = (constant, own) if instruction else (own, "Answer:")
        found.append(Row(before, tuple(walks), texts, after, answer))
    return found


def texts(
    file: str, num_rows: int, held_out: int, low: int = 20, high: int = 700, seed: int = 3
) -> tuple[list[str], list[str]]:
    """Pieces of a text of about `low` to `high` tokens, log-uniform; for training and held out.

    Without a file the generated corpus is the text.
    """
    source = Path(file).read_text(encoding="utf-8") if file else "\n".join(corpus_documents(0, "train", 20_000))
    rng = np.random.default_rng(seed)
    lengths = (
        np.exp(rng.uniform(np.log(low), np.log(high), num_rows + held_out)).astype(int) * 3 // 2
    )  # 1.5 characters a token: the words it knows are made up
    ends = np.cumsum(lengths)
    assert ends[-1] < len(source), f"{file or 'the corpus'} is too short: {len(source)} of {ends[-1]} characters"
    pieces = [source[end - length : end].strip() or "." for end, length in zip(ends, lengths, strict=True)]
    return pieces[:num_rows], pieces[num_rows:]


def text_row(text: str) -> Row:
    """A row whose every token counts."""
    return Row("", (), (), "", text)


def ids_of(text: str, tokenizer: Any) -> list[int]:
    """What ours makes of a text, with a peer's tokenizer: BOS, the text, EOS."""
    return [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
