"""Installs pip into the environment that runs this, where ensurepip is missing.

Takes pip's own wheel from the package registry (PIP_INDEX_URL or PyPI) and checks its SHA-256 as
the index states it. Called by scripts/install only.
"""

import hashlib
import os
import re
import runpy
import sys
import tempfile
import urllib.parse
import urllib.request


def main() -> None:
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/") + "/pip/"
    page = urllib.request.urlopen(index, timeout=30).read().decode()
    links = re.findall(r'href="([^"#]+/pip-[\d.]+-py3-none-any\.whl)#sha256=([0-9a-f]{64})"', page)
    if not links:
        sys.exit(f"No pip wheel found at {index}; install python3-venv instead.")
    address, digest = links[-1]
    data = urllib.request.urlopen(urllib.parse.urljoin(index, address), timeout=120).read()
    if hashlib.sha256(data).hexdigest() != digest:
        sys.exit("The pip wheel does not have the SHA-256 that the index states.")
    with tempfile.TemporaryDirectory() as folder:
        wheel = os.path.join(folder, address.rsplit("/", 1)[-1])
        with open(wheel, "wb") as file:
            file.write(data)
        sys.path.insert(0, wheel)
        sys.argv = ["pip", "install", "--quiet", "--no-index", wheel]
        runpy.run_module("pip", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
