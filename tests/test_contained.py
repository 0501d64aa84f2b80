"""What may crash runs in a process of its own first: planted kernels that die, hang, fork, eat memory or compute
something else each time are records, and never run here."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import planted
import pytest
from helpers import LAST, conv
from jax import lax
from jax import numpy as jnp
from made_up import measurement, not_asked
from signatures import signature

from jaxlayout import Candidate, ConvDimensionNumbers, CostTable, Lowering, Plan, auto_layout, register_lowering
from jaxlayout.cli.checks import helper_process
from jaxlayout.convs.lowering import may_crash, registered
from jaxlayout.convs.primitive import CONVOLUTIONS, tuned_conv
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.graph.build import Mode, build_graph
from jaxlayout.graph.program import equations
from jaxlayout.measure import contained
from jaxlayout.measure.contained import Died, Helper, NoHelper, Proofs
from jaxlayout.measure.environment import current_environment, settings
from jaxlayout.measure.jobs import candidate_id, conv_job
from jaxlayout.measure.marker import Marker
from jaxlayout.measure.remote import Request
from jaxlayout.measure.trials import measure
from jaxlayout.table.records import look
from jaxlayout.tuning import pipeline
from jaxlayout.tuning.model import CostModel

CONV = signature((2, 6, 6, 4), (3, 3, 4, 8))
WRITTEN = Candidate("xla", ConvDimensionNumbers.channels_last(2))


def way(lowering: type[Lowering]) -> Candidate:
    return Candidate(lowering.name, WRITTEN.dims)


@pytest.fixture
def proofs() -> Proofs:
    return Proofs.of(CostTable(":memory:"), jax.devices()[0], None)


@pytest.fixture
def not_here(monkeypatch):
    """A planted kernel that is as much as traced in this process ends it."""
    monkeypatch.setenv(planted.NOT_HERE, str(os.getpid()))


@pytest.fixture
def no_helper(monkeypatch):
    """There is none, and none can be started."""
    monkeypatch.setattr(contained.process_helpers, "value", contained.Helpers())
    monkeypatch.setattr(sys, "executable", "")


def helper_pid() -> int:
    return the_helper().process.pid


def the_helper() -> Helper:
    helper = contained.process_helpers.value.helper
    assert helper is not None
    return helper


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while is_there(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.05)


# What comes of a form


BROKEN = {
    planted.Aborts: ("failed", ("died by SIGABRT", "terminate called after throwing an instance of 'planted'")),
    planted.Traced: ("failed", ("died by SIGABRT",)),
    planted.Segfaults: ("failed", ("died by SIGSEGV",)),
    planted.Hangs: ("failed", ("gave no answer within 2 s",)),
    planted.Eats: ("failed", ("died by SIGABRT",)),
    planted.Varies: ("wrong", ("gives another result each time",)),
    planted.Crowded: ("wrong", ("with others at the same time",)),
    planted.Overreads: ("wrong", ("depends on memory that is not its own",)),
    planted.Skips: ("wrong", ("it",)),  # what was in the memory before: NaNs or anything
    planted.Wrong: ("wrong", ("error 0.02", "allowed")),
    planted.Raises: ("failed", ("not today",)),
    planted.Quits: ("failed", ("SystemExit(3)",)),
}


@pytest.mark.parametrize("lowering", BROKEN, ids=lambda lowering: lowering.name)
def test_a_broken_kernel_is_a_record_and_never_runs_here(lowering, proofs, not_here, monkeypatch):
    if lowering is planted.Hangs:
        monkeypatch.setattr(contained, "FORM_SECONDS", 2.0)
    if lowering is planted.Eats:
        monkeypatch.setattr(contained, "available_memory", lambda device: 2**27)
    status, words = BROKEN[lowering]
    with registered(lowering()):
        assert proofs.offers(lowering.name)
        job = conv_job(CONV, [WRITTEN, way(lowering)])
        ((_, found),) = measure([job], device=jax.devices()[0], prove=proofs)
    record = found[f"{lowering.name}@1:{WRITTEN.dims}"]
    assert record.status == status and record.median_ns is None
    assert all(word in record.detail for word in words), record.detail
    assert found[candidate_id(WRITTEN)].status == "ok"


@pytest.mark.parametrize("lowering", [planted.Sound, planted.Talks], ids=lambda lowering: lowering.name)
def test_what_comes_through_runs_here_and_is_not_asked_again(lowering, tmp_path, monkeypatch):
    def fresh() -> Proofs:
        return Proofs.of(CostTable(tmp_path / "proofs.sqlite"), jax.devices()[0], None)

    with registered(lowering()):
        if lowering is planted.Talks:  # to another process: here it would print, and wait for what is typed
            found = fresh()(CONV, way(lowering))
        else:
            job = conv_job(CONV, [WRITTEN, way(lowering)])
            ((_, records),) = measure([job], device=jax.devices()[0], prove=fresh())
            assert records[candidate_id(way(lowering))].status in ("ok", "slow")
            found = fresh()(CONV, way(lowering))
        assert found.status == "ok" and found.median_ns and found.error < 1e-5
        monkeypatch.setattr(Helper, "ask", not_asked)
        assert fresh()(CONV, way(lowering)) == found == fresh()(replace(CONV, context="nested"), way(lowering))
        with pytest.raises(
            AssertionError, match="asked"
        ):  # other numerics, other compiler options, another convolution are not known
            Proofs.of(CostTable(tmp_path / "proofs.sqlite"), jax.devices()[0], None, relax=100.0)(CONV, way(lowering))
        with pytest.raises(AssertionError, match="asked"):
            fresh()(replace(CONV, batch=3), way(lowering))


def test_without_anybody_to_try_it_first_nothing_that_may_crash_runs(not_here):
    with registered(planted.Sound()):
        job = conv_job(CONV, [WRITTEN, way(planted.Sound)])
        ((_, found),) = measure([job], device=jax.devices()[0])
        assert found[candidate_id(way(planted.Sound))].status == "failed"


def test_one_process_serves_as_long_as_nothing_goes_wrong_in_it(proofs):
    with registered(planted.Sound()), registered(planted.Raises()), registered(planted.Aborts()):
        assert proofs(CONV, way(planted.Sound)).status == "ok"
        first = helper_pid()
        assert proofs(replace(CONV, batch=1), way(planted.Sound)).status == "ok"
        assert proofs(CONV, way(planted.Raises)).status == "failed"
        assert helper_pid() == first and is_there(first)
        assert proofs(CONV, way(planted.Aborts)).status == "failed"
        assert not is_there(first)
        assert proofs(replace(CONV, batch=3), way(planted.Sound)).status == "ok"
        second = helper_pid()
        assert second != first
        os.kill(second, signal.SIGKILL)  # by somebody else, while nothing runs in it
        wait_until_gone(second)
        assert proofs(replace(CONV, batch=4), way(planted.Sound)).status == "ok"


@pytest.mark.parametrize("lowering", [planted.Forks, planted.ForksAndDies], ids=lambda lowering: lowering.name)
def test_what_a_kernel_starts_ends_with_the_process_it_was_tried_in(lowering, proofs, monkeypatch):
    said = []
    close = Helper.close

    def closing(helper: Helper) -> None:
        if not helper.closed:
            helper._errors.seek(0)
            said.append(helper._errors.read().decode())
        close(helper)

    monkeypatch.setattr(Helper, "close", closing)
    with registered(lowering()):
        found = proofs(CONV, way(lowering))
    assert found.status == "failed"
    assert ("it leaves a process behind" if lowering is planted.Forks else "died by SIGABRT") in found.detail
    left = [int(line.split()[1]) for line in "".join(said).splitlines() if line.startswith("left ")]
    assert left
    for pid in left:
        wait_until_gone(pid)


def test_an_interrupt_ends_it_and_is_no_record(proofs):
    table = proofs.table
    with registered(planted.Hangs()), registered(planted.Sound()):
        assert proofs.offers("hangs")
        pid = helper_pid()
        with pytest.raises(KeyboardInterrupt):
            replace(proofs, stop=lambda: True)(CONV, way(planted.Hangs))
        assert not is_there(pid) and not table.counts()["measurements"]
        assert proofs(CONV, way(planted.Sound)).status == "ok"  # another serves


def test_it_ends_with_who_started_it_a_script_on_standard_input_too():
    script = """
        import os, signal, jax, planted
        from jaxlayout import Candidate, ConvDimensionNumbers, CostTable
        from jaxlayout.convs.lowering import registered
        from jaxlayout.measure import contained
        from signatures import signature

        print("run")
        proofs = contained.Proofs.of(CostTable(":memory:"), jax.devices()[0], None)
        with registered(planted.Sound()):
            way = Candidate("sound", ConvDimensionNumbers.channels_last(2))
            found = proofs(signature((2, 6, 6, 4), (3, 3, 4, 8)), way)
        print(found.status)
        print(contained.process_helpers.value.helper.process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    ran = run_script(script, stdin=True)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    assert ran.stdout.startswith("run\nok\n")
    wait_until_gone(int(ran.stdout.split()[2]))


def test_it_ends_when_nobody_asks_anything(monkeypatch):
    monkeypatch.setattr(contained, "IDLE_SECONDS", 0.2)
    helper = Helper(jax.devices()[0], settings())
    with pytest.raises(Died, match="died by SIGKILL"):
        wait_until_gone(helper.process.pid)
        helper.ask({"lowerings": {}, "seconds": 5.0})
    assert helper.closed


def run_script(script: str, *, stdin: bool = False, **variables: str) -> Any:
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    env = os.environ | {"PYTHONPATH": path} | variables
    text = textwrap.dedent(script)
    command, given = ([sys.executable, "-"], text) if stdin else ([sys.executable, "-c", text], None)
    return subprocess.run(command, input=given, env=env, capture_output=True, text=True, timeout=300)


# Who may be asked


def test_a_lowering_that_may_crash_has_to_be_importable_by_name(proofs, caplog):
    class Local(planted.Planted):
        name = "local"

    with pytest.raises(ValueError, match=r"'local' may crash.*Local cannot be imported there"):
        register_lowering(Local())
    in_main = type("InMain", (planted.Planted,), {"name": "in_main", "__module__": "__main__"})
    with pytest.raises(ValueError, match=r"__main__\.InMain cannot be imported there: put it into a module"):
        register_lowering(in_main())
    with caplog.at_level(logging.WARNING, "jaxlayout"), registered(planted.Needs(3)):
        assert not proofs.offers("needs")
    assert "lowering 'needs' is not offered" in caplog.text and "planted.Needs" in caplog.text


def test_another_version_there_than_here_is_refused_by_name(proofs, monkeypatch):
    monkeypatch.setattr(planted.Sound, "version", 7)
    with registered(planted.Sound()):
        assert not proofs.offers("sound")
        with pytest.raises(NoHelper, match=r"version 1 of .*Sound.* there, not 7"):
            proofs(CONV, way(planted.Sound))


def test_a_composite_may_crash_if_what_is_inside_may():
    with registered(planted.Sound()):
        assert may_crash("phases/sound") and may_crash("sound") and not may_crash("phases/dot")


def test_it_is_started_for_itself_alone(monkeypatch):
    told = {"XLA_FLAGS": "--xla_dump_to=/nowhere --xla_cpu_enable_fast_math=false", "OMPI_COMM_WORLD_SIZE": "4"}
    told |= {"JAX_COORDINATOR_ADDRESS": "here:1", "JAX_NUM_PROCESSES": "4", "JAX_PLATFORMS": "cuda", "NPROC": "3"}
    found = contained.environment_alone(told)
    assert found.pop("PYTHONPATH").split(os.pathsep) == [path or os.getcwd() for path in sys.path]
    assert found == {
        "XLA_FLAGS": "--xla_cpu_enable_fast_math=false",
        "NPROC": "3",
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "JAXLAYOUT_POLICY": "off",
    }


def test_settings_of_jax_hold_there_too(proofs):
    with registered(planted.Sound()):
        assert proofs.offers("sound")
        before = helper_pid()
        with jax.enable_x64(True), jax.default_matmul_precision("float32"):
            other = Proofs.of(proofs.table, jax.devices()[0], None)
            assert other(CONV, way(planted.Sound)).status == "ok"
            assert helper_pid() != before and the_helper().config["jax_enable_x64"] is True
        assert other.environment != proofs.environment


def test_a_process_that_is_unlike_this_one_is_none(monkeypatch):
    monkeypatch.setenv("NPROC", "1")
    alone = contained.environment_alone

    def without(environ: Any) -> dict[str, str]:
        return {name: value for name, value in alone(environ).items() if name != "NPROC"}

    monkeypatch.setattr(contained, "environment_alone", without)
    with pytest.raises(NoHelper, match="unlike this one: variables is"):
        Helper(jax.devices()[0], settings())


def test_strange_paths_and_many_descriptors_do_not_matter(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path, os.fsencode(tmp_path), None])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2048, hard), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        helper = Helper(jax.devices()[0], settings())
        assert helper.answers() and helper.process.stdout.fileno() > 1024
        helper.close()
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_signatures_travel():
    every = replace(CONV, precision=(lax.Precision.HIGH, lax.Precision.DEFAULT), lhs_dtype=jnp.dtype("bfloat16"))
    every = replace(every, preferred_element_type=np.dtype("float32"), padding=((-1, 2), (0, 3)), context="nested")
    for one in (CONV, every, replace(CONV, precision=lax.Precision.HIGHEST)):
        assert ConvSignature.from_json(json.loads(json.dumps(one.to_json()))) == one
    with pytest.raises(ValueError, match="a precision without a name"):
        replace(CONV, precision=lax.DotAlgorithmPreset.F32_F32_F32).to_json()


# Without any


def test_where_no_process_can_be_started_none_of_it_is_offered(no_helper, not_here, only, proofs, caplog):
    only(planted.Sound)
    with registered(planted.Sound()), caplog.at_level(logging.WARNING, "jaxlayout"):
        assert not proofs.offers("sound") and proofs.offers("xla")
        explained = auto_layout(net).explain(*arguments())
    assert "there is no Python to start" in caplog.text and caplog.text.count("are not offered") == 1
    assert "sound" not in tried(explained)


@pytest.mark.parametrize("program", ["/bin/false", "/nowhere"])
def test_nor_where_it_does_not_come_up(program, no_helper, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.symlink_to(program)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(NoHelper, match=r"ended with exit status 1|cannot be started"):
        Helper(jax.devices()[0], settings())


def test_doctor_says_so(no_helper, monkeypatch):
    finding = helper_process()
    assert finding.grade == "warning" and "sys.executable is ''" in finding.found
    monkeypatch.undo()
    assert helper_process().grade == "ok"


# In the whole line


def net(x: Any, k: Any) -> Any:
    return jnp.tanh(conv(x, k, LAST))


def arguments() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((2, 6, 6, 4), np.float32), rng.standard_normal((3, 3, 4, 4), np.float32)


def tried(explained: Any) -> set[str]:
    """The lowerings that have been measured."""
    return {one.candidate.lowering for site in explained.sites for one in site.tried if one.measurement is not None}


@pytest.fixture
def only(monkeypatch):
    """Of all candidates one lowering's beside the one written."""

    def offer(lowering: type[Lowering]) -> None:
        def candidates(model: Any, conv: ConvSignature, written: Candidate, *, relaxed: bool) -> tuple[Candidate, ...]:
            return written, Candidate(lowering.name, written.dims)

        monkeypatch.setattr(CostModel, "candidates", candidates)

    return offer


def chosen(plan: Plan) -> set[str]:
    return {mode.candidate.lowering for mode in plan.choices.values() if mode.candidate is not None}


def plan_of_another_machine(lowering: type[Lowering], monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A plan that chooses the lowering, stored with its measurements; seen to run where they come from."""
    with monkeypatch.context() as there:
        there.setattr(Proofs, "offers", lambda proofs, name: True)
        there.setattr(Proofs, "__call__", lambda proofs, conv, way: measurement(1.0))
        plan = auto_layout(net).plan(*arguments())
    assert chosen(plan) == {lowering.name}
    return plan


def test_a_function_is_tuned_beside_a_kernel_that_dies(only, not_here):
    only(planted.Aborts)
    with registered(planted.Aborts()):
        tuned = auto_layout(net)
        np.testing.assert_array_equal(tuned(*arguments()), jax.jit(net)(*arguments()))
        (site,) = tuned.explain(*arguments()).sites
    (record,) = [one.measurement for one in site.tried if one.candidate.lowering == "aborts"]
    assert record is not None and record.status == "failed" and "died by SIGABRT" in record.detail


def test_a_function_runs_through_a_kernel_that_came_through(only, forced):
    only(planted.Sound)
    with registered(planted.Sound()):
        tuned = auto_layout(net)
        assert chosen(tuned.plan(*arguments())) == {"sound"}
        np.testing.assert_allclose(tuned(*arguments()), jax.jit(net)(*arguments()), atol=1e-6)


def test_what_was_measured_elsewhere_is_run_elsewhere_first(only, forced, not_here, monkeypatch):
    only(planted.Aborts)
    with registered(planted.Aborts()):
        monkeypatch.delenv(planted.NOT_HERE)
        plan = plan_of_another_machine(planted.Aborts, monkeypatch)
        monkeypatch.setenv(planted.NOT_HERE, str(os.getpid()))
        table = CostTable(os.environ["JAXLAYOUT_TABLE"])
        table.forget({env for env in environments(table) if not table.measurements(env, CONV_OF_NET.key)})
        outcome = auto_layout(net).outcome(*arguments())  # its measurements are there, its plan is not
        assert outcome.source == "measured" and chosen(outcome.plan) != {"aborts"}
        with pytest.raises(ValueError, match=r"must not be computed by aborts.*died by SIGABRT"):
            auto_layout(net, plan=plan)(*arguments())


def test_a_stored_plan_of_another_machine_is_seen_to_run_first(only, forced, not_here, monkeypatch, caplog):
    only(planted.Aborts)
    with registered(planted.Aborts()):
        monkeypatch.delenv(planted.NOT_HERE)
        plan_of_another_machine(planted.Aborts, monkeypatch)
        monkeypatch.setenv(planted.NOT_HERE, str(os.getpid()))
        tuned = auto_layout(net)
        np.testing.assert_array_equal(tuned(*arguments()), jax.jit(net)(*arguments()))
        assert "made anew" in caplog.text and "died by SIGABRT" in caplog.text
        assert tuned.outcome(*arguments()).source == "stored" and not chosen(tuned.plan(*arguments())) - {"xla"}


def test_the_proof_is_of_this_machine_alone(only, forced, monkeypatch, tmp_path):
    only(planted.Sound)
    asked = []
    ask = Helper.ask

    def noted(helper: Helper, request: Any, *rest: Any) -> Any:
        if "conv" in request:
            asked.append(request)
        return ask(helper, request, *rest)

    monkeypatch.setattr(Helper, "ask", noted)
    with registered(planted.Sound()):
        plan = auto_layout(net).plan(*arguments())
        assert len(asked) == 1
        auto_layout(net)(*arguments())  # the plan is stored, and what is in it known to run
        auto_layout(net, plan=plan)(*arguments())
        assert len(asked) == 1
        monkeypatch.setattr(contained, "this_machine", lambda: "another")
        auto_layout(net)(*arguments())
        assert len(asked) == 2
    with CostTable(os.environ["JAXLAYOUT_TABLE"]) as table:
        table.export_json(tmp_path / "exported")
    assert "machine" not in (tmp_path / "exported").read_text()
    kept, refused = look(f"{os.environ['JAXLAYOUT_TABLE']}.proofs")
    forms = [env for env, signature, *_ in kept["measurements"] if signature == CONV_OF_NET.key]
    assert len(set(forms)) == len(forms) == 2 and not refused


def test_a_worker_tries_it_first_where_it_is(not_here):
    with registered(planted.Quits()):
        make = partial(conv_job, CONV, [WRITTEN, way(planted.Quits)])
        request = Request(make=make, environment=current_environment(), compiler_options=None, relax=1.0)
        reply = request()
        assert reply.records[candidate_id(way(planted.Quits))].detail == "SystemExit(3)"
    assert not reply.refused and reply.records[candidate_id(WRITTEN)].status == "ok"


def test_it_is_not_offered_for_a_convolution_divided_among_devices():
    jaxpr = jax.make_jaxpr(net)(*arguments())
    x, _ = jaxpr.jaxpr.invars if hasattr(jaxpr, "jaxpr") else jaxpr.invars
    with registered(planted.Sound()):
        for divided, names in (({}, {"xla", "sound"}), ({x: ((("data", 2),), (), (), ())}, {"xla"})):
            graph = build_graph(jaxpr, lambda conv, written: [written, way(planted.Sound)], divided=divided)
            (site,) = [node for node in graph.nodes if node.kind == "site"]
            assert {mode.candidate.lowering for mode in site.modes if mode.candidate is not None} == names


def environments(table: CostTable) -> set[str]:
    rows, _ = look(table.path)
    return {row[0] for those in rows.values() for row in those}


CONV_OF_NET = replace(CONV, out_features=4, padding=((1, 1), (1, 1)))


def test_what_jax_derives_is_not_taken_to_run():
    k = arguments()[1]
    params = dict(jax.make_jaxpr(net)(*arguments()).eqns[0].params)
    with registered(planted.Sound()):
        jaxpr = jax.make_jaxpr(jax.grad(lambda x: tuned_conv(x, k, lowering="sound", **params).sum()))(arguments()[0])
    assert [eqn.params["lowering"] for eqn in equations(jaxpr) if eqn.primitive in CONVOLUTIONS] == ["sound", "xla"]


# The whole program


def test_a_program_that_took_its_process_down_on_trial_is_not_tried_again(tmp_path, only, monkeypatch, caplog):
    script = """
        import planted
        from jaxlayout import Candidate, auto_layout
        from jaxlayout.tuning import pipeline
        from jaxlayout.convs.lowering import register_lowering
        from jaxlayout.tuning.model import CostModel
        from made_up import made_up
        from test_contained import Unsuspected, arguments, net

        register_lowering(Unsuspected())
        pipeline.measure = made_up(lambda *_: 1.0)  # nothing runs
        CostModel.candidates = lambda model, conv, written, relaxed: (written, Candidate("aborts", written.dims))
        auto_layout(net)(*arguments())
    """
    dead = run_script(script)
    assert dead.returncode == -signal.SIGABRT, dead.stderr
    assert len(markers(tmp_path)) == 1
    monkeypatch.setattr(pipeline, "measure", None)  # nobody gets as far
    with registered(Unsuspected()):
        for source in ("none", "stored"):
            tuned = auto_layout(net)
            outcome = tuned.outcome(*arguments())
            assert (outcome.source, outcome.verdict.cause) == (source, "failure")
            assert "ended on" in outcome.verdict.reason
            assert "was run for the first time: it is not tried again" in outcome.verdict.reason
            np.testing.assert_array_equal(tuned(*arguments()), jax.jit(net)(*arguments()))
            assert not markers(tmp_path)
    assert caplog.text.count("`jaxlayout table prune --plans` forgets that") == 1


class Unsuspected(planted.Aborts):
    may_crash = False


def markers(folder: Path) -> list[Path]:
    return list(folder.glob("*.running-*"))


def pinned(lowering: type[Lowering]) -> Plan:
    """A plan for `net`, made anywhere."""
    last = tuple(range(4))
    return Plan(choices={(0,): Mode((last, last), (last,), way(lowering))})


def tuned_net(lowering: type[Lowering], *, frozen: bool) -> tuple[Any, tuple[Any, ...]]:
    """`net` under such a plan, with its kernel frozen or not, and what it is called with."""
    tuned, (x, k) = auto_layout(net, plan=pinned(lowering)), arguments()
    return (tuned.freeze(k=k), (x,)) if frozen else (tuned, (x, k))


whether_frozen = pytest.mark.parametrize("frozen", [False, True], ids=["whole", "frozen"])


@whether_frozen
def test_a_program_that_took_the_users_call_down_is_not_tried_again(tmp_path, caplog, frozen):
    script = f"""
        import os, planted
        from jaxlayout.convs.lowering import register_lowering
        from test_contained import tuned_net

        os.environ[planted.DIES_HERE] = str(os.getpid())
        register_lowering(planted.Composed())
        tuned, args = tuned_net(planted.Composed, frozen={frozen})
        tuned(*args)
    """
    dead = run_script(script)
    assert dead.returncode == -signal.SIGABRT, dead.stderr
    assert len(markers(tmp_path)) == 1
    with registered(planted.Composed()):
        for _ in range(2):
            tuned, args = tuned_net(planted.Composed, frozen=frozen)
            np.testing.assert_array_equal(tuned(*args), jax.jit(net)(*arguments()))
            outcome = tuned.outcome(*args)
            assert not outcome.kept and outcome.verdict.cause == "failure"
            assert "was run for the first time: it is not tried again" in outcome.verdict.reason
            assert outcome.verdict.reason in caplog.text and not markers(tmp_path)


@whether_frozen
def test_what_has_returned_once_has_no_marker_again(tmp_path, monkeypatch, frozen):
    put = []
    on = Marker.on
    monkeypatch.setattr(Marker, "on", lambda marker, doing: put.append(doing) or on(marker, doing))
    with registered(planted.Sound()):
        for _ in range(2):
            tuned, args = tuned_net(planted.Sound, frozen=frozen)
            tuned.outcome(*args)  # which runs nothing
            for _ in range(2):
                np.testing.assert_allclose(tuned(*args), jax.jit(net)(*arguments()), atol=1e-6)
            assert put == ["run for the first time"] and not markers(tmp_path)
        with pytest.raises(TypeError, match="bad"):
            auto_layout(raising, plan=pinned(planted.Sound))(*arguments())
        assert not markers(tmp_path)


def raising(x: Any, k: Any) -> Any:
    raise TypeError("bad")


def test_a_marker_says_what_a_process_that_is_gone_was_at(tmp_path):
    marker = Marker.of(tmp_path / "table", "program")
    with marker.on("compiled"):
        assert list(tmp_path.iterdir()) == [marker.path]
        assert Marker.of(tmp_path / "table", "program").left() == ""  # its process is there
        assert Marker.of(tmp_path / "table", "another").path != marker.path
        with Marker.of(tmp_path / "table", "program").on("run"):  # one is enough
            assert list(tmp_path.iterdir()) == [marker.path]
        assert marker.path.exists()
    assert not list(tmp_path.iterdir()) and marker.left() == ""
    marker.path.write_text('{"doing": "compiled", "process": 7, "time": 1}')
    assert "process 7 ended on 19" in marker.left() and "was compiled" in marker.left()
    marker.path.write_text("nonsense")
    assert marker.left() == "a process ended while the rewritten function was tried"
    marker.clear()
    assert not list(tmp_path.iterdir())
    with Marker.of(tmp_path / "nowhere" / "table", "program").on("run"), Marker.of(Path(":memory:")).on("run"):
        assert not list(tmp_path.iterdir())
