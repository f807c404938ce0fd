"""What ftray is measured against: `transformers.Trainer` with PEFT, one trainer a trial, as their documentation shows.

See https://huggingface.co/docs/peft/quicktour and
https://docs.ray.io/en/latest/train/user-guides/hyperparameter-optimization.html.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

BATCH = 8  # records a step
Row = dict[str, Any]  # input_ids and labels, a list of token ids each


class InOrder(Trainer):
    """Takes the rows as they come: another order would be another run."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def lora(settings: dict[str, Any]) -> LoraConfig:
    """PEFT's configuration for ftray's fields of the same adapter."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        target_modules=settings["target_modules"],
    )


def warmup(records: int) -> int:
    """Steps in which the learning rate rises, as ftray counts them: Trainer would round its share of them up."""
    return round(0.05 * (records // BATCH))


def load(path: str, dtype: torch.dtype) -> Any:
    """The base model."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def trainer(base: Any, settings: dict[str, Any], rows: Sequence[Row], held: Sequence[Row], tokenizer: Any) -> Trainer:
    """A trainer that goes through `rows` once, in order, and reports the loss on `held`.

    Args:
        settings: rank, alpha, dropout, target_modules and learning_rate.
    """
    arguments = TrainingArguments(
        output_dir=str(Path("unused")),
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=warmup(len(rows)),
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=False,  # the base is in bfloat16 already where that is fast, the adapter in float32
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    model = get_peft_model(base, lora(settings))
    return InOrder(
        model=model,
        args=arguments,
        train_dataset=list(rows),
        eval_dataset=list(held),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
    )


@torch.no_grad()
def held_out_loss(trainer: Trainer) -> float:
    """Mean over the supervised tokens of the held-out rows, in the trainer's own batches."""
    model = trainer.model.eval()
    loss, count = 0.0, 0
    for batch in trainer.get_eval_dataloader():
        supervised = int((batch["labels"][:, 1:] != -100).sum())
        loss += model(**batch).loss.item() * supervised
        count += supervised
    return loss / count
