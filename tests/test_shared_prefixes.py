"""Texts that begin alike have their common tokens once in a packed row, and learn what they learn apart."""

from typing import Any

import pytest
import torch
from conftest import llama
from helpers.packs import CONFIGS, Gradients, Trial
from helpers.trl_trainers import log_probability
from transformers import MistralConfig, MistralForCausalLM

from ftray.config import TrainingConfig
from ftray.models.next_token import packed_row
from ftray.multi_adapter.attention import shared_prefixes
from ftray.task_spec import TaskSpec
from ftray.tasks.objective import PREFIXES
from ftray.training.pack import Pack


def rows(pairs: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs of answers of 1 to 20 tokens to prompts of 1 to 40; the first answers begin alike, too."""
    draw, found = torch.Generator().manual_seed(seed), []

    def text(most: int) -> list[int]:
        length = int(torch.randint(1, most + 1, (), generator=draw))
        return torch.randint(2, 300, (length,), generator=draw).tolist()

    for pair in range(pairs):
        prompt, same = text(40), text(3) if pair == 0 else []
        answers = [same + text(20), same + text(20)]
        labels = [label for answer in answers for label in ([-100] * len(prompt) + answer)]
        ids = [token for answer in answers for token in prompt + answer]
        lengths = [len(prompt) + len(answer) for answer in answers]
        found.append({"input_ids": ids, "labels": labels, "lengths": lengths, "reference": [-30.0, -28.0]})
    return found


def step(base: Any, trials: list[Trial], shares: bool) -> tuple[list[list[torch.Tensor]], int]:
    """The gradients of a step of each trial, and the tokens that went through the model."""
    task = TaskSpec.named("DPO").load()
    pack, kept, seen = Pack(base, task.spec), [Gradients() for _ in trials], []
    assert pack.shares_prefixes
    pack.shares_prefixes = shares
    for i, trial in enumerate(trials):
        pack.add(str(i), trial.model(base), kept[i], objective=task.objective(TrainingConfig()))
    pack.shared.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    batches = {}
    for i in range(len(trials)):
        own = rows(3, i)
        batches[str(i)] = [task.collate({name: [row[name] for row in own] for name in own[0]})]
    assert all(result.failure is None for result in pack.step(batches).values())
    return [gradients.kept for gradients in kept], sum(seen)


def mistral() -> MistralForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return MistralForCausalLM(MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=8))


@pytest.mark.parametrize("make", [llama, mistral], ids=["llama", "sliding window"])
def test_gradients_are_those_of_whole_texts(make):
    base, trials = make().requires_grad_(False), [Trial(method, seed=i) for i, method in enumerate(CONFIGS)]
    got, few = step(base, trials, shares=True)
    wanted, many = step(base, trials, shares=False)
    prompts = sum(
        row["lengths"][1] - sum(label != -100 for label in row["labels"][row["lengths"][0] :])
        for i in range(len(trials))
        for row in rows(3, i)
    )
    assert few == many - prompts  # each prompt once
    for ours, theirs in zip(got, wanted, strict=True):
        greatest = max(gradient.abs().max() for gradient in theirs)
        assert greatest > 0
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).abs().max() <= 1e-5 * greatest


def test_many_answers_share_a_prompt():
    """As a group of answers does that is drawn for one prompt; another prompt's come after."""
    base = llama().requires_grad_(False)
    texts = [[5, 6, 7, *answer] for answer in ([8, 9], [10], [11, 12, 13])] + [[40, 41, 50], [40, 41, 51, 52]]
    prompts = [3, 3, 3, 2, 2]
    labels = [[-100] * prompt + text[prompt:] for text, prompt in zip(texts, prompts, strict=True)]
    batch = packed_row({"input_ids": texts, "labels": labels})
    batch[PREFIXES] = torch.tensor([[0, 3, 3, 0, 2]])
    prefixes = shared_prefixes(batch["position_ids"], batch[PREFIXES][0])
    row = batch["input_ids"][0][prefixes.kept]
    assert row.tolist() == [5, 6, 7, 8, 9, 10, 11, 12, 13, 40, 41, 50, 51, 52]
    assert torch.equal(row[prefixes.source], batch["input_ids"][0])
    (losses,) = Pack(base, TaskSpec()).reference_losses([batch], [1.0])
    each = iter(losses.tolist())
    for text, own in zip(texts, labels, strict=True):
        found = -sum(next(each) for label in own if label != -100)
        assert found == pytest.approx(log_probability(base, text, own), rel=1e-5)
