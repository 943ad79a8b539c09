"""The report page: what it says, what it must not do, and what a reader meets in a browser."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from tiny import save, text_file

import assay
from assay.model.errors import InputError
from assay.model.files import save_note
from assay.report.page.facts import cells, read
from assay.report.page.render import page


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    model, text = save("llama", folder / "model"), text_file(folder)
    assay.compress(model, folder / "out", bits=5.0, calibration=text, tokens=1024, window=32)
    return folder / "out"


def embedded(html: str) -> dict:
    return json.loads(re.search(r'id="facts">(.*?)</script>', html, re.S)[1])


def test_the_page_lies_beside_every_result_and_needs_no_network(result: Path) -> None:
    html = (result / "assay" / "report.html").read_text()
    assert html == page(read(result))
    assert not re.findall(r"(?:src|href)\s*=|url\(|@import|fetch\(", re.sub(r'id="plotly">.*?</script>', "", html, flags=re.S))


def test_the_map_adds_up_to_the_plan_and_the_ledger_to_the_files(result: Path) -> None:
    facts, shown = read(result), embedded((result / "assay" / "report.html").read_text())
    blocks, roles, found = cells(facts.rows)
    assert len(found) <= len(blocks) * len(roles)
    assert sum(c["damage"] for c in shown["cells"]) == pytest.approx(sum(r.damage for r in facts.rows))
    planned = {e.tensor: e for e in facts.ledger}
    assert {r.site: r.after for r in facts.rows} == {r.site: planned[r.site].bytes_after for r in facts.rows}
    assert sum(row[5] for row in shown["ledger"]) == facts.after
    assert {row[0] for row in shown["ledger"]} == set(planned)


def test_verify_turns_the_promise_into_a_verdict(result: Path) -> None:
    assert "Not measured on test text yet" in page(read(result))
    other = result.parent / "other.txt"
    other.write_text(" ".join(reversed(text_file(result.parent).read_text().split())))
    verdict = assay.verify(result, result.parent / "model", text=other, tokens=512, window=32)
    html = (result / "assay" / "report.html").read_text()
    assert f"on {verdict['tokens']:,} tokens" in html
    shutil.copytree(result, result.parent / "tight")
    notes = result.parent / "tight" / "assay" / "verdict.json"
    save_note(notes, verdict | {"passed": False, "max_loss": 1e-9})
    assert 'class="verdict bad"' in page(read(result.parent / "tight"))


def test_names_and_reasons_are_text_and_never_markup(result: Path, tmp_path: Path) -> None:
    evil = tmp_path / "out"
    shutil.copytree(result, evil)
    ledger = evil / "assay" / "ledger.json"
    rows = json.loads(ledger.read_text())
    rows[0]["reason"] = "</script><script>alert(1)</script>"
    ledger.write_text(json.dumps(rows))
    with pytest.raises(InputError, match=r"ledger\.json: not as it was written"):
        read(evil)
    (evil / "assay" / "SHA256SUMS").unlink()
    html = page(read(evil))
    assert "alert(1)</script>" not in html
    assert embedded(html)["ledger"][0][3] == rows[0]["reason"]


@pytest.mark.parametrize("damage", ["missing", "not JSON", "other columns"])
def test_a_damaged_result_is_refused_in_one_line(result: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(result, tmp_path / "out")
    ledger = tmp_path / "out" / "assay" / "ledger.json"
    match damage:
        case "missing":
            ledger.unlink()
        case "not JSON":
            ledger.write_text("[{")
        case _:
            ledger.write_text('[{"tensor": "a"}]')
    with pytest.raises(InputError, match="damaged"):
        read(tmp_path / "out")
    with pytest.raises(InputError, match="assay compress wrote"):
        read(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="Debian's browser")
def test_in_a_browser_the_keyboard_walks_the_map_and_the_search_finds(result: Path, browser) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.get((result / "assay" / "report.html").as_uri())
    first, second = browser.find_elements(By.CSS_SELECTOR, "#map td[data-cell]")[:2]
    first.send_keys(Keys.ARROW_RIGHT)
    assert browser.switch_to.active_element == second
    told = browser.find_element(By.ID, "cell").text
    cell = embedded(page(read(result)))["cells"][int(second.get_attribute("data-cell"))]
    assert told.startswith(f"{cell['name']}: {cell['levels']}") and told.endswith(cell["why"])
    browser.find_element(By.ID, "find").send_keys("layernorm")
    rows = browser.find_elements(By.CSS_SELECTOR, "#ledger tbody tr")
    assert rows and all("layernorm" in row.text for row in rows)
    before = second.text
    browser.find_element(By.CSS_SELECTOR, "input[value=bytes]").click()
    assert second.text != before and second.text.endswith("B")
    for width in (400, 1600):
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        )
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.get_log("browser") == []
