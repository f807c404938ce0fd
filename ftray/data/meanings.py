"""What a key means, by the words of its name: so that no spelling of a key that changes what is learnt is overlooked.

Each kind is a set of words, to which a newcomer adds one. `image_path`, `imagePath` and `Image-Path` are the same.
"""

import re
from collections.abc import Mapping
from functools import lru_cache


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# in front of a mark or verdict, and without a meaning of its own
_FILLERS = _set("is was has do does should to be use with the turn message")

# whether a turn, or a record, is learnt: marks that say so by 1 or true, and those that say so by 0 or false
LEARNT = _set(
    "weight loss_weight train training trainable trained train_on loss compute_loss computes_loss calculate_loss "
    "calculates_loss calc_loss apply_loss include_loss in_loss loss_on include_in_loss learn learnt learned learnable "
    "supervise supervised"
)
UNLEARNT = _set(
    "mask masked mask_out masked_out mask_loss loss_masked no_loss skip_loss ignore_loss ignore_in_loss "
    "exclude_from_loss ignore ignored skip skipped exclude excluded no_train not_trained untrained untrainable "
    "unsupervised context_only"
)

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
# how a text says either
YES = _set("yes true good positive up thumb_up thumbs_up accepted correct like liked +1 👍")
NO = _set(
    "no false bad negative poor down thumb_down thumbs_down rejected incorrect wrong dislike disliked fail failed "
    "unhelpful invalid downvote downvoted -1 👎"
)
# a grade is no verdict, unless it is a word that says no
GRADES = _set("rating score quality grade outcome result status evaluation")

_PREFERENCE = "one of a preference pair, and ftray has no preference training yet: keep the good answer, as completion"
_WRONG_ANSWERS = "a bad answer, and ftray has no preference training yet: keep the good answer alone"
_MEDIA = "ftray reads text alone: leave out what needs more"
# words of which a key has one -> why a record is refused whose key holds a text, a list or an object
_ANSWERS: tuple[tuple[frozenset[str], str], ...] = (
    (
        _set(
            "chosen rejected reject preferred dispreferred unpreferred nonpreferred preference winner winning loser "
            "losing better worse worst"
        ),
        _PREFERENCE,
    ),
    (_set("negative negatives incorrect wrong bad undesirable distractor distractors"), _WRONG_ANSWERS),
)
_MEDIA_WORDS = _set(
    "image images img imgs picture pictures photo photos pixel pixels video videos audio audios wav waveform"
)
# of what is read by another name
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
    "rank weight loss batch fold seed provenance"
)
_LABELS = _set("label labels class classes target category categories stars rating sentiment intent emotion")


@lru_cache(maxsize=4096)
def words(key: object) -> tuple[str, ...]:
    """The words of a key, in small letters: of snake, kebab and camel case; digits at the end of one are left out."""
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
    """Whether 1 under this key says that a turn or record is learnt; None: the key says nothing of it."""
    name = _name(key)
    return True if name in LEARNT else False if name in UNLEARNT else None


def is_verdict(key: object) -> bool:
    """Whether a key says of an answer that it is a good or a bad one."""
    return _name(key) in GOOD | BAD


def says_bad(key: object, value: object) -> bool:
    """Whether `value`, a number, a boolean or a word, says under this key that an answer is a bad one.

    A share (`reward: 0.3`) says neither; nor does a text of more than a word, as a comment.
    """
    name = _name(key)
    good = name in GOOD
    if isinstance(value, bool | int | float):
        return value <= 0 if good else name in BAD and value >= 1
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
    return _MEDIA if _MEDIA_WORDS & {*own} and not about and not _is_number(value) else ""


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
    return (bool(_REASONS & {*own}) or "chain_of_thought" in "_".join(own)) and not about and not _is_number(value)


def is_about(key: object, value: object) -> bool:
    """Whether what stands under a key beside a lone text is about the record, rather than something to be learnt."""
    own = words(key)
    if own and (own[-1] in _ABOUT or own[0] in ("meta", "metadata")):
        return True
    return not _holds_text(value) and not (own and own[-1] in _LABELS and not isinstance(value, list))


def is_label(key: object) -> bool:
    """Whether a key names a class, by its words."""
    return bool(_LABELS & {*words(key)})


def _holds_text(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_text(inner) for inner in value.values())
    if isinstance(value, list | tuple):
        return any(_holds_text(inner) for inner in value)
    return isinstance(value, str) and not _is_number(value)
