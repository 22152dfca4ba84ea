"""Expansion of `~` and environment variables in the paths of a run file."""

import os
import re

# $$, $NAME, ${NAME} or a single $. The groups are the second $, NAME and the NAME in braces.
_VARIABLE = re.compile(r"\$(?:(\$)|([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})?")
_HOME = re.compile("~[^/]*")
# Variables whose names match are refused, because paths appear in messages and files.
_SECRET = re.compile("TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_MAX_BYTES, _MAX_NAME_BYTES = 4000, 255  # Linux: PATH_MAX is 4096, NAME_MAX 255


def expand(text: str) -> str:
    """Replace a leading `~` or `~user`, `$NAME` and `${NAME}`; `$$` becomes `$`.

    Raises ValueError for a variable that is unset or empty, for one whose name suggests a secret,
    and for a path that is too long for Linux.
    """
    home = _HOME.match(text)
    # os.path.expanduser returns an unknown ~user unchanged; Path.expanduser raises RuntimeError.
    home_folder = os.path.expanduser(home[0]) if home else ""  # noqa: PTH111
    if home_folder.startswith("~"):
        raise ValueError(
            f"{home_folder}: no such home folder; for a file of that name write ./{home_folder}"
        )
    path = home_folder + _VARIABLE.sub(_variable_value, text[home.end() if home else 0 :])
    num_bytes = len(os.fsencode(path))
    longest = max(len(os.fsencode(name)) for name in path.split("/"))
    if num_bytes > _MAX_BYTES or longest > _MAX_NAME_BYTES:
        raise ValueError(
            f"the path has {num_bytes:,} bytes and its longest name {longest:,}; the limits are "
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
            f"${name}: the name suggests a secret, and paths appear in messages and files; use a "
            "variable of another name"
        )
    if not os.environ.get(name):
        raise ValueError(f"${name}: not set; run export {name}=..., or write $$ for a dollar sign")
    return os.environ[name]
