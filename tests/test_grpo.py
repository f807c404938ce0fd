"""GRPO: its loss against TRL's trainer and by hand, answers that are drawn in a pack, searches that learn a reward."""

import json
import math
import random
import re
import statistics
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from conftest import gpt2, llama, make_tokenizer
from helpers.packs import CONFIGS, TARGETS, Trial

from ftray.cli import main
from ftray.config import AdapterConfig, EvaluationConfig, ModelConfig, TrainingConfig
from ftray.evaluation.user_metric import UserMetric, UserMetricError
from ftray.multi_adapter.decoding import Drawing, DrawnAnswer, PackDecoder
from ftray.search.reference import add_start
from ftray.task_spec import TaskSpec
from ftray.tasks.grpo import Objective, advantages
from ftray.training.pack_trainer import PackTrainer
from ftray.training.rollouts import Rollouts
from ftray.training.run_spec import RunSpec

SPEC = TaskSpec.named("GRPO")
TASK = SPEC.load()
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
    objective, total = Objective(TrainingConfig(**kind)), 0.0
    by = advantages(given["rewards"], kind.get("advantage", "grpo")).flatten()
    for half in (slice(0, GROUP), slice(GROUP, PROMPTS * GROUP)):
        part = {name: given[name][half] for name in ("prompts", "answers", "mask")}
        kept = part["mask"].bool()
        batch = packed(part) | {
            "advantages": by[half][None],
            "drawn_logprobs": (logprobs.detach() + given["noise"][0])[half][kept][None],
            "reference_logprobs": (logprobs.detach() + given["noise"][1])[half][kept][None],
            "max_new_tokens": torch.tensor([[LONGEST]]),
        }
        assert TASK.num_targets(batch) == len(kept)
        total += objective.loss(-logprobs[half][kept].double(), batch, (PROMPTS * GROUP,))
    return total.float() / (PROMPTS * GROUP)


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


def prompts_of(count: int, seed: int = 1) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    lengths = [1, 40, 7, 7, 90, 21][:count]
    return [torch.randint(2, 300, (length,), generator=draw).tolist() for length in lengths]


def drawing(seed: int, prompts: int = 5, group: int = 3, temperature: float = 1.0) -> Drawing:
    return Drawing(prompts_of(prompts, seed), [(seed, 7, i) for i in range(prompts)], group, temperature)


def same_draws(got: list[list[DrawnAnswer]], wanted: list[list[DrawnAnswer]]) -> None:
    assert [[a.ids for a in group] for group in got] == [[a.ids for a in group] for group in wanted]
    flat = [torch.tensor([p for group in found for a in group for p in a.logprobs]) for found in (got, wanted)]
    torch.testing.assert_close(*flat, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("base", "targets"), [(llama(), TARGETS[2]), (gpt2(), ["c_attn", "c_proj", "c_fc"])], ids=["llama", "gpt2"]
)
def test_answers_are_drawn_in_a_pack_as_alone_and_by_the_model_itself(base, targets):
    base.requires_grad_(False)
    methods = [*CONFIGS, "prompt tuning"] if base.config.model_type == "llama" else ["lora", "rslora", "dora"]
    models = {m: Trial(m, rank=2 + i, targets=targets, seed=i).model(base) for i, m in enumerate(methods)}
    drawings = {m: drawing(i, group=2 + i % 2, temperature=(1.0, 0.6)[i % 2]) for i, m in enumerate(methods)}
    decoder = PackDecoder(base, make_tokenizer(), EvaluationConfig(max_new_tokens=6))
    found = decoder.draw(models, drawings)
    for name, model in models.items():
        alone = PackDecoder(base, make_tokenizer(), EvaluationConfig(max_new_tokens=6, batch_size=2))
        same_draws(alone.draw({name: model}, {name: drawings[name]})[name], found[name])
        for prompt, group in zip(drawings[name].prompts, found[name], strict=True):
            assert len(group) == drawings[name].group
            for answer in group:
                ids = torch.tensor([[*prompt, *answer.ids]])
                with torch.no_grad():
                    logits = model.eval()(input_ids=ids).logits[0, -len(answer.ids) - 1 : -1]
                wanted = (logits / drawings[name].temperature).log_softmax(-1).gather(1, ids[0, len(prompt) :, None])
                torch.testing.assert_close(torch.tensor(answer.logprobs), wanted[:, 0], rtol=0, atol=1e-4)


def test_answers_are_drawn_with_the_probabilities_of_the_model():
    base, count = llama().requires_grad_(False), 4000
    model = Trial("lora").model(base).eval()
    decoder = PackDecoder(base, make_tokenizer(), EvaluationConfig(max_new_tokens=1, batch_size=256))
    prompt = prompts_of(2)[1]
    found = decoder.draw({"a": model}, {"a": Drawing([prompt], [(0, 0, 0)], count, 0.1)})["a"][0]
    with torch.no_grad():
        wanted = (model(input_ids=torch.tensor([prompt])).logits[0, -1] / 0.1).softmax(-1)
    shares = torch.bincount(torch.tensor([answer.ids[0] for answer in found]), minlength=len(wanted)) / count
    assert wanted.max() > 0.05
    assert ((shares - wanted).abs() <= 5 * (wanted * (1 - wanted) / count).sqrt() + 1 / count).all()


def test_a_prompt_is_read_once_for_its_group_and_an_answer_ends_with_its_stop_token():
    base, tokenizer = llama().requires_grad_(False), make_tokenizer()
    models = {name: Trial("lora", seed=i).model(base).eval() for i, name in enumerate("ab")}
    drawings = {"a": drawing(0, group=4), "b": drawing(1, group=4)}
    cfg = EvaluationConfig(max_new_tokens=40, batch_size=32)
    decoder = PackDecoder(base, tokenizer, cfg)
    decoder.stops = list(range(0, 384, 12))
    decoder.draw(models, drawings)
    read: list[int] = []
    base.get_input_embeddings().register_forward_pre_hook(lambda _, given: read.append(given[0].numel()))
    found = decoder.draw(models, drawings)
    answers = [answer for groups in found.values() for group in groups for answer in group]
    prompts = sum(len(prompt) - 1 for drawing in drawings.values() for prompt in drawing.prompts)
    assert sum(read) == prompts + sum(len(answer.ids) for answer in answers)
    ended = [answer for answer in answers if len(answer.ids) < cfg.max_new_tokens]
    assert ended
    assert all(answer.ids[-1] in decoder.stops for answer in ended)
    assert not any(set(answer.ids[:-1]) & {*decoder.stops} for answer in answers)
    assert all(answer.text == tokenizer.decode([i for i in answer.ids if i not in decoder.stops]) for answer in ended)
    few = PackDecoder(base, tokenizer, EvaluationConfig(max_new_tokens=40, batch_size=3))
    few.stops = decoder.stops
    for name, groups in few.draw(models, drawings).items():
        same_draws(groups, found[name])


def test_other_random_numbers_give_other_answers():
    base = llama().requires_grad_(False)
    model = Trial("lora").model(base).eval()
    decoder = PackDecoder(base, make_tokenizer(), EvaluationConfig(max_new_tokens=8))
    prompt = prompts_of(3)[2]
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    groups = decoder.draw({"a": model}, {"a": Drawing([prompt] * 4, keys, 3, 1.0)})["a"]
    assert len({tuple(answer.ids) for group in groups for answer in group}) == 12


def test_one_that_is_not_finite_is_missing_and_the_others_are_drawn():
    base = llama().requires_grad_(False)
    models = {"sound": Trial("lora").model(base).eval(), "broken": Trial("lora", seed=1).model(base).eval()}
    next(p for n, p in models["broken"].named_parameters() if "lora_B" in n).data.fill_(math.nan)
    decoder = PackDecoder(base, make_tokenizer(), EvaluationConfig(max_new_tokens=4))
    drawings = {"sound": drawing(0, 2), "broken": drawing(1, 2)}
    found = decoder.draw(models, drawings)
    assert [*found] == ["sound"]
    same_draws(found["sound"], decoder.draw({"sound": models["sound"]}, drawings)["sound"])


REWARD = """
def share(records, answers):
    return [a.count("a") / (1 + len(a)) + len(r["hint"]) for r, a in zip(records, answers)]
"""
STEPS, MOST = 3, 5
TRIALS = {
    "lora": ({"method": "lora", "rank": 4, "dropout": 0.0}, {"group": 4}),
    "dropout": (
        {"method": "lora", "rank": 4, "dropout": 0.0},
        {"group": 3, "beta": 0.0, "temperature": 0.6, "seed": 5},
    ),
    "oft": ({"method": "oft", "block_size": 16}, {"group": 2, "advantage": "dr_grpo", "micro_batch": 2}),
    "prompts": ({"method": "prompt_tuning", "virtual_tokens": 3}, {"group": 3, "temperature": 0.8}),
}


def run_of(path: str, adapter: dict, **training) -> RunSpec:
    settings = TrainingConfig(batch_size=4, learning_rate=5e-3, clip_norm=0.5, reward="r.py:share", **training)
    return RunSpec(ModelConfig(dtype="fp32"), path, AdapterConfig(**adapter), settings, STEPS, (2,), SPEC)


def prompt_rows(step: int) -> list[dict]:
    draw = torch.Generator().manual_seed(100 + step)
    rows = []
    for length in torch.randint(2, 12, (4,), generator=draw).tolist():
        ids = torch.randint(2, 300, (length,), generator=draw).tolist()
        extra = '{"hint": "' + "x" * (length % 3) + '"}'
        rows.append({"input_ids": ids, "labels": [-100] * length, "prompt": "p", "target": "", "extra": extra})
    return rows


def prompt_batches(run: RunSpec, step: int = 0):
    size = run.training.micro_batch or run.training.batch_size
    for at in range(step, STEPS):
        rows = prompt_rows(at)
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            yield TASK.collate({name: [row[name] for row in part] for name in TASK.columns if name in rows[0]})


def learn(path: str, runs: dict[str, RunSpec], resume: dict | None = None, save: dict | None = None) -> dict:
    """Trains the runs in one pack; their weights and reports."""
    trainer = PackTrainer(ModelConfig(dtype="fp32"), path, task=SPEC)
    tokenizer, cfg = make_tokenizer(), EvaluationConfig(max_new_tokens=MOST)
    trainer.rollouts = Rollouts(trainer.pack, tokenizer, cfg, UserMetric("r.py", "share", REWARD, "reward"))
    for name, run in runs.items():
        trainer.join(name, run, (resume or {}).get(name))
        trainer.trials[name].batches = prompt_batches(run, trainer.trials[name].history.step)
    while names := [name for name, trial in trainer.trials.items() if not trial.history.over]:
        assert trainer.step(names) == {}
        if due := [name for name in names if trainer.trials[name].history.due]:
            assert trainer.validate(due, []) == {}
        for name in names:
            if save and trainer.trials[name].history.step == 1:
                trainer.save(name, save[name])
    found = {}
    for name, trial in trainer.trials.items():
        weights = [p.detach().clone() for p in trainer.pack.adapters[name].parameters]
        found[name] = weights, trial.history.reports
    for name in runs:
        trainer.leave(name)
    return found


def by_hand(path: str, run: RunSpec) -> tuple[list[torch.Tensor], list[dict[str, float]]]:
    """The same by a plain loop: no cache, no packing, one token of one answer after another; AdamW of PyTorch."""
    from transformers import get_scheduler

    from ftray.adapters.methods import attach
    from ftray.models.load import load_base

    cfg, tokenizer = run.training, make_tokenizer()
    model = attach(load_base(run.model, path), run.adapter, run.steps, cfg.seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=cfg.learning_rate, weight_decay=0.0)
    schedule = get_scheduler(cfg.schedule, optimizer, round(cfg.warmup * STEPS), STEPS)
    group, heat = cfg.group, cfg.temperature or 1.0
    beta = 0.04 if cfg.beta is None else cfg.beta
    seen = []

    def logits_of(ids):
        return model(input_ids=torch.tensor([ids])).logits[0, -len(ids) :] / heat

    for step in range(STEPS):
        total, rewards = 0.0, []
        for place, row in enumerate(prompt_rows(step)):
            answers = []
            for sample in range(group):
                uniform, answer = np.random.default_rng([cfg.seed, step, place, sample]).random(MOST), []
                while len(answer) < MOST and answer[-1:] != [0]:
                    with torch.no_grad():
                        shares = logits_of([*row["input_ids"], *answer])[-1].softmax(-1).double().cumsum(0)
                    answer.append(int((shares <= uniform[len(answer)] * shares[-1]).sum()))
                answers.append(answer)
            texts = [tokenizer.decode([i for i in answer if i > 1]) for answer in answers]
            own = [text.count("a") / (1 + len(text)) + row["extra"].count("x") for text in texts]
            rewards += own
            spread = statistics.stdev(own) + 1e-4 if cfg.advantage != "dr_grpo" else 1.0
            for answer, reward in zip(answers, own, strict=True):
                ids, n = [*row["input_ids"], *answer], len(answer)
                logprobs = logits_of(ids).log_softmax(-1)[-n - 1 : -1].gather(1, torch.tensor(answer)[:, None])[:, 0]
                with torch.no_grad(), model.disable_adapter():
                    wide = logits_of(ids).log_softmax(-1)[-n - 1 : -1]
                apart = wide.gather(1, torch.tensor(answer)[:, None])[:, 0] - logprobs
                gain = (logprobs - logprobs.detach()).exp() * (reward - sum(own) / group) / spread
                loss = -gain + beta * (apart.exp() - apart - 1)
                total = total + loss.sum() / (MOST if cfg.advantage == "dr_grpo" else n)
        (total / len(rewards)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, cfg.clip_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seen.append(sum(rewards) / len(rewards))
    return [p.detach() for p in parameters], seen


def test_trials_of_a_pack_learn_what_each_learns_by_a_plain_loop(tiny_llama):
    runs = {name: run_of(tiny_llama, adapter, **training) for name, (adapter, training) in TRIALS.items()}
    found = learn(tiny_llama, runs)
    for name, run in runs.items():
        weights, rewards = by_hand(tiny_llama, run)
        got, reports = found[name]
        begun, last = reports
        assert [begun["step"], last["step"]] == [2, 3]
        assert begun["train_reward"] == pytest.approx(sum(rewards[:2]) / 2, abs=1e-6)
        assert last["train_reward"] == pytest.approx(rewards[2], abs=1e-6)
        assert 1 <= begun["answer_tokens"] <= MOST
        assert ("kl" in last) == (run.training.beta != 0)
        assert last.get("kl", 0.0) >= 0
        for a, b in zip(got, weights, strict=True):
            # where a gradient is nearly zero, Adam divides its rounding by itself; a step moves a weight by 5e-3
            assert (a - b).abs().max() <= 2e-3 * b.abs().max(), name
            assert (a - b).abs().mean() <= 1e-5 * b.abs().mean(), name


def test_a_trial_resumes_with_the_same_draws(tiny_llama, tmp_path):
    runs = {name: run_of(tiny_llama, adapter, **training) for name, (adapter, training) in TRIALS.items()}
    places = {name: str(tmp_path / name) for name in runs}
    whole = learn(tiny_llama, runs, save=places)
    again = learn(tiny_llama, runs, resume=places)
    for name in runs:
        for a, b in zip(again[name][0], whole[name][0], strict=True):
            assert (a - b).abs().max() <= 1e-6 * b.abs().max(), name
        for key in ("train_reward", "answer_tokens"):
            assert again[name][1][-1][key] == pytest.approx(whole[name][1][-1][key], abs=1e-9)


def test_answers_of_several_trials_are_drawn_at_once_where_a_pass_trains_but_one(tiny_llama, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=3 * 2**18))
    trainer = PackTrainer(ModelConfig(dtype="fp32"), tiny_llama, task=SPEC)
    reward = UserMetric("r.py", "share", REWARD, "reward")
    run = run_of(tiny_llama, *TRIALS["lora"][:1], **TRIALS["lora"][1])
    batch = next(prompt_batches(run))
    trainer.rollouts = Rollouts(trainer.pack, make_tokenizer(), EvaluationConfig(max_new_tokens=MOST), reward)
    assert trainer.fit_memory(run, batch) > 2
    assert trainer.pack.tokens < run.training.group * MOST * len(prompt_rows(0))


def test_an_adapter_that_is_kept_is_what_trials_diverge_from(tiny_llama, tmp_path):
    """They begin as it is: the divergence of their first answers is 0, and from the base it is not."""
    first = run_of(tiny_llama, *TRIALS["lora"][:1], group=2)
    first.training.learning_rate = 0.05
    learn(tiny_llama, {"a": first}, save={"a": str(tmp_path)})
    found = []
    for start in ("", "start"):
        trainer = PackTrainer(ModelConfig(dtype="fp32"), tiny_llama, task=SPEC)
        if start:
            add_start(trainer.pack, trainer.base, str(tmp_path / "adapter"))
        reward, cfg = UserMetric("r.py", "share", REWARD, "reward"), EvaluationConfig(max_new_tokens=MOST)
        trainer.rollouts = Rollouts(trainer.pack, make_tokenizer(), cfg, reward, start)
        run = replace(first, start=str(tmp_path / "adapter"), evaluate_at=(1,))
        trainer.join("a", run)
        trainer.trials["a"].batches = prompt_batches(run)
        assert trainer.step(["a"]) == {}
        assert trainer.validate(["a"], []) == {}
        found.append(trainer.trials["a"].history.reports[0]["kl"])
        trainer.leave("a")
    assert found[0] > 1e-4
    assert found[1] < 1e-9


def test_a_reward_that_raises_is_one_line(tiny_llama):
    trainer = PackTrainer(ModelConfig(dtype="fp32"), tiny_llama, task=SPEC)
    source = "def share(records, answers):\n    return [1 / 0 for _ in answers]\n"
    reward = UserMetric("r.py", "share", source, "reward")
    trainer.rollouts = Rollouts(trainer.pack, make_tokenizer(), EvaluationConfig(max_new_tokens=2), reward)
    run = run_of(tiny_llama, *TRIALS["lora"][:1], group=2)
    trainer.join("a", run)
    trainer.trials["a"].batches = prompt_batches(run)
    with pytest.raises(
        UserMetricError, match=r"^r.py:2: ZeroDivisionError: division by zero \(share of record 0, prompt"
    ):
        trainer.step(["a"])
    trainer.leave("a")


# letters that a byte-level model finds by chance now and then
LETTERS = """def letters(records, answers):
    return [sum(c in "abcdefghijklmnop" for c in a) / max(1, len(a)) for a in answers]
"""
SPACE = """
method: {choice: [lora, oft]}
temperature: {choice: [0.9, 1.0]}
advantage: {choice: [grpo, dr_grpo]}
beta: 0.01
schedule: constant
lora: {rank: 8, dropout: 0.0, target_modules: all-linear, learning_rate: {log: [5.0e-3, 2.0e-2]}}
oft: {block_size: 16, target_modules: all-linear, learning_rate: {log: [5.0e-3, 2.0e-2]}}
"""


@pytest.fixture(scope="module")
def outspoken(tmp_path_factory, tokenizer) -> str:
    """A tiny Llama whose output layer can make a token nearly certain, as one that was trained has it."""
    directory = tmp_path_factory.mktemp("outspoken")
    model = llama()
    model.lm_head.weight.data *= 8
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> str:
    """A JSONL file of 120 prompts, each with a further field."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("asked") / "prompts.jsonl"
    with open(path, "w") as file:
        for number in range(120):
            prompt = " ".join(draw.choices("abcdefgh", k=draw.randint(2, 9)))
            file.write(json.dumps({"prompt": prompt, "number": number}) + "\n")
    return str(path)


def settings(asked: str, model: str, output, *more: str) -> list[str]:
    flags = {
        "--task": "grpo",
        "--data": asked,
        "--model": model,
        "--model.dtype": "fp32",
        "--data.cache": str(output.parent / "shards"),
        "--training.reward": "letters.py:letters",
        "--evaluation.max_new_tokens": "6",
        "--output": str(output),
    }
    return [part for pair in flags.items() for part in pair] + list(more)


def reports_of(output, capsys, *arguments: str) -> list[dict[str, float]]:
    assert main(["train", *arguments]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    return [{n: float(v) for n, v in re.findall(r"(\w+) ([-\d.]+)(?:,|$)", line)} for line in lines]


def test_a_run_learns_a_reward_alike_on_one_and_two_workers(cluster, asked, outspoken, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "letters.py").write_text(LETTERS)
    steps = ["--training.steps", "12", "--training.learning_rate", "0.01", "--training.schedule", "constant"]
    steps += ["--adapter.dropout", "0", "--adapter.target_modules", "all-linear", "--training.beta", "0.01"]
    found = []
    for workers in ("1", "2"):
        output = tmp_path / f"out-{workers}"
        arguments = settings(asked, outspoken, output, *steps, "--scaling.workers", workers)
        found.append(reports_of(output, capsys, *arguments))
    assert {"train_reward", "answer_tokens", "kl", "validation_reward"} <= found[0][0].keys()
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-3)  # later, rounding has changed some draw
    for reports in found:
        assert reports[-1]["train_reward"] > reports[0]["train_reward"] + 0.3
        assert reports[-1]["validation_reward"] > 0.95  # greedy answers, nearly all letters from the first report on
    given = ["--data", asked, "--adapter", "out-1", "--training.reward", "letters.py:letters", "--output", "e.json"]
    assert (
        main(["evaluate", *given, "--model.dtype", "fp32", "--evaluation.max_new_tokens", "6", "--split", "validation"])
        == 0
    )
    scores = json.loads((tmp_path / "e.json").read_text())
    (adapter,) = scores["adapters"].values()
    best = max(report["validation_reward"] for report in found[0])
    assert adapter["reward"]["best"] == pytest.approx(best, abs=1e-4)  # of the checkpoint that was kept
    assert adapter["reward"]["shown"]
    assert adapter["reward"]["difference"] > 0


def test_a_search_learns_a_reward_and_proves_it(cluster, asked, outspoken, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "letters.py").write_text(LETTERS)
    (tmp_path / "space.yaml").write_text(SPACE)
    flags = ["--space", "space.yaml", "--trials", "4", "--training.steps", "12", "--search.finalist_seeds", "1"]
    assert main(["tune", *settings(asked, outspoken, tmp_path / "out", *flags)]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["metric"], summary["direction"]) == ("validation_reward", "max")
    proof = summary["proof"]["metrics"]
    assert {*proof} == {"reward", "answer_tokens"}  # the records have no answers to compare with
    assert proof["reward"]["shown"]
    assert proof["reward"]["difference"] > 0
    reports = [json.loads(path.read_text()) for path in tmp_path.glob("out/tune/trial-*/checkpoint_*/report.json")]
    assert reports
    assert all({"train_reward", "kl", "answer_tokens", "validation_reward"} <= report.keys() for report in reports)


MISTAKES = {
    "no reward": ([], "training.reward: GRPO learns from a reward: give FILE.py:FUNCTION"),
    "no file": (["--training.reward", "none.py:f"], "training.reward none.py:f: can't be read: No such file"),
    "no function": (["--training.reward", "letters.py:let"], "letters.py: has no function let; did you mean letters?"),
    "raises": (["--training.reward", "letters.py:shares"], "letters.py:4: ZeroDivisionError: division by zero (shares"),
    "no name": (["--training.reward", "letters"], "training.reward: must be FILE.py:FUNCTION"),
    "no text": (
        ["--training.reward", "letters.py:letters", "--evaluation.generate", "false"],
        "evaluation.generate: GRPO is judged by answers: leave it true",
    ),
    "sharded": (
        ["--training.reward", "letters.py:letters", "--training.zero_stage", "3"],
        "training.zero_stage 3: answers are drawn where a worker has the whole base: leave it out",
    ),
    "group": (["--training.reward", "letters.py:letters", "--training.group", "1"], "training.group: "),
}


@pytest.mark.parametrize("case", MISTAKES)
@pytest.mark.parametrize("name", ["tune", "train"])
def test_what_is_wrong_with_a_reward_is_told_before_anything_begins(
    name, case, asked, tiny_llama, tmp_path, monkeypatch, capsys, ray_undone
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "letters.py").write_text(LETTERS + "\ndef shares(r, a):\n    return [1 / len(x) for x in a]\n".lstrip())
    flags, line = MISTAKES[case]
    assert main([name, "--task", "GRPO", "--data", asked, "--model", tiny_llama, "--output", "out", *flags]) == 2
    told = capsys.readouterr().err
    assert line in told, told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()
