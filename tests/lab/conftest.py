"""JupyterLab on copies of the notebooks, and a real Chromium to use it."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHOTS = ROOT / "build" / "lab"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-extensions "
    "--disable-background-networking --disable-component-update --disable-sync --no-first-run"
).split()
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "docmanager-extension/plugin": {"autosave": False},
}


def pytest_collection_modifyitems(items):
    wanted = os.environ.get("D2L_TEST_LAB") == "1"
    reason = "opens a browser: run `just test-lab`" if not wanted else "there is no Chromium here"
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and (not wanted or CHROMIUM is None):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """Start JupyterLab on a copy of the notebooks; return its folder and its address."""
    home = tmp_path_factory.mktemp("lab")
    pages = home / "notebooks"
    shutil.copytree(ROOT / "notebooks", pages)
    for name, value in SETTINGS.items():
        path = home / f"settings/@jupyterlab/{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    folders = ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR")
    environment = os.environ | {
        **{f"JUPYTER_{folder}": str(home / folder.lower()) for folder in folders},
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "IPYTHONDIR": str(home / "ipython"),
        "D2L_HOME": str(ROOT),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))),
    }
    log = (home / "lab.log").open("w")
    command = [sys.executable, "-m", "jupyterlab", str(pages), "--no-browser", "--allow-root"]
    command += [f"--ServerApp.port={port}", f"--IdentityProvider.token={token}"]
    server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}/lab/tree/{{}}?token={token}&reset"
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=5)
            break
        except (urllib.error.URLError, OSError):
            assert server.poll() is None, (home / "lab.log").read_text()[-2000:]
            time.sleep(0.1)
    yield pages, address
    server.terminate()
    server.wait(20)
    log.close()


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium that stays off the network."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


def set_parameters(path, values):
    """Change values in the cell of parameters, as a user would before running the page."""
    page = json.loads(path.read_text())
    cell = next(c for c in page["cells"] if "parameters" in c["metadata"].get("tags", []))
    source = "".join(cell["source"])
    for name, value in values.items():
        source, n = re.subn(rf"^{name}: str = .*$", f"{name}: str = {value!r}", source, flags=re.M)
        assert n == 1
    cell["source"] = source
    path.write_text(json.dumps(page))


class Page:
    """A notebook open in JupyterLab."""

    def __init__(self, browser, lab, name):
        self.name = name
        pages, address = lab
        self.tab = browser.new_page(viewport={"width": 1400, "height": 1100})
        self.tab.goto(address.format(name), timeout=180_000)
        self.tab.keyboard.press("Control+b")
        self.code = self.tab.locator(".jp-Notebook .jp-CodeCell")
        n_cells = [c["cell_type"] for c in json.loads((pages / name).read_text())["cells"]].count(
            "code"
        )
        self.tab.wait_for_function(
            f"document.querySelectorAll('.jp-Notebook .jp-CodeCell').length == {n_cells}",
            timeout=180_000,
        )
        self.tab.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=180_000)

    def run_all(self, timeout_s):
        """Run every cell from the menu; fail on an error in a cell."""
        self.tab.get_by_role("menuitem", name="Run", exact=True).click()
        self.tab.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        prompts = self.code.locator(".jp-InputArea-prompt")
        end = time.monotonic() + timeout_s
        while "[*]:" in (shown := prompts.all_inner_texts()):
            if time.monotonic() > end:
                pytest.fail(f"{self.name} ran for over {timeout_s} s; see {self.shot('too-slow')}")
            self.tab.wait_for_timeout(200)
        if any(not re.fullmatch(r"\[\d+\]:", prompt.strip()) for prompt in shown):
            said = self.tab.locator(".jp-OutputArea-output").all_inner_texts()
            pytest.fail(f"a cell of {self.name} failed; see {self.shot('failed')}\n{said[-1:]}")

    def shot(self, what):
        """Keep a picture of the whole page."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        path = SHOTS / f"{self.name.partition('-test')[0]}-{what}.png"
        bottom = "e => e.querySelector('.jp-Cell:last-of-type').offsetTop + 350"
        height = self.tab.locator(".jp-WindowedPanel-viewport").first.evaluate(bottom)
        self.tab.set_viewport_size({"width": 1400, "height": max(800, min(int(height), 6000))})
        self.tab.locator(".jp-Cell").first.scroll_into_view_if_needed()
        self.tab.wait_for_timeout(500)
        self.tab.locator(".jp-NotebookPanel").first.screenshot(path=path)
        return path


@pytest.fixture
def open_page(lab, browser, request):
    """Open a notebook in JupyterLab."""
    opened = []

    def open_page(name, **parameters):
        own = f"{Path(name).stem}-{request.node.name}.ipynb"
        shutil.copy(lab[0] / name, lab[0] / own)
        set_parameters(lab[0] / own, parameters)
        opened.append(Page(browser, lab, own))
        return opened[-1]

    yield open_page
    for page in opened:
        page.tab.close()
