"""A Modelfile for Ollama: the GGUF file beside it, how a prompt is rendered, where an answer ends."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftray.errors import UserError
from ftray.exports.gguf import FILE
from ftray.models.chat_template import turn_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

USER, ANSWER, AGAIN, SYSTEM = "ZQXJU", "ZQXJA", "ZQXJV", "ZQXJS"  # texts that stand in no template
Turns = list[dict[str, str]]
CHECKS: tuple[Turns, ...] = tuple(
    [{"role": role, "content": text} for role, text in turns]
    for turns in (
        [("user", "Where is {it}?")],
        [("system", "Be brief."), ("user", "Where is it?")],
        [("user", "Where?"), ("assistant", "Here.\n\nOr there."), ("user", "And now?")],
        [("system", 'Say "so".'), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
    )
)


@dataclass(frozen=True)
class TurnTemplate:
    """What a chat template puts around turns.

    Attributes:
        without_system: at the beginning, where there is no system turn.
        before_system, after_system, before_user, after_answer: as they say.
        before_answer: between what the user says and the answer.
    """

    without_system: str
    before_system: str
    after_system: str
    before_user: str
    before_answer: str
    after_answer: str

    def render(self, turns: Turns) -> str:
        """As Ollama renders :meth:`go`."""
        text = "" if turns[0]["role"] == "system" else self.without_system
        around = {
            "system": (self.before_system, self.after_system),
            "user": (self.before_user, ""),
            "assistant": (self.before_answer, self.after_answer),
        }
        for turn in turns:
            before, after = around[turn["role"]]
            text += before + turn["content"] + after
        return text + self.before_answer

    def go(self) -> str:
        """In the language of Go's text/template, over Ollama's `.System` and `.Messages`."""
        own = {name: _literal(text) for name, text in vars(self).items()}
        turn = "{{ .Content }}"
        return (
            f"{{{{ if not .System }}}}{own['without_system']}{{{{ end }}}}{{{{ range .Messages }}}}"
            f'{{{{ if eq .Role "system" }}}}{own["before_system"]}{turn}{own["after_system"]}'
            f'{{{{ else if eq .Role "user" }}}}{own["before_user"]}{turn}'
            f'{{{{ else if eq .Role "assistant" }}}}{own["before_answer"]}{turn}{own["after_answer"]}'
            f"{{{{ end }}}}{{{{ end }}}}{own['before_answer']}"
        )


def turn_template(tokenizer: "PreTrainedTokenizerBase") -> TurnTemplate:
    """What the chat template of `tokenizer` comes to, without the token that begins a text, which llama.cpp adds.

    Raises:
        UserError: Ollama's language can't say it.
    """
    refusal = UserError(
        "export: the chat template does more than put texts around turns, which is all that a Modelfile can say: "
        "take --to gguf, which holds the template itself"
    )
    if "strftime_now" in (tokenizer.chat_template or ""):
        raise UserError("export: the chat template writes the day's date, which a Modelfile can't: take --to gguf")
    begins = _beginning(tokenizer)

    def rendered(*turns: tuple[str, str]) -> str:
        text: str = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns], tokenize=False, add_generation_prompt=True
        )
        return text.removeprefix(begins)

    try:
        head, before_answer = rendered(("user", USER)).split(USER)
        asked = rendered(("user", USER), ("assistant", ANSWER), ("user", AGAIN))
        between = asked.partition(ANSWER)[2].partition(AGAIN)[0]
        before_system, _, rest = rendered(("system", SYSTEM), ("user", USER)).partition(SYSTEM)
        after = rest.partition(USER)[0]
    except Exception:  # a template is a program, and raises whatever it likes
        raise refusal from None
    before_user = _common_end(between, head, after)
    end = turn_end(tokenizer)
    if end is not None and (mark := tokenizer.convert_ids_to_tokens(end)) in before_user:
        before_user = before_user.rpartition(mark)[2]
    cut = len(before_user)
    found = TurnTemplate(
        head[: len(head) - cut],
        before_system,
        after[: len(after) - cut],
        before_user,
        before_answer,
        between[: len(between) - cut],
    )
    for turns in CHECKS:
        try:
            wanted = rendered(*((turn["role"], turn["content"]) for turn in turns))
        except Exception:
            raise refusal from None
        if found.render(turns) != wanted:
            raise refusal
    return found


def modelfile(tokenizer: "PreTrainedTokenizerBase", template: str | None, stops: list[int]) -> str:
    """The text of the Modelfile.

    Args:
        template: with {prompt}, by which plain prompts are rendered; None: the chat template renders turns.
        stops: tokens that end an answer.

    Raises:
        UserError: as :func:`turn_template`.
    """
    if template is None:
        text = turn_template(tokenizer).go()
    else:
        before, _, after = template.partition("{prompt}")
        text = f"{_literal(before)}{{{{ .Prompt }}}}{_literal(after)}{{{{ .Response }}}}"
    marks = [str(tokenizer.convert_ids_to_tokens(token)) for token in stops]
    if '"""' in text or any('"' in mark for mark in marks):
        raise UserError('export: the template holds """, which ends a text in a Modelfile: take --to gguf')
    lines = [
        f"FROM ./{FILE}",
        f'TEMPLATE """{text}"""',
        *(f'PARAMETER stop "{mark}"' for mark in marks),
        "# as the adapter was proven: the likeliest token each time, and no penalty on words that return",
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
    ]
    return "\n".join(lines) + "\n"


def _beginning(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The token that the tokenizer puts before any text, and llama.cpp too; empty: there is none."""
    bos = tokenizer.bos_token_id
    return tokenizer.bos_token if bos is not None and tokenizer("a")["input_ids"][0] == bos else ""


def _common_end(*texts: str) -> str:
    shortest, end = min(map(len, texts)), 0
    while end < shortest and len({text[len(text) - end - 1] for text in texts}) == 1:
        end += 1
    return texts[0][len(texts[0]) - end :]


def _literal(text: str) -> str:
    """What stands for `text` in a template of Go."""
    return text.replace("{{", '{{ "{{" }}')
