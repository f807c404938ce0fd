"""Losses and gradients of TRL's own trainers, and the same batches as rows of ftray's shards."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from conftest import make_tokenizer
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

PAIRS = [
    {"prompt": f"Say {word}: ", "chosen": f"{word} {'ab' * n}", "rejected": f"no{'cd' * (5 - n)} {word[::-1]}"}
    for n, word in enumerate(["cat", "mat", "the hat", "a dog"])
]
UNPAIRED = [
    {"prompt": pair["prompt"], "completion": pair[key], "label": key == "chosen"}
    for pair, key in zip(PAIRS, ["chosen", "rejected", "chosen", "chosen"], strict=True)
]
COMMON = {
    "per_device_train_batch_size": 4,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "max_length": None,
    "gradient_checkpointing": False,
    "save_strategy": "no",
}


@dataclass
class Reference:
    """What a trainer of TRL makes of one batch: rows of shards, its loss, and the adapter's gradients."""

    rows: list[dict[str, Any]]
    loss: float
    gradients: list[torch.Tensor]


CONFIG = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")


def moved(model: PeftModel, seed: int = 0) -> PeftModel:
    """`model` with its adapter's weights drawn from `seed`, away from zero."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model


def adapted(base: PreTrainedModel, seed: int = 0, config: LoraConfig = CONFIG) -> PeftModel:
    """A LoRA on `base`, with weights drawn from `seed`."""
    return moved(get_peft_model(base, config), seed)


def reference(kind: str, base: PreTrainedModel, output: str, config: LoraConfig = CONFIG, **settings: Any) -> Reference:
    """One batch of the trainer that TRL has for `kind`, with these settings of its own."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    given = {"processing_class": tokenizer, "peft_config": config}
    trainer = _trainer(kind, base, output, settings, given)
    (inputs,) = trainer.get_train_dataloader()
    model = moved(trainer.model).train()
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    return Reference([*_rows(kind, inputs, model)], loss.item(), gradients)


def _trainer(kind: str, model: PreTrainedModel, output: str, settings: dict[str, Any], given: dict[str, Any]) -> Any:
    if kind == "kto":
        from trl import KTOConfig, KTOTrainer

        unpaired = Dataset.from_list(UNPAIRED)
        return KTOTrainer(model, args=KTOConfig(output, **COMMON | settings), train_dataset=unpaired, **given)
    given["train_dataset"] = Dataset.from_list(PAIRS)
    if kind == "dpo":
        from trl import DPOConfig, DPOTrainer

        return DPOTrainer(model, args=DPOConfig(output, **COMMON | settings), **given)
    if kind in ("cpo", "simpo"):
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        return CPOTrainer(model, args=CPOConfig(output, **COMMON | settings), **given)
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return ORPOTrainer(model, args=ORPOConfig(output, **COMMON | settings), **given)


def _rows(kind: str, inputs: dict[str, torch.Tensor], model: PeftModel) -> Iterator[dict[str, Any]]:
    """The records of a batch of TRL's collator, with what the base without the adapter says of them."""
    if kind == "dpo":
        texts = _texts(inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"])
        pairs = list(zip(texts[: len(texts) // 2], texts[len(texts) // 2 :], strict=True))
        scores = [1.0] * len(pairs)
    elif kind == "kto":
        parts = [[inputs[f"{p}{n}"] for n in ("input_ids", "attention_mask", "completion_mask")] for p in ("", "KL_")]
        pairs = list(zip(*(_texts(*part) for part in parts), strict=True))
        scores = inputs["label"].float().tolist()
    else:
        parts = [
            [inputs[f"{p}_input_ids"], inputs[f"{p}_attention_mask"], inputs[f"{p}_labels"] != -100]
            for p in ("chosen", "rejected")
        ]
        pairs = list(zip(*(_texts(*part) for part in parts), strict=True))
        scores = [1.0] * len(pairs)
    for pair, score in zip(pairs, scores, strict=True):
        with model.disable_adapter(), torch.no_grad():
            known = [log_probability(model, *text) for text in pair]
        ids, labels = ([token for text in pair for token in text[i]] for i in (0, 1))
        lengths = [len(text[0]) for text in pair]
        yield {"input_ids": ids, "labels": labels, "lengths": lengths, "score": score, "reference": known}


def _texts(ids: torch.Tensor, mask: torch.Tensor, answer: torch.Tensor) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of each row, without its padding."""
    found = []
    for row, present, supervised in zip(ids, mask.bool(), answer.bool(), strict=True):
        labels = torch.where(supervised, row, -100)
        found.append((row[present].tolist(), labels[present].tolist()))
    return found


def log_probability(model: Any, ids: list[int], labels: list[int]) -> float:
    """What `model` gives to the supervised tokens of a text, from its full logits."""
    was = model.training
    logits = model.eval()(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    model.train(was)
    return sum(logits[i, label].item() for i, label in enumerate(labels[1:]) if label != -100)
