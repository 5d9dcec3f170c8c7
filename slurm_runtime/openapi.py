"""How is the API described to programs and people? Its OpenAPI object, and a page made from it that works offline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from slurm_runtime.page import document, text

MEANINGS = {
    400: "The body is no JSON that can be read.",
    401: "The API key is missing or wrong.",
    403: "The operator has not allowed this.",
    404: "Nothing has this name.",
    405: "This path has no such method.",
    408: "The body did not arrive in time.",
    409: "The sandbox cannot do this now.",
    413: "The body is too large.",
    422: "A field is missing or wrong.",
    429: "Too many at once; ask again later.",
    499: "The client left before the answer.",
    500: "A fault of this server; its log has the details.",
    501: "This is not switched on.",
    502: "Podman refused.",
    503: "No slot became free, the node takes no new sandboxes, or the server is stopping.",
    504: "Podman did not answer in time.",
    507: "The disk is full.",
}
ALWAYS = (400, 401, 405, 408, 413, 422, 500)
DESCRIPTION = (
    "The OpenHands remote runtime API on Podman sandboxes. Every request but GET /health carries the API key as "
    "header X-API-Key; pages for people and for Prometheus take it as password of HTTP Basic too. Every error is an "
    "object with detail, a sentence."
)
ERROR = {"$ref": "#/components/schemas/ErrorAnswer"}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route answers besides its success: ``statuses``, and those that every route has."""
    from slurm_runtime.models import ErrorAnswer

    return {status: {"model": ErrorAnswer, "description": MEANINGS[status]} for status in sorted({*ALWAYS, *statuses})}


def describe(app: FastAPI, with_key: bool) -> dict[str, Any]:
    """The OpenAPI object of the application, made once."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes)
        schemes = {
            "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            "password": {"type": "http", "scheme": "basic", "description": "Any user name; the key as password."},
        }
        made.setdefault("components", {})["securitySchemes"] = schemes
        for path, operations in made["paths"].items():
            for operation in operations.values():
                operation["security"] = _security(path, with_key)
        app.openapi_schema = made
    return app.openapi_schema


def _security(path: str, with_key: bool) -> list[dict[str, list[str]]]:
    from slurm_runtime.guard import OPEN_PATH, PAGES

    if not with_key or path == OPEN_PATH:
        return []
    return [{"key": []}, {"password": []}] if path in PAGES else [{"key": []}]


def documentation(description: Mapping[str, Any]) -> str:
    """The page GET /docs: every endpoint with its fields and errors, without scripts or anything to fetch. Pure."""
    schemas = description.get("components", {}).get("schemas", {})
    body = "".join(
        _operation(method, path, operation, schemas)
        for path, operations in description["paths"].items()
        for method, operation in operations.items()
    )
    info = description["info"]
    head = f"<h1>{text(info['title'])} {text(info['version'])}</h1><p class='faint'>{text(DESCRIPTION)}</p>"
    return document(info["title"], "", head + body)


def _operation(method: str, path: str, operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    words = f"<p>{text(operation.get('description') or operation.get('summary', ''))}</p>"
    parameters = [
        (f"{entry['name']} ({entry['in']})", _kind(entry.get("schema", {})), entry.get("description", ""))
        for entry in operation.get("parameters", ())
    ]
    asked = _content(operation.get("requestBody", {}))
    parts = [words, _fields("Parameters", parameters), _fields("Body", _properties(asked, schemas))]
    for status, answer in operation["responses"].items():
        if status.startswith("2"):
            parts.append(_fields(f"Answer {status}", _properties(_content(answer), schemas)))
    failures = [(s, "", a["description"]) for s, a in operation["responses"].items() if not s.startswith("2")]
    parts.append(f"<details><summary>Errors</summary>{_fields('', failures)}</details>")
    return f"<h2>{method.upper()} {text(path)}</h2>{''.join(parts)}"


def _content(holder: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of the first content type."""
    kinds = list(holder.get("content", {}).values())
    found: Mapping[str, Any] = kinds[0].get("schema", {}) if kinds else {}
    return found


def _properties(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, kind and description of each field."""
    reference = schema.get("$ref") or schema.get("items", {}).get("$ref", "")
    found = schemas.get(reference.rpartition("/")[2], schema)
    needed = found.get("required", ())
    return [
        (name + (" *" if name in needed else ""), _kind(field), str(field.get("description", "")).replace("`", ""))
        for name, field in found.get("properties", {}).items()
    ]


def _kind(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_kind(option) for option in schema["anyOf"]))
    kind = str(schema.get("type", "anything"))
    return f"list of {_kind(schema['items'])}" if kind == "array" and "items" in schema else kind


def _fields(title: str, rows: list[tuple[str, str, str]]) -> str:
    if not rows:
        return ""
    body = "".join(f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    heading = f"<p class='faint'>{text(title)}</p>" if title else ""
    return f'{heading}<div class="table"><table><tbody>{body}</tbody></table></div>'
