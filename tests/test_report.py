"""The leaderboard's page: complete, closed against what names could bring in, and working in a browser."""

import base64
import dataclasses
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from boards import plan_cells
from matplotlib.image import imsave

from copernicus.datasets.bench import TASKS
from copernicus.datasets.sensors import InputError
from copernicus.platform.leaderboard import Leaderboard, Score
from copernicus.platform.report import page
from copernicus.platform.report_svg import ticks

EVIL = "</td><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
NAMES = ("cloud_s3", "eurosat_s2", "flood_s1", "aq_no2_s5p")


class Elements(HTMLParser):
    """Every element's name and attributes, every text, and whether tags match."""

    VOID = ("meta", "link", "img", "input", "br", "line", "circle", "rect", "polyline")

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag in self.VOID:  # a drawing's element with a title inside
            return
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)


def made(encoders=("pretrained", "random"), names=NAMES) -> Leaderboard:
    scores = []
    for i, name in enumerate(names):
        for j, encoder in enumerate(encoders):
            for seed in (1, 2, 3):
                value = 50.0 + 10 * ((i + j) % 3) + seed
                curve = tuple(float(v) for v in np.linspace(30, value, 6))
                scores.append(
                    Score(name, encoder, seed, value, value, {"lr": 0.125}, f"run{i}{j}{seed}", "probe", value, curve)
                )
    return Leaderboard(tuple(scores), plan_cells([*names], [*encoders], [1, 2, 3]))


@pytest.fixture(scope="module")
def evil() -> Elements:
    board = made((EVIL, "random"))
    lacking = dataclasses.replace(
        board,
        scores=tuple(s for s in board.scores if (s.task, s.encoder) != ("flood_s1", "random")),
        failures={("flood_s1", "random"): EVIL},
        notes=(EVIL,),
    )
    lacking.scores[0].settings[EVIL] = EVIL
    return Elements(page(lacking, EVIL, {}))


def test_the_page_asks_nobody_for_anything():
    parsed = Elements(page(made(), "a sweep", {}))
    for tag, attributes in parsed.found:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
    (policy,) = [a["content"] for tag, a in parsed.found if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    assert "script-src 'sha256-" in policy
    assert "url(" not in page(made(), "a sweep", {})


def test_whatever_a_name_holds_stays_text(evil):
    assert [tag for tag, _ in evil.found].count("script") == 1
    assert not [tag for tag, _ in evil.found if tag == "img"]
    said = "".join(evil.texts)
    assert said.count(EVIL) > 8, "title, legend, heads, settings, failure, note"
    assert f"failed: {EVIL}" in said


def test_the_page_shows_every_score_what_is_missing_and_all_published_figures():
    board = made()
    lacking = dataclasses.replace(
        board,
        scores=tuple(s for s in board.scores if (s.task, s.encoder) != ("flood_s1", "random") and s.run_id != "run003"),
    )
    text = page(lacking, "a sweep", {})
    said = " ".join(Elements(text).texts)
    for s in lacking.scores:
        assert s.run_id in said
        summary = lacking.summary(s.task, s.encoder)
        assert f"{summary.mean:.2f} ± {summary.std:.2f}" in said
        assert f"[{summary.low:.2f}, {summary.high:.2f}]" in said
    for task in board.tasks:
        assert all(f"{mean:.1f} ± {std:.1f}" in said for mean, std in filter(None, task.published.values()))
    assert "20 of 24 final runs" in said
    assert "flood_s1 / random: missing" in said
    assert "cloud_s3 / pretrained: 2 of 3 seeds" in said
    assert "lr=0.125" in said
    assert text.count("<polyline") == len(lacking.scores) + 7, "a curve of every run, and the mean of each cell"


@pytest.mark.parametrize(
    "board",
    [
        Leaderboard(()),
        Leaderboard((), plan_cells(["eurosat_s2"], ["a", "b"], [1])),
        Leaderboard((Score("eurosat_s2", "a", 1, 5.0, 5.0),)),
        made(("one",)),
        Leaderboard(tuple(Score("eurosat_s2", e, s, 5.0, 5.0, curve=(5.0,)) for e in "ab" for s in (1, 2))),
        Leaderboard(tuple(Score("flood_s1", str(e), s, float(e), 5.0) for e in range(12) for s in range(2))),
    ],
    ids=["nothing", "only a plan", "one score", "one encoder", "all equal", "more encoders than colours"],
)
def test_every_table_makes_a_page(board):
    parsed = Elements(page(board, "x", {}))
    numbers = [v for _, a in parsed.found for k, v in a.items() if k in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy")]
    assert all(np.isfinite(float(v)) for v in numbers)
    assert "nan" not in " ".join(parsed.texts).lower().split()


def test_pictures_are_embedded_whole(tmp_path):
    path = tmp_path / "confusion <b>.png"
    imsave(path, np.zeros((4, 4)))
    parsed = Elements(page(made(), "x", {("eurosat_s2", "random"): [path]}))
    (source,) = [a["src"] for tag, a in parsed.found if tag == "img"]
    kind, _, data = source.partition(";base64,")
    assert kind == "data:image/png"
    assert base64.b64decode(data) == path.read_bytes()
    assert f"{TASKS['eurosat_s2'].title} · random · confusion <b>" in "".join(parsed.texts)
    with pytest.raises(InputError, match=r"none\.png cannot be read"):
        page(made(), "x", {("eurosat_s2", "random"): [tmp_path / "none.png"]})
    (tmp_path / "text.png").write_text("<svg onload=alert(1)>")
    with pytest.raises(InputError, match=r"text\.png is neither PNG nor JPEG"):
        page(made(), "x", {("eurosat_s2", "random"): [tmp_path / "text.png"]})


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (61.4, 62.9), (-3, 1e4), (0.5, 50.5), (1e-9, 2e-9), (99.95, 100.0), (-1e-3, 1e-3)]
)
def test_ticks_are_few_round_and_within(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 5
    step = found[1] - found[0]
    np.testing.assert_allclose(np.diff(found), step)
    assert re.match(r"[125](\.0+)?$", f"{step / 10 ** np.floor(np.log10(step * (1 + 1e-9))):.3f}")
    assert all(low - 1e-6 * step <= t <= high + 1e-6 * step for t in found)


def browse(path: Path) -> str:
    """The page as chromium has it after its scripts ran."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={path.parent / 'profile'}"]
    done = subprocess.run(
        [*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


@pytest.mark.browser
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Debian's chromium")
def test_in_a_browser_the_page_sorts_and_runs_no_other_script(tmp_path):
    text = page(made(), "a sweep", {})
    path = tmp_path / "page.html"
    foreign = "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\">"
    path.write_text(text.replace("</main>", f"{foreign}</main>"))
    dom = browse(path)
    assert "<title>a sweep – leaderboard</title>" in dom, "what is not the page's own does not run"
    assert 'tabindex="0"' in dom, "the page's own script has run"

    # A copy without the policy, so that a script may click.
    click = "<script>document.querySelectorAll('#scores th')[%d].click()</script>"
    freed = re.sub(r"<meta http-equiv[^>]*>", "", text)
    orders = []
    for column in (0, 3):
        path.write_text(freed.replace("</body>", f"{click % column}</body>"))
        table = browse(path).partition('id="scores"')[2].partition("</table>")[0]
        orders.append(re.findall(r'<th scope="row">([^<]*)', table))
    titles = [TASKS[name].title for name in NAMES]
    assert orders[0] == sorted(titles)
    # Encoder "random": 62, 72, 52, 62 by task; the greatest first, equal ones as they were.
    assert orders[1] == [titles[1], titles[0], titles[3], titles[2]]
