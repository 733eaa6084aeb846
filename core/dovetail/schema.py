"""The JSON Schema of the config, the options of the installed plugins included."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias

from dovetail._markers import HOOKS, HookName
from dovetail.config import AUTO, OFF, TrainingConfig
from dovetail.errors import DovetailError
from dovetail.registry import PluginInfo, Registry, default_registry

Schema: TypeAlias = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"

_QUALIFIED_NAME = {
    "type": "string",
    "pattern": r"^[A-Za-z0-9][A-Za-z0-9._-]*:.+$",
    "description": "Backend of one distribution: distribution:name.",
}
_WORDS: dict[str, tuple[str, ...]] = {"compile": (OFF,), "collate": (AUTO,)}
"""Values of `use` that are no backend."""


def build_schema(registry: Registry | None = None) -> Schema:
    """Return the JSON Schema of a config, for editors and checkers.

    `use` of every hook takes the installed backends' names, and each backend has a table with its
    options. A plugin that does not load keeps a table that is not checked, with the reason.

    Args:
        registry: Where backends come from; the process's own without it.
    """
    registry = registry or default_registry()
    schema = TrainingConfig.model_json_schema()
    definitions: Schema = schema["$defs"]
    for field in schema["properties"].values():
        section = definitions[field["$ref"].rpartition("/")[2]]
        field["description"] = section["description"]
        # The whole table of defaults says nothing that its fields do not say.
        field.pop("default", None)
    for hook in HOOKS:
        section = definitions[schema["properties"][hook]["$ref"].rpartition("/")[2]]
        _complete_section(section, hook, registry, definitions)
    wrappers = definitions["RunConfig"]["properties"]["plugins"]
    wrappers["items"] = _name_schema([p.name for p in registry.list_plugins("wrap")])
    # Editors look for it in a JSON config; in TOML it is a comment.
    schema["properties"]["$schema"] = {"type": "string", "description": "Path of this schema."}
    return {"$schema": DIALECT, **schema, "title": "Config of a dovetail run"}


def _complete_section(
    section: Schema, hook: HookName, registry: Registry, definitions: Schema
) -> None:
    """Put the installed backends of a hook into its section."""
    properties: Schema = section["properties"]
    properties.pop("options")
    plugins = [p for p in registry.list_plugins(hook) if not p.is_reserved]
    names = list(dict.fromkeys(p.name for p in plugins))
    use = properties["use"]
    name = _name_schema([*_WORDS.get(hook, ()), *names])
    many = use.pop("type") == "array"
    use.pop("items", None)
    use["anyOf"] = (
        [name, {"type": "array", "items": copy.deepcopy(name)}] if many else name["anyOf"]
    )
    unchecked: list[str] = []
    for backend in names:
        offers = [p for p in plugins if p.name == backend]
        tables = [_options_schema(p, hook, registry, definitions) for p in offers]
        unchecked += [text for table in tables if (text := table.get("$comment"))]
        properties[backend] = tables[0] if len(tables) == 1 else {"anyOf": tables}
    section["additionalProperties"] = False
    if unchecked:
        section["description"] += f" Not checked: {'; '.join(unchecked)}"


def _name_schema(names: Sequence[str]) -> Schema:
    listed = [{"enum": list(dict.fromkeys(names))}] if names else []
    return {"anyOf": [*listed, dict(_QUALIFIED_NAME)]}


def _options_schema(
    info: PluginInfo, hook: HookName, registry: Registry, definitions: Schema
) -> Schema:
    """Return a reference to the schema of a backend's options, which joins the definitions."""
    try:
        backend = registry.load(hook, f"{info.distribution}:{info.name}")
        # Two plugins may have a nested model of the same name.
        prefix = f"{hook}.{info.distribution}.{info.name}."
        with warnings.catch_warnings():
            # A default that JSON cannot hold is left out of the schema; that is all.
            warnings.simplefilter("ignore")
            options = backend.options_model(hook).model_json_schema(
                ref_template=f"#/$defs/{prefix}{{model}}"
            )
    except DovetailError as err:
        return _unchecked(info, str(err))
    except Exception as err:
        reason = f"{info.where}: its options have no JSON Schema: {type(err).__name__}: {err}"
        return _unchecked(info, reason)
    for name, inner in options.pop("$defs", {}).items():
        definitions[f"{prefix}{name}"] = inner
    summary = backend.summary or f"Options of {info.where}."
    definitions[f"{prefix}options"] = {**options, "description": summary}
    return {"$ref": f"#/$defs/{prefix}options", "description": summary}


def _unchecked(info: PluginInfo, reason: str) -> Schema:
    return {"type": "object", "description": f"Not checked: {reason}", "$comment": reason}
