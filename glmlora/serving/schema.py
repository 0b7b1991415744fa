"""What callers send: OpenAI's requests with the fields that are served, and `/v1/classify`.

A field that is not here is refused by name. Bounds are checked here, so the description in
`/openapi.json` tells them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, StrictStr


def _whole(value: Any) -> Any:
    """1.0, which JSON has for 1, too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Text = StrictStr
FROM_FLOAT = BeforeValidator(_whole)
Whole = Annotated[StrictInt, FROM_FLOAT]
Seed = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63), FROM_FLOAT]
Count = Annotated[int, Field(strict=True, ge=1, le=1 << 20), FROM_FLOAT]


class Body(BaseModel):
    """Base of all: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")


class TextPart(Body):
    """A part of a content; images, sound and files are not served."""

    type: Literal["text"]
    text: Text


Content = Text | list[TextPart]


class CalledFunction(Body):
    """A function's name and its arguments as JSON."""

    name: Text
    arguments: Text


class ToolCall(Body):
    """A call that the model made in an earlier turn."""

    id: Text | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class SystemMessage(Body):
    """What the model is to be."""

    role: Literal["system", "developer"]
    content: Content
    name: Text | None = None


class UserMessage(Body):
    """What the user says."""

    role: Literal["user"]
    content: Content
    name: Text | None = None


class AssistantMessage(Body):
    """What the model said; `reasoning_content` is in no later prompt."""

    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: Text | None = None
    refusal: None = None
    name: Text | None = None


class ToolMessage(Body):
    """What a tool returned."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Text | None = None


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class Function(Body):
    """A function that the model may call."""

    name: Annotated[str, Field(strict=True, pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class Tool(Body):
    """A tool; only functions are served."""

    type: Literal["function"]
    function: Function


class StreamOptions(Body):
    """include_usage: a last chunk that counts tokens."""

    include_usage: StrictBool = False


class JsonSchema(Body):
    """A JSON schema that the answer follows."""

    name: Text = "answer"
    description: Text | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: StrictBool | None = None


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Body):
    """A JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Body):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


Format = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]
Stop = Annotated[str, Field(strict=True, min_length=1, max_length=256)]


class Sampling(Body):
    """What chat and completions have in common. What is not given is as in `model.chat`."""

    model: Text
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(strict=True, ge=1, le=8), FROM_FLOAT] = 1
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: Seed | None = None
    user: Text | None = Field(None, description="Accepted; means nothing.")
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    top_k: Annotated[int, Field(strict=True, ge=0, le=1 << 20), FROM_FLOAT] | None = Field(
        None, description="Not OpenAI's: keep so many of the best tokens; 0: all."
    )
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = Field(None, description="Not OpenAI's.")
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=10)] | None = Field(
        None, description="Not OpenAI's: over prompt and answer."
    )
    guided_choice: (
        Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=256)]
        | None
    ) = Field(None, description="Not OpenAI's: the answer is one of these.")
    response_format: Format | None = None

    @property
    def stops(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: StrictBool | None = Field(None, description="Accepted; means nothing.")
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=20), FROM_FLOAT] | None = None
    metadata: dict[str, str] | None = Field(None, description="Accepted; means nothing.")
    store: Literal[False] | None = None

    @property
    def limit(self) -> int | None:
        """New tokens allowed, where the caller says."""
        given = self.max_completion_tokens
        return self.max_tokens if given is None else given


class CompletionRequest(Sampling):
    """`POST /v1/completions`: a text goes on; prompts may be ids."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=64)]
        | Annotated[list[Whole], Field(min_length=1)]
    )
    logprobs: Annotated[int, Field(strict=True, ge=0, le=5), FROM_FLOAT] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    @property
    def limit(self) -> int:
        """New tokens allowed; OpenAI's default."""
        return 16 if self.max_tokens is None else self.max_tokens


class ClassifyRequest(Body):
    """`POST /v1/classify`: the probability of each label as the answer to each input.

    input: texts, or conversations as lists of messages. labels: those that the adapter was trained
    for, where none are given.
    """

    model: Text
    input: Annotated[
        list[Text | Annotated[list[Message], Field(min_length=1)]],
        Field(min_length=1, max_length=1024),
    ]
    labels: Annotated[list[Text | Whole], Field(min_length=1, max_length=256)] | None = None


# What callers get


class Problem(BaseModel):
    """An error in OpenAI's form."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Failure(BaseModel):
    """The body of every response that is no success."""

    error: Problem


class ModelCard(BaseModel):
    """A model that can be asked: the base, or an adapter over it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "glmlora"
    parent: str | None = Field(None, description="The base, of an adapter.")
    adapters: list[str] = Field([], description="Of the base.")
    max_model_len: int = Field(description="Tokens of a prompt and its answer.")
    labels: list[str] | None = Field(None, description="The answers it was trained for.")
    template: str | None = Field(None, description="The question it was trained for.")


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] | None = Field(
        None, description="cached_tokens: those that were not computed again."
    )


class Classified(BaseModel):
    """What a model thinks of one input; probabilities are those of the labels, in their order."""

    index: int
    label: str
    probabilities: dict[str, float]
    log_probs: dict[str, float] = Field(
        description="Of each whole answer, not scaled to add up to 1; in nats."
    )


class ClassifyResponse(BaseModel):
    """`POST /v1/classify`."""

    object: Literal["list"] = "list"
    model: str
    labels: list[str]
    data: list[Classified]
    usage: Usage


class Health(BaseModel):
    """`GET /health`."""

    status: Literal["ok", "draining", "failed"]
    running: int
    waiting: int
