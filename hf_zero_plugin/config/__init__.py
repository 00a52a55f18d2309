"""ds_config.json -> validated, resolved settings. START READING at load.py.

::

    fields.py     the words a schema is written in: applied(), inert(), refused(), "auto", strict numbers
    schema*.py    one pydantic model per JSON object; schema.py holds the whole tree
    json_scan.py  JSON text -> values, and where each of them stands
    problems.py   one mistake of the user's, and how it is told
    load.py       file, dict, inline or base64 JSON -> LoadedConfig, or every mistake at once
    facts.py      what TrainingArguments and the model know, without importing transformers
    fill.py       "auto" and absent keys -> value and where it came from
    checks.py     what cannot be right together
    auto.py       resolve(): the above -> ResolvedConfig
    settings.py   EngineSettings, the only thing the engine reads
    report.py     entries -> text
    docs.py       the schema -> docs/config.md

Imports no torch.distributed, no transformers and no accelerate; a configuration can be checked without a GPU.
"""
