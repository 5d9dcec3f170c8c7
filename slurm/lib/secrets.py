"""Which names hold secrets, and how secret values are kept out of what people and files get to see."""

from __future__ import annotations

import base64
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping

MASK = "***"
SHORTEST = 4  # characters; masking shorter values would blank text that has nothing to do with them

_SECRET_WORDS = frozenset(
    {"KEY", "KEYS", "TOKEN", "JWT", "SECRET", "SECRETS", "PASSPHRASE", "CREDENTIAL", "CREDENTIALS", "BEARER"}
    | {"AUTHORIZATION"}
)
_SECRET_ENDINGS = ("PASSWORD", "PASSWORDS", "PASSWD", "APIKEY", "ACCESSKEY", "PRIVATEKEY", "SECRETKEY", "AUTHTOKEN")
_SECRET_LAST_WORDS = frozenset({"PASS", "PAT", "PW"})  # DB_PASS, GITHUB_PAT; not PASS_THROUGH
_RECIPIENTS = "NOTIFY"  # webhooks, whose addresses are secrets, among mail addresses, which are none
_SECRET_NAMES = frozenset({"DOCKER_AUTH_CONFIG", "MYSQL_PWD", _RECIPIENTS})
# Where it is, or how much of it there may be: ALLHANDS_API_KEY_FILE, TOKEN_LIMIT. SSH_AUTH_SOCK is such a place.
_HARMLESS_LAST_WORDS = frozenset(
    {"FILE", "FILES", "PATH", "DIR", "FOLDER", "SOCK", "SOCKET", "URL", "LIMIT", "SIZE", "LENGTH", "LEN", "COUNT"}
    | {"NUM", "TIMEOUT", "TTL", "TYPE", "BINDINGS"}
)
_COUNTING_FIRST_WORDS = frozenset({"MAX", "MIN", "NUM"})  # MAX_TOKEN
_URL_PASSWORD = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/:@]*:([^\s/@]+)@", re.I)


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name holds a secret: KEY, TOKEN, PASSWORD … as a whole word of the name.

    ``ALLHANDS_API_KEY``, ``hf_token``, ``apiKey`` and ``PGPASSWORD`` do; ``MAX_TOKENS``, ``TOKENIZERS_PARALLELISM``,
    ``KEYBOARD``, ``SSH_AUTH_SOCK`` and ``API_KEY_FILE`` do not. In doubt a name is secret.
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).upper().replace("-", "_").split("_")
    words = [word for word in words if word]
    if not words or words[-1] in _HARMLESS_LAST_WORDS or words[0] in _COUNTING_FIRST_WORDS:
        return False
    if name.upper() in _SECRET_NAMES or (len(words) > 1 and words[-1] in _SECRET_LAST_WORDS):
        return True
    return any(word in _SECRET_WORDS or word.endswith(_SECRET_ENDINGS) for word in words)


def secret_values(mapping: Mapping[str, str]) -> frozenset[str]:
    """The values to be masked: those of secret names, and passwords inside URLs (``https://user:password@proxy``)."""
    named = (_secrets_in(name, value) for name, value in mapping.items() if value and is_secret_name(name))
    by_name = (secret for found in named for secret in found)
    in_urls = (password for value in mapping.values() for password in _URL_PASSWORD.findall(value))
    return frozenset([*by_name, *in_urls])


def without_url_passwords(text: str) -> str:
    """``text`` with the passwords in its URLs masked."""
    return _URL_PASSWORD.sub(lambda found: found[0].removesuffix(f"{found[1]}@") + f"{MASK}@", text)


def _secrets_in(name: str, value: str) -> list[str]:
    """What is secret in the value of a secret name: all of it, but for the mail addresses in NOTIFY."""
    return [word for word in re.split(r"[\s,]+", value) if "://" in word] if name == _RECIPIENTS else [value]


def mask_values(text: str, values: Iterable[str]) -> str:
    """``text`` with every occurrence of each value of four characters or more replaced by ``***``.

    Its other spellings count too: base64 (URL-safe or not, alone or inside a longer encoded text), JSON, shell
    quoting, percent encoding.
    """
    forms = {form for value in values if len(value.strip()) >= SHORTEST for form in _spellings(value)}
    if not forms:
        return text
    longest_first = sorted(forms, key=lambda form: (-len(form), form))
    return re.sub("|".join(map(re.escape, longest_first)), MASK, text)


def _spellings(value: str) -> Iterator[str]:
    from urllib.parse import quote  # 5 ms, spent only where there is a secret

    yield from {value, value.strip(), json.dumps(value)[1:-1], quote(value, safe=""), shlex.quote(value)}
    raw = value.encode("utf-8", "surrogateescape")
    for encoded in _base64_forms(raw):
        yield encoded
        yield encoded.replace("+", "-").replace("/", "_")


def _base64_forms(raw: bytes) -> Iterator[str]:
    """The value encoded alone, and the characters that it alone decides at each of the three possible offsets."""
    alone = base64.b64encode(raw).decode()
    yield alone
    yield alone.rstrip("=")
    for offset in range(3):
        first = (offset * 8 + 5) // 6
        last = (offset + len(raw)) * 8 // 6
        inside = base64.b64encode(b"\0" * offset + raw).decode()[first:last]
        if len(inside) >= 8:  # fewer characters occur by chance
            yield inside


def masked(mapping: Mapping[str, str]) -> dict[str, str]:
    """The mapping for people: the values of secret names replaced by ``***``, and wherever else they stand."""
    values = secret_values(mapping)
    return {
        name: MASK if value and is_secret_name(name) else mask_values(value, values) for name, value in mapping.items()
    }


# --- copies of .conf files -------------------------------------------------------------------------------------------

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(?:\[[^\]\n]*\])?\+?=(?!=)", re.ASCII)
_DEFAULT = re.compile(r"\$\{([A-Za-z_]\w*):?[-=]", re.ASCII)
PLACEHOLDER = "KEY=VALUE"  # what help and comments say of any key
_NAME_PART = re.compile(r"[\w$]", re.ASCII)


def redact_conf(text: str, secrets: Iterable[str]) -> str:
    """A ``.conf`` for keeping: assignments to secret names are left out, whatever else is there stays byte-identical.

    ``API_KEY="…"``, also over several lines, as an array, exported or commented out, becomes ``API_KEY=${API_KEY-}``:
    the copy still runs and takes the key from the environment. A default as in ``${API_KEY:-…}`` becomes empty. Lines
    keep their numbers. The values of ``secrets`` found anywhere else become ``***``.
    """
    return mask_values(_Redaction(text).result(), secrets)


class _Redaction:
    """One pass over shell text that knows just enough of quoting to see where a word ends."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.kept: list[str] = []

    def result(self) -> str:
        quote_mark = ""  # "'", '"', "#" (a comment) or "" outside of any
        while self.at < len(self.text):
            if self._redact(quote_mark):
                continue
            character = self.text[self.at]
            escaped = character == "\\" and quote_mark not in ("'", "#")
            quote_mark = quote_mark if escaped else self._next_mark(quote_mark, character)
            self._keep(2 if escaped else 1)
        return "".join(self.kept)

    def _keep(self, length: int) -> None:
        self.kept.append(self.text[self.at : self.at + length])
        self.at += length

    def _next_mark(self, mark: str, character: str) -> str:
        if mark == "#":
            return "" if character == "\n" else "#"
        if mark:
            return "" if character == mark else mark
        starts_word = self.at == 0 or self.text[self.at - 1] in " \t\n;&|("
        return character if character in "'\"" or (character == "#" and starts_word) else ""

    def _redact(self, mark: str) -> bool:
        """Replace the secret that begins here, if one does."""
        default = _DEFAULT.match(self.text, self.at)
        if default and is_secret_name(default[1]):
            self._replace(default[0], _end_of_braces(self.text, default.end(), mark == '"'))
            return True
        before = self.text[self.at - 1] if self.at else "\n"
        assignment = None if _NAME_PART.match(before) or before == "{" else _ASSIGNMENT.match(self.text, self.at)
        if not assignment or not is_secret_name(assignment[1]) or self.text.startswith(PLACEHOLDER, self.at):
            return False
        end = _end_of_comment_value if mark == "#" else _end_of_word
        stop = end(self.text, assignment.end(), mark)
        if stop > assignment.end():
            self._replace(f"{assignment[1]}=${{{assignment[1]}-}}", stop)
        else:
            self._keep(assignment.end() - self.at)
        return True

    def _replace(self, replacement: str, stop: int) -> None:
        lines = self.text.count("\n", self.at, stop)
        self.kept.append(replacement + "\\\n" * lines)
        self.at = stop


def _end_of_comment_value(text: str, start: int, _mark: str) -> int:
    end = text.find("\n", start)
    return len(text) if end < 0 else end


def _end_of_word(text: str, start: int, mark: str) -> int:
    """Where the shell word that goes on at ``start`` ends, for text outside of quotes or inside ``mark``."""
    at = start
    while at < len(text):
        character = text[at]
        if character in " \t\n;&|<>)" or (mark and character == mark):
            return at
        at = _after_unit(text, at, plain=bool(mark))
    return at


def _after_unit(text: str, at: int, plain: bool = False, quoted: bool = False) -> int:
    """Past one unit of a word: a character, an escape, a quotation, an expansion, an array's parentheses.

    ``plain``: quotes and expansions mean nothing here; ``quoted``: inside double quotes, where ``'`` is a character.
    """
    if text[at] == "\\":
        return at + 2
    if plain:
        return at + 1
    if text.startswith("$'", at) and not quoted:
        return _end_of_quote(text, at + 2, "'", escapes=True)
    if text[at] == "'" and not quoted:
        return _end_of_quote(text, at + 1, "'", escapes=False)
    if text[at] in '"`':
        return _end_of_quote(text, at + 1, text[at], escapes=True)
    if text.startswith("${", at):
        return _end_of_braces(text, at + 2, quoted) + 1
    if text.startswith("$(", at):
        return _end_of_nest(text, at + 2, ")")
    return _end_of_nest(text, at + 1, ")") if text[at] == "(" and not quoted else at + 1


def _end_of_quote(text: str, at: int, mark: str, escapes: bool) -> int:
    while at < len(text) and text[at] != mark:
        nested = mark == '"' and text.startswith(("$(", "${"), at)
        at = _after_unit(text, at, quoted=True) if nested else at + (2 if escapes and text[at] == "\\" else 1)
    return at + 1


def _end_of_nest(text: str, at: int, closing: str, quoted: bool = False) -> int:
    """Past the bracket that closes the one before ``at``."""
    while at < len(text) and text[at] != closing:
        at = _after_unit(text, at, quoted=quoted)
    return at + 1


def _end_of_braces(text: str, at: int, quoted: bool) -> int:
    """The position of the brace that closes the ``${`` before ``at``."""
    return _end_of_nest(text, at, "}", quoted) - 1
