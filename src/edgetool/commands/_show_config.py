"""`--show-config`: the resolved configuration as TOML that `--config` reads back, or as a JSON document."""

from __future__ import annotations

import json
from typing import Any

from edgetool.config import SECTIONS, Config, key_of
from edgetool.console import Output


def show_config(config: Config, command: str, output: Output) -> None:
    """Print `common`, the section of `command` and those that it uses, with origins; secrets are masked."""
    names = ["common", command, *SECTIONS[command].uses] if command in SECTIONS else ["common"]
    sections = {name: _values(config, name) for name in names}
    if output.json:
        wanted = tuple(f"{name}." for name in names)
        origins = {key: origin for key, origin in config.origins.items() if key.startswith(wanted)}
        output.schema = "edgetool.config/1"
        output.result({"config": sections, "origins": origins}, [])
        return
    lines = []
    for name, values in sections.items():
        fields = SECTIONS[name].model_fields.items()
        secrets = {key_of(*item) for item in fields if "Secret" in str(item[1].annotation)}
        lines.append(f"[{name}]")
        for key, value in values.items():
            origin = config.origins.get(f"{name}.{key}", "default")
            # A mask or an unset value must not come back through --config, so they are shown as comments.
            missing = value is None or (origin == "default" and key in SECTIONS[name].required)
            usable = not missing and key not in secrets
            shown = "(not set)" if missing else _toml(value)
            lines.append(f"{'' if usable else '# '}{key} = {shown}  # {origin}")
        lines.append("")
    output.text("\n".join(lines))


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)


def _values(config: Config, name: str) -> dict[str, Any]:
    section = getattr(config, name)
    dumped = section.model_dump(mode="json")
    return {key_of(*item): dumped[item[0]] for item in type(section).model_fields.items()}
