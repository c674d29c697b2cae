import json

ABOUT_S = 240


def set_parameter(path, name, value):
    """Change a value in the cell of parameters, as a user would before running the page."""
    page = json.loads(path.read_text())
    cell = next(c for c in page["cells"] if "parameters" in c["metadata"].get("tags", []))
    lines = "".join(cell["source"]).splitlines()
    assert sum(line.startswith(f"{name}:") for line in lines) == 1
    lines = [f"{name} = {value!r}" if line.startswith(f"{name}:") else line for line in lines]
    cell["source"] = "\n".join(lines)
    path.write_text(json.dumps(page))


def test_fig2_runs_at_smoke(lab, open_page):
    set_parameter(lab[0] / "fig2.ipynb", "scale", "smoke")
    page = open_page("fig2.ipynb")
    page.run_all(ABOUT_S)
    picture = page.tab.locator(".jp-OutputArea-output img").first
    picture.scroll_into_view_if_needed()
    assert picture.evaluate("img => img.naturalWidth") > 300
    assert page.tab.get_by_text("not testable at this scale").count() > 0
    page.shot("smoke")
