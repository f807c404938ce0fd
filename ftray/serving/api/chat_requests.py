"""The body of a request for a chat completion: turns, tools and which of them are called."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from ftray.errors import first_error
from ftray.serving.api.requests import GenerationParameters, Model, without_nulls


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
        return without_nulls(values)

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
