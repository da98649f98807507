"""LoRA as the peers train it: mlx_lm.lora's own `train`, and Hugging Face's Trainer with PEFT; one epoch a step.

Every token counts on all sides, and the adapters are the same: rank, alpha / rank, all seven matrices of a layer.
"""

import importlib.util
import math
import tempfile
from collections.abc import Sequence
from typing import Any

from mlx_training.blas import load_fast_blas
from tools.benchmarks import material
from tools.benchmarks.ours import TARGETS
from tools.benchmarks.worker import Absent

BATCH = 4


def needed(*packages: str) -> None:
    """Raises Absent for the first that is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise Absent(f"{package} is not installed; pip install {' '.join(packages)}")


class MlxLm:
    """`mlx_lm.lora` without its command line: its datasets, batches, loss and loop; MLX with the fast BLAS."""

    def __init__(self, llm: str, texts: dict[str, Any], rank: int, alpha: int, rate: float, seed: int) -> None:
        needed("mlx_lm")
        load_fast_blas()
        import mlx.core as mx
        import mlx.optimizers
        import numpy as np
        from mlx_lm.tuner.datasets import CacheDataset, TextDataset
        from mlx_lm.tuner.utils import linear_to_lora_layers
        from mlx_lm.utils import load

        np.random.seed(seed)  # as its command line does
        mx.random.seed(seed)
        self.model, self.tokenizer = load(llm)[:2]
        self.model.freeze()
        keys = [f"self_attn.{t}" if t[0] in "qkvo" else f"mlp.{t}" for t in TARGETS]
        config = {"rank": rank, "scale": alpha / rank, "dropout": 0.0, "keys": keys}
        linear_to_lora_layers(self.model, len(self.model.layers), config)
        self.train, self.held_out = material.texts(**texts)
        self.data = CacheDataset(TextDataset([{"text": t} for t in self.train], self.tokenizer))
        self.optimizer = mlx.optimizers.Adam(learning_rate=rate)
        self.tokens = sum(len(self.data[i][0]) for i in range(len(self.data)))

    def __call__(self, steps: int) -> dict[str, float]:
        from mlx_lm.tuner.trainer import TrainingArgs, train

        with tempfile.TemporaryDirectory() as folder:
            iterations = steps * (len(self.train) // BATCH)
            args = TrainingArgs(BATCH, iterations, steps_per_save=10**9, adapter_file=f"{folder}/a.safetensors")
            train(self.model, self.optimizer, self.data, None, args)
        return {"tokens": self.tokens}

    def loss(self) -> float:
        """Mean negative log-likelihood of every held-out token."""
        import mlx.core as mx
        from mlx_lm.tuner.trainer import default_loss

        self.model.eval()
        total = weight = 0.0
        for text in self.held_out:
            ids = material.ids_of(text, self.tokenizer)
            loss, count = default_loss(self.model, mx.array([ids]), mx.array([[0, len(ids)]]))
            total, weight = total + float(loss) * int(count), weight + int(count)
        return total / weight


class Trainer:
    """Hugging Face's Trainer with PEFT, float32, its defaults but for rate, batch and what it would write."""

    def __init__(self, llm: str, texts: dict[str, Any], rank: int, alpha: int, rate: float, seed: int) -> None:
        needed("peft", "accelerate")
        import transformers
        from peft import LoraConfig, get_peft_model  # type: ignore[import-not-found, unused-ignore]

        transformers.logging.set_verbosity_error()
        transformers.set_seed(seed)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(llm)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        base = transformers.AutoModelForCausalLM.from_pretrained(llm, dtype="float32")
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=list(TARGETS))
        self.model, self.rate, self.seed = get_peft_model(base, config), rate, seed
        train, self.held_out = material.texts(**texts)
        self.data = [self._row(material.ids_of(text, self.tokenizer)) for text in train]
        self.tokens = sum(len(row["input_ids"]) for row in self.data)

    def __call__(self, steps: int) -> dict[str, float]:
        import transformers

        with tempfile.TemporaryDirectory() as folder:
            args = transformers.TrainingArguments(
                folder,
                per_device_train_batch_size=BATCH,
                num_train_epochs=steps,
                learning_rate=self.rate,
                seed=self.seed,
                lr_scheduler_type="constant",
                logging_steps=10,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                dataloader_pin_memory=False,
            )
            collator = transformers.DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=-100)
            transformers.Trainer(self.model, args, train_dataset=self.data, data_collator=collator).train()
        return {"tokens": self.tokens}

    def loss(self) -> float:
        """Mean negative log-likelihood of every held-out token."""
        import torch

        self.model.eval()
        total = weight = 0.0
        for text in self.held_out:
            ids = torch.tensor([material.ids_of(text, self.tokenizer)])
            with torch.no_grad():
                loss = float(self.model(input_ids=ids, labels=ids).loss)
            total, weight = total + loss * (ids.shape[1] - 1), weight + ids.shape[1] - 1
        assert math.isfinite(total)
        return total / weight

    def _row(self, ids: Sequence[int]) -> dict[str, list[int]]:
        return {"input_ids": list(ids), "attention_mask": [1] * len(ids), "labels": list(ids)}
