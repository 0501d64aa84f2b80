"""What cannot win, because even at the machine's peaks it would be no faster, is never compiled."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from drawing import examples
from helpers import conv
from hypothesis import example, given
from jax import numpy as jnp
from made_up import measurement
from signatures import DENSE, LARGE, convs, last, signature
from toys import Toy, offer, records

from jaxlayout import auto_layout
from jaxlayout.convs.candidates import Candidate
from jaxlayout.convs.lowering import lowering_named, lowerings, registered
from jaxlayout.measure.jobs import conv_job
from jaxlayout.measure.peaks import HEADROOM, Peaks
from jaxlayout.measure.reference import reference
from jaxlayout.measure.trials import measure
from jaxlayout.table.measurement import Measurement

look = Peaks.look
X, K = jnp.ones((2, 4, 6, 6)), jnp.ones((4, 4, 3, 3))


class Endless(Toy):
    """In the orders of PyTorch; it says that it does so much."""

    def __init__(self):
        self.compiled = 0

    def least_work(self, conv, dims):
        return 10**18, 0

    def apply(self, conv, dims, lhs, prepared):
        self.compiled += 1
        return super().apply(conv, dims, lhs, prepared)


def peaks(macs: float = 1e6, nbytes: float = 1e6) -> Peaks:
    """A nanosecond for each of them."""
    known = {"macs": macs, "bytes": nbytes}
    return Peaks(None, None, {unit: measurement(ns) for unit, ns in known.items()})


def statuses(c, ways, known):
    """Of the candidates of one job, "ok" for whatever was timed."""
    ((_, found),) = measure([conv_job(c, ways)], device=jax.devices()[0], peaks=known)
    assert list(found) == [f"{way.lowering}@1:{way.dims}" for way in ways]
    return ["ok" if record.runs else record.status for record in found.values()]


SMALL = signature((2, 6, 6, 4), (3, 3, 4, 4), padding=((1, 1), (1, 1)))
FIRST = next(iter(Toy().dimension_numbers(SMALL)))


def test_what_cannot_win_is_not_compiled():
    with registered(Endless()) as toy:
        ways = [Candidate("xla", FIRST), Candidate("toy", FIRST), Candidate("xla", last(2))]
        assert statuses(SMALL, ways, peaks()) == ["ok", "pruned", "ok"]
        assert not toy.compiled
        assert statuses(SMALL, ways[:2], None) == ["ok", "ok"]
        assert toy.compiled


def test_the_one_written_is_always_timed():
    with registered(Endless()):
        assert statuses(SMALL, [Candidate("toy", FIRST)], peaks()) == ["ok"]
        ways = [Candidate("toy", FIRST), Candidate("xla", FIRST)]
        assert statuses(SMALL, ways, peaks(1e30)) == ["ok", "pruned"]
        assert statuses(SMALL, ways, peaks(1e-30, 1e-30)) == ["ok", "ok"]


def test_other_orders_may_still_spare_a_conversion():
    with registered(Endless()):
        assert statuses(SMALL, [Candidate("xla", last(2)), Candidate("toy", FIRST)], peaks()) == ["ok", "ok"]


def test_half_precision_may_have_arithmetic_of_its_own():
    c = signature((2, 6, 6, 4), (3, 3, 4, 4), padding=((1, 1), (1, 1)), dtype="bfloat16")
    with registered(Endless()):
        assert statuses(c, [Candidate("xla", FIRST), Candidate("toy", FIRST)], peaks()) == ["ok", "ok"]


def test_a_failure_stands_for_nothing(monkeypatch):
    class Fails(Endless):
        name = "fails"

        def apply(self, conv, dims, lhs, prepared):
            raise ValueError("of all the bad luck")

    with registered(Endless()), registered(Fails()):
        assert statuses(SMALL, [Candidate("fails", FIRST), Candidate("toy", FIRST)], peaks()) == ["failed", "ok"]


def test_tuning_prunes_and_remembers(monkeypatch):
    """By the peaks in the table, which a plan does without."""
    looks = []

    def looked(peaks):
        looks.append(dict(peaks.records))
        peaks.keep({"macs": measurement(1e6), "bytes": measurement(1e6)})
        peaks.records = {"macs": measurement(1e6), "bytes": measurement(1e6)}

    monkeypatch.setattr(Peaks, "look", looked)
    with registered(Endless()) as toy:
        offer(monkeypatch, toy, "xla")
        np.testing.assert_allclose(auto_layout(conv, verdict=False)(X, K), conv(X, K), rtol=1e-5)
        found = records()
        assert not toy.compiled
        assert found["toy@1:NCHW,OIHW->NCHW"]["status"] == "pruned"
        assert "ms at least" in found["toy@1:NCHW,OIHW->NCHW"]["detail"]
        assert found["macs"]["median_ns"] == 1e6
        auto_layout(lambda x, k: conv(x, k) + 1, verdict=False)(X[:1], K)
        assert looks[0] == {} and looks[-1].keys() == {"macs", "bytes"}


def test_peaks_of_this_machine():
    """The best ever seen counts, in this process or another."""
    kept: dict[str, Measurement] = {}
    found = Peaks(jax.devices()[0], None, keep=kept.update)
    assert found.least_ns(10**12, 10**12) == 0
    look(found)
    first = found.least_ns(10**12, 0), found.least_ns(0, 10**12)
    assert kept == found.records and kept.keys() == {"macs", "bytes"}
    assert all(0 < ns < 1e15 for ns in first)
    look(found)
    assert found.least_ns(10**12, 0) <= first[0]
    again = Peaks(jax.devices()[0], None, {unit: measurement(1e-9) for unit in kept}, kept.update)
    look(again)
    assert again.least_ns(10**9, 0) == pytest.approx(1e3 * 1e-9 / HEADROOM)


@examples(60)
@given(convs(dtypes=("int32",)))
@example(signature((2, 7, 7, 40), (7, 7, 1, 40), groups=40, padding=((3, 3), (3, 3)), dtype="int32"))
def test_products(c):
    """As many as a convolution of ones adds up; what the lowerings say they do at least."""
    ones = (np.ones(shape, np.int32) for shape in (c.lhs_shape(last(c.rank).lhs), c.rhs_shape(last(c.rank).rhs)))
    assert c.products == reference(c, *ones).sum()
    for lowering in lowerings().values():
        for dims in lowering.dimension_numbers(c):
            for name in lowering.names(c, dims):
                macs, nbytes = lowering_named(name).least_work(c, dims)
                assert c.products <= macs and nbytes == c.nbytes


def test_fewer_multiplications_are_said():
    for c, name, most in ((signature(*DENSE), "winograd4", 0.5), (signature(*LARGE), "fft", 0.1)):
        dims = next(iter(lowerings()[name].dimension_numbers(c)))
        assert lowering_named(name).least_work(c, dims)[0] < most * c.macs
    grouped = signature((2, 9, 9, 16), (3, 3, 8, 16), groups=2)
    assert lowering_named("groups/winograd2").least_work(grouped, last(2))[0] < grouped.products
