"""Trials of a pack, each also trained alone by plain PEFT and AdamW."""

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch.nn import functional as F
from transformers import get_scheduler

from ftray.multi_adapter.shared_model import share, trainable
from ftray.task_spec import CAUSAL
from ftray.training.optimizer import TorchOptimizer
from ftray.training.pack import Pack

STEPS = 4
CONFIGS = {
    "lora": lambda r, t: LoraConfig(r=r, lora_alpha=16, target_modules=t),
    "rslora": lambda r, t: LoraConfig(r=r, use_rslora=True, target_modules=t),
    "dora": lambda r, t: LoraConfig(r=r, use_dora=True, target_modules=t),
    "adalora": lambda r, t: AdaLoraConfig(
        init_r=r + 2, target_r=r, tinit=1, tfinal=1, total_step=STEPS, target_modules=t
    ),
    "ia3": lambda r, t: IA3Config(target_modules=t, feedforward_modules=[m for m in t if m == "down_proj"]),
    "oft": lambda r, t: OFTConfig(oft_block_size=16, target_modules=t),
    "loha": lambda r, t: LoHaConfig(r=r, target_modules=t),
    "lokr": lambda r, t: LoKrConfig(r=r, target_modules=t),
}
APART = {
    "prompt tuning": lambda r, t: PromptTuningConfig(num_virtual_tokens=r),
    "prefix tuning": lambda r, t: PrefixTuningConfig(num_virtual_tokens=r),
    "lora and head": lambda r, t: LoraConfig(r=r, target_modules=t, modules_to_save=["lm_head"]),
    "lora on head": lambda r, t: LoraConfig(r=r, target_modules=[*t, "lm_head"]),
}
TARGETS = [["q_proj", "v_proj"], ["down_proj"], ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"]]


@dataclass
class Trial:
    """One adapter's settings, and when it joins and leaves."""

    method: str
    rank: int = 4
    targets: list[str] = field(default_factory=lambda: TARGETS[2])
    seed: int = 0
    rate: float = 5e-3
    decay: float = 0.0
    clip: float = 0.0
    schedule: str = "constant"
    rows: int = 2
    micro_batches: int = 1
    first: int = 0
    steps: int = STEPS
    dropout: float = 0.0

    def model(self, base: Any) -> PeftModel:
        config = (CONFIGS | APART)[self.method](self.rank, self.targets)
        config.task_type = "CAUSAL_LM"
        if self.dropout:
            config.lora_dropout = self.dropout
        torch.manual_seed(self.seed)
        model = get_peft_model(share(base), config)
        for parameter in trainable(model):  # away from zero, where a wrong gradient would be zero too
            parameter.data += 0.02 * torch.randn_like(parameter)
        return model

    def update(self, model: PeftModel) -> TorchOptimizer:
        optimizer = torch.optim.AdamW(trainable(model), lr=self.rate, weight_decay=self.decay, eps=1e-3)
        return TorchOptimizer(model, optimizer, get_scheduler(self.schedule, optimizer, 1, STEPS), self.clip)

    def batches(self, step: int) -> list[dict[str, torch.Tensor]]:
        draw = torch.Generator().manual_seed(self.seed * 1000 + step)
        return [packed_row(draw, self.rows) for _ in range(self.micro_batches)]


class Gradients:
    """In place of an optimiser: keeps what it is given."""

    def apply(self, gradients: list[torch.Tensor], step: int) -> None:
        self.kept = [gradient.clone() for gradient in gradients]


def packed_row(draw: torch.Generator, records: int) -> dict[str, torch.Tensor]:
    """Records of 3 to 40 tokens, the first third of each without loss."""
    rows: dict[str, list[torch.Tensor]] = {"input_ids": [], "position_ids": [], "labels": []}
    for length in torch.randint(3, 41, (records,), generator=draw).tolist():
        ids = torch.randint(2, 300, (length,), generator=draw)
        rows["input_ids"].append(ids)
        rows["position_ids"].append(torch.arange(length))
        rows["labels"].append(torch.where(torch.arange(length) <= length // 3, -100, ids))
    return {name: torch.cat(parts)[None] for name, parts in rows.items()}


def alone(base: Any, trial: Trial) -> PeftModel:
    """PEFT and AdamW as anyone would write it: full logits, one record after another through the model's own code."""
    model = trial.model(base)
    parameters = trainable(model)
    optimizer = torch.optim.AdamW(parameters, lr=trial.rate, weight_decay=trial.decay, eps=1e-3)
    schedule = get_scheduler(trial.schedule, optimizer, 1, STEPS)
    for step in range(trial.steps):
        model.train()
        micro_batches = trial.batches(step)
        count = sum(int((b["labels"] != -100).sum()) for b in micro_batches)
        for batch in micro_batches:
            starts = (batch["position_ids"][0] == 0).nonzero().squeeze(1).tolist()
            for first, end in zip(starts, [*starts[1:], batch["labels"].shape[1]], strict=True):
                logits = model(input_ids=batch["input_ids"][:, first:end]).logits[0, first - end : -1]
                loss = F.cross_entropy(logits, batch["labels"][0, first + 1 : end], reduction="sum")
                (loss / count).backward()
        if trial.method == "adalora":
            factors = [p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]
            grams = [p @ p.T if p.shape[0] < p.shape[1] else p.T @ p for p in factors]
            (0.5 * sum((g - torch.eye(len(g))).norm() for g in grams) / len(grams)).backward()
        if trial.clip:
            torch.nn.utils.clip_grad_norm_(parameters, trial.clip)
        optimizer.step()
        schedule.step()
        if trial.method == "adalora":
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model


def together(base: Any, trials: list[Trial], tokens: int = 2**16) -> list[PeftModel]:
    """The trials in one pack, each joining at its `first` step and leaving when it has made its `steps`."""
    pack, done = Pack(base, CAUSAL, tokens), {}
    for now in range(max(t.first + t.steps for t in trials)):
        for i, trial in enumerate(trials):
            if trial.first == now:
                model = trial.model(base)
                pack.add(str(i), model, trial.update(model), trial.seed)
            if trial.first + trial.steps == now:
                done[i] = pack.remove(str(i))
        batches = {str(i): t.batches(now - t.first) for i, t in enumerate(trials) if t.first <= now < t.first + t.steps}
        if batches:
            stepped = pack.step(batches)
            assert all(s.failure is None for s in stepped.values())
    return [done.get(i) or pack.remove(str(i)) for i in range(len(trials))]


def assert_same_weights(got: PeftModel, wanted: PeftModel, tolerance: float) -> None:
    """Difference of each tensor, relative to its greatest element."""
    for (name, a), b in zip(got.named_parameters(), wanted.parameters(), strict=True):
        if a.requires_grad:
            assert (a - b).abs().max() <= tolerance * b.abs().max(), name
