"""ds_config.json -> validated, resolved settings. START READING at load.py, then auto.py.

::

    fields.py       the words a schema is written in: applied(), inert(), refused(), "auto", strict numbers
    schema*.py      one pydantic model per JSON object; schema.py holds the whole tree
    json_scan.py    JSON text -> values, and where each of them stands
    problems.py     one mistake, and how it is told
    paths.py        reading and writing by path, showing values
    renames.py      old spellings -> today's keys
    validate.py     a configuration against the schema, every mistake in words of our own
    load.py         file, dict, inline or base64 JSON -> LoadedConfig, or every mistake at once
    facts.py        what TrainingArguments and the model know, without importing transformers
    fill.py         "auto" and absent keys -> value and where it came from
    batch.py        the three batch sizes
    checks.py       what cannot be right together
    entries.py      every key -> value, origin, and what becomes of it in this run
    build.py        validated values -> EngineSettings
    auto.py         resolve(): all of the above -> ResolvedConfig
    resolved.py     ResolvedConfig and Entry
    settings.py     EngineSettings, the only thing the engine reads
    report.py       the dozen lines that are logged when a run starts
    json_schema.py  the schema for editors
    docs.py         the schema -> docs/config.md

Imports no torch, no transformers and no accelerate: a configuration can be checked in a fraction of a second.
"""
