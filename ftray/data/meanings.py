"""What a key means, by the words in its name, so that no spelling of a key that changes what is learnt is missed.

Each kind of key is a set of words; to teach ftray another one, add its word. `image_path`, `imagePath` and `Image-Path`
are the same.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLE_KEYS = ("role", "from", "speaker")  # of a turn
ROLES: dict[str, Role] = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatbot", "ai", "chatgpt", "bing", "bard"), "assistant"),
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
    **dict.fromkeys(("tool_response", "tool_result", "function_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
}
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thoughts")
# keys of texts that are asked, and of those that answer them, each as it is spelt
ASKED = (
    *("text", "prompt", "instruction", "input", "question", "query", "context", "document", "passage", "article"),
    *("suffix", "prefix", "choices", "options", "endings", "problem", "dialogue", "story", *THOUGHTS),
)
ANSWERED = (
    *("output", "completion", "response", "answer", "answers", "target", "summary", "highlights", "translation"),
    "solution",
)
# keys of the answers of a preference pair, the preferred one and the other; and of what judges one answer
PAIRED = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("preferred_output", "non_preferred_output"),
    ("preferred", "dispreferred"),
    ("y_w", "y_l"),
    ("win", "lose"),
)
VERDICTS = ("label", "kto_tag")

# words of a key that says which of two answers is the better one, of one that says that a pair stands the other way
# round, and what else the names of such keys may hold; words of keys that hold an answer
BETTER = _set("winner winning preference preferred better best choice verdict safer")
TURNED = _set("flipped flip swapped swap reversed inverted")
SIDE_FILLERS = _set(
    "is was the of which a b overall human user annotator response answer completion output id idx index side label "
    "key option"
)
ANSWER_WORDS = _set(
    "response answer completion output generation candidate summary reply solution conversation conv dialogue messages "
    "message chat"
)

# words in front of a verdict that add nothing to it, as in `is_correct`
_FILLERS = _set("is was has do does should to be use with the turn message")

# A mark says by 1 or 0 whether a turn, or a record, is learnt. Its name holds words of learning, words that turn its
# meaning round, or both (`no_loss`), and beside these only words without a meaning of their own.
_LEARN = _set(
    "train training trainable trained loss learn learnt learned learnable supervise supervised backprop backpropagate "
    "finetune finetuned grad gradient gradients"
)
_MASK = _set("mask masked skip skipped ignore ignored exclude excluded untrained untrainable unsupervised")  # alone too
_NOT = _set("no not non dont never without freeze frozen detach detached stop stopped disable disabled omit omitted")
_MARK_FILLERS = _FILLERS | _set(
    "used using for in on from of out by require requires required need needs needed include includes included "
    "contribute contributes compute computes calculate calculates calc apply applies enable enabled bear bears"
)
# marks by their whole name; `target` only as `is_target`, since it is also a key of answers
_LEARNT = _set("weight loss_weight train_weight training_weight target")
_UNLEARNT = _set("context_only")

# what says that an answer is a good one, and what that it is a bad one
GOOD = _set(
    "correct accepted accept acceptable passed pass good best reward preferred chosen helpful like liked approved "
    "approval upvoted desirable success successful succeeded thumb thumbs thumb_up thumbs_up feedback user_feedback "
    "human_feedback verdict judgement judgment usable keep valid solved resolved"
)
BAD = _set(
    "incorrect wrong bad rejected reject thumb_down thumbs_down unhelpful dislike disliked downvoted undesirable "
    "dispreferred unpreferred non_preferred not_preferred failed failure invalid flagged worse worst loser "
    "hallucinated spam unacceptable"
)
# what a label of an answer is about, where it is no class of it: `kto_tag`, `human_label`
_LABELLED = _set("kto human user quality answer response completion preference")
# how a text says either
YES = _set("yes true good positive up thumb_up thumbs_up accepted correct like liked desirable chosen preferred +1 👍")
NO = _set(
    "no false bad negative poor down thumb_down thumbs_down rejected incorrect wrong dislike disliked fail failed "
    "unhelpful invalid downvote downvoted undesirable dispreferred -1 👎"
)
# a grade is no verdict, unless it is a word that says no
GRADES = _set("rating score quality grade outcome result status evaluation")

PREFERENCE = "one of a preference pair, which --task DPO learns from as prompt, chosen and rejected"
_CORRECTED = "a better answer than the one that would be learnt: name it by data.fields, as output: corrected"
_WRONG_ANSWERS = "a bad answer: keep the good one alone, or give both as prompt, chosen and rejected to --task DPO"
MEDIA = "ftray reads text alone: leave out what needs more"
# words of which a key has one -> why a record is refused whose key holds a text, a list or an object
_ANSWERS: tuple[tuple[frozenset[str], str], ...] = (
    (
        _set(
            "chosen rejected reject preferred dispreferred unpreferred nonpreferred preference winner winning loser "
            "losing better worse worst"
        ),
        PREFERENCE,
    ),
    (_set("negative negatives incorrect wrong bad undesirable distractor distractors"), _WRONG_ANSWERS),
    (_set("corrected correction corrections revised"), _CORRECTED),
)
_MEDIA_WORDS = _set(
    "image images img imgs picture pictures photo photos pixel pixels video videos audio audios wav waveform"
)
# words of keys that hold a system text, earlier turns, tools, or how an answer was found, under other names
_SYSTEM_WORDS = _set("system sys")
_SYSTEM_TEXTS = _set("system sys message msg prompt text content instruction instructions turn default")
_HISTORY = _set("history histories previous prior past earlier preceding")
_TURNS = _set("messages turns conversation conversations dialog dialogue chat history qa")
_TOOLS = _set("tool tools function functions plugins")
_REASONS = _set(
    "rationale rationales reasoning explanation explanations thinking thoughts thought cot scratchpad justification"
)
# words that end the name of a key which says something about a record, and is none of what the record says
_ABOUT = _set(
    "id ids uid uuid guid idx index key hash md5 sha sha1 sha256 hexsha checksum digest url urls uri link links domain "
    "host hostname site website source sources src origin meta metadata info attributes attrs timestamp time "
    "date datetime day month year created added updated modified published retrieved fetched crawled version revision "
    "commit dump shard snapshot warc file filename path filepath dir directory folder repo repository branch project "
    "package count counts num number length len size bytes chars characters tokens words lines language languages lang "
    "langs locale script license licenses licence licences copyright author authors user username owner publisher "
    "editor subset split dataset corpus collection config name names title subreddit format mime mimetype type types "
    "ext extension suffix encoding quality score scores perplexity ppl prob probability confidence signals stats "
    "statistics status flag flags warnings duplicate duplicates dup cluster line page pages chapter volume isbn doi "
    "issn geo country region offset start end position keyword keywords backend headers header model generator parser "
    "rank weight loss batch fold seed provenance state repos partition locale"
)
# words of a number beside a text that may be what is to be learnt, or only an opinion of the text
_SCORES = _set("score scores grade grades")
# words of a score that is plainly about the text
_SCORES_OF_TEXT = _set("language lang quality ocr perplexity edu educational confidence similarity duplicate")
# words of a count, which names no class even where it is 0 or 1
_COUNTS = _set(
    "n num nb number count total sum max min avg mean likes retweets upvotes downvotes ups downs votes replies views "
    "shares comments favorites followers friends awards clicks level depth"
)
# words of keys that say where a text was collected; scores beside such a text are about it
_COLLECTED = _set(
    "url urls uri dump snapshot warc crawl domain host hostname website subreddit repo repository path filepath "
    "hexsha digest minhash arxiv doi isbn"
)
MANY_CLASSES = 3  # columns of 0 or 1, which then are classes rather than flags
_LABELS = _set("label labels class classes target category categories stars rating sentiment intent emotion")


@lru_cache(maxsize=4096)
def words(key: object) -> tuple[str, ...]:
    """The words of a key in snake, kebab or camel case, in lower case and without digits at their ends."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[^\w]|_", " ", str(key))
    return tuple(word for part in spaced.lower().split() if (word := part.rstrip("0123456789") or part))


@lru_cache(maxsize=4096)
def _name(key: object) -> str:
    """The words of a key without fillers in front, as the tables have them."""
    own = [*words(key)]
    while len(own) > 1 and own[0] in _FILLERS:
        own = own[1:]
    return "_".join(own)


@lru_cache(maxsize=4096)
def marks_learnt(key: object) -> bool | None:
    """Whether 1 under this key says that a turn or record is learnt; None: the key does not clearly say."""
    own, name = words(key), _name(key)
    if name in _LEARNT and (name != "target" or own[0] == "is"):
        return True
    if name in _UNLEARNT:
        return False
    said = {word for word in own if word not in _MARK_FILLERS}
    speaks = bool(said & (_LEARN | _MASK)) and own not in (("grad",), ("gradient",), ("gradients",))
    if not speaks or not said <= _LEARN | _MASK | _NOT or is_unclear_mark(key):
        return None
    return not said & (_MASK | _NOT)


@lru_cache(maxsize=4096)
def is_unclear_mark(key: object) -> bool:
    """Whether a key says what is learnt in a way that isn't read: by parts of a turn, by shares, or by a mask.

    A mask of the loss is 1 where tokens are learnt in some files, and where they are not in others.
    """
    *before, last = words(key) or ("",)
    if last in ("mask", "masks"):
        return bool({*before} & (_LEARN | _set("label labels token tokens assistant")))
    if last in ("detail", "details"):
        return bool({*before} & {"train", "training"})
    return (last == "weights" and {*before} <= _LEARN | {"sample", "token", "turn"}) or _name(key) == "sample_weight"


def is_verdict(key: object) -> bool:
    """Whether a key says of an answer that it is a good or a bad one."""
    return _name(key) in GOOD | BAD


def says_bad(key: object, value: object, is_answer: bool = True) -> bool:
    """Whether `value`, a number, a boolean or a word, says under this key that an answer is a bad one.

    A label says so of an answer; of a text (not `is_answer`) it is a class, and so are `labels` that are numbers.

    A share (`reward: 0.3`) says neither; nor does a text of more than a word, as a comment.
    """
    name = _name(key)
    *about, last = words(key) or ("",)
    labelled = is_answer and last in ("label", "labels", "tag", "vote") and {*about} <= _LABELLED
    good = name in GOOD or labelled
    if isinstance(value, bool | int | float):
        is_class = last == "labels" and not isinstance(value, bool)
        return value <= 0 if good and not is_class else name in BAD and value >= 1
    if not isinstance(value, str):
        return False
    said = "_".join(words(value)) or value.strip()
    said = value.strip() if value.strip() in ("+1", "-1") else said
    if name in BAD:
        return said in YES
    return said in NO and (good or bool(GRADES & {*words(key)}))


def _is_number(value: object) -> bool:
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return value.strip().lower() in ("true", "false")
        return True
    return isinstance(value, bool | int | float)


def of_media(key: object, value: object) -> str:
    """Why a record is refused whose key holds an image, or names one; empty: it doesn't."""
    own = words(key)
    about = own and own[-1] in ("id", "ids", "count", "num", "number", "width", "height", "size", "caption", "captions")
    return MEDIA if _MEDIA_WORDS & {*own} and not about and not _is_number(value) else ""


def of_answer(key: object, value: object) -> str:
    """Why a record is refused whose key holds another answer than the one to be learnt, or which one is better."""
    own = {*words(key)}
    names_better = bool({"winner", "preference"} & own)
    verdict = is_verdict(key) and isinstance(value, str) and "_".join(words(value)) in YES | NO
    if (_is_number(value) and not names_better) or verdict or ({*words(key)[-1:]} & {"score", "scores", "id"}):
        return ""
    return next((why for known, why in _ANSWERS if known & own), "")


def read_as(key: object, value: object) -> str:
    """The key by which it would be read: system, history or tools; empty: none of them."""
    own = {*words(key)}
    if own & _SYSTEM_WORDS and own <= _SYSTEM_TEXTS and not _is_number(value):
        return "system"
    if _is_number(value):
        return ""
    nested = isinstance(value, list | tuple) or (isinstance(value, str) and value.lstrip().startswith("["))
    if (own & _HISTORY and (own & _TURNS or nested)) or ("context" in own and own & _TURNS):
        return "history"
    holds = value[0] if isinstance(value, list) and value else value
    is_json = isinstance(holds, str) and holds.lstrip()[:2] in ("[{", '{"')
    return "tools" if own & _TOOLS and (isinstance(holds, dict) or is_json) else ""


def is_reasoning(key: object, value: object) -> bool:
    """Whether a key holds how an answer was found."""
    own = words(key)
    about = bool(own) and own[-1] in ("length", "tokens", "count", "effort", "id", "type", "model", "score")
    about = about or bool((_SCORES | GRADES | _SCORES_OF_TEXT) & {*own}) or not _holds_text(value)
    is_named = (
        _REASONS & {*own} or "chain_of_thought" in "_".join(own) or "cot" in re.split(r"[\W_]+", str(key).lower())
    )
    return bool(is_named) and not about


def is_about(key: object, value: object, is_collected: bool) -> bool:
    """Whether what stands under a key beside a lone text is about the record, rather than something to be learnt.

    Args:
        is_collected: see :func:`is_collected`.
    """
    own = words(key)
    if not own or own[0] in ("meta", "metadata"):
        return True
    if own[-1] in _SCORES and _is_number(value):
        return is_collected or bool(_SCORES_OF_TEXT & {*own})
    if own[-1] in _ABOUT:
        return True
    if _holds_text(value) or (own[-1] in _LABELS and not isinstance(value, list)):
        return False
    return not _may_be_class(key, value) or is_collected


def is_collected(record: Mapping[str, object]) -> bool:
    """Whether a record says where its text was collected, and has no columns that may be one for each class."""
    columns = [key for key, value in record.items() if _may_be_class(key, value)]
    return len(columns) < MANY_CLASSES and any(_COLLECTED & {*words(key)} for key in record)


def _may_be_class(key: object, value: object) -> bool:
    """Whether a number says that a text is of the class by which its key is named."""
    is_mark = isinstance(value, int | str) and not isinstance(value, bool) and value in (0, 1, "0", "1")
    return is_mark and not _COUNTS & {*words(key)}


def is_label(key: object) -> bool:
    """Whether a key names a class or a score, by its words."""
    return bool((_LABELS | _SCORES) & {*words(key)})


def _holds_text(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_text(inner) for inner in value.values())
    if isinstance(value, list | tuple):
        return any(_holds_text(inner) for inner in value)
    return isinstance(value, str) and not _is_number(value)
