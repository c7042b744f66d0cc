"""Messages of a conversation, and how they become a prompt."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, model_validator

from deploy.ingress.openai.fields import as_content, as_template_kwargs, refuse
from deploy.ingress.openai.neutral import MESSAGE_NEUTRAL
from deploy.ingress.openai.strict import Strict
from deploy.ingress.openai.tools import Tool, as_tool_calls, as_tools


class Message(Strict):
    """One message of a conversation. Text parts of `content` are joined by newlines, as vLLM does."""

    NEUTRAL = MESSAGE_NEUTRAL

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(as_content, json_schema_input_type=str | list[dict[str, str]])] = (
        None
    )
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[
        tuple[dict[str, Any], ...], PlainValidator(as_tool_calls, json_schema_input_type=list[dict[str, Any]])
    ] = ()
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _fields_fit_the_role(self) -> "Message":
        if self.content is None and not self.tool_calls:
            raise refuse("content", f"content is required in a message of role {self.role!r}", "missing")
        if self.tool_calls and self.role != "assistant":
            raise refuse(
                "tool_calls", f"tool_calls can't be sent with role {self.role!r}: only 'assistant' calls tools"
            )
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise refuse("tool_call_id", "tool_call_id belongs to messages of role 'tool', and to each of them")
        return self

    def for_template(self) -> dict[str, Any]:
        # Templates know no "developer": it is OpenAI's newer name of "system". Not all know content that is not there.
        shown: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        shown["content"] = self.content or ""
        if self.tool_calls:
            shown["tool_calls"] = self.tool_calls
        more = {"name": self.name, "tool_call_id": self.tool_call_id, "reasoning_content": self.reasoning_content}
        return shown | {key: value for key, value in more.items() if value is not None}


# The first bad one is told: thousands of them would be thousands of errors.
Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


class ChatFields(Strict):
    """How messages become a prompt; the same for a chat completion and for /tokenize."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: Annotated[
        dict[str, Any], PlainValidator(as_template_kwargs, json_schema_input_type=dict[str, Any])
    ] = Field(default_factory=dict)
    tools: Annotated[tuple[Tool, ...], PlainValidator(as_tools, json_schema_input_type=list[dict[str, Any]])] = ()

    @model_validator(mode="after")
    def _one_continuation(self) -> "ChatFields":
        if self.continue_final_message and self.add_generation_prompt:
            raise refuse(
                "continue_final_message", "continue_final_message=true needs add_generation_prompt=false beside it"
            )
        return self
