"""The report as one HTML file, looked at by a browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fl_bgmd.simulations import write_report
from fl_bgmd.strategies import GMD, RobustResult, Verdict
from simulations.cli import main
from simulations.config import defaults
from simulations.experiment import RunResult, evaluate_saved
from simulations.grid import InProcessGrid
from simulations.report.page import write_page

pytest.importorskip("plotly", reason="plotly is not installed")
ROUNDS, CLIENTS = 6, 10
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
SEEN = """<script>
addEventListener("error", event => document.title = "FAILED " + event.message);
addEventListener("load", () => setTimeout(() => {
  const map = document.getElementById("map").data;
  document.body.dataset.seen = JSON.stringify({
    cells: map[0].z.flat().length,
    scale: [map[0].zmin, map[0].zmax],
    known: map[0].z.flat().filter(value => value !== null).length,
    marks: Object.fromEntries(map.slice(1).map(trace => [trace.name, trace.x.length])),
    wide: document.documentElement.scrollWidth,
    paper: getComputedStyle(document.body).backgroundColor,
  });
}, 300));
</script>"""


def run_of(seed: int) -> RunResult:
    config = defaults() | {
        "num-clients": CLIENTS,
        "attack": "nan",
        "byzantine-fraction": 0.2,
        "byzantine-selection": "fixed",
        "seed": seed,
    }
    verdicts = [
        Verdict(r, 2**63 + c, c, "non-finite")
        if c == 3
        else Verdict(r, 2**63 + c, c, norm=1.0, distance=0.5, weight=1 / 9)
        for r in range(1, ROUNDS + 1)
        for c in range(CLIENTS)
    ]
    rounds = [
        {"round": r, "accuracy": 0.1 * r, "class-accuracies": [0.1 * r] * 10, "bytes-up": 4000}
        for r in range(ROUNDS + 1)
    ]
    return RunResult(config, rounds, error="</script><b>", verdicts=verdicts)


def page(folder: Path) -> Path:
    runs = [("gmd under nan", f"gmd under nan, seed {seed}", run_of(seed)) for seed in range(2)]
    return write_page(folder, runs, title="A <study>", table=[["", "nan"], ["gmd", "60.0"]])


def told_by(text: str) -> dict[str, Any]:
    [data] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    found: dict[str, Any] = json.loads(data)
    return found


def test_the_file_needs_no_network_and_its_data_cannot_end_the_script(tmp_path: Path) -> None:
    text = page(tmp_path).read_text()
    assert "A &lt;study&gt;" in text
    assert not re.search(r"<(script|link)[^>]+(src|href)=\"(http|//)", text)
    told = told_by(text)
    assert told["runs"][0]["error"] == "</script><b>"
    assert told["runs"][0]["map"]["nodes"][0] == str(2**63)
    assert told["runs"][0]["reasons"] == {"non-finite": ROUNDS}


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium to show the page in")
@pytest.mark.parametrize("width", [1100, 390])
def test_a_browser_draws_every_cell_without_an_error(tmp_path: Path, width: int) -> None:
    path = page(tmp_path)
    path.write_text(path.read_text().replace("<script>", f"{SEEN}<script>", 1))
    assert BROWSER is not None
    done = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
            *(f"--window-size={width},900", f"--user-data-dir={tmp_path / 'browser'}"),
            *("--virtual-time-budget=5000", "--dump-dom", path.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert not re.findall(r".*:CONSOLE.*", done.stderr)
    assert "<title>FAILED" not in done.stdout
    [seen] = re.findall(r'data-seen="([^"]*)"', done.stdout)
    found = json.loads(seen.replace("&quot;", '"'))
    assert found["cells"] == ROUNDS * CLIENTS
    assert found["known"] == ROUNDS * (CLIENTS - 1)
    assert found["scale"] == [0, pytest.approx(1 / 9)]  # equal weights have one too
    assert found["marks"] == {"non-finite": ROUNDS, "hostile": 2 * ROUNDS}
    assert found["wide"] <= max(width, 500)


def test_a_run_leaves_its_models_and_verdicts(tmp_path: Path) -> None:
    arguments = ["run", "--strategy=gmd", "--num-server-rounds=2", "--dataset=mnist"]
    arguments += ["--model=tiny-cnn", "--local-steps=1", "--backend=inprocess"]
    assert main([*arguments, f"--folder={tmp_path}"]) == 0
    [folder] = [path.parent for path in tmp_path.rglob("run.json")]
    result = RunResult.read(folder)
    assert len(result.verdicts) == 2 * 10
    assert evaluate_saved(folder).accuracy == pytest.approx(result.final_accuracy, abs=1e-3)
    assert evaluate_saved(folder, "best").accuracy == pytest.approx(result.best_accuracy, abs=1e-3)
    assert (tmp_path / "report.html").is_file()
    assert main(["evaluate", str(folder), "--model", "best"]) == 0
    assert main(["report", str(folder)]) == 0
    assert main(["evaluate", str(tmp_path)]) == 2


@pytest.fixture
def own_result() -> RobustResult:
    """Run two rounds of an app of somebody's own, of whose four clients one fails."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 3:
            raise RuntimeError("lost")
        metrics = MetricRecord({"num-examples": 1})
        content = RecordDict({"arrays": ArrayRecord([np.ones(3)]), "metrics": metrics})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 1, "eval_acc": 0.5})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    strategy = GMD(fraction_evaluate=1.0)
    return strategy.start(InProcessGrid(app, 4, {}), ArrayRecord([np.zeros(3)]), num_rounds=2)


def test_an_app_of_your_own_has_the_report_too(own_result: RobustResult, tmp_path: Path) -> None:
    path = write_report(
        own_result, tmp_path / "new", accuracy="eval_acc", config={"lr": 0.1}, title="My <run>"
    )
    assert path == tmp_path / "new" / "report.html"
    assert "My &lt;run&gt;" in path.read_text()
    told = told_by(path.read_text())
    assert told["curves"][0]["y"] == [50.0, 50.0]
    [run] = told["runs"]
    assert run["reasons"] == {"error": 2}
    assert run["versions"]["lr"] == "0.1"
    assert run["map"]["labels"] == [f"node {number}" for number in (1, 2, 3, 4)]


def test_long_ids_of_nodes_are_cut_where_that_names_one_node(tmp_path: Path) -> None:
    ids = (7 * 10**18 + 5, 8 * 10**18 + 123456, 9 * 10**18 + 123456)
    run = RunResult(defaults(), verdicts=[Verdict(1, node) for node in ids])
    told = told_by(write_page(tmp_path, [("a", "b", run)], title="").read_text())
    assert told["runs"][0]["map"]["labels"] == ["node …000005", f"node {ids[1]}", f"node {ids[2]}"]


def test_the_report_of_an_app_without_an_accuracy_has_no_curve(
    own_result: RobustResult, tmp_path: Path
) -> None:
    text = write_report(own_result, tmp_path).read_text()
    assert told_by(text)["curves"][0]["y"] == []
    with pytest.raises(ValueError, match=r"accuracy is 'acc'; allowed: .*clients-eval_acc"):
        write_report(own_result, tmp_path, accuracy="acc")
