"""Expansion of `~` and environment variables in the paths of a run file."""

import os
import re

_VARIABLE = re.compile(r"\$(?:(\$)|([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})?")
_HOME = re.compile("~[^/]*")
# Such variables are refused: paths appear in messages and files, secrets must not.
_SECRET = re.compile("TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_MAX_BYTES, _MAX_NAME_BYTES = 4000, 255  # Linux: PATH_MAX is 4096, NAME_MAX 255


def expand(text: str) -> str:
    """Replace a leading `~` or `~user`, `$NAME` and `${NAME}`; `$$` becomes `$`.

    Raises ValueError for a variable that is unset or empty, or whose name suggests a secret, and
    for a path that is too long for Linux.
    """
    home = _HOME.match(text)
    start = os.path.expanduser(home[0]) if home else ""  # noqa: PTH111 - Path's raises
    if start.startswith("~"):
        raise ValueError(f"{start}: there is no such home; ./~ is a file of that name")
    path = start + _VARIABLE.sub(_value, text[home.end() if home else 0 :])
    size, longest = len(os.fsencode(path)), max(len(os.fsencode(n)) for n in path.split("/"))
    if size > _MAX_BYTES or longest > _MAX_NAME_BYTES:
        raise ValueError(f"no path can have {size:,} bytes, or {longest:,} in one name")
    return path


def _value(match: re.Match[str]) -> str:
    dollar, bare, braced = match.groups()
    name = bare or braced
    if dollar:
        return "$"
    if not name:
        raise ValueError("a $ without a name; write $NAME or ${NAME}, or $$ for a dollar")
    if _SECRET.search(name):
        raise ValueError(f"${name}: by its name a secret, and paths are shown and kept in files")
    if not os.environ.get(name):
        raise ValueError(f"${name}: not set; export {name}=..., or write $$ for a dollar")
    return os.environ[name]
