"""The page of the report: whole, safe to open anywhere, the same to the byte, and legible on a phone."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from carv.report import findings, page
from carv.report.plates import cost, profile
from carv.report.style import COLOURS, drawn, legend_above

from sweep_records import SCRIPT, cells, exact_pilot, hostile_findings, write_records


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return hostile_findings(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def page_file(tmp_path_factory, full):
    path = tmp_path_factory.mktemp("page") / "report.html"
    page.write(full, path)
    return path


class Elements(HTMLParser):
    """Names, ids, references and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.references, self.attributes, self.texts = [], [], set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes.append((tag, name, value or ""))
            if name == "id":
                self.ids.append(value)
            self.references |= set(re.findall(r"url\(#([^)]+)\)", value or ""))
            if name == "href" and (value or "").startswith("#"):
                self.references.add(value[1:])

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_holds_every_figure_with_its_caption_and_numbers(page_file):
    elements = Elements(page_file.read_text())
    names = ("split", "cost", "ecm", "re", "coverage", "norms", "proposals", "sensitivity")
    assert [f"s0-{name}" for name in names if f"s0-{name}" not in elements.ids] == []
    assert elements.tags.count("svg") == elements.tags.count("figcaption") == len(names)
    assert elements.tags.count("details") == len(names) + 1
    labels = [value for tag, name, value in elements.attributes if tag == "svg" and name == "aria-label"]
    assert len(labels) == len(names)
    assert all(len(label) > 20 for label in labels)


def test_ids_are_unique_and_every_reference_has_its_target(page_file):
    elements = Elements(page_file.read_text())
    assert len(elements.ids) == len(set(elements.ids))
    assert elements.references
    assert elements.references <= set(elements.ids)


def test_nothing_is_loaded_and_nothing_can_run(page_file):
    elements = Elements(page_file.read_text())
    assert not {"script", "img", "link", "iframe", "object", "embed", "form", "metadata", "foreignobject"} & set(
        elements.tags
    )
    assert not [name for _, name, _ in elements.attributes if name.startswith("on") or name in ("src", "xlink:href")]
    assert all(value.startswith("#") for _, name, value in elements.attributes if name == "href")
    assert not re.search(r"https?://|@import|url\((?!#)", page_file.read_text())
    policy = next(value for tag, _, value in elements.attributes if tag == "meta" and "default-src" in value)
    assert "default-src 'none'" in policy
    assert "script" not in policy


def test_prompts_proposals_and_paths_are_shown_as_they_are_written(page_file):
    text = page_file.read_text()
    assert SCRIPT not in text
    shown_text = "".join(Elements(text).texts)
    assert f"sds: {SCRIPT}" in shown_text
    assert f"IW ({SCRIPT})" in shown_text
    assert "<img src=x onerror=alert(1)>" in shown_text


def test_the_same_records_make_the_same_figures_to_the_byte(page_file, full):
    text = page_file.read_text()
    for name, make in (("cost", cost.plate), ("norms", profile.norms_plate)):
        assert make(full.studies[0], f"s0-{name}").svg in text


def test_every_colour_of_a_figure_is_one_of_the_page(page_file):
    text = page_file.read_text()
    svgs = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert "var(--ink)" in svgs
    assert not re.findall(r"(?:fill|stroke|color): ?#[0-9a-fA-F]{3,6}", svgs)


@pytest.mark.parametrize(("scheme", "paper"), [(0, "#fdfcfa"), (1, "#14171a")])
def test_colours_stand_out_from_their_paper(scheme, paper):
    """WCAG 2.1: 4.5 for text, 3 for graphics."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for name, pair in COLOURS.items():
        high, low = sorted((luminance(pair[scheme]), luminance(paper)), reverse=True)
        least = {"ink": 4.5, "soft": 4.5, "line": 1.0}.get(name, 3.0)
        assert (high + 0.05) / (low + 0.05) >= least, name


def test_a_pilot_alone_makes_a_page_without_coverage(tmp_path):
    text = page.render(findings.load([exact_pilot(tmp_path)]))
    ids = Elements(text).ids
    assert "s0-split" in ids
    assert "s0-coverage" not in ids
    assert "carv pilot" in text


def test_cells_alone_make_a_page_in_teacher_calls(tmp_path):
    found = findings.load([write_records(tmp_path, cells())])
    text = page.render(found)
    ids = Elements(text).ids
    assert {"s0-cost", "s0-ecm", "s0-re", "s0-sensitivity"} <= set(ids)
    assert not {"s0-split", "s0-norms", "s0-proposals", "s0-coverage"} & set(ids)
    assert "teacher calls, one render as one" in text
    assert found.studies[0].costing.assumed


def test_a_single_cell_makes_a_page(tmp_path):
    found = findings.load([write_records(tmp_path, cells()[:1])])
    assert "1 cell was measured" in page.render(found)


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    found = findings.load([write_records(tmp_path / "records", cells()[:1])])
    target = tmp_path / "new" / "report.html"
    page.write(found, target)
    before = target.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("carv.checkpoint.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            page.write(found, target)
    assert target.read_bytes() == before
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, package):
    found = findings.load([write_records(tmp_path, cells()[:2])])
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"carv\[report\]"):
        page.write(found, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def chromium(*arguments, folder):
    program = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no chromium here to open the page with")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile")
    found = subprocess.run([program, *flags, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr[-500:]
    return found


def test_a_browser_opens_the_page_without_an_error_and_runs_nothing(page_file, tmp_path):
    found = chromium("--enable-logging=stderr", "--dump-dom", page_file.as_uri(), folder=tmp_path)
    assert "CONSOLE" not in found.stderr
    elements = Elements(found.stdout)
    assert "script" not in elements.tags
    assert elements.tags.count("svg") == 8
    title = re.search("<title>(.*?)</title>", found.stdout, flags=re.DOTALL)[1]
    assert title.startswith("carv report: sds:")


def test_a_phone_needs_no_sideways_scrolling_and_the_switch_turns_colours_over(page_file, tmp_path):
    """Opened in a frame of 360 pixels, with all tables unfolded."""
    harness = tmp_path / "harness.html"
    harness.write_text(
        f"""<iframe id="f" src="{page_file.as_uri()}" width="360" height="800"></iframe><pre id="o"></pre><script>
        f.onload = () => {{
          const d = f.contentDocument, style = () => f.contentWindow.getComputedStyle(d.querySelector(".page"))
          const paper = () => style().backgroundColor
          const before = paper()
          d.querySelectorAll("details").forEach(x => x.open = true)
          const wide = [...d.querySelectorAll("svg")].filter(x => x.getBoundingClientRect().right > 360).length
          d.querySelector("#scheme").click()
          o.textContent = JSON.stringify({{scroll: d.documentElement.scrollWidth, width: f.contentWindow.innerWidth,
            wide, before, after: paper()}})
        }}</script>"""
    )
    found = chromium("--allow-file-access-from-files", "--dump-dom", harness.as_uri(), folder=tmp_path)
    seen = json.loads(re.search(r'<pre id="o">(\{.*?\})</pre>', found.stdout)[1])
    assert seen["scroll"] <= seen["width"] <= 360
    assert seen["wide"] == 0
    assert {seen["before"], seen["after"]} == {"rgb(253, 252, 250)", "rgb(20, 23, 26)"}


def test_a_name_in_a_legend_is_no_formula_and_no_markup():
    def draw(axes):
        axes.plot([1, 2], [1, 2], label="$x_1$ <b>")
        legend_above(axes)

    svg = drawn(draw, "key", 'a "figure"')
    assert ">$x_1$ &lt;b&gt;</text>" in svg
    assert 'aria-label="a &quot;figure&quot;"' in svg
