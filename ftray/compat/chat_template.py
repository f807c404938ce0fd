"""Private names of `transformers.utils.chat_template_utils`, which imports no torch; seen in transformers 5.22.2
(not in 5.22.1) to 5.23.0."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

from jinja2 import Template, nodes
from transformers.utils.chat_template_utils import (
    _alias_reasoning_fields,
    _compile_jinja_template,
    _plain_template_data,
    render_jinja_template,
)

Messages = list[dict[str, Any]]
_CUT = "\ue000zqxj\ue001"  # between the pieces of a rendering; a text that holds it is rendered as a whole
_ORDERLY = ("first", "index", "index0", "previtem", "changed", "cycle")  # of a loop, what later turns don't change
_TEXT = "\ue000zqxk\ue001"  # a turn's text, by which is found what stands around it
_PLAIN = ("role", "content")
# of a template that puts a text where it is told to and does nothing else with it
_SIMPLE = (
    *(nodes.Output, nodes.TemplateData, nodes.Const, nodes.Name, nodes.Getattr, nodes.Getitem, nodes.Add, nodes.Concat),
    *(nodes.If, nodes.CondExpr, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Test),
    *(nodes.List, nodes.Tuple, nodes.For, nodes.Filter),
    *(nodes.CallBlock, nodes.Call, nodes.ExtensionAttribute),
)
_REACH = (nodes.Block, nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)  # for other templates


def render(
    template: str, messages: Messages, tools: list[dict[str, Any]] | None, ask: bool, special_tokens: dict[str, str]
) -> str:
    """What `apply_chat_template` renders of messages, without its copies of what is plain text already.

    Args:
        ask: it ends with the beginning of an answer.
        special_tokens: `special_tokens_map` of the tokenizer.
    """
    said = [message if _is_plain(message) else _plain_template_data(message) for message in _without_nulls(messages)]
    return str(
        _compile_jinja_template(template).render(
            messages=_alias_reasoning_fields(said),
            tools=_plain_template_data(tools),
            documents=None,
            add_generation_prompt=ask,
            **special_tokens,
        )
    )


@dataclass(frozen=True)
class Pieces:
    """A rendering, cut at turns.

    Attributes:
        begun: with no turn, with the first, with the first two ...
        end: what follows the last turn.
        ask: what follows it where an answer is asked for.
    """

    begun: list[str]
    end: str
    ask: str


def render_pieces(
    template: str, messages: Messages, tools: list[dict[str, Any]] | None, special_tokens: dict[str, str]
) -> Pieces | None:
    """All that :func:`render` makes of the first turns, one or more, of a conversation; None: not with this template.

    A turn that a template renders by the turns before it alone is rendered once, not once for each answer after it.
    """
    cut = _cut_at_turns(template)
    if cut is None:
        return None
    marked, end, is_framed = cut
    if is_framed and not tools and all((*message,) == _PLAIN and _is_plain(message) for message in messages):
        return _framed(template, messages, end, tuple(special_tokens.items()))
    said = [message if _is_plain(message) else _plain_template_data(message) for message in _without_nulls(messages)]
    common = {"messages": _alias_reasoning_fields(said), "tools": _plain_template_data(tools), "documents": None}
    before, *turns = marked.render(**common, add_generation_prompt=True, **special_tokens).split(_CUT)
    if len(turns) != len(messages) + 1:
        return None
    return Pieces([*accumulate([before, *turns[:-1]])], end, turns[-1])


def _framed(template: str, messages: Messages, end: str, special_tokens: tuple[tuple[str, str], ...]) -> Pieces:
    """The pieces of turns that have a role and a text alone: a text between what the template puts around it."""
    opener = messages[0]["role"]
    begun = []
    for number, message in enumerate(messages):
        role, text = message["role"], message["content"]
        before, frame, ask = _frame(template, opener, role, number == 0, not text, special_tokens)
        begun.append(text.join(frame))
    return Pieces([*accumulate(begun, initial=before)], end, ask)


@lru_cache(maxsize=1024)
def _frame(
    template: str, opener: str, role: str, is_first: bool, is_empty: bool, special_tokens: tuple[tuple[str, str], ...]
) -> tuple[str, list[str], str]:
    """What stands before all turns, around a text of this role, and after all turns where an answer is asked for."""
    cut = _cut_at_turns(template)
    assert cut is not None
    before_it = [] if is_first else [{"role": opener, "content": ""}]
    messages = [*before_it, {"role": role, "content": "" if is_empty else _TEXT}]
    common: dict[str, Any] = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
    before, *turns, ask = cut[0].render(**common, **dict(special_tokens)).split(_CUT)
    return before, turns[-1].split(_TEXT), ask


@lru_cache(maxsize=8)
def _cut_at_turns(template: str) -> tuple[Template, str, bool] | None:
    """The template with a mark before each turn and after the last, what follows that where no answer is asked for, and
    whether it puts a turn's text as it is between what depends on its role.

    None: a turn may depend on what comes after it. The template must be one loop over `messages`, of which all else
    reads the first alone, and end in what depends on `add_generation_prompt` alone, which nothing else reads.
    """
    environment = _compile_jinja_template(template).environment
    tree, other = environment.parse(template), environment.parse(template)
    loops = [at for at, node in enumerate(tree.body) if isinstance(node, nodes.For) and _is(node.iter, "messages")]
    loop = tree.body[loops[0]] if len(loops) == 1 else None
    if not isinstance(loop, nodes.For) or loop.test or loop.recursive or loop.else_ or any(tree.find_all(_REACH)):
        return None
    before, after = tree.body[: loops[0]], tree.body[loops[0] + 1 :]
    if any(name.name != "add_generation_prompt" for node in after for name in node.find_all(nodes.Name)):
        return None
    parts = [*before, *loop.body]
    orderly = {
        id(node.node) for part in parts for node in part.find_all((nodes.Getattr, nodes.Getitem)) if _is_orderly(node)
    }
    read = (name for part in parts for name in part.find_all(nodes.Name) if id(name) not in orderly)
    if any(name.name in ("messages", "loop", "add_generation_prompt") for name in read):
        return None
    is_framed = isinstance(loop.target, nodes.Name) and _is_framed(parts, loop.target.name)
    end = nodes.Template(other.body[loops[0] + 1 :], lineno=1).set_environment(environment)
    loop.body.insert(0, _cut())
    tree.body.insert(loops[0] + 1, _cut())
    tree.set_environment(environment)
    marked, ending = (
        Template.from_code(environment, environment.compile(made), environment.make_globals(None))
        for made in (tree, end)
    )
    return marked, ending.render(add_generation_prompt=False), is_framed


def _is_framed(parts: list[nodes.Node], turn: str) -> bool:
    """Whether what stands around a turn's text depends on its role, that of the first turn, whether it is that, and
    whether it has a text.

    Args:
        parts: what stands before the loop, and in it.
        turn: what the loop calls a turn.
    """
    inner = [node for part in parts for node in (part, *part.find_all(nodes.Node))]
    shown = {id(taken) for node in inner for put in _put(node) for taken in _shown(put)}
    for node in inner:
        if not isinstance(node, _SIMPLE) or (isinstance(node, nodes.Filter) and node.name == "random"):
            return False
        if isinstance(node, nodes.Call) and not _is_known_call(node):
            return False
        if isinstance(node, nodes.Getattr | nodes.Getitem) and not _is_by_role(node, id(node) in shown, turn):
            return False
    held = {id(node.node) for node in inner if isinstance(node, nodes.Getattr | nodes.Getitem)}
    first = (node for node in inner if isinstance(node, nodes.Getitem) and _is(node.node, "messages"))
    names = (node for node in inner if isinstance(node, nodes.Name) and node.name in (turn, "loop", "messages"))
    return all(id(node) in held for node in (*first, *names))


def _put(node: nodes.Node) -> list[nodes.Node]:
    """Expressions of which a statement writes the text, or asks whether there is one."""
    if isinstance(node, nodes.Output):
        return [*node.nodes]
    return [node.test] if isinstance(node, nodes.If) else []


def _shown(put: nodes.Node) -> list[nodes.Node]:
    """What such an expression is made of: texts that are joined, or one of them."""
    if isinstance(put, nodes.Add | nodes.And | nodes.Or):
        return [*_shown(put.left), *_shown(put.right)]
    if isinstance(put, nodes.Concat):
        return [inner for node in put.nodes for inner in _shown(node)]
    return _shown(put.node) if isinstance(put, nodes.Not) else [put]


def _is_known_call(call: nodes.Call) -> bool:
    return isinstance(call.node, nodes.ExtensionAttribute) or _is(call.node, "raise_exception")


def _is_by_role(node: nodes.Getattr | nodes.Getitem, is_shown: bool, turn: str) -> bool:
    """Whether what is taken there of something is a turn's text, which is shown, or depends on roles alone."""
    name = _of(node)
    if _is(node.node, "messages"):
        return True  # the first of them
    if name is None:
        return False
    if _is(node.node, turn):
        return is_shown or name != "content"
    return name == {"loop": "first"}.get(node.node.name, name) if isinstance(node.node, nodes.Name) else name == "role"


def _of(node: nodes.Node) -> str | None:
    """The name of what is taken of something; None: it is nothing with a name."""
    if isinstance(node, nodes.Getattr):
        return node.attr
    arg = node.arg if isinstance(node, nodes.Getitem) else None
    return arg.value if isinstance(arg, nodes.Const) and isinstance(arg.value, str) else None


def _is_orderly(node: nodes.Getattr | nodes.Getitem) -> bool:
    """Whether it is the first of `messages`, or something of the loop that later turns don't change."""
    if isinstance(node, nodes.Getattr):
        return _is(node.node, "loop") and node.attr in _ORDERLY
    return _is(node.node, "messages") and isinstance(node.arg, nodes.Const) and node.arg.value == 0


def _cut() -> nodes.Output:
    return nodes.Output([nodes.TemplateData(_CUT, lineno=1)], lineno=1)


def _is(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.name == name


def with_generation_spans(
    template: str, messages: Messages, tools: list[dict[str, Any]] | None, special_tokens: dict[str, str]
) -> tuple[str, list[tuple[int, int]]]:
    """What a chat template renders, and the characters that it puts between {% generation %} tags.

    The public `apply_chat_template` gives a mask of tokens alone, of the whole text tokenized at once.
    """
    rendered, spans = render_jinja_template(
        [_without_nulls(messages)],
        chat_template=template,
        return_assistant_tokens_mask=True,
        tools=tools,
        **special_tokens,
    )
    return rendered[0], [(start, end) for start, end in spans[0]]


def _without_nulls(messages: Messages) -> Messages:
    """As `apply_chat_template` has them."""
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _is_plain(message: dict[str, Any]) -> bool:
    return all(type(value) is str for value in message.values())
