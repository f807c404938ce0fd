"""Whether records that share a pass get what each of them gets alone: in logits and in gradients.

Recurrent, convolutional and state-space layers carry one record of a row into the next; so does attention that a model
masks without asking where records begin. No list of architectures says so reliably: each model is tried.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, cast

import torch
from torch import nn
from torch.nn import functional as F

from ftray.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutput

    Model: TypeAlias = PreTrainedModel | PeftModel

# tokens: a short record before longer ones, two that packed attention pads alike, and one that they are padded to
LENGTHS = (5, 19, 11, 35)
LONG = 300  # tokens of a record that is long enough for all layers to act
MOVED = 0.02  # standard deviation by which an adapter's weights leave their start, where most of them do nothing


class Tolerance(NamedTuple):
    """Relative errors that rounding may make.

    Attributes:
        logits: of a record's logits; twice as much of all gradients together.
        gradient: of one tensor's gradient: a sum over few tokens has few digits left; what is forgotten is off by 1.
        leak: of a record's logits between two passes of the same shape in which only its neighbours differ.
    """

    logits: float
    gradient: float
    leak: float


# by dtype, the coarsest first
TOLERANCES = {
    torch.bfloat16: Tolerance(0.1, 0.7, 0.02),
    torch.float16: Tolerance(0.03, 0.3, 5e-3),
    torch.float32: Tolerance(1e-4, 1e-2, 1e-5),
}


def tolerance(model: "Model") -> Tolerance:
    """By the coarsest arithmetic that `model` may use; that over quantised weights is as coarse as bfloat16."""
    dtypes = {p.dtype if p.is_floating_point() else torch.bfloat16 for p in model.parameters()}
    return next(found for dtype, found in TOLERANCES.items() if dtype in dtypes)


def probe_records(model: "Model", longest: int | None = None) -> list[torch.Tensor]:
    """Token ids of a few records, int64 [tokens] each, drawn from a fixed seed.

    Args:
        longest: tokens of the longest record that will be trained on; None: of any length. Where a sliding window is
            shorter, one record is longer than the window.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    lengths = [*LENGTHS]
    if isinstance(window, int) and (longest is None or window < longest):
        lengths.append(window + 7)
    special = {v for k, v in config.to_dict().items() if k.endswith(("token_id", "token_index")) and isinstance(v, int)}
    plain = torch.tensor([i for i in range(min(config.vocab_size, 4096)) if i not in special])
    draw = torch.Generator().manual_seed(0)
    return [plain[torch.randint(len(plain), (length,), generator=draw)] for length in lengths]


def token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Summed next-token cross-entropy of one record: logits [tokens, vocabulary], ids int64 [tokens]."""
    return F.cross_entropy(logits[:-1].float(), ids[1:].to(logits.device), reduction="sum")


@contextmanager
def moved(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, `parameters` are off their values by noise of a fixed seed; afterwards they are exactly as before."""
    before = [p.data for p in parameters]
    draw = torch.Generator().manual_seed(1)
    try:
        for p in parameters:
            p.data = p.data + (MOVED * torch.randn(p.shape, generator=draw)).to(p)
        yield
    finally:
        for p, old in zip(parameters, before, strict=True):
            p.data = old


@contextmanager
def embedded(model: "Model") -> Iterator[list[torch.Tensor]]:
    """Inside, what the model's input embeddings give is collected, as leaves that a gradient can be asked for."""
    found: list[torch.Tensor] = []

    def collect(module: nn.Module, inputs: tuple[object, ...], output: torch.Tensor) -> torch.Tensor:
        found.append(output.detach().requires_grad_())
        return found[-1].clone()  # which the model may write to

    hook = model.get_input_embeddings().register_forward_hook(collect)
    try:
        yield found
    finally:
        hook.remove()


def alone(model: "Model", records: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Logits of each record by itself, and the gradient of its loss with respect to its embeddings.

    Returns:
        For each record float32 [tokens, vocabulary] and [tokens, hidden size].
    """
    all_logits, gradients = [], []
    for ids in records:
        with embedded(model) as embeddings:
            logits = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0]
        (gradient,) = torch.autograd.grad(token_loss(logits, ids), embeddings[0])
        all_logits.append(logits.detach().float())
        gradients.append(gradient[0].float())
    return all_logits, gradients


@torch.no_grad()
def row_obstacle(model: "Model", records: Sequence[torch.Tensor]) -> str | None:
    """Why `model` does not keep the records of one packed row apart by their positions; None: it does."""
    positions, lengths = torch.cat([torch.arange(len(r)) for r in records])[None], [len(r) for r in records]
    device, allowed = model.get_input_embeddings().weight.device, tolerance(model)

    def row(records: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        ids = torch.cat(list(records))[None].to(device)
        logits = model(input_ids=ids, position_ids=positions.to(device), use_cache=False).logits[0]
        parts: Sequence[torch.Tensor] = logits.split(lengths)
        return parts

    try:
        together, again = row(records), row(other_first(records))
        alone = [model(input_ids=r[None].to(device), use_cache=False).logits[0] for r in records]
    except Exception as error:  # one: a method that puts tokens before the row
        return reason_of(error)
    return wrong_logits(together, alone, allowed) or leak(together, again, allowed)


@torch.no_grad()
def padding_obstacle(model: "Model") -> str | None:
    """Why records that are padded on the right don't get the logits of each alone; None: they do."""
    records = probe_records(model, 1)
    width, device = max(map(len, records)), model.get_input_embeddings().weight.device
    ids = torch.stack([F.pad(ids, (0, width - len(ids))) for ids in records]).to(device)
    mask = torch.stack([(torch.arange(width) < len(ids)).long() for ids in records]).to(device)
    try:  # what a prompt method puts before the records has logits of its own, which come first
        together = model(input_ids=ids, attention_mask=mask).logits[:, -width:]
        alone = [model(input_ids=ids[None].to(device)).logits[0, -len(ids) :] for ids in records]
    except Exception as error:
        return reason_of(error)
    ours = [row[: len(ids)] for row, ids in zip(together, records, strict=True)]
    return wrong_logits(ours, alone, tolerance(model))


@torch.no_grad()
def shared_passes(
    model: "PreTrainedModel", run: Callable[[list[torch.Tensor]], torch.Tensor]
) -> tuple[Literal["all", "equal", "none"], str | None]:
    """Which records may share a pass of `model`: all, padded on the right; those of equal length; or none.

    Args:
        run: makes of token ids, int64 [tokens] each, the outputs [records, ...] of one padded pass.

    Returns:
        That, and why padded records don't get what each of them gets alone; None: they do.
    """
    records = [ended(model, ids) for ids in probe_records(model, 1)]
    other = torch.cat([records[1][:-1].flip(0), records[1][-1:]])
    groups: dict[Literal["all", "equal"], list[torch.Tensor]] = {"all": records, "equal": [records[1], other]}
    reason = None
    for kind, group in groups.items():
        try:
            together, alone = run(group), [run([ids])[0] for ids in group]
            ours = [row[tuple(map(slice, own.shape))] for row, own in zip(together, alone, strict=True)]
            differs = wrong_logits(ours, alone, tolerance(model))
        except Exception as error:
            differs = reason_of(error)
        if not differs:
            return kind, reason
        reason = reason or differs
    return "none", reason


@torch.no_grad()
def decodes_together(model: "Model") -> Literal["all", "equal", "none"]:
    """Which prompts `model.generate` continues in one batch as it does alone: all, padded on the left; those of equal
    length; or none."""
    short, long = probe_records(model, 1)[:2]
    pads = len(long) - len(short)
    for kind, first in (("all", torch.cat([long.new_zeros(pads), short])), ("equal", long.flip(0))):
        ids = torch.stack([first, long])
        mask = torch.ones_like(ids)
        mask[0, : pads if kind == "all" else 0] = 0
        try:
            together = _continued(model, ids, mask)
            alone = [_continued(model, row[seen.bool()][None])[0] for row, seen in zip(ids, mask, strict=True)]
        except Exception:
            continue
        same = [(a[0].argmax() == b[0].argmax()).item() for a, b in zip(together, alone, strict=True)]
        steps = [2 if equal else 1 for equal in same]  # after another first token the second has other logits
        ours, theirs = ([t[:n] for t, n in zip(side, steps, strict=True)] for side in (together, alone))
        if not wrong_logits(ours, theirs, tolerance(model)):
            return cast(Literal["all", "equal"], kind)
    return "none"


def _continued(model: "Model", ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits [prompts, 2, vocabulary] of the two tokens that `model.generate` puts after each prompt."""
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=(torch.ones_like(ids) if mask is None else mask).to(model.device),
        max_new_tokens=2,
        min_new_tokens=2,
        do_sample=False,
        pad_token_id=0,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(out.logits, 1)


def reason_of(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def body(model: "PreTrainedModel") -> "PreTrainedModel":
    """The part of a causal language model that returns last hidden states."""
    if model.base_model is not model:
        return model.base_model
    from transformers import PreTrainedModel  # here, as PEFT below: who parses records needs neither

    return next(child for child in model.children() if isinstance(child, PreTrainedModel))


@torch.no_grad()
def head_obstacle(model: "Model", ids: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor]) -> str | None:
    """Why the model's logits are not what `head` makes of its last hidden states; None: they are.

    The states are made a thousand times greater on the way: capping and scaling show, whatever the weights are.
    """
    found: list[torch.Tensor] = []

    def louder(module: nn.Module, inputs: tuple[object, ...], output: "BaseModelOutput") -> "BaseModelOutput":
        output.last_hidden_state = output.last_hidden_state * 1000
        found.append(output.last_hidden_state)
        return output

    for inner in (body(model), model.get_decoder()):
        hook = inner.register_forward_hook(louder)
        try:
            logits = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0]
        finally:
            hook.remove()
        if found:
            break
    ours = head(found[0][0])
    if ours.shape != logits.shape or _relative(ours.float(), logits.float()) > tolerance(model).logits:
        return "its head is more than one linear layer"
    return None


def alone_adapter(
    model: "Model", records: Sequence[torch.Tensor], parameters: Sequence[nn.Parameter]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Logits of each record by itself through a PEFT model, and the gradient of the sum of their losses.

    Returns:
        For each record float32 [tokens, vocabulary]; for each of the `parameters` a tensor of its shape.
    """
    logits, total = [], [torch.zeros_like(p) for p in parameters]
    for ids in records:
        # what a prompt method puts before the record has logits of its own, which come first
        own = model(input_ids=ids[None].to(model.device)).logits[0, -len(ids) :]
        found = torch.autograd.grad(token_loss(own, ids), parameters, allow_unused=True, materialize_grads=True)
        for whole, part in zip(total, found, strict=True):
            whole += part
        logits.append(own.detach().float())
    return logits, total


def idle_layers(model: "PreTrainedModel") -> frozenset[str]:
    """Names of the modules with weights of a base whose outputs change nothing that it says for its task: the model
    never runs them, reads a weight past its module, or what they compute only chooses. An adapter there does nothing.

    Experts that few tokens reach are not among them. Without weights (meta device) they are found only where the
    model's code asks for no values, else there are none.

    Raises:
        UserError: the model, with weights, fails on a text.
    """
    if any(hasattr(p, "ds_id") for p in model.parameters()):  # shared out by ZeRO 3, which gathers for its engine alone
        return frozenset()
    short = torch.cat(probe_records(model, 1))[None]
    room = max(0, getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0) or LONG
    # repeated, as some layers wake up beyond a number of tokens only
    long = short.repeat(1, LONG // short.shape[1] + 1)[:, : min(LONG, room - 8)]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        idle = _not_acting(model, short[:, : LENGTHS[1]])
        if idle:
            with suppress(IndexError, RuntimeError, ValueError):  # more than it takes
                idle &= _not_acting(model, long)
    except Exception as error:
        if model.device.type == "meta":
            return frozenset()
        raise UserError(f"model.name: {type(model).__name__} fails on a text: {reason_of(error)}") from None
    finally:
        for module, training in modes:
            module.training = training
    return frozenset(idle)


@torch.enable_grad()
def _not_acting(model: "PreTrainedModel", ids: torch.Tensor) -> set[str]:
    """Modules without whose outputs the model says the same of `ids` [1, tokens]: no gradient would reach them."""
    switches: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[..., torch.Tensor | None]:
        def add(module: nn.Module, inputs: tuple[object, ...], output: object) -> torch.Tensor | None:
            if not (isinstance(output, torch.Tensor) and output.is_floating_point()):
                return None
            if name not in switches:
                switches[name] = torch.zeros((), device=output.device, requires_grad=True)
            return output + switches[name].to(output.dtype)

        return add

    own = [(name, m) for name, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None]
    own = [(name, module) for name, module in own if not re.search(r"experts?[._]\d+\.", name)]
    hooks = [module.register_forward_hook(watch(name)) for name, module in own]
    try:
        outputs = _said_of(model, ended(model, ids[0])[None].to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    reached = _leaves(v.grad_fn for v in outputs if isinstance(v, torch.Tensor))
    return {name for name, _ in own if id(switches.get(name)) not in reached}


def _said_of(model: "PreTrainedModel", ids: torch.Tensor) -> Iterable[object]:
    """What the model returns for `ids` [1, tokens]."""
    refusals: tuple[type[Exception], ...] = TypeError, ValueError
    ways: list[dict[str, torch.Tensor]] = [{}, {"decoder_input_ids": ids[:, : LENGTHS[0]]}]
    if model.device.type == "meta":  # some look for padding in what has no values, unless a whole mask is given
        refusals = TypeError, ValueError, RuntimeError
        mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device)
        ways += [way | {"attention_mask": mask} for way in ways]
    for further in ways[:-1]:
        with suppress(*refusals):
            said: Iterable[object] = model(input_ids=ids, **further).values()
            return said
    last: Iterable[object] = model(input_ids=ids, **ways[-1]).values()
    return last


def _leaves(nodes: Iterable[Any]) -> set[int]:
    """Ids of the tensors from which a graph that ends in `nodes` begins."""
    waiting, seen, found = [node for node in nodes if node is not None], set[Any](), set[int]()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting += [earlier for earlier, _ in node.next_functions if earlier is not None]
    return found


def ended(model: "Model", ids: torch.Tensor) -> torch.Tensor:
    """`ids` [tokens] with the end of a text, whose state a classifier over an encoder and a decoder reads."""
    end = getattr(model.config, "eos_token_id", None) if model.config.is_encoder_decoder else None
    return torch.cat([ids, ids.new_tensor([end])]) if isinstance(end, int) else ids


def other_first(records: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same records, but for the words of the first."""
    return [records[0].roll(1), *records[1:]]


def leak(once: Sequence[torch.Tensor], again: Sequence[torch.Tensor], allowed: Tolerance) -> str | None:
    """Why logits of records after the first, in passes that differ in the first alone, show that they saw it."""
    for mine, other in zip(once[1:], again[1:], strict=True):
        error = _relative(_centred(mine), _centred(other))
        if not error <= allowed.leak:
            return f"a record's logits change by {error:.2g} with what the record before it says"
    return None


def wrong_logits(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], allowed: Tolerance) -> str | None:
    """Why logits [tokens, vocabulary] of some record are not those that it has alone; None: they are.

    What is the same for all words of a position changes no probability: each position's mean is taken off.
    """
    for i, (mine, wanted) in enumerate(zip(ours, theirs, strict=True)):
        if mine.shape != wanted.shape:
            return f"record {i} has logits of shape {list(mine.shape)}, alone {list(wanted.shape)}"
        error = _relative(_centred(mine), _centred(wanted))
        if not error <= allowed.logits:
            return f"the logits of a record beside others are off by {error:.2g} of what they are alone"
    return None


def wrong_gradients(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], allowed: Tolerance) -> str | None:
    """Why some gradient is not that of the records alone; None: all are. Those near zero beside others don't count."""
    errors = [float((mine.float() - wanted.float()).norm()) for mine, wanted in zip(ours, theirs, strict=True)]
    norms = [float(wanted.float().norm()) for wanted in theirs]
    together = math.hypot(*errors) / max(math.hypot(*norms), 1e-20)
    single = max(error / max(norm, 0.1 * max(norms), 1e-20) for error, norm in zip(errors, norms, strict=True))
    if not (together <= 2 * allowed.logits and single <= allowed.gradient):
        return f"the gradients of records beside others are off by {max(together, single):.2g} of what they are alone"
    return None


def _relative(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((ours.detach() - wanted).norm() / wanted.norm().clamp_min(1e-20))


def _centred(logits: torch.Tensor) -> torch.Tensor:
    return logits.float() - logits.float().mean(-1, keepdim=True)
