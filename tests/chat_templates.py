"""Chat templates in the forms in which checkpoints bring them, in words of this project's own."""

FUNCTIONS = (
    "{%- for tool in tools %}{%- set function = tool.function if tool.get('function') else tool %}"
    "\n\n## {{ function.name }}\n\n{{ function | tojson(indent=4, ensure_ascii=False) }}\n"
    "Answer with JSON.{%- endfor %}"
)
SYSTEM_FIRST = (
    "{%- for message in messages %}{%- if message.role == 'system' %}<|system|>\n"
    "{{ message.content }}{%- endif %}{%- endfor %}"
    "{%- for message in messages if message.role != 'system' %}"
    "{%- set role = message['role'] %}{%- set content = message['content'] %}"
)
SAID = (
    "{%- set meta = message.get('metadata', '') %}"
    "{%- if role == 'user' %}<|user|>\n{{ visible }}"
    "{%- elif role == 'assistant' and not meta %}<|assistant|>\n{{ visible }}"
    "{%- elif role == 'assistant' and meta %}<|assistant|>{{ meta }} \n{{ visible }}"
    "{%- elif role == 'observation' %}<|observation|>\n{{ visible }}{%- endif %}{%- endfor %}"
)
VISIBLE = "{%- set visible = content.split('</think>')[-1].strip() %}"
HEAD = "[gMASK]<sop>{%- if tools -%}<|system|>\nYou have tools.\n\n# Tools" + FUNCTIONS
HEAD += "{%- endif -%}"

#: What the families write by themselves.
KNOWN = {
    "v3": (
        "{% for message in messages %}{% if loop.first %}[gMASK]sop<|{{ message['role'] }}|>\n "
        "{{ message['content'] }}{% else %}<|{{ message['role'] }}|>\n {{ message['content'] }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "g4": (
        "[gMASK]<sop>{% for item in messages %}{% if item['tools'] is defined %}<|system|>\n"
        "You have tools.\n\n# Tools{% set tools = item['tools'] %}{% for tool in tools %}"
        "{% if tool['type'] == 'function' %}\n\n## {{ tool['function']['name'] }}\n\n"
        "{{ tool['function'] | tojson(indent=4) }}\nAnswer with JSON.{% endif %}{% endfor %}"
        "{% endif %}{% if item['content'] %}<|{{ item['role'] }}|>{{ item['metadata'] }}\n"
        "{{ item['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "0414": HEAD
    + SYSTEM_FIRST
    + "{%- set visible = content %}"
    + SAID
    + "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "z1": HEAD
    + SYSTEM_FIRST
    + VISIBLE
    + SAID
    + "{% if add_generation_prompt %}<|assistant|>\n<think>{% endif %}",
    "rumination": '[gMASK]<sop><|system|>\nYou search.\n\n<tools>\n[{"name": "search"}]\n'
    + SYSTEM_FIRST.partition("{%- endfor %}")[2]
    + VISIBLE
    + SAID
    + "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "edge": (
        "{% for item in messages %}{% if item['role'] == 'system' %}<|system|>\n"
        "{{ item['content'] }}{% elif item['role'] == 'user' %}<|user|>\n{{ item['content'] }}"
        "{% elif item['role'] == 'assistant' %}<|assistant|>\n{{ item['content'] }}{% endif %}"
        "{% endfor %}<|assistant|>"
    ),
}
KNOWN["hf"] = KNOWN["g4"]

#: What no family writes.
OTHERS = {
    "a system text where there is none": (
        "{%- if messages[0].role != 'system' %}{{ '<|system|>\n天气 bot' }}{% endif %}"
        "{%- for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "an end behind each answer": (
        "[gMASK]<sop>{% for message in messages %}{% if loop.index0 == 0 and message.role == "
        "'system' %}{{ '<|system|>' ~ message.content }}{% continue %}{% endif %}"
        "{{ '<|' + message.role + '|>' + message.content }}"
        "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ),
    "thoughts to be switched off": (
        "[gMASK]<sop>{% macro text(c) %}{{ c if c is string else c | map(attribute='text') | "
        "join('') }}{% endmacro %}{% set ns = namespace(last=-1) %}{% for m in messages %}"
        "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'user' %}<|user|>\n{{ text(m.content) }}"
        "{{ '/nothink' if enable_thinking is defined and not enable_thinking }}"
        "{% elif m.role == 'assistant' %}<|assistant|>\n"
        "{% set thought = m.reasoning_content | default('', true) %}"
        "{% if thought and loop.index0 > ns.last %}<think>{{ thought }}</think>\n"
        "{% else %}<think></think>\n{% endif %}{{ text(m.content).split('</think>')[-1].strip() }}"
        "{% elif m.role == 'tool' %}{% if messages[loop.index0 - 1].role != 'tool' %}"
        "<|observation|>{% endif %}\n<tool_response>\n{{ m.content }}\n</tool_response>"
        "{% else %}<|system|>\n{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>"
        "{{ '\n<think></think>' if enable_thinking is defined and not enable_thinking }}{% endif %}"
    ),
    "thoughts opened by the prompt": (
        "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% endgeneration %}{% else %}"
        "{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n<think>\n{% endif %}"
    ),
    "tools in JSON and a date": (
        "{{- '<|system|>\n' }}{% if tools %}{{- 'Tools:\n' }}{% for t in tools %}"
        "{{- t | tojson }}{{- '\n' }}{% endfor %}{% endif %}{{- 'Year ' + strftime_now('%Y') }}"
        "{% for m in messages %}{% if m.role not in ['user', 'assistant', 'system'] %}"
        "{{ raise_exception('unknown role ' + m.role) }}{% endif %}\n"
        "<|{{ m.role }}|>\n{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.arguments | tojson(indent=2) }}{% endfor %}{% endfor %}"
        "{%- if add_generation_prompt %}\n<|assistant|>\n{% endif %}"
    ),
}
