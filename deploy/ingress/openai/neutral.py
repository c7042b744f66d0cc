"""Request fields that OpenAI or vLLM know and Outcrop does not, with the values of each that ask for nothing.

Such a value (`tools: []`) is accepted, so that clients which always send the field work; any other is refused as
unsupported, never ignored. null always counts as absent.
"""

from typing import Any

Neutral = dict[str, tuple[Any, ...]]

ENGINE_NEUTRAL: Neutral = {
    "service_tier": ("auto", "default"),
    "store": (False,),
    "metadata": ({},),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "moderation": (),
    "safety_identifier": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "use_beam_search": (False,),
    "length_penalty": (1.0, 1),
    "early_stopping": (False,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "logits_processors": (),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "priority": (0,),
    "request_id": (),
    "cache_salt": (),
    "kv_transfer_params": (),
    "vllm_xargs": ({},),
}

COMPLETION_NEUTRAL: Neutral = {"suffix": ("",), "add_special_tokens": (True,)}

EMBEDDING_NEUTRAL: Neutral = {"add_special_tokens": (True,), "truncate_prompt_tokens": (), "priority": (0,)}

RESPONSES_NEUTRAL: Neutral = {
    "previous_response_id": (),
    "conversation": (),
    "background": (False,),
    "prompt": (),
    "include": ([],),
    "max_tool_calls": (),
    "moderation": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning": ({}, {"effort": None}, {"effort": "none"}, {"effort": None, "summary": None}),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "stream_options": ({}, {"include_obfuscation": False}),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}

TEMPLATE_NEUTRAL: Neutral = {
    "documents": ([],),
    "chat_template": (),
}

CHAT_NEUTRAL: Neutral = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "add_special_tokens": (False,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "echo": (False,),
    "best_of": (1,),
}

MESSAGE_NEUTRAL: Neutral = {
    "function_call": (),
    "refusal": (),
    "audio": (),
    "annotations": ([],),
}
