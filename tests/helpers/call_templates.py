"""Chat templates that write calls of tools as families of models do, and tools that may be called."""

from conftest import make_tokenizer
from hypothesis import strategies as st

from ftray.models.chat_template import give_chat_template

TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}"
END = "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
TOOLS = "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"


def template(calls):
    return TOOLS + TURNS + "{% if m.tool_calls %}" + calls + "{% endif %}" + END


EACH = "{% for c in m.tool_calls %}{% set f = c.function %}"
# how families of models write calls, each in the fewest words
TEMPLATES = {
    "objects between tags": template(EACH + "\n<tool_call>\n{{ f | tojson }}\n</tool_call>{% endfor %}"),
    "an object alone": template(
        "{% set f = m.tool_calls[0].function %}"
        "{% if m.tool_calls | length > 1 %}{{ raise_exception('one') }}{% endif %}"
        '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}'
    ),
    "a list after a word": template(
        "[TOOL_CALLS] ["
        + EACH
        + '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}, "id": "{{ c.id }}"}'
        "{% if not loop.last %}, {% endif %}{% endfor %}]"
    ),
    "a list without a word": template("{{ m.tool_calls | map(attribute='function') | list | tojson }}"),
    "a name, then an object": template(EACH + "[TOOL_CALLS]{{ f.name }}[ARGS]{{ f.arguments | tojson }}{% endfor %}"),
    "a name, its id, then an object": template(
        EACH + "[TOOL_CALLS]{{ f.name }}[CALL_ID]{{ c.id }}[ARGS]{{ f.arguments | tojson }}{% endfor %}"
    ),
    "a name and a block of code": template(
        "<calls>" + EACH + "<call>function<sep>{{ f.name }}\n```json\n{{ f.arguments | tojson }}\n```</call>"
        "{% if not loop.last %}\n{% endif %}{% endfor %}</calls>"
    ),
    "key by key, in tags with names": template(
        EACH + "\n<tool_call>\n<function={{ f.name }}>\n{% for k, v in f.arguments.items() %}<parameter={{ k }}>\n"
        "{{ v | tojson if v is mapping or (v is sequence and v is not string) else v }}\n</parameter>\n{% endfor %}"
        "</function>\n</tool_call>{% endfor %}"
    ),
    "key by key, in tags of two": template(
        EACH + "\n<tool_call>{{ f.name }}\n{% for k, v in f.arguments.items() %}<arg_key>{{ k }}</arg_key>\n<arg_value>"
        "{{ v if v is string else v | tojson }}</arg_value>\n{% endfor %}</tool_call>{% endfor %}"
    ),
    "as OpenAI wraps it": template(EACH + "<call>{{ c | tojson }}</call>{% endfor %}"),
}
KINDS = {"city": "string", "days": "integer", "share": "number", "hourly": "boolean", "more": "object", "list": "array"}
NAMES = ["get_weather", "f", "search-2"]
OFFERED = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": {key: {"type": kind} for key, kind in KINDS.items()}},
        },
    }
    for name in NAMES
]


def tokenizer_with(text):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = text
    return tokenizer


TOKENIZERS = {name: tokenizer_with(text) for name, text in TEMPLATES.items()}
give_chat_template(TOKENIZERS.setdefault("chatml", make_tokenizer()), "chatml")

WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="<>[]{}"), max_size=8)
VALUES = {
    "city": WORDS,
    "days": st.integers(-99, 99),
    "share": st.floats(-9, 9),
    "hourly": st.booleans(),
    "more": st.dictionaries(WORDS, st.integers(0, 9) | WORDS | st.booleans(), max_size=2),
    "list": st.lists(st.integers(0, 9) | WORDS, max_size=3),
}
ARGUMENTS = st.fixed_dictionaries({}, optional=VALUES)
CALLS = st.lists(st.tuples(st.sampled_from(NAMES), ARGUMENTS), min_size=1, max_size=3)
