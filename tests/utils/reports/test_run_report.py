"""A run's page: what it says is what the files say, whatever the run; and browsers show it whole."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import eval as evaluation
from models import SCHEMAS
from tests.conftest import ROOT, TINY, TINY_GRIDS, TINY_SDLORA
from tests.utils.reports.test_report import Page, table_of_runs, write
from trainer import train
from utils.config.loading import config_from_dict
from utils.metric_catalogue import keyed

RUNS = {
    "nested adapters": {},
    "closed form": {"model_name": "ranpac", "ranpac_dim": 20},
    "held-out images": {"model_name": "simplecil", "validation_share": 0.25},
    "gates": {**TINY_SDLORA, "lambda_sparsity": 0.05, "max_tasks": 2},
    "grids": {**TINY_GRIDS, "few_shot_tasks": 1, "description": "<b>grids</b> & more"},
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PROBE = """<script>addEventListener("load", () => {
  const broken = [...document.images].filter(image => !image.naturalWidth).length;
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  document.title = JSON.stringify({images: document.images.length, broken, wide});
});</script>"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """Name -> page of a finished run of each kind."""
    found, smoke = {}, json.loads((ROOT / "exps/smoke.json").read_text())
    for name, changes in RUNS.items():
        logs = tmp_path_factory.mktemp("logs")
        common = smoke | TINY | {"logs_root": str(logs), "cache_root": str(logs / "cache"), "max_tasks": 3}
        known = SCHEMAS[changes.get("model_name", "sema")].model_fields
        values = {key: value for key, value in common.items() if key in known} | changes
        train(config_from_dict(values | {"figure_format": "png"}, SCHEMAS, "test").config)
        (found[name],) = logs.rglob("report.html")
    return found


def words(page: str) -> str:
    """The text of a page, with a space between fields."""
    text = re.sub("<style>.*?</style>", "", page.replace("<wbr>", ""), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub("<[^>]+>", " ", text)).split())


@pytest.mark.parametrize("name", RUNS)
def test_a_page_says_what_was_run_and_what_came_out(name, pages):
    folder, source = pages[name].parent, pages[name].read_text()
    parts = (json.loads((folder / f"{part}.json").read_text()) for part in ("config", "result", "manifest"))
    (config, result, manifest), page = parts, Page(source)
    assert page.open == [] and "script" not in {tag for tag, _ in page.tags}
    said = [f"seed {config['seed']}", " ".join(config["description"].split()), "fp32, 1 thread"]
    said += [f"{manifest['method'].strip('.')} ({config['model_name']})", manifest["sessions"][0]["started"]]
    if name != "grids":
        measured = "validation" if name == "held-out images" else "test"
        images = manifest["images_per_class"][measured]
        said.append(f"A_N (%) {result['metrics'][keyed(measured, 'final')]:.2f}")
        said.append(f"chance (%) {100 / result['classes_seen'][-1]:.2f}")
        said.append(f"{measured} {sum(images)} images, {images[0]} per class")
        said.append("test_vit.random (untrained network), 32 px")
    assert [part for part in said if part not in words(source)] == []
    pictures = [path for part in ("figures", "analysis") for path in (folder / part).glob("*.png")]
    assert source.count("data:image/png;base64,") == len(pictures) > 2
    links = [values["href"] for tag, values in page.tags if tag == "a"]
    places = {f"#{values.get('id')}" for _, values in page.tags}
    assert links and all(link in places or (folder / link).exists() for link in links)
    changed, defaults = source.split('id="keys"')[1].split("<details>")[:2]
    defaults = defaults.split("</details>")[0]
    assert ">device<" in changed and ">trackers<" not in changed
    assert ">trackers<" in defaults and ">device<" not in defaults


def test_the_pages_of_class_incremental_runs_show_tasks_and_confusions(pages):
    text = words(pages["nested adapters"].read_text())
    assert "drift of consolidated adapters" in text and "Forgotten" in text and "most taken for" in text
    row = re.search(r"\b0 (\w+, \w+) (\d+) (\d+) ([\d.]+) ([\d.]+) ([\d.]+)", text)
    assert row.groups()[1:3] == ("32", "16")  # training and test images of two classes
    learned, now, lost = map(float, row.groups()[3:])
    assert lost >= learned - now - 0.01
    assert "Weight that the gate gives" in words(pages["gates"].read_text())


@pytest.mark.parametrize("name", RUNS)
def test_a_page_names_files_that_are_there(name, pages):
    named = set(re.findall(r"\b\w+\.csv\b", words(pages[name].read_text())))
    assert named and [file for file in named if not (pages[name].parent / file).exists()] == []


def test_it_is_written_again_as_far_as_an_unfinished_or_older_run_got(pages, tmp_path, capsys):
    """Without a result, and without what earlier versions did not write; a damaged file is a sentence."""
    run = shutil.copytree(pages["nested adapters"].parent, tmp_path / "run")
    for name in ("result.json", "report.html", "per_class.csv"):
        (run / name).unlink()
    manifest = json.loads((run / "manifest.json").read_text())
    for key in ("method", "images_per_class", "finished"):
        del manifest[key]
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert evaluation.main(["--run", str(run), "--report"]) == 0
    assert f"wrote {run / 'report.html'}" in capsys.readouterr().out
    text = words((run / "report.html").read_text())
    assert "unfinished" in text and "Final numbers" not in text and "most taken for" not in text
    (run / "result.json").write_text("{}")
    assert evaluation.main(["--run", str(run), "--report"]) == 2
    assert "result.json is damaged" in capsys.readouterr().err


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason=f"no browser: {', '.join(BROWSERS)}")
def test_a_browser_shows_every_page_whole(pages, tmp_path):
    """On desktop and phone no image is missing, nothing is too wide, and the console stays empty."""
    write(tmp_path, table_of_runs())
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    for number, page in enumerate([*pages.values(), tmp_path / "report.html"]):
        source, probed = page.read_text(), tmp_path / f"page{number}.html"
        probed.write_text(source.replace("</body>", f"{PROBE}</body>"))
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
        for width in (1280, 500):
            command = [browser, *options, f"--window-size={width},900", probed.as_uri()]
            shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
            found = json.loads(re.search("<title>(.*?)</title>", shown.stdout)[1])
            assert found == {"images": source.count("<img "), "broken": 0, "wide": 0}, page
            assert "CONSOLE" not in shown.stderr
