"""GRPO: its loss against TRL's trainer and by hand, answers that are drawn in a pack, searches that learn a reward."""

import math

import pytest
import torch

from ftray.tasks.grpo import PolicyLoss, advantages

PROMPTS, GROUP, LONGEST = 3, 4, 12
VARIANTS = {
    "grpo": {"beta": 0.0},
    "grpo kl": {"beta": 0.04},
    "grpo clip high": {"beta": 0.04, "clip": 0.1, "clip_high": 0.28},
    "dr_grpo": {"beta": 0.0, "advantage": "dr_grpo"},
    "dr_grpo kl": {"beta": 0.1, "advantage": "dr_grpo"},
}


def drawn_answers() -> dict[str, torch.Tensor]:
    """Prompts with a group of answers each, of different lengths, and log-probabilities as of other policies."""
    draw = torch.Generator().manual_seed(0)
    count, width = PROMPTS * GROUP, LONGEST
    lengths = torch.randint(1, width + 1, (count,), generator=draw)
    return {
        "prompts": torch.randint(2, 300, (PROMPTS, 5), generator=draw).repeat_interleave(GROUP, 0),
        "answers": torch.randint(2, 300, (count, width), generator=draw),
        "mask": (torch.arange(width) < lengths[:, None]).long(),
        "rewards": torch.rand(PROMPTS, GROUP, generator=draw),
        "noise": 0.3 * torch.randn(2, count, width, generator=draw),
    }


def packed(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same as a pack has it: one row."""
    rows: dict[str, list[torch.Tensor]] = {"input_ids": [], "position_ids": [], "labels": []}
    for prompt, answer, kept in zip(given["prompts"], given["answers"], given["mask"], strict=True):
        answer = answer[: kept.sum()]
        rows["input_ids"].append(torch.cat([prompt, answer]))
        rows["position_ids"].append(torch.arange(len(prompt) + len(answer)))
        rows["labels"].append(torch.cat([torch.full_like(prompt, -100), answer]))
    return {name: torch.cat(parts)[None] for name, parts in rows.items()}


def token_logprobs(model, given, temperature=1.0) -> torch.Tensor:
    """[answers, longest], one answer after another through the model's own code."""
    found = []
    for prompt, answer in zip(given["prompts"], given["answers"], strict=True):
        logits = model(input_ids=torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1] / temperature
        found.append(logits.log_softmax(-1).gather(1, answer[:, None])[:, 0])
    return torch.stack(found)


def ours(logprobs, given, kind: dict) -> torch.Tensor:
    """The loss of two micro-batches of a step, which `logprobs` [answers, longest] depend on."""
    loss_of, total = PolicyLoss(**{"clip": 0.2, "clip_high": 0.2} | kind), []
    by = advantages(given["rewards"], kind.get("advantage", "grpo")).flatten()
    halves = [slice(0, GROUP), slice(GROUP, PROMPTS * GROUP)]
    batches = []
    for half in halves:
        part = {name: given[name][half] for name in ("prompts", "answers", "mask")}
        kept = part["mask"].bool()
        batches.append(
            packed(part)
            | {
                "advantages": by[half][None],
                "old_logprobs": (logprobs.detach() + given["noise"][0])[half][kept][None],
                "reference_logprobs": (logprobs.detach() + given["noise"][1])[half][kept][None],
                "max_new_tokens": torch.tensor([[LONGEST]]),
            }
        )
    counts = (sum(loss_of.counts(batch)[0] for batch in batches),)
    for half, batch in zip(halves, batches, strict=True):
        loss, summed = loss_of(-logprobs[half][given["mask"][half].bool()], batch, counts)
        assert not summed.requires_grad
        total.append((loss, summed))
    torch.testing.assert_close(sum(s for _, s in total) / counts[0], sum(loss for loss, _ in total))
    return sum(loss for loss, _ in total)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_and_its_gradient_are_those_of_trl(variant, tiny_llama, tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    kind, given, temperature = VARIANTS[variant], drawn_answers(), 0.7
    own = kind.get("advantage", "grpo")
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=str(tmp_path),
            num_generations=GROUP,
            per_device_train_batch_size=PROMPTS * GROUP,
            max_completion_length=LONGEST,
            temperature=temperature,
            beta=kind["beta"],
            epsilon=kind.get("clip", 0.2),
            epsilon_high=kind.get("clip_high"),
            loss_type=own,
            use_bias_correction_kl=False,  # newer than the papers
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a"}] * PROMPTS * GROUP),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
    )
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.model.float().train()
    logprobs = token_logprobs(model, given, temperature)
    inputs = {
        "prompt_ids": given["prompts"],
        "prompt_mask": torch.ones_like(given["prompts"]),
        "completion_ids": given["answers"],
        "completion_mask": given["mask"],
        "advantages": advantages(given["rewards"], own).flatten(),
        "old_per_token_logps": logprobs.detach() + given["noise"][0],
        "ref_per_token_logps": logprobs.detach() + given["noise"][1],
        "num_items_in_batch": given["mask"].sum(),
    }
    theirs = trainer._compute_loss(model, inputs)
    assert trainer._metrics["train"]["clip_ratio/region_mean"][-1] > 0.1  # clipping does happen
    loss = ours(logprobs, given, kind)
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-6)
    weights = list(model.parameters())
    got, wanted = torch.autograd.grad(loss, weights), torch.autograd.grad(theirs, weights)
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max() + 1e-9


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_is_that_of_the_papers(variant):
    kind, given = VARIANTS[variant], drawn_answers()
    logprobs = -3 * torch.rand(PROMPTS * GROUP, LONGEST, generator=torch.Generator().manual_seed(1))
    old, reference = (logprobs + noise for noise in given["noise"])
    low, high, own = kind.get("clip", 0.2), kind.get("clip_high", 0.2), kind.get("advantage", "grpo")
    total = 0.0
    for i in range(PROMPTS * GROUP):
        rewards = given["rewards"][i // GROUP].tolist()
        mean = sum(rewards) / GROUP
        deviation = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (GROUP - 1))
        advantage = rewards[i % GROUP] - mean
        if own == "grpo":
            advantage /= deviation + 1e-4
        tokens, length = 0.0, int(given["mask"][i].sum())
        for t in range(length):
            ratio = math.exp(logprobs[i, t] - old[i, t])
            tokens += min(ratio * advantage, max(min(ratio, 1 + high), 1 - low) * advantage)
            apart = float(reference[i, t] - logprobs[i, t])
            tokens -= kind["beta"] * (math.exp(apart) - apart - 1)
        total -= tokens / (length if own == "grpo" else LONGEST)
    loss = ours(logprobs.requires_grad_(), given, kind).item()
    assert loss == pytest.approx(total / (PROMPTS * GROUP), rel=1e-5, abs=1e-7)


def test_answers_of_equal_reward_teach_nothing():
    for kind in ("grpo", "dr_grpo"):
        assert advantages(torch.full((2, 4), 0.3), kind).abs().max() < 1e-3
