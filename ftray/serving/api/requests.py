"""The bodies of requests, as https://platform.openai.com/docs/api-reference defines them, and what is refused."""

import json
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from ftray.config import COLDEST
from ftray.errors import first_error, near
from ftray.serving.errors import APIError, invalid
from ftray.serving.generation_request import Sampling

Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Token = Annotated[int, Field(lt=2**31)]
BiasedToken = Annotated[int, Field(ge=0, lt=2**31)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Temperature = Annotated[float, Field(ge=0, le=2), AfterValidator(lambda value: value if value >= COLDEST else 0.0)]

Body = TypeVar("Body", bound=BaseModel)


def _without_nulls(values: object) -> object:
    return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)


def _joined(content: object) -> object:
    """The text of content that comes in parts."""
    if not isinstance(content, list):
        return content
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else part
        if kind != "text" or not isinstance(part.get("text"), str) or len(part) > 2:
            raise ValueError(
                f"part {index} must be of type text, not {str(kind)[:40]!r}: the models here read text only"
            )
        texts.append(part["text"])
    return "".join(texts)


class StreamOptions(Model):
    include_usage: bool = False


class JSONSchema(Model):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    body: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Model):
    """Which answers are possible; those of a schema conform to it, whatever `strict` says."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_says_nothing(cls, values: object) -> object:
        return _without_nulls(values)

    @model_validator(mode="after")
    def _has_its_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema: goes with type json_schema, and with no other")
        return self

    @property
    def schema_text(self) -> str | None:
        """The schema as text; None: any text will do."""
        if self.type == "text":
            return None
        return json.dumps(self.json_schema.body if self.json_schema else {"type": "object"})


class GenerationParameters(Model):
    """What chat and plain completions share. One that isn't supported may have the value that changes nothing."""

    model: str = Field(max_length=200)
    temperature: Temperature = 1.0
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=16)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[Stop], Field(max_length=4)] | Stop | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: Annotated[dict[BiasedToken, Bias], Field(max_length=1024)] = {}
    response_format: ResponseFormat | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, values: object) -> object:
        return _without_nulls(values)

    @property
    def stops(self) -> tuple[str, ...]:
        """All stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self, logprobs: int | None, echo: bool = False) -> Sampling:
        """How tokens are chosen, and which log-probabilities come back."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop=self.stops,
            logprobs=logprobs,
            echo=echo,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias,
            schema=self.response_format.schema_text if self.response_format else None,
        )


class CompletionRequest(GenerationParameters):
    """POST /v1/completions"""

    prompt: Annotated[str, Field(strict=True)] | list[Token] | list[str] | list[list[Token]]
    max_tokens: int = Field(16, ge=0, lt=2**31)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    best_of: Literal[1] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """All prompts, as text or tokens."""
        return as_list(self.prompt)


class FunctionCall(Model):
    name: str = Field(min_length=1)
    arguments: str


class ToolCallGiven(Model):
    """A call that an earlier answer made."""

    id: str = Field(min_length=1)
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Model):
    """A turn. Clients send answers back as they came, with all that is null in them."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_joined)] | None = None
    name: str | None = None
    tool_calls: list[ToolCallGiven] = Field(default=[], max_length=128)
    tool_call_id: str | None = Field(None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _null_says_nothing(cls, values: object) -> object:
        return _without_nulls(values)

    @model_validator(mode="after")
    def _fits_its_role(self) -> "Message":
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls: a turn of role {self.role} can't hold calls")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError(
                "tool_call_id: a turn of role tool needs the id of the call that it answers, and no other turn"
            )
        if self.content is None and not self.tool_calls:
            raise ValueError("content: must be a text, or a list of text parts")
        return self

    @property
    def plain(self) -> dict[str, Any]:
        """What was given, with content as text."""
        return self.model_dump(exclude_unset=True) | {"content": self.content}


def _answering_calls(messages: list[Message]) -> list[Message]:
    made: set[str] = set()
    for index, message in enumerate(messages):
        made |= {call.id for call in message.tool_calls}
        if (answered := message.tool_call_id) is not None and answered not in made:
            raise ValueError(f"{index}.tool_call_id: no turn before made a call {answered[:80]!r}")
    return messages


class Function(BaseModel):
    """A tool's name and parameters; whatever else stands there is for the chat template."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.:/-]{1,128}$")
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    type: Literal["function"]
    function: Function


def _checked(tool: dict[str, Any]) -> dict[str, Any]:
    """The tool itself: the order of its keys is seen in the prompt."""
    try:
        Tool.model_validate(tool)
    except ValidationError as error:
        first = first_error(error)
        raise ValueError(f"{'.'.join(first.path)}: {first.reason}") from None
    return tool


class FunctionName(Model):
    name: str


class NamedTool(Model):
    """The one tool that the answer calls."""

    type: Literal["function"]
    function: FunctionName


class ChatCompletionRequest(GenerationParameters):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000), AfterValidator(_answering_calls)]
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Annotated[dict[str, Any], AfterValidator(_checked)]] = Field(default=[], max_length=128)
    tool_choice: Literal["auto", "none", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> "ChatCompletionRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @field_validator("tool_choice", mode="wrap")
    @classmethod
    def _one_of_the_tools(cls, given: object, check: ValidatorFunctionWrapHandler, info: ValidationInfo) -> object:
        try:
            choice = check(given)
        except ValidationError:
            raise ValueError("must be 'auto', 'none', 'required' or a tool of type function by its name") from None
        names = [tool["function"]["name"] for tool in info.data.get("tools", [])]
        if choice == "required" and not names:
            raise ValueError("'required', and there are no tools to call")
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise ValueError(f"there is no tool {choice.function.name[:80]!r}")
        return choice

    @model_validator(mode="after")
    def _a_form_leaves_no_room_for_calls(self) -> "ChatCompletionRequest":
        if self.offered and self.response_format and self.response_format.type != "text":
            raise ValueError("response_format: such an answer calls no tool: give tool_choice none, or no tools")
        return self

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools that the answer may call."""
        return [] if self.tool_choice == "none" else self.tools

    @property
    def must_call(self) -> tuple[str, ...]:
        """Names of the tools of which the answer calls one; empty: it may say what it likes."""
        if isinstance(self.tool_choice, NamedTool):
            return (self.tool_choice.function.name,)
        return tuple(tool["function"]["name"] for tool in self.tools) if self.tool_choice == "required" else ()

    @property
    def one_call(self) -> bool:
        """Whether an answer has no more than one call."""
        return not self.parallel_tool_calls or isinstance(self.tool_choice, NamedTool)


class EmbeddingRequest(Model):
    """POST /v1/embeddings"""

    model: str = Field(max_length=200)
    input: Annotated[str, Field(strict=True)] | list[Token] | list[str] | list[list[Token]]
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None

    @property
    def texts(self) -> list[str] | list[list[int]]:
        """All texts, as text or tokens."""
        return as_list(self.input)


class ClassificationRequest(Model):
    """POST /v1/classify, as vLLM defines it; `pair` holds the second text of each, for models that compare two."""

    model: str = Field(max_length=200)
    input: Annotated[str, Field(strict=True)] | list[str]
    pair: Annotated[str, Field(strict=True)] | list[str] | None = None
    user: str | None = None

    @property
    def texts(self) -> list[str]:
        """All texts."""
        return [self.input] if isinstance(self.input, str) else self.input

    @property
    def pairs(self) -> list[str] | None:
        """All second texts."""
        return [self.pair] if isinstance(self.pair, str) else self.pair


class AddAdapterRequest(Model):
    """POST /v1/adapters"""

    name: str
    source: str = Field(min_length=1, max_length=1000, pattern=r"^[^\x00]*$")  # no path holds NUL


def as_list(given: str | list[int] | list[str] | list[list[int]]) -> list[str] | list[list[int]]:
    """One text, or the token ids of one, as a list of one; a list of several as it is."""
    if isinstance(given, str):
        return [given]
    return cast("list[str] | list[list[int]]", [given] if not given or isinstance(given[0], int) else given)


def parse(kind: type[Body], body: bytes) -> Body:
    """The request in `body`, which is JSON.

    Raises:
        APIError: with status 400 and the field at fault.
    """
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise APIError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(values, dict):
        raise APIError(400, f"the body must be a JSON object, not {type(values).__name__}", code="invalid_json")
    _refuse_half_characters(values)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = first_error(error)
        path = ".".join(first.path)
        if first.unknown:
            meant = near(path, kind.model_fields, "") if len(first.path) == 1 else ""
            raise APIError(400, f"unsupported field {path!r}{meant}", path, "unsupported_field") from None
        field = first.path[0] if path else None
        raise invalid(f"{path}: {first.reason}" if path else first.reason, field) from None


def _refuse_half_characters(values: dict[str, Any]) -> None:
    r"""Refuse text such as "\ud83d": JSON lets half a surrogate pair through, and no tokenizer takes it."""
    for name, value in values.items():
        for part, field in ((name, None), (value, name)):
            try:
                json.dumps(part, ensure_ascii=False).encode()
            except (UnicodeEncodeError, RecursionError) as error:
                what = "half a surrogate pair" if isinstance(error, UnicodeEncodeError) else "too deep a nesting"
                raise invalid(f"{field or 'a field name'}: holds {what}", field) from None
