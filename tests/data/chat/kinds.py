"""Small chat templates, each with one peculiarity of published templates."""

# ruff: noqa: E501 - a line break would change a template
from tests.data.chat.documents import tokenizer_with
from tests.data.chat.matrix import tokenizer as family_tokenizer

# Channels in the header; turns end with <|end|>, the last one with <|return|>, calls with <|call|>.
# Reasoning is written in the last turn only. A result repeats the name of its call.
CHANNELS = """
{%- if tools %}<|start|>developer<|message|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|end|>{% endif %}
{%- set ns = namespace(name='') %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- if m.thinking and (loop.last or m.tool_calls) %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}
{%- if m.tool_calls %}
{%- set call = m.tool_calls[0].function %}
{%- set ns.name = call.name %}
{{- '<|start|>assistant<|channel|>commentary to=functions.' ~ call.name ~ '<|message|>' ~ call.arguments | tojson ~ '<|call|>' }}
{%- else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}
{%- endif %}
{%- elif m.role == 'tool' %}<|start|>functions.{{ ns.name }} to=assistant<|channel|>commentary<|message|>{{ m.content }}<|end|>
{%- else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}
"""
# The token of the next role ends a turn. Each argument of a call is written separately.
NEXT_ROLE = """<sop>
{%- if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}<|assistant|>
{%- if m.reasoning_content %}<think>{{ m.reasoning_content.strip() }}</think>{% else %}<think></think>{% endif %}
{{- m.content.strip() }}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }}
{%- for key, value in call.function.arguments.items() %}
<arg_key>{{ key }}</arg_key>
<arg_value>{{ value if value is string else value | tojson }}</arg_value>
{%- endfor %}</tool_call>{% endfor %}
{%- elif m.role == 'tool' %}<|observation|><tool_response>{{ m.content }}</tool_response>
{%- else %}<|{{ m.role }}|>{{ m.content }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}
"""
# Arguments are concatenated with text (`+`). Calls are written only if the content is none.
JOINED = """{{ bos_token }}
{%- for m in messages %}
{%- if m.role == 'user' or m.role == 'system' %}<|User|>{{ m.content }}
{%- elif m.role == 'tool' %}<|output|>{{ m.content }}
{%- elif m.content is none %}<|Assistant|>
{%- for call in m.tool_calls %}{{ '<call>' + call.type + '<sep>' + call['function']['name'] + '\n' + call['function']['arguments'] + '</call>' }}{% endfor %}{{ eos_token }}
{%- else %}<|Assistant|>{{ m.content }}{{ eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|Assistant|>{% endif %}
"""
# The name of a call is written as part of its id only.
NAMED_IDS = """
{%- for m in messages %}
{%- if m.role == 'tool' %}<|im_tool|>## Return of {{ m.tool_call_id }}
{{ m.content }}<|im_end|>
{%- else %}<|im_{{ m.role }}|>{{ m.content or '' }}
{%- for call in m.tool_calls or [] %}<|call|>{{ call.id }}<|argument|>
{%- if call.function.arguments is string %}{{ call.function.arguments }}{% else %}{{ call.function.arguments | tojson }}{% endif %}<|end_call|>
{%- endfor %}<|im_end|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_assistant|>{% endif %}
"""
# Each turn has two {% generation %} blocks.
TWO_BLOCKS = """{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant
{% generation %}{{ m.content }}{% endgeneration %}{% generation %}<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}{% endfor %}"""

# Kind -> its template, special tokens without a name, and named special tokens.
_TOKENS = {
    "channels": (
        CHANNELS,
        ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>"],
        {"eos_token": "<|return|>"},
    ),
    "next-role": (
        NEXT_ROLE,
        ["<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"],
        {"eos_token": "<|endoftext|>"},
    ),
    "joined": (
        JOINED,
        ["<|User|>", "<|Assistant|>", "<|output|>"],
        {"bos_token": "<s>", "eos_token": "</s>"},
    ),
    "named-ids": (
        NAMED_IDS,
        ["<|im_user|>", "<|im_assistant|>", "<|im_tool|>", "<|call|>", "<|argument|>"],
        {},
    ),
    "two-blocks": (TWO_BLOCKS, [], {}),
}
KINDS = sorted(_TOKENS)


def kind_tokenizer(name):
    """A tokenizer with the template of a kind."""
    template, others, named = _TOKENS[name]
    return tokenizer_with(template, others, **named)


def tokenizer_of(name):
    """A tokenizer with the template of a kind, or of a family of tests/templates."""
    return kind_tokenizer(name) if name in KINDS else family_tokenizer(name)
