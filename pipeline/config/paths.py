"""Expansion of `~` and environment variables in the paths of a run file."""

import os
import re

_VARIABLE = re.compile(r"\$(?:(\$)|([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})?")
_HOME = re.compile("~[^/]*")
# Variables with such names are refused: paths appear in messages and files, secrets must not.
_SECRET = re.compile("TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_MAX_BYTES, _MAX_NAME_BYTES = 4000, 255  # Linux: PATH_MAX is 4096, NAME_MAX 255


def expand(text: str) -> str:
    """Replace a leading `~` or `~user`, `$NAME` and `${NAME}`; `$$` becomes `$`.

    Raises ValueError for a variable that is unset or empty, for one whose name suggests a secret,
    and for a path that is too long for Linux.
    """
    home = _HOME.match(text)
    start = os.path.expanduser(home[0]) if home else ""  # noqa: PTH111 - Path's raises
    if start.startswith("~"):
        raise ValueError(f"{start}: no such home folder; for a file of that name write ./{start}")
    path = start + _VARIABLE.sub(_variable_value, text[home.end() if home else 0 :])
    size, longest = len(os.fsencode(path)), max(len(os.fsencode(n)) for n in path.split("/"))
    if size > _MAX_BYTES or longest > _MAX_NAME_BYTES:
        raise ValueError(
            f"the path has {size:,} bytes and its longest name {longest:,}; the limits are "
            f"{_MAX_BYTES:,} and {_MAX_NAME_BYTES:,}"
        )
    return path


def _variable_value(match: re.Match[str]) -> str:
    """Value of the environment variable in a match of _VARIABLE; `$` for `$$`."""
    dollar, bare, braced = match.groups()
    name = bare or braced
    if dollar:
        return "$"
    if not name:
        raise ValueError("a $ without a name; write $NAME or ${NAME}, or $$ for a dollar sign")
    if _SECRET.search(name):
        raise ValueError(
            f"${name}: the name suggests a secret, and paths appear in messages and files"
        )
    if not os.environ.get(name):
        raise ValueError(f"${name}: not set; run export {name}=..., or write $$ for a dollar sign")
    return os.environ[name]
