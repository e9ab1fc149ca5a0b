"""Paired KL on the demo checkpoint, first-order damages, calibration under a clock, the file."""

from __future__ import annotations

import itertools
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hotset.blocks.calibrate import Calibration, Settings
from hotset.blocks.calibrate_text import read_text
from hotset.blocks.families import KINDS
from hotset.blocks.sensitivity import KLMeter
from hotset.blocks.sensitivity_fisher import EVEN_SHARE, first_order, frequencies, smoothed
from hotset.blocks.sensitivity_rank import check_ranks
from hotset.blocks.sensitivity_stats import PairedKL, bootstrap, rank_correlation
from hotset.blocks.sensitivity_table import read_table, shorten, write_table
from hotset.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hotset.blocks.calibrate_text import CalibrationText
    from hotset.blocks.sensitivity_table import SensitivityTable

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo-moe"
SOURCE = Path(sysconfig.get_path("stdlib")) / "argparse.py"
FORMATS = ("int8", "int4", "int2")
TOKENS = 64  # of a window; short, so that tests are


@pytest.fixture(scope="module")
def meter() -> Iterator[KLMeter]:
    made = KLMeter(DEMO, batch_tokens=8 * TOKENS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def text() -> CalibrationText:
    return read_text(DEMO, [SOURCE], window_tokens=TOKENS)


def test_full_precision_is_the_reference_model(meter: KLMeter, text: CalibrationText) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(DEMO), dtype=torch.float32)
    batch = text.check[:2]
    with torch.no_grad():
        expected = model.eval()(input_ids=batch).logits
        assert torch.allclose(meter.logits(batch), expected, atol=1e-3, rtol=1e-4)


def test_no_demotion_is_no_divergence(meter: KLMeter, text: CalibrationText) -> None:
    found = meter.measure({}, text.check[:2])
    assert (found.kl == 0).all()
    assert not found.flips.any()


def test_lossless_is_no_divergence(meter: KLMeter, text: CalibrationText) -> None:
    found = meter.measure(meter.uniform("bf16z", layers=(0, 1)), text.check[:2])
    assert (found.kl == 0).all()


def test_fewer_bits_diverge_more_and_layers_differ(meter: KLMeter, text: CalibrationText) -> None:
    windows = text.check[:8]
    means = [meter.measure(meter.uniform(form), windows).summary().mean for form in FORMATS]
    assert 0 < means[0] < means[1] < means[2]
    first, later = (
        meter.measure(meter.uniform("int2", layers=(layer,)), windows).summary() for layer in (0, 3)
    )
    assert first.lower > 2 * later.upper, "layer 0 is the sensitive one"


def test_measuring_again_gives_the_same(meter: KLMeter, text: CalibrationText) -> None:
    mix = meter.uniform("int4", layers=(2,))
    first, second = (meter.measure(mix, text.check[:8]) for _ in range(2))
    assert (first.kl == second.kl).all()
    assert first.summary() == second.summary()


def test_first_order_is_near_true_kl_where_nothing_follows(
    meter: KLMeter, text: CalibrationText
) -> None:
    windows, last = text.fit[:16], meter.catalog.layers[-1]
    found = first_order(meter, windows, formats=FORMATS)
    for code, form in enumerate(FORMATS[1:], start=1):
        estimate = found.nats[:, -1, :, code].sum() / found.tokens
        true = meter.measure(meter.uniform(form, layers=(last,)), windows).summary().mean
        assert estimate == pytest.approx(true, rel=0.4)
    tokens = windows.numel()
    assert found.tokens == tokens
    assert (found.counts.sum(axis=(0, 2)) == tokens * meter.catalog.top_k).all()
    routing = meter.routing(windows)
    assert all(
        found.counts[:, meter.catalog.layers.index(block.layer), block.index].sum() == count
        for block, count in routing.items()
    )
    assert sum(routing.values()) == found.counts.sum()
    assert (found.nats >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_can_be_measured(kind: str, checkpoints: dict[str, Path]) -> None:
    meter = KLMeter(checkpoints[kind])
    windows = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(1))
    assert (meter.measure({}, windows).kl == 0).all()
    assert meter.measure(meter.uniform("int2"), windows).summary().mean > 0
    found = first_order(meter, windows, formats=("int4", "int2"))
    assert found.nats.shape[:2] == (2, len(meter.catalog.layers))
    assert found.nats[..., 1].sum() > found.nats[..., 0].sum() > 0
    meter.close()


@settings(max_examples=50)
@given(
    hnp.arrays(np.int64, (2, 6), elements=st.integers(0, 500)),
    hnp.arrays(np.float64, (2, 6, 3), elements=st.floats(0, 10)),
)
def test_unused_experts_are_never_free(counts: np.ndarray, damage: np.ndarray) -> None:
    top_k = 2
    counts = counts.astype(np.float64)
    sums = damage * counts[..., None]
    tokens = max(1, int(counts.sum(axis=1).max()) // top_k)
    use = frequencies(counts, tokens=tokens, top_k=top_k)
    nats = smoothed(sums, counts, tokens=tokens, top_k=top_k)
    assert (use >= EVEN_SHARE * top_k / 6 - 1e-12).all()
    assert np.isfinite(nats).all()
    hurt = sums.sum(axis=1) > 1e-9  # [L, F]
    assert (nats.min(axis=1)[hurt] > 0).all()


def test_bootstrap_says_how_sure_a_mean_is() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for seed in range(100):
        values = random.exponential(size=40)
        found = bootstrap(values, seed=seed)
        assert found == bootstrap(values, seed=seed)
        assert found.lower < found.mean < found.upper
        hits += found.lower <= 1.0 <= found.upper
    assert hits >= 80  # 90 % intervals of a skewed mean
    assert bootstrap([1.0]).upper == np.inf
    with pytest.raises(ValueError, match="values"):
        bootstrap([])


def test_pairs_join() -> None:
    one = PairedKL(kl=np.ones((2, 3)), flips=np.zeros((2, 3), dtype=np.bool_))
    two = PairedKL(kl=np.zeros((1, 3)), flips=np.ones((1, 3), dtype=np.bool_))
    found = one.join(two).summary()
    assert (found.windows, found.tokens) == (3, 9)
    assert found.mean == pytest.approx(2 / 3)
    assert found.flip_ratio == pytest.approx(1 / 3)


def clock(step_ns: int) -> Callable[[], int]:
    """Time that passes with every look at it."""
    ticks = itertools.count(0, step_ns)
    return lambda: next(ticks)


def choose(nats: np.ndarray, most: float) -> np.ndarray:
    """Everything in int4 as soon as that fits, else full precision."""
    fits = nats[..., 1].sum() <= most
    return np.full(nats.shape[:2], 2 if fits else 0, dtype=np.int64)


def calibrate(meter: KLMeter, text: CalibrationText, *, step_ns: int) -> SensitivityTable:
    return Calibration(
        meter,
        fit=text.fit[:24],
        check=text.check[:24],
        text=text.digest,
        settings=Settings(formats=FORMATS, budget_nats=0.1, time_ns=1000),
        choose=choose,
        clock=clock(step_ns),
    ).run()


@pytest.fixture(scope="module")
def table(meter: KLMeter, text: CalibrationText) -> SensitivityTable:
    return calibrate(meter, text, step_ns=1)


def test_calibration_corrects_checks_and_names(
    meter: KLMeter, text: CalibrationText, table: SensitivityTable
) -> None:
    assert table.checkpoint == meter.catalog.digest
    assert table.text == text.digest
    assert table.damage.shape == (6, 16, 3)
    assert (table.damage > 0).all()
    assert table.nbytes == tuple(meter.nbytes(form) for form in FORMATS)
    assert {(row.layer, row.format) for row in table.groups} == set(
        itertools.product(meter.catalog.layers, FORMATS)
    )
    assert all(row.lower <= row.mean <= row.upper for row in table.groups)
    assert len(table.mixes) == 1
    assert 0.5 < table.optimism < table.optimism_upper < 5


def test_output_errors_rank_blocks_as_their_true_kl_does(
    meter: KLMeter, text: CalibrationText, table: SensitivityTable
) -> None:
    found = check_ranks(meter, table, text.check[:4], fit=text.fit[:24], form="int2", blocks=16)
    by = {one.by: one for one in found}
    assert len(by) == 5
    assert all(-1 <= one.lower <= one.correlation <= one.upper <= 1 for one in found)
    assert by["Fisher-weighted output error"].correlation > 0.4
    assert by["router-weighted output error"].correlation > 0.4
    assert by["the table"].correlation > 0.3


def test_rank_correlation_is_spearmans() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 25, 99]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486832980505138)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0
    with pytest.raises(ValueError, match="one length"):
        rank_correlation([1], [1])


def test_samples_go_where_the_decision_is_uncertain(table: SensitivityTable) -> None:
    by_format = {form: {row.tokens for row in table.groups if row.format == form}
                 for form in FORMATS}  # fmt: skip
    assert by_format["int8"] == by_format["int2"] == {8 * TOKENS}, "the mix never takes them"
    assert max(by_format["int4"]) > 8 * TOKENS


def test_no_time_still_measures_something(meter: KLMeter, text: CalibrationText) -> None:
    table = calibrate(meter, text, step_ns=1000)
    assert table.tokens == 8 * TOKENS
    assert len(table.groups) == 1
    assert (table.damage > 0).all()


def test_the_same_clock_gives_the_same_table(meter: KLMeter, text: CalibrationText) -> None:
    assert calibrate(meter, text, step_ns=200) == calibrate(meter, text, step_ns=200)


def test_the_file_is_what_was_measured(table: SensitivityTable, tmp_path: Path) -> None:
    path = tmp_path / "sensitivity.json"
    write_table(table, path)
    assert read_table(path, checkpoint=table.checkpoint) == table
    assert path.stat().st_size < 100_000


def test_another_checkpoint_is_refused(table: SensitivityTable, tmp_path: Path) -> None:
    path = tmp_path / "sensitivity.json"
    write_table(table, path)
    with pytest.raises(ConfigError, match="was measured on checkpoint"):
        read_table(path, checkpoint="0" * 32)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"version": 99}, "version 99"),
        ({"frequency": [[0.5]]}, "frequency"),
        ({"nats": [[[0.5]]]}, "nats"),
        ({"nbytes": [1]}, "nbytes"),
        ({"nbytes": [1, 2, 0]}, "nbytes"),
        ({"formats": ["int8", "int8", "int2"]}, "formats"),
        ({"optimism_upper": -1.0}, "optimism_upper"),
        ({"tokens": "many"}, "not a sensitivity file"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    table: SensitivityTable, tmp_path: Path, change: dict[str, object], named: str
) -> None:
    raw = msgspec.to_builtins(table)
    path = tmp_path / "sensitivity.json"
    path.write_bytes(msgspec.json.encode({**raw, **change}))
    with pytest.raises(ConfigError, match=named):
        read_table(path, checkpoint=table.checkpoint)


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe", b"[]"])
def test_files_that_are_none_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "sensitivity.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="hotset calibrate"):
        read_table(path, checkpoint="")


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20))
def test_shortening_keeps_four_digits(values: list[float]) -> None:
    found = shorten(np.array(values))
    assert np.allclose(found, values, rtol=5e-4, atol=1e-300)
    assert (shorten(found) == found).all()


def test_halves_of_the_text_share_no_window(text: CalibrationText) -> None:
    assert text.fit.shape[1] == TOKENS
    assert abs(len(text.fit) - len(text.check)) <= 4
    again = read_text(DEMO, [SOURCE], window_tokens=TOKENS)
    assert torch.equal(text.fit, again.fit)
    assert text.digest == again.digest
    other = read_text(DEMO, [SOURCE], window_tokens=TOKENS, seed=1)
    assert not torch.equal(text.fit, other.fit)
    fit = {tuple(row) for row in text.fit.tolist()}
    assert not fit & {tuple(row) for row in text.check.tolist()}


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [("absent.txt", None, "cannot be read"), ("short.txt", "too short", "more or longer")],
)
def test_text_that_cannot_serve_is_refused(
    tmp_path: Path, name: str, content: str | None, named: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=named):
        read_text(DEMO, [path])
