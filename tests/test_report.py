"""The report: what stands on the page, against the log; in a real browser; several runs; hostile text; the limit."""

import html
import http.server
import json
import math
import os
import re
import shutil
import threading

import numpy as np
import pytest
from conftest import TINY
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

import evaluate
from data import Example
from evaluate import Gallery, found_rightly, points_of, read_run, report_page, task_gallery, tick_values

WIDE, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """A pre-training with two validations, and a fine-tuning that begins with it."""
    import finetune
    import pretrain
    folder = tmp_path_factory.mktemp("runs")
    assert pretrain.main([*TINY, "--data", world, "--output", str(folder / "a"), "--steps", "4", "--val-every", "2",
                          "--device", "cpu"]) == 0
    assert finetune.main(["--task", "vqa", "--mini", "--init", str(folder / "a/last.pt"), "--data", world, "--output",
                          str(folder / "vqa"), "--steps", "2", "--log-every", "1", "--minutes", "0", "--workers", "0",
                          "--batch-size", "8", "--device", "cpu"]) == 0
    shutil.copytree(folder / "a", folder / "b")
    return folder


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_training_run_writes_its_report(runs):
    page = (runs / "a/report.html").read_text()
    assert len(page.encode()) < 5_000_000
    last = [line for line in log(runs / "a") if "val_AP50" in line][-1]
    for key, value in last.items():
        if key.startswith("val_"):
            row = re.search(rf"<tr><th scope=row>{key[4:]}</th><td[^>]*><b>([\d.]+)</b> <small>blind ([\d.]+)", page)
            assert row, key
            assert float(row[1]) == pytest.approx(value, abs=5e-4)
            assert float(row[2]) == pytest.approx(last[f"blind_{key[4:]}"], abs=5e-4)
    assert html.escape("python pretrain.py --mini") in page and "--batch-size" in page and "PyTorch" in page
    assert page.count("<polyline") >= 8 + 10  # the losses and the measures
    for kind in ("objects", "caption", "hidden word", "sentence and picture"):
        assert f'data-kinds="{kind}"' in page


def test_a_fine_tuning_writes_its_report_with_blind_and_constant_answers(runs):
    page, lines = (runs / "vqa/report.html").read_text(), log(runs / "vqa")
    last = [line for line in lines if "val_overall" in line][-1]
    assert 0 <= last["blind_overall"] <= 100 and "habit_overall" in lines[0]
    row = re.search(r"<th scope=row>overall</th><td[^>]*><b>([\d.]+)</b> <small>blind ([\d.]+)</small> "
                    r"<small>constant ([\d.]+)", page)
    for found, value in zip(row.groups(), (last["val_overall"], last["blind_overall"], lines[0]["habit_overall"])):
        assert float(found) == pytest.approx(value, abs=0.051)


def test_several_runs_on_one_page(runs, tmp_path, capsys):
    assert evaluate.main(["--report", str(runs / "a"), str(runs / "b"), "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out == os.path.relpath(tmp_path / "report.html") + "\n"
    page = (tmp_path / "report.html").read_text()
    assert str(runs / "a") in page and str(runs / "b") in page and 'class="run1 "' in page
    cards = (runs / "a/report.html").read_text().count('<article class="card"')
    assert page.count('<article class="card"') == cards > 10  # the same examples: once, with both answers
    assert page.count('class="side answer"') == 2 * cards


def test_without_output_the_page_is_where_the_runs_are(runs, tmp_path, capsys):
    for name in ("a", "b"):
        shutil.copytree(runs / "a", tmp_path / "runs" / name)
    assert evaluate.main(["--report", str(tmp_path / "runs/a"), str(tmp_path / "runs/b")]) == 0
    assert capsys.readouterr().out == os.path.relpath(tmp_path / "runs/report.html") + "\n"
    assert evaluate.main(["--report", str(tmp_path / "runs/a"), "--output", ""]) == 2  # a variable that was not set
    assert "--output: is empty" in capsys.readouterr().err


def test_one_report_is_written_anew(runs, tmp_path):
    shutil.copytree(runs / "a", tmp_path / "a")
    os.remove(tmp_path / "a/report.html")
    with open(tmp_path / "a/log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # a run that was cut short while it wrote
    assert evaluate.main(["--report", str(tmp_path / "a")]) == 0
    assert (tmp_path / "a/report.html").read_text().count("<polyline") >= 18


@pytest.mark.parametrize("spoil,says", [
    (lambda folder: os.remove(folder / "log.jsonl"), "no log.jsonl in it"),
    (lambda folder: (folder / "log.jsonl").write_text(""), "has no line of a run yet")])
def test_no_run_no_report(runs, tmp_path, capsys, spoil, says):
    shutil.copytree(runs / "a", tmp_path / "a")
    spoil(tmp_path / "a")
    assert evaluate.main(["--report", str(tmp_path / "a")]) == 2
    wrong = capsys.readouterr().err
    assert says in wrong and wrong.count("\n") == 1 and str(tmp_path / "a") in wrong


def test_a_damaged_report_json_is_no_end(runs, tmp_path):
    shutil.copytree(runs / "a", tmp_path / "a")
    (tmp_path / "a/report.json").write_text('{"gallery": [')
    assert evaluate.main(["--report", str(tmp_path / "a")]) == 0
    assert "<polyline" in (tmp_path / "a/report.html").read_text()


@pytest.mark.parametrize("key,value", [
    ("gallery", 7), ("gallery", [{}]), ("pictures", {"a": {"size": [0, 1], "jpeg": ""}}), ("kind", []),
    ("commands", [None]), ("versions", ["1"]), ("settings", "x"), (None, [])])
def test_a_report_json_of_something_else_is_no_end(runs, tmp_path, key, value):
    shutil.copytree(runs / "a", tmp_path / "a")
    kept = json.loads((tmp_path / "a/report.json").read_text())
    (tmp_path / "a/report.json").write_text(json.dumps(value if key is None else {**kept, key: value}))
    assert evaluate.main(["--report", str(tmp_path / "a")]) == 0
    page = (tmp_path / "a/report.html").read_text()
    assert "<polyline" in page and '<article class="card"' not in page


def test_lines_of_a_log_that_no_run_writes_are_left_out(runs, tmp_path):
    shutil.copytree(runs / "a", tmp_path / "a")
    odd = [{"step": 10 ** 400}, {"step": True}, {"step": -1}, {"step": 4, "blind_examples": "x", "loss": 10 ** 400},
           {"step": 4, "\ud800": 1}]
    with open(tmp_path / "a/log.jsonl", "a") as file:
        file.writelines(f"{json.dumps(line)}\n" for line in odd)
    assert evaluate.main(["--report", str(tmp_path / "a")]) == 0
    page = (tmp_path / "a/report.html").read_text()
    assert "pre-training, step 4" in page and page.count("<polyline") >= 18


# ----------------------------------------------------------------------------------------------------------------
# What the page is made of


def test_long_curves_are_thinned_and_keep_their_course():
    lines = [{"step": s, "loss": math.exp(-s / 50_000)} for s in range(50, 1_100_000, 50)]
    points = points_of({"lines": [*lines, {"step": 9, "loss": math.nan}, {"step": 9, "loss": "x"}]}, "loss")
    assert len(points) <= 300
    for step, value in points:
        assert value == pytest.approx(math.exp(-step / 50_000), rel=0.01)


@pytest.mark.parametrize("low,high", [(0, 1), (0, 100), (-0.3, 0.2), (0, 7e-5), (3, 3.01), (0, 1_100_000)])
def test_ticks_are_few_and_inside(low, high):
    ticks = tick_values(low, high)
    assert 2 <= len(ticks) <= 6 and all(low - 1e-9 <= t <= high * (1 + 1e-9) for t in ticks)


def test_ticks_of_a_logarithmic_scale():
    assert tick_values(0.03, 20, log=True) == pytest.approx([0.1, 1, 10])
    assert tick_values(0.5, 6, log=True) == pytest.approx([0.5, 1, 2, 5])


def test_boxes_are_judged_by_name_and_overlap():
    a, b = [0.1, 0.1, 0.2, 0.2, "dog"], [0.5, 0.5, 0.2, 0.2, "cat"]
    assert found_rightly([a, b], [a, b]) == 1 and found_rightly([], []) == 1 and found_rightly([a], []) == 0
    assert found_rightly([a], [[*a[:4], "cat"]]) == 0             # another name
    assert found_rightly([a], [[0.1, 0.1, 0.2, 0.11, "dog"]]) == 1   # 55 % overlap
    assert found_rightly([a], [[0.1, 0.1, 0.2, 0.09, "dog"]]) == 0   # 45 %
    assert found_rightly([a], [a, a]) == pytest.approx(2 / 3)      # one of them is too much
    assert found_rightly([a, b], [a]) == pytest.approx(2 / 3)


@pytest.fixture
def files(tmp_path):
    for n in range(3):
        Image.effect_noise((400, 300), 90).convert("RGB").save(tmp_path / f"{n}.jpg")
    return [str(tmp_path / f"{n}.jpg") for n in range(3)]


def test_items_of_each_task(files):
    people = ["two"] * 6 + ["2", "2", "three", "three"]
    item, = task_gallery("vqa", ["two"], [Example(7, (files[0],), "how many?", answers=people)], {}).items
    assert item["score"] == 1 and item["kinds"] == ["number"] and item["answer"]["lines"] == ["two"]
    assert item["truth"]["lines"][0] == "6 of 10: two"

    item, = task_gallery("nlvr2", ["True"], [Example("dev-1-0-0", tuple(files[:2]), "both", 0)], {}).items
    assert item["score"] == 0 and item["kinds"] == ["false statements"]
    assert item["pictures"] == [Gallery().picture(file) for file in files[:2]] and len(set(item["pictures"])) == 2

    two = [Example(n, (files[n],), sentences=(f"a {word} dog", f"the {word} dog runs")) for n, word in enumerate(
        ("red", "blue"))]
    items = task_gallery("caption", ["a red dog", "a green cat"], two, {}).items
    assert [i["answer"]["lines"] for i in items] == [["a red dog"], ["a green cat"]]
    assert items[0]["score"] > items[1]["score"]

    rows = [np.array([0.9, 0.1, 0.5, 0.2], np.float32), np.array([0.95, 0.2, 0.1, 0.3], np.float32)]
    items = task_gallery("flickr30k", rows, two, {}).items
    assert [i["says"] for i in items] == ["rank 2 of 2", "rank 1 of 4", "rank 2 of 2", "rank 2 of 4"]
    keys = [Gallery().picture(file) for file in files]
    assert items[0]["answer"]["pictures"] == [keys[1], keys[0]] and items[0]["truth"]["pictures"] == [keys[0]]

    boxes = (np.array([[0.5, 0.5, 0.2, 0.4]], np.float32), np.array([1]))
    item, = task_gallery("detection", [[(1, (160, 90, 80, 120), 0.9), (0, (0, 0, 9, 9), 0.4)]],
                         [Example(1, (files[0],), target=boxes, size=(300, 400))], {"coco": ["cat", "dog"]}).items
    assert item["score"] == 1 and item["kinds"] == ["dog"]
    assert item["truth"]["boxes"][0] == pytest.approx([0.4, 0.3, 0.2, 0.4, "dog"])
    assert item["answer"]["boxes"] == [[0.4, 0.3, 0.2, 0.4, "dog"]]


def run_of(gallery, name="run", lines=({"step": 1, "loss": 2.0},)):
    return {"name": name, "lines": list(lines), "kind": "vqa", "commands": ["python x"], "settings": {"lr": 1},
            "versions": {}, "pictures": gallery.pictures, "gallery": gallery.items}


def test_a_page_is_never_longer_than_the_limit(files):
    gallery = Gallery()
    for n in range(64):
        gallery.pictures[str(n)] = {"size": [320, 240], "jpeg": "A" * 200_000}
        gallery.add(["kind"], n / 64, "", f"question {n}", {"lines": ["a"]}, {"lines": ["b"]}, [str(n)])
    page = report_page([run_of(gallery)])
    assert 1_000_000 < len(page.encode()) <= 5_000_000 and 8 <= page.count("<article") < 64


def test_text_of_others_cannot_become_part_of_the_page(files):
    gallery, bad = Gallery(), '"><script>alert(1)</script><img src=http://x.example/y onerror=alert(2)>'
    gallery.add([bad], 0.5, bad, bad, {"lines": [bad], "boxes": [[0, 0, 1, 1, bad]], "pictures": [
        gallery.picture(files[0])]}, {"lines": [bad]})
    run = run_of(gallery, bad, [{"step": 1, "loss": 1.0, f"val_{bad}": 0.5}, {"step": 2, "loss": 1.0, f"val_{bad}": 1}])
    run |= {"commands": [bad], "settings": {bad: bad}, "versions": {bad: bad}, "kind": bad}
    page = report_page([run])
    assert "<script>alert" not in page and "<img" not in page and page.count("<script>") == 1


def test_braces_are_text(files):
    gallery = Gallery()
    gallery.add(["kind"], 0.5, "", "{{symbols}} and {{lead}}", {"lines": ["{{body}}"]}, {"lines": ["{{other}}"]})
    page = report_page([run_of(gallery)])
    assert all(f"{{{{{name}}}}}" in page for name in ("symbols", "lead", "body", "other"))


def test_bars_of_several_runs_have_one_scale(files):
    runs = [run_of(Gallery(), name, [{"step": 1, "val_CIDEr": value, "blind_CIDEr": 0.43}]) | {"kind": "caption"}
            for name, value in (("runs/model-a", 1.72), ("runs/model-b", 0.86))]
    page = report_page(runs)
    assert re.findall(r"<span style=\"width:([\d.]+)%", page) == ["100.0", "50.0"]
    assert page.count('left:25.0%') == 2 and "runs/model-a" in page and "runs/training" not in page
    runs = [run_of(Gallery(), "vqa", [{"step": 1, "val_number": 8.2, "blind_number": 5.0, "blind_examples": 1000}])]
    page = report_page(runs)
    assert re.findall(r"<span style=\"width:([\d.]+)%", page) == ["8.2"] and "the first 1,000 examples" in page


def test_the_table_has_the_last_validation_of_a_long_run():
    lines = [{"step": s, "val_AP": s / 1000} for s in range(1000)]
    assert "<b>0.999</b>" in report_page([run_of(Gallery(), lines=lines) | {"kind": "detection"}])


# ----------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def browser():
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no Chromium with its chromedriver is installed; .ci/run installs them")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run",
                 "disable-background-networking", "disable-component-update", "disable-sync"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield found
    found.quit()


@pytest.fixture(scope="module")
def site(runs):
    """A server, so that what the page asks for can be counted; it also has the page that compares two runs."""
    assert evaluate.main(["--report", str(runs / "a"), str(runs / "b"), "--output", str(runs / "both")]) == 0
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(runs))

        def end_headers(self):  # a page from the browser's memory would not be counted
            self.send_header("Cache-Control", "no-store")
            super().end_headers()

        def log_message(self, *args):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def visit(browser, url, size=WIDE, dark=False):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {
        "features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]})
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(url)


@pytest.mark.parametrize("size", [WIDE, PHONE])
@pytest.mark.parametrize("page", ["a", "vqa", "both"])
def test_the_page_stands_alone_without_errors(browser, site, page, size):
    asked, url = site[1], f"{site[0]}/{page}/report.html"
    asked.clear()
    visit(browser, url, size)
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    assert {s for s in sent if not s.startswith("data:")} == {url} and asked == [f"/{page}/report.html"]
    wide = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1] == size[0]  # no sideways scrolling on a telephone
    shown = browser.execute_script("""return [...document.querySelectorAll('.chart polyline')].map(line => {
        const box = line.getBoundingClientRect(), plot = line.closest('svg').getBoundingClientRect();
        return [box.width, plot.height, box.left >= plot.left && box.right <= plot.right && box.top >= plot.top
                && box.bottom <= plot.bottom, getComputedStyle(line).stroke]; })""")
    assert shown and all(width > 50 and height > 80 and inside and stroke.startswith("rgb")
                         for width, height, inside, stroke in shown)
    labels = browser.execute_script("return [...document.querySelectorAll('.card:not([hidden]) .picture text')]"
                                    ".map(t => t.getBoundingClientRect().height)")
    assert all(height >= 11 for height in labels)
    drawn = browser.execute_script("""return [...document.querySelectorAll('.card:not([hidden]) .picture')].map(svg =>
        [svg.getBoundingClientRect().width > 40, !!svg.getAttribute('aria-label'),
         !!document.querySelector(svg.querySelector('use').getAttribute('href')).querySelector('image')])""")
    assert drawn and all(map(all, drawn))


def test_filter_and_order(browser, site):
    visit(browser, f"{site[0]}/a/report.html")

    def cards():
        return browser.execute_script("""return [...document.querySelectorAll('.card')].filter(c =>
            c.offsetParent !== null).map(c => [c.dataset.kinds, +c.dataset.score])""")

    def choose(name, value):
        browser.execute_script(f"const s = document.getElementById('{name}'); s.value = arguments[0];"
                               "s.dispatchEvent(new Event('change'))", value)

    every = cards()
    assert [score for _, score in every] == sorted(score for _, score in every)
    kinds = sorted({kind for kind, _ in every})
    assert len(kinds) == 4
    for kind in kinds:
        choose("kind", kind)
        assert cards() == [card for card in every if card[0] == kind]
        assert f"{len(cards())} shown" == browser.find_element("id", "shown").text
    choose("kind", "")
    choose("order", "-1")
    assert [score for _, score in cards()] == sorted((score for _, score in every), reverse=True)


def test_a_long_gallery_comes_in_parts(browser, tmp_path):
    gallery = Gallery()
    for n in range(60):
        gallery.add(["even" if n % 2 == 0 else "odd"], n / 60, "", f"question {n}", {"lines": ["a"]}, {"lines": ["b"]})
    (tmp_path / "page.html").write_text(report_page([run_of(gallery)]))
    visit(browser, f"file://{tmp_path}/page.html", PHONE)

    def state():
        more = browser.find_element("id", "more")
        return browser.find_element("id", "shown").text, more.is_displayed(), browser.execute_script(
            "return [...document.querySelectorAll('.card')].filter(c => c.offsetParent !== null).length")

    assert state() == ("24 of 60 shown", True, 24)
    for expected in (("48 of 60 shown", True, 48), ("60 shown", False, 60)):
        browser.execute_script("document.getElementById('more').click()")
        assert state() == expected
    browser.execute_script("const s = document.getElementById('kind'); s.value = 'odd';"
                           "s.dispatchEvent(new Event('change'))")
    assert state() == ("24 of 30 shown", True, 24)


def test_values_can_be_read_with_the_keyboard(browser, site, runs):
    visit(browser, f"{site[0]}/a/report.html")
    svg = browser.find_element("css selector", '.chart svg[aria-label^="loss: the weighted sum"]')
    browser.execute_script("arguments[0].focus()", svg)
    svg.send_keys(Keys.END)
    says = browser.execute_script("return arguments[0].parentNode.querySelector('.reading').textContent", svg)
    last = points_of(read_run(str(runs / "a")), "loss")[-1]
    step, value = re.fullmatch(r"step (\d+): training ([\d.e+]+)", says).groups()
    assert int(step) == last[0] and float(value) == pytest.approx(last[1], rel=0.02)


def contrast(a, b):
    """WCAG's contrast of two colours "rgb(r, g, b)"."""
    def light(colour):
        parts = [int(v) / 255 for v in re.findall(r"\d+", colour)[:3]]
        return sum(w * (v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4)
                   for w, v in zip((0.2126, 0.7152, 0.0722), parts))
    high, low = sorted((light(a), light(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_in_light_and_dark(browser, site, dark):
    visit(browser, f"{site[0]}/both/report.html", dark=dark)
    found = browser.execute_script("""
        const paper = getComputedStyle(document.body).backgroundColor;
        const texts = 'p, h1, h2, h3, h4, td, th, small, a, label, summary, .key, .chart text';
        return [...document.querySelectorAll(texts)]
            .filter(e => e.textContent.trim() && e.getBoundingClientRect().width).map(e => {
                let b = e, ground = 'rgba(0, 0, 0, 0)';
                for (; b && ground.endsWith(', 0)'); b = b.parentElement)
                    ground = getComputedStyle(b).backgroundColor;
                const style = getComputedStyle(e);
                return [e.tagName + '.' + (e.getAttribute('class') || ''),
                        e.closest('svg') ? style.fill : style.color, ground.endsWith(', 0)') ? paper : ground]; })""")
    assert len(found) > 50
    poor = {(name, colour, ground) for name, colour, ground in found if contrast(colour, ground) < 4.5}
    assert not poor, poor
