"""The book's slider: whole without its script, one size, alternative texts, and bytes within bounds."""

import base64
import io
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
from IPython.display import HTML
from PIL import Image

import lab


def frame(height: float, alt: str = "A bar.", size: tuple[float, float] = (3, 2)):
    figure, ax = plt.subplots(figsize=size)
    ax.bar(0, height)
    return figure, alt


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[HTML]:
    """What is displayed, instead of showing it."""
    outputs: list[HTML] = []
    monkeypatch.setattr(lab, "display", outputs.append)
    return outputs


def frames():
    return {f"{x}": frame(x, f"A bar of height {x}, <so> it is.") for x in (1, 2, 3)}


def test_it_shows_every_frame_with_its_text(shown: list[HTML]):
    lab.slider(frames(), "height & width")
    page = shown[0].data
    texts = [f'alt="A bar of height {x}, &lt;so&gt; it is."' for x in (1, 2, 3)]
    assert [page.count(text) for text in texts] == [1, 1, 1]
    assert page.count("height &amp; width: <b>") == 3
    assert 'aria-label="height &amp; width"' in page


def test_without_its_script_the_ends_stand_there_and_no_dead_slider(shown: list[HTML]):
    lab.slider(frames(), "height")
    page = re.sub(r"<script>.*?</script>", "", shown[0].data, flags=re.DOTALL)
    assert re.findall(r'data-value="(\d)" style="display:(\w+)"', page) == [
        ("1", "block"), ("2", "none"), ("3", "block")
    ]  # fmt: skip
    assert '<input type="range" hidden' in page


def test_pictures_have_a_palette_and_twice_the_pixels(shown: list[HTML]):
    lab.slider(frames(), "height")
    page = shown[0].data
    packed = re.findall(r"data:image/png;base64,([^\"]+)", page)
    pictures = [Image.open(io.BytesIO(base64.b64decode(x))) for x in packed]
    assert {(x.mode, x.size) for x in pictures} == {("P", (600, 400))}
    assert page.count('width="300" height="200"') == 3
    assert not plt.get_fignums(), "shown figures are closed"


def test_it_needs_no_network_and_moves_nothing_by_itself(shown: list[HTML]):
    lab.slider(frames(), "height")
    page = re.sub(r"base64,[^\"]+", "", shown[0].data)
    for forbidden in ("http", 'src="/', "setInterval", "setTimeout", "animation", "transition"):
        assert forbidden not in page


def test_two_sliders_of_a_page_have_two_names_that_do_not_change(shown: list[HTML]):
    lab.slider(frames(), "height")
    lab.slider({"1": frame(1), "2": frame(2)}, "height")
    lab.slider(frames(), "height")
    one, two, again = (re.findall(r'id="(slider-\w+)"', x.data)[0] for x in shown)
    assert one == again != two
    assert shown[0].data == shown[2].data


def test_it_begins_where_it_is_told(shown: list[HTML]):
    lab.slider(frames(), "height", start=2)
    assert 'max="2" step="1" value="2"' in shown[0].data


def noise():
    figure = plt.figure(figsize=(6, 4))
    figure.figimage(np.random.default_rng(0).random((800, 1200)), resize=False)
    return figure, "noise"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: {"1": frame(1), "2": frame(2, size=(4, 2))}, "one size"),
        (lambda: {"1": frame(1), "2": frame(2, alt="")}, "alternative text"),
        (lambda: {"1": noise()}, "more than 150,000"),
    ],
)
def test_what_it_refuses(shown: list[HTML], wrong, said: str):
    with pytest.raises(ValueError, match=said):
        lab.slider(wrong(), "height")
    assert not shown
    plt.close("all")


def test_a_paired_lead_by_hand():
    ours, theirs = np.array([True, True, False, True]), np.array([True, False, False, False])
    ahead, half = lab.paired(ours, theirs)
    assert ahead == 50
    assert half == pytest.approx(1.96 * 100 * np.std([0, 1, 0, 1], ddof=1) / 2)


def test_means_over_draws_are_paired_alike():
    draws = np.array([[True, False], [False, False]])
    assert lab.paired(draws.mean(0), np.zeros(2))[0] == 25
