"""llama.cpp as the runtime of a GGUF file, by xllamacpp, in a process of its own: `python -m ftray.exports.llama_cpp`.

What it can't read ends a process in C++, with no exception; and its logs go to the terminal of whoever loads it.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftray.exports.proof import Question, Reply

ERROR = re.compile(r"[\d.]+ E (.*)")  # in llama.cpp's log, after the time
LOG_SECONDS = 2.0  # for the thread that writes it: the end of the process would cut it, and with it the reason
SPARE = 8  # places of the context beyond the longest question and its answer
FORCED = 1e6  # added to a logit, which is then the greatest
ALL = 2**24  # tokens: more than any vocabulary has


@dataclass(frozen=True)
class Seen:
    """What llama.cpp makes of texts and of a conversation with what a GGUF file holds.

    Attributes:
        replies: one a question.
        tokens: of each text, as if it stood in the middle of another one.
        framed: of the first text, as a text by itself.
        rendered: the conversation, up to where the assistant begins; None: none was given.
    """

    replies: "list[Reply]"
    tokens: list[list[int]]
    framed: list[int]
    rendered: str | None


def ask(
    file: Path,
    questions: "Sequence[Question]",
    stop: int,
    most: int,
    texts: Sequence[str],
    turns: list[dict[str, str]] | None,
) -> Seen:
    """Load `file` and let it answer; the file itself says where an answer ends.

    Args:
        stop: a token that ends an answer.
        most: tokens of an answer.
        texts: to tokenize.
        turns: of a conversation, to render; None: there is none.

    Raises:
        RuntimeError: llama.cpp can't read the file; with the first error of its log.
    """
    from ftray.exports.proof import Reply

    given = {"questions": [asdict(q) for q in questions], "stop": stop, "most": most, "texts": list(texts)}
    with tempfile.TemporaryDirectory(prefix="ftray-llama-") as scratch:
        asked, found = Path(scratch, "asked.json"), Path(scratch, "found.json")
        asked.write_text(json.dumps(given | {"turns": turns}))
        command = [sys.executable, "-m", "ftray.exports.llama_cpp", str(file), str(asked), str(found)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode or not found.is_file():
            raise RuntimeError(_first_error(done.stderr))
        seen: dict[str, Any] = json.loads(found.read_text())
    return Seen([Reply(**reply) for reply in seen["replies"]], seen["tokens"], seen["framed"], seen["rendered"])


def _first_error(log: str) -> str:
    """The line of a log that says why; those after it only say that it failed, each function once more."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    says = [found[1] for line in lines if (found := ERROR.match(line))]
    says += [line for line in lines if "Error: " in line] or lines[-1:] or ["its process ended"]  # of Python
    return " ".join(says[0].split())


def main(file: str, questions: str, found: str) -> None:
    """Read questions from the JSON file `questions`, write what :class:`Seen` holds to `found`."""
    import xllamacpp

    given: dict[str, Any] = json.loads(Path(questions).read_text())
    stop, most = given["stop"], given["most"]
    longest = max((len(q["ids"]) for q in given["questions"]), default=1)
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel, params.warmup = longest + most + SPARE, 1, False
    try:
        server = xllamacpp.Server(params)
    except RuntimeError:
        time.sleep(LOG_SECONDS)
        raise
    replies = [{**_answer(server, asked, most), "loss": _loss(server, asked, stop)} for asked in given["questions"]]
    tokens = [_tokens(server, text, False) for text in given["texts"]]
    framed = _tokens(server, given["texts"][0], True) if given["texts"] else []
    rendered = given["turns"] and _post(server, "/apply-template", {"messages": given["turns"]})["prompt"]
    seen = {"replies": replies, "tokens": tokens, "framed": framed, "rendered": rendered}
    Path(found).write_text(json.dumps(seen))


def _answer(server: Any, asked: dict[str, Any], most: int) -> dict[str, Any]:  # noqa: ANN401  # it has no types
    said = _complete(server, asked["ids"][: asked["prompt_tokens"]], most)
    ids, ended = said["tokens"], said["stop_type"] == "eos"
    return {"ids": ids[:-1] if ended else ids, "ended": ended}  # the token that ends it is the last one


def _loss(server: Any, asked: dict[str, Any], stop: int) -> float:  # noqa: ANN401
    """A bias lets the server draw the target's tokens; it says how likely each was without the bias.

    It says nothing of one that ends amid a character; then it is made to stop, and to say how likely all tokens were.
    """
    found = 0.0
    for at in asked["learnt"]:
        token, before = asked["ids"][at], asked["ids"][:at]
        if said := _complete(server, before, 1, token).get("completion_probabilities"):
            known = said[:1]
        else:
            known = _complete(server, before, 1, stop, ALL)["completion_probabilities"][0]["top_logprobs"]
        found -= next(float(one["logprob"]) for one in known if one["id"] == token)
    return found


def _complete(server: Any, ids: list[int], most: int, forced: int | None = None, shown: int = 1) -> dict[str, Any]:  # noqa: ANN401
    bias = [] if forced is None else [[forced, FORCED]]
    settings = {"n_predict": most, "temperature": 0, "n_probs": shown, "logit_bias": bias, "return_tokens": True}
    return _post(server, "/completion", {"prompt": ids, "cache_prompt": True, **settings})


def _tokens(server: Any, text: str, framed: bool) -> list[int]:  # noqa: ANN401
    asked = {"content": text, "add_special": framed, "parse_special": True}
    found: list[int] = _post(server, "/tokenize", asked)["tokens"]
    return found


def _post(server: Any, route: str, body: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
    from urllib.request import Request, urlopen

    request = Request(server.listening_address + route, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


if __name__ == "__main__":
    main(*sys.argv[1:])
