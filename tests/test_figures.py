"""The figures: true scale on paper, the same bytes every time, readable without colour, and proof against odd input."""
import re
import warnings
from io import BytesIO

import matplotlib
import numpy as np
import pytest
from PIL import Image

from evaluation import charts, figures

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
KNOWN = {"value": 0.8, "low": 0.7, "high": 0.9}
SCORES = np.random.default_rng(0).lognormal(size=60)
LABELS = np.arange(60) % 2


@pytest.fixture(autouse=True)
def warnings_are_errors():
    """A reader of the report should not have to wonder about a warning, so no figure may give one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def example(leads=12, **other):
    """A simulated record: a beat of 1.2 mV a second in every lead, and a stretch marked in lead 2."""
    time = np.arange(4800) / 500
    signal = np.repeat(1.2 * np.exp(-(((time % 1) - 0.5) / 0.02) ** 2)[:, None], leads, axis=1)
    truth = np.zeros((4800, leads), np.uint8)
    truth[2050:2500, min(1, leads - 1)], truth[:1000, 0] = 1, 255
    return figures.Example(**{"title": "A record", "unit": "mV", "lead_names": (LEADS * 2)[:leads], "signal": signal,
                              "restored": 0.8 * signal, "truth": truth, "scores": (0.2 * signal) ** 2, **other})


def curves(count=2):
    """ROC and precision-recall curves of several series, the last without areas."""
    grid = np.linspace(0, 1, 21)
    full = {"fpr": grid, "tpr": grid ** 0.5, "tpr_low": grid, "tpr_high": grid ** 0.3, "recall": grid,
            "precision": 1 - grid / 2, "precision_low": 0.9 - grid / 2, "precision_high": 1 - grid / 3,
            "auroc": KNOWN, "average_precision": KNOWN}
    bare = {**full, "auroc": {"value": float("nan")}, "average_precision": None}
    return {f"series {number}": full if number < count - 1 else bare for number in range(count)}


def history(epochs, **aurocs):
    """A training of so many epochs."""
    return [{"epoch": epoch, "loss": 1 / epoch - 1, "loss_global": 0.5 / epoch - 1, "loss_local": 0.4 / epoch,
             "loss_trend": 0.1 / epoch, "lr": 1e-4, "val_auroc": "", "test_auroc": None, **aurocs}
            for epoch in range(1, epochs + 1)]


DRAWINGS = {
    "record": lambda: figures.draw_record(example()),
    "detection_curves": lambda: charts.draw_detection_curves(curves(), prevalence=0.6),
    "score_histograms": lambda: charts.draw_score_histograms(
        {"clean": SCORES, "paper": SCORES - 1}, LABELS, {"clean": {"youden": 1.0, "sensitivity_90": 0.5}}),
    "groups": lambda: charts.draw_group_aurocs({"women (n = 9)": {"clean": KNOWN, "paper": KNOWN}}, "By sex"),
    "learning_curves": lambda: charts.draw_learning_curves(history(3, val_auroc=0.7, test_auroc=0.6)),
}


def test_files_have_their_true_size_and_the_same_bytes():
    """Each figure is a PNG and a PDF of the size that it is printed at, and drawing it again gives the same bytes.

    Neither matplotlib's settings of the caller change, nor do they change the figure.
    """
    before = dict(matplotlib.rcParams)
    packed = figures.pack(DRAWINGS["groups"]())
    assert dict(matplotlib.rcParams) == before and list(packed) == ["png", "pdf"]
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9, "savefig.dpi": 30, "savefig.bbox": "tight"}):
        assert figures.pack(DRAWINGS["groups"]()) == packed
    for png, size in ((packed["png"], (1190, 247)), (figures.pack(DRAWINGS["record"]())["png"], (1855, 854))):
        with Image.open(BytesIO(png)) as image:
            assert image.size == size and image.info["dpi"] == pytest.approx((177.8, 177.8), abs=0.01)
    box = re.search(rb"/MediaBox \[ ?0 0 ([\d.]+) ([\d.]+)", packed["pdf"])
    assert [float(points) / 72 * 25.4 for points in box.groups()] == pytest.approx((170, 35.4), abs=0.01)


def test_ecg_grid_is_true_to_scale():
    """A second is 25 mm on paper and a millivolt 10 mm, in every lead; the squares are 1 and 5 mm."""
    signal = np.zeros((4800, 12))
    signal[2300, 4] = 3.3                                   # one row is taller than the others
    figure = figures.draw_record(example(signal=signal))
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in panels] == list(LEADS)
    for axes in panels:
        paper = axes.transData.transform([(5, 0), (6, 1), (5.04, 0.1), (5.2, 0.5)]) / figure.dpi * 25.4
        assert paper[1:] - paper[0] == pytest.approx(np.array([(25, 10), (1, 1), (5, 5)]), rel=1e-4)
        box = axes.get_window_extent()
        assert box.width / figure.dpi * 25.4 == pytest.approx(60, rel=1e-4)
        tall = 40 if axes.get_title(loc="left") in ("II", "aVL", "V2", "V5") else 20
        assert box.height / figure.dpi * 25.4 == pytest.approx(tall, rel=1e-4)
        steps = sorted({round(np.diff([path.vertices[0, 0] for path in lines.get_paths()])[0] * 25, 3)
                        for lines in axes.collections[:4:2]})
        assert steps == [1, 5]


def test_leads_and_scores_stand_where_they_belong():
    """Columns of three leads, the same time and colour scale in all, each strip with its own lead's scores."""
    record = example()
    record.scores[:, 11] = 7
    figure = figures.draw_record(record, window=(2000, 3200))
    panels, strips = figure.axes[:24:2], figure.axes[1:24:2]
    legend = {text.get_text(): line.get_color() for text, line in zip(*(getattr(figure.legends[0], name)() for name in (
        "get_texts", "get_lines")))}
    assert len({round(axes.get_position().x0, 6) for axes in panels}) == 4
    assert all(axes.get_position().x0 == pytest.approx(panels[lead // 3 * 3].get_position().x0)
               for lead, axes in enumerate(panels))
    for lead, (axes, strip) in enumerate(zip(panels, strips)):
        assert axes.get_xlim() == strip.get_xlim() == pytest.approx((4.2, 6.6))
        np.testing.assert_array_equal(strip.images[0].get_array()[0], record.scores[2000:3200, lead])
        assert strip.images[0].get_clim() == (0, np.percentile(record.scores, 99))
        for line, values, name in zip(axes.lines, (record.signal, record.restored), ("ECG", "restored"), strict=True):
            np.testing.assert_array_equal(line.get_ydata(), values[2000:3200, lead])
            assert line.get_color() == legend[name]
    marked = panels[1].collections[4].get_paths()[0].vertices[:, 0]
    assert (marked.min(), marked.max()) == pytest.approx((0.2 + 2050 / 500, 0.2 + 2500 / 500))


def test_rare_differences_have_one_scale_for_all_records():
    """The share of normals is shown from usual to 1 in 1,000, whatever the record holds."""
    for scores in (0.5, 40):
        figure = figures.draw_record(example(rare=True, scores=np.full((4800, 12), scores)))
        assert {strip.images[0].get_clim() for strip in figure.axes[1:24:2]} == {(0.3, 3)}
    ticks = [tick.get_text() for tick in figure.axes[-1].get_xticklabels()]
    assert ticks == ["usual", "1 in 10", "1 in 100", "1 in 1,000"]
    assert any("how rare" in text.get_text() for text in figure.texts)


def test_window_shows_what_is_marked():
    """The default window is the one with the most marked points, then the most annotated ones, then the first."""
    truth = np.zeros((4800, 12), np.uint8)
    assert figures.marked_window(truth) == (0, 1200)
    truth[:3000] = 255
    assert figures.marked_window(truth) == (3000, 4200)
    truth[2500:2510, 3], truth[500:505, 3] = 1, 1
    start, stop = figures.marked_window(truth)
    assert (start, stop) == (2500, 3700)
    assert figures.marked_window(truth[:700]) == (0, 700)


def test_unit_is_told():
    """Normalised signals do not claim a millivolt scale, and traces that do not fit are said to be cut off."""
    first, second = (" ".join(text.get_text() for text in figures.draw_record(record).texts) for record in (
        example(unit="normalised"), example(signal=np.eye(4800, 12, -2100) * 40)))
    assert "no mV scale" in first and "10 mm/mV" not in first and "cut off" not in first
    assert "10 mm/mV" in second and "cut off at 8 cm" in second


EMPTY = {"value": None, "low": None, "high": float("nan")}
EDGE_CASES = {
    "flat leads": lambda: figures.draw_record(example(**dict.fromkeys(("signal", "restored", "scores"),
                                                                      np.zeros((4800, 12))))),
    "nothing annotated or restored": lambda: figures.draw_record(example(
        truth=np.full((4800, 12), 255, np.uint8), restored=np.full((4800, 12), np.nan),
        scores=np.full((4800, 12), np.nan))),
    "an artefact of 1000 mV": lambda: figures.draw_record(example(signal=np.eye(4800, 12, -2100) * 1000)),
    "one lead": lambda: figures.draw_record(example(1)),
    "fifteen leads": lambda: figures.draw_record(example(15)),
    "ten curves": lambda: charts.draw_detection_curves(curves(10), prevalence=0.0),
    "constant scores": lambda: charts.draw_score_histograms({"a": np.full(60, 0.3)}, LABELS, {}),
    "no abnormal record": lambda: charts.draw_score_histograms(
        {"a": SCORES, "b": np.zeros(60), "c": -SCORES}, np.zeros(60), {"a": {"youden": float("nan")}, "b": None}),
    "no interval": lambda: charts.draw_group_aurocs(
        {"one": {"clean": {"value": 0.2, "low": None, "high": float("nan")}, "paper": EMPTY}, "two": {"paper": KNOWN}},
        "No interval"),
    "no value at all": lambda: charts.draw_group_aurocs({"one": {"clean": EMPTY}}, "Nothing"),
    "sixty groups": lambda: charts.draw_group_aurocs(
        {f"{'a long diagnosis ' * 5} {row} (n = {row})": {"clean": KNOWN} for row in range(60)}, "Sixty"),
    "one epoch": lambda: charts.draw_learning_curves(history(1, test_auroc=0.5)),
    "text from history.csv": lambda: charts.draw_learning_curves(
        [{key: str(value or "") for key, value in row.items()} for row in history(2)]),
}


@pytest.mark.parametrize("case", [*DRAWINGS, *EDGE_CASES])
def test_text_is_legible_and_on_the_page(case):
    """Unusual results give a figure too, without a warning; no text is below 7 points or over the edge."""
    figure = {**DRAWINGS, **EDGE_CASES}[case]()
    sizes = [text.get_size() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]
    assert sizes and min(sizes) >= 7
    figure.draw_without_rendering()
    if case not in ("sixty groups", "an artefact of 1000 mV", "fifteen leads"):
        box, page = figure.get_tightbbox(), figure.get_size_inches()
        assert box.x0 >= -0.01 and box.y0 >= -0.01 and box.x1 <= page[0] + 0.01 and box.y1 <= page[1] + 0.01


def test_groups_are_sorted_and_hollow_without_interval():
    """The best group of the first series stands on top, one without a value at the bottom; no interval, no filling."""
    axes = charts.draw_group_aurocs({"low": {"clean": {**KNOWN, "value": 0.1}}, "none": {"clean": EMPTY},
                                     "high": {"clean": {**KNOWN, "low": None}}}, "Order").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["none", "low", "high"]
    markers = {line.get_xdata()[0]: line.get_markerfacecolor() for line in axes.lines
               if line.get_marker() == "o" and len(line.get_xdata()) == 1}
    assert markers[0.8] == "white" and markers[0.1] == figures.BLACK
    assert axes.get_xlim() == (0.1, 1)


def test_best_epoch_is_of_the_validation():
    """The star marks the best epoch on the validation records, not on the test set."""
    rows = history(4)
    for row, (validation, test) in zip(rows, [(0.5, 0.9), ("", 0.9), (0.8, 0.6), (0.7, 0.95)]):
        row.update(val_auroc=validation, test_auroc=test)
    star, = (line for line in charts.draw_learning_curves(rows).axes[1].lines if line.get_marker() == "*")
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (3, 0.8)
    assert star.get_label() == "best validation: 0.800, epoch 3"
