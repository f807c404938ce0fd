"""The bodies of requests, as https://platform.openai.com/docs/api-reference defines them."""

import json
from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from ftray.config import COLDEST
from ftray.serving.generation_request import Sampling

Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Token = Annotated[int, Field(lt=2**31)]
BiasedToken = Annotated[int, Field(ge=0, lt=2**31)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Temperature = Annotated[float, Field(ge=0, le=2), AfterValidator(lambda value: value if value >= COLDEST else 0.0)]


def without_nulls(values: object) -> object:
    """A body without the keys whose value is null, which says nothing."""
    return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)


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
        return without_nulls(values)

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
        return without_nulls(values)

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
