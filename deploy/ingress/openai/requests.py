"""What clients may ask: strict pydantic models of the request bodies.

A value of the wrong type is refused, never converted. A field that is not here is refused by name; null counts as
absent. What OpenAI or vLLM know and Outcrop does not is listed in neutral.py; what depends on the model or on the
server's limits is checked in sampling.py. The file is long because every field of every endpoint stands in it.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator, model_validator

from cluster.messages.requests import PromptEmbeds
from deploy.ingress.openai.embeds import as_prompt_embeds
from deploy.ingress.openai.fields import (
    as_logit_bias,
    as_prompts,
    as_stop,
    as_stop_token_ids,
    as_token_ids,
    refuse,
)
from deploy.ingress.openai.messages import ChatFields, Messages
from deploy.ingress.openai.neutral import (
    CHAT_NEUTRAL,
    COMPLETION_NEUTRAL,
    EMBEDDING_NEUTRAL,
    ENGINE_NEUTRAL,
    TEMPLATE_NEUTRAL,
    Neutral,
)
from deploy.ingress.openai.strict import Strict
from deploy.ingress.openai.structured import (
    AskedFormat,
    ResponseFormat,
    StructuredOutputs,
    as_response_format,
    as_structured_outputs,
)
from deploy.ingress.openai.tools import ANY_OBJECT, ToolChoice, as_tool_choice

INT64_MAX = 2**63 - 1

Prompt = str | list[str] | list[int] | list[list[int]]


class StreamOptions(Strict):
    NEUTRAL: ClassVar[Neutral] = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}

    include_usage: bool = False


class GenerationFields(Strict):
    """What completions and chat completions share. Bounds that OpenAI leaves open keep the arithmetic finite."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=0)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-INT64_MAX - 1, le=INT64_MAX)
    n: int = Field(1, ge=1)
    stop: Annotated[tuple[str, ...], PlainValidator(as_stop, json_schema_input_type=str | list[str])] = ()
    stop_token_ids: Annotated[list[int], PlainValidator(as_stop_token_ids, json_schema_input_type=list[int])] = Field(
        default_factory=list
    )
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0)
    skip_special_tokens: bool = True
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    logit_bias: Annotated[dict[int, float], PlainValidator(as_logit_bias, json_schema_input_type=dict[str, float])] = (
        Field(default_factory=dict)
    )
    prompt_logprobs: int | None = Field(None, ge=0)
    response_format: Annotated[
        AskedFormat | None, PlainValidator(as_response_format, json_schema_input_type=ResponseFormat)
    ] = None
    structured_outputs: Annotated[
        AskedFormat | None, PlainValidator(as_structured_outputs, json_schema_input_type=StructuredOutputs)
    ] = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    return_token_ids: bool = False
    return_routed_experts: bool = False

    @model_validator(mode="after")
    def _stream_fields_fit(self) -> "GenerationFields":
        if self.stream_options is not None and not self.stream:
            raise refuse("stream_options", "stream_options is only allowed with stream=true")
        if self.prompt_logprobs is not None and self.stream:
            raise refuse("prompt_logprobs", "prompt_logprobs is not available with stream=true: leave one out")
        return self

    @model_validator(mode="after")
    def _format_fits(self) -> "GenerationFields":
        if self.response_format and self.structured_outputs:
            raise refuse("structured_outputs", "structured_outputs can't be sent together with response_format")
        if asked := self.asked_format:
            _refuse_beside(self, asked.param)
        return self

    @property
    def asked_format(self) -> AskedFormat | None:
        """What the answer is to look like."""
        return self.response_format or self.structured_outputs

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


def _refuse_beside(fields: GenerationFields, param: str) -> None:
    """A grammar decides where the text ends."""
    if fields.ignore_eos:
        raise refuse("ignore_eos", f"ignore_eos=true can't be used with {param}: leave one out")
    if fields.min_tokens:
        raise refuse("min_tokens", f"min_tokens={fields.min_tokens} can't be used with {param}: leave one out")


class CompletionRequest(GenerationFields):
    NEUTRAL = ENGINE_NEUTRAL | COMPLETION_NEUTRAL

    prompt: Annotated[list[str] | list[list[int]], PlainValidator(as_prompts, json_schema_input_type=Prompt)] = Field(
        default_factory=list
    )
    prompt_embeds: Annotated[
        list[PromptEmbeds], PlainValidator(as_prompt_embeds, json_schema_input_type=str | list[str])
    ] = Field(default_factory=list)
    best_of: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0)
    echo: bool = False

    @model_validator(mode="after")
    def _prompt_or_embeds(self) -> "CompletionRequest":
        if not self.prompt and not self.prompt_embeds:
            raise refuse("prompt", "prompt is required", "missing")
        if self.prompt and self.prompt_embeds:
            raise refuse("prompt_embeds", "prompt_embeds can't be sent together with prompt: send one")
        if self.prompt_embeds and self.n > 1:  # each choice takes the tensor along
            raise refuse("n", f"n={self.n} can't be used with prompt_embeds: send a request for each choice")
        for field in ("echo", "prompt_logprobs"):
            if self.prompt_embeds and getattr(self, field) not in (None, False):
                raise refuse(field, f"{field} can't be used with prompt_embeds: there are no tokens to report")
        return self

    @model_validator(mode="after")
    def _best_of_is_n(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n):
            raise refuse("best_of", f"best_of={self.best_of} is not supported: leave it out", "unsupported")
        return self

    @property
    def num_choices(self) -> int:
        return self.n * (len(self.prompt) + len(self.prompt_embeds))

    @property
    def prompt_token_ids(self) -> list[list[int]]:
        """Prompts that came as token ids."""
        return [prompt for prompt in self.prompt if not isinstance(prompt, str)]

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report per token (0: only the token itself), None for no log-probabilities."""
        return self.logprobs

    @property
    def is_echo(self) -> bool:
        return self.echo


class ChatCompletionRequest(GenerationFields, ChatFields):
    NEUTRAL = ENGINE_NEUTRAL | TEMPLATE_NEUTRAL | CHAT_NEUTRAL

    messages: Messages
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0)
    include_reasoning: bool = True
    tool_choice: Annotated[ToolChoice, PlainValidator(as_tool_choice, json_schema_input_type=str | dict[str, Any])] = (
        ToolChoice("auto")
    )
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _tools_agree(self) -> "ChatCompletionRequest":
        choice, names = self.tool_choice, [tool.name for tool in self.tools]
        if choice.mode == "required" and not names:
            raise refuse("tool_choice", "tool_choice needs tools beside it")
        if choice.name is not None and choice.name not in names:
            raise refuse("tool_choice", f"tool_choice names {choice.name!r}, which is not among the tools")
        if asked := self.asked_calls:
            _refuse_beside(self, asked.param)
            if (asked_format := self.asked_format) and asked_format.kind != "json":
                raise refuse(asked_format.param, f"{asked_format.param} beside tools can only be a JSON schema")
        return self

    @property
    def may_call(self) -> bool:
        return bool(self.tools) and self.tool_choice.mode != "none"

    @property
    def shown_tools(self) -> list[dict[str, Any]]:
        """What the template gets: a model that may not call is not told of tools."""
        return [tool.shown for tool in self.tools] if self.may_call else []

    @property
    def most_calls(self) -> int | None:
        return None if self.parallel_tool_calls and self.tool_choice.name is None else 1

    @property
    def asked_calls(self) -> AskedFormat | None:
        """The calls that the answer must have, or keeps to once it calls; without the marks of the model's form."""
        must_call = self.tool_choice.mode == "required"
        if not self.may_call or not (must_call or self.asked_format or any(tool.is_strict for tool in self.tools)):
            return None
        tools = [
            {"name": tool.name, "schema": tool.parameters if must_call or tool.is_strict else ANY_OBJECT}
            for tool in self.tools
            if self.tool_choice.name in (None, tool.name)
        ]
        content = self.asked_format.value if self.asked_format and not must_call else None
        may_talk = not must_call and content is None
        value = {"tools": tools, "may_talk": may_talk, "most": self.most_calls, "content": content}
        return AskedFormat("tools", "tools", value)

    @model_validator(mode="after")
    def _fields_agree(self) -> "ChatCompletionRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise refuse("top_logprobs", f"top_logprobs={self.top_logprobs} needs logprobs=true beside it")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            both = f"max_tokens={self.max_tokens} and max_completion_tokens={self.max_completion_tokens}"
            raise refuse("max_tokens", f"{both} contradict each other: send one of them")
        return self

    @property
    def num_choices(self) -> int:
        return self.n

    @property
    def prompt_token_ids(self) -> list[list[int]]:
        return []

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def is_echo(self) -> bool:
        return False


class TokenizeRequest(ChatFields):
    """POST /tokenize as vLLM: a prompt (special tokens added) or messages (template, none added)."""

    NEUTRAL = TEMPLATE_NEUTRAL

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _prompt_or_messages(self) -> "TokenizeRequest":
        if self.prompt is None and self.messages is None:
            raise refuse("prompt", "prompt is required (or messages)", "missing")
        if self.prompt is not None and self.messages is not None:
            raise refuse("messages", "messages can't be sent together with prompt: send one")
        return self


class EmbeddingRequest(Strict):
    """POST /v1/embeddings as OpenAI, and `pooling` of a model that was trained to write."""

    NEUTRAL = EMBEDDING_NEUTRAL

    model: str | None = None
    input: Annotated[list[str] | list[list[int]], PlainValidator(as_prompts, json_schema_input_type=Prompt)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    pooling: Literal["last", "mean"] = "last"
    normalize: bool = True
    user: str | None = None


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: Annotated[list[int], PlainValidator(as_token_ids, json_schema_input_type=list[int])]
