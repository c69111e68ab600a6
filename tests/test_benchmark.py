"""The benchmark: its arithmetic and data, and the command from end to end at smoke sizes on the CPU."""

import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"
SHAPE = "B1-T128-W32"


@pytest.fixture(autouse=True)
def _modules(monkeypatch):
    """The benchmark is a script with modules beside it, not a package."""
    monkeypatch.syspath_prepend(str(FOLDER))


def run(*arguments, python=sys.executable):
    command = [python, str(FOLDER / "benchmark_nsa.py"), *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)


def saved(folder):
    return json.loads((folder / "results.json").read_text())


def test_smoke_run_writes_table_json_and_plots_and_resumes(tmp_path):
    patterns = [
        f"ceiling-*/*/{SHAPE}/*", f"*/both/{SHAPE}/topk", f"selected/forward/{SHAPE}/realistic",
        f"sliding/[bd]*/{SHAPE}/*",
    ]  # fmt: skip
    done = run("--device", "cpu", "--sweep", "parts", "long", "--only", *patterns, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    content = saved(tmp_path)
    expected = {
        "ceiling-matmul/forward", "ceiling-copy/forward", "first-step/both", "dense/both", "nsa/both", "nsa-paper/both",
        "selected/forward", "sliding/backward", "sliding/dq",
    }  # fmt: skip
    assert {key.rsplit("/", 2)[0] for key in content["rows"]} == expected
    assert not [row for row in content["rows"].values() if "error" in row]
    assert content["runs"][0]["command"].startswith("benchmark_nsa.py --device cpu")
    assert content["runs"][0]["versions"]["jax"] == jax.__version__
    whole = content["rows"][f"nsa/both/{SHAPE}/topk"]
    assert whole["ms"] > 0 and whole["iqr_ms"] >= 0 and whole["kernels"] > 0 and whole["temp_bytes"] > 0
    for name in ("results.json", "table.txt", "time.png", "speedup.png", "share.png"):
        assert (tmp_path / name).stat().st_size > 0
    table = (tmp_path / "table.txt").read_text()
    assert "nsa-paper" in table and "overlap 0." in table and "first process" in table

    peer = f"fla-selected/forward/{SHAPE}/random"  # as if a run with flash-linear-attention had been here before
    content["rows"][peer] = {**content["rows"][f"selected/forward/{SHAPE}/realistic"], "ms": 123.0, "chained_ms": None}
    (tmp_path / "results.json").write_text(json.dumps(content))
    again = run("--device", "cpu", "--sweep", "parts", "--only", f"*/both/{SHAPE}/topk", f"sliding/[bd]*/{SHAPE}/*",
                "fla-*", "--out", tmp_path)  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert " ms\n" not in again.stderr  # nothing was measured again
    assert saved(tmp_path)["rows"] == content["rows"] and len(saved(tmp_path)["runs"]) == 2
    assert "fla-selected" in (tmp_path / "table.txt").read_text()

    other = run("--device", "cpu", "--overlap", "0.6", "--out", tmp_path)
    assert other.returncode == 2 and "measured with overlap 0.41, now it is 0.6" in other.stderr
    assert saved(tmp_path)["rows"] == content["rows"]


def test_a_failing_provider_leaves_its_reason_and_the_others_run(tmp_path):
    # without TRITON_INTERPRET the kernels refuse a CPU; dense attention by cuDNN does not exist there
    only = ("--only", f"sliding/forward/{SHAPE}/*", f"ceiling-copy/*/{SHAPE}/*", f"dense/forward/{SHAPE}/*")
    done = run("--device", "cpu", "--implementation", "triton", "--sweep", "parts", *only, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = saved(tmp_path)["rows"]
    assert "need an NVIDIA GPU" in rows[f"sliding/forward/{SHAPE}/topk"]["error"]
    assert "error" in rows[f"dense/forward/{SHAPE}/topk"]
    assert rows[f"ceiling-copy/forward/{SHAPE}/topk"]["ms"] > 0
    assert "failed: RuntimeError" in (tmp_path / "table.txt").read_text()
    assert all("\n" not in row.get("error", "") for row in rows.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--overlap", "1.5"), "--overlap: expected a number above 0.25 and below 1, got 1.5"),
        (("--budget", "0"), "--budget: expected a positive number, got 0.0"),
        (("--device", "tpu"), "argument --device: invalid choice: 'tpu' (choose from 'gpu', 'cpu')"),
        (("--only", "nothing/*"), "--only: no row matches nothing/*; see --list"),
    ],
)
def test_bad_arguments(arguments, message):
    done = run("--sweep", "parts", *arguments)
    assert (done.returncode, done.stderr) == (2, f"benchmark_nsa: error: {message}\n")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_no_gpu(tmp_path):
    done = run("--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("benchmark_nsa: error: --device: no GPU that JAX can use: ")
    assert done.stderr.count("\n") == 1


def test_budget_stops_in_time_and_reports_what_is_there(tmp_path):
    done = run("--device", "cpu", "--budget", "1", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "out of budget" in done.stderr and saved(tmp_path)["rows"] == {}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("import os, sys; print('the GPU fell off', file=sys.stderr); os._exit(7)", "ended with 7: the GPU fell off"),
        ("import time; time.sleep(60)", "no reply within 1 s"),
        (
            "import sys; sys.path.insert(0, sys.argv[1]); import protocol; protocol.serve(lambda _: 1 / 0)",
            "ZeroDivision",
        ),
    ],
)
def test_a_worker_that_crashes_hangs_or_raises(tmp_path, body, reason):
    from protocol import Worker, WorkerError

    worker = Worker([sys.executable, "-c", body, str(FOLDER)], dict(os.environ), tmp_path / "log")
    with pytest.raises(WorkerError, match=reason):
        worker.ask({}, 1.0 if "sleep" in body else 60.0)
    worker.close()


def test_what_failed_or_was_measured_on_other_source_is_measured_again(tmp_path):
    from results import Results

    def opened(source, fresh=False):
        return Results(tmp_path, {"device": "d"}, {"source": source}, fresh)

    results = opened("old")
    results.add("good", {"ms": 1.0})
    results.add("bad", {"error": "OutOfMemory"})
    assert [opened("old").is_done(key) for key in ("good", "bad", "new")] == [True, False, False]
    assert not opened("new").is_done("good")
    assert opened("old", fresh=True).rows == {}


def test_planned_rows_are_those_of_the_two_sweeps():
    from plan import FULL, SWEEPS, rows

    planned = rows(FULL, SWEEPS, [], fla=True)
    assert len({row.key for row in planned}) == len(planned)
    original = {(row.case.B, row.case.T, row.case.window_size) for row in planned if "original" in row.sweeps}
    assert original == {(4, 2**i, 64) for i in range(7, 15)}
    long = {(row.case.B, row.case.T, row.case.window_size) for row in planned if "long" in row.sweeps}
    assert long == {(max(1, 65536 // 2**i), 2**i, 512) for i in range(12, 18)}
    assert {row.provider for row in planned if "parts" in row.sweeps} >= {"fla-selected", "cudnn-window", "nsa-paper"}


def smoke_case(**changes):
    from plan import SMOKE

    return dataclasses.replace(SMOKE.base, **changes)


@pytest.mark.parametrize(("T", "window", "stride"), [(128, 16, 16), (100, 8, 4), (7, 16, 16)])
def test_visible_pairs(T, window, stride):
    import arithmetic

    case = smoke_case(B=2, T=T, window=window, stride=stride)
    S, block = case.S, case.block_size
    windows = range(T // stride)
    assert arithmetic.dense_pairs(case) == 2 * sum(p + 1 for p in range(T))
    assert arithmetic.sliding_pairs(case) == 2 * sum(min(p + 1, case.window_size) for p in range(T))
    assert arithmetic.compressed_pairs(case) == 2 * sum(
        c * stride + window - 1 <= p for p, c in itertools.product(range(T), windows)
    )
    assert arithmetic.selected_pairs(case) == 2 * sum(min(S - 1, p // block) * block + p % block + 1 for p in range(T))


def test_random_blocks_are_distinct_causal_and_as_many_as_there_are():
    import selections

    case = smoke_case(B=2, T=200)
    chosen = selections.random_blocks(jax.random.key(0), case)
    assert chosen.shape == (2, 200, case.H, case.S) and chosen.dtype == jnp.int32
    for token in (0, 15, 16, 100, 199):
        for picks in np.asarray(chosen[:, token]).reshape(-1, case.S):
            real = picks[picks >= 0]
            own = token // case.block_size
            assert len(set(real)) == len(real) == min(case.S, own + 1) and max(real) <= own
            assert list(picks) == sorted(real) + [-1] * (case.S - len(real))
    counts = jnp.full(chosen.shape[:3], case.S, jnp.int32)
    brute = sum(
        min(case.block_size, max(0, token - block * case.block_size + 1))
        for row in np.asarray(chosen)
        for token, heads in enumerate(row)
        for block in heads.ravel()
        if block >= 0
    )
    assert int(selections.visible_keys(chosen, counts, case.block_size).sum()) == brute
    none = selections.visible_keys(chosen, jnp.zeros_like(counts), case.block_size)
    assert int(none.sum()) == 0


def test_overlap():
    import selections

    alike = jnp.broadcast_to(jnp.array([0, 3, -1], jnp.int32), (2, 8, 1, 3))
    assert float(selections.measured_overlap(alike)) == 0.25
    apart = jnp.arange(16, dtype=jnp.int32).reshape(1, 8, 1, 2)
    assert float(selections.measured_overlap(apart)) == 1.0


@pytest.mark.parametrize("overlap", [0.35, 0.5])
def test_realistic_selection_overlaps_as_asked(overlap):
    import inputs

    case = smoke_case(T=2048, N=2, H=1, S=8, selection="realistic", overlap=overlap)
    _, measured = inputs.blocks(case)
    # early tokens have few blocks to choose from and so choose alike
    assert overlap - 0.05 < measured < overlap + 0.03


def test_kernels_counts_launches_of_the_schedule_only():
    import compiled

    hlo = """HloModule jit_f, is_scheduled=true

%fused_computation (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %n = f32[4]{0} negate(%p)
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%command_buffer (q: f32[4]) -> (f32[4], f32[4]) {
  %q = f32[4]{0} parameter(0)
  %f = f32[4]{0} fusion(%q), kind=kLoop, calls=%fused_computation
  ROOT %c = (f32[4]{0}, f32[4]{0}) custom-call(%f), custom_call_target="triton_kernel_call"
}

ENTRY %main (x: f32[4]) -> f32[] {
  %x = f32[4]{0} parameter(0)
  %call = (f32[4]{0}, f32[4]{0}) call(%x), to_apply=%command_buffer
  %g = f32[4]{0} get-tuple-element(%call), index=0
  %zero = f32[] constant(0)
  ROOT %r = f32[] reduce(%g, %zero), dimensions={0}, to_apply=%add
}
"""
    assert compiled.kernels(hlo) == 3


def test_time_calls_measures_the_slow_call_and_takes_argument_sets_in_turn():
    import time

    import timing

    seen = []

    def call(number):
        seen.append(number)
        time.sleep(0.002)

    taken = timing.time_calls(call, [(0,), (1,)], lambda _: None, sample_seconds=0.01, samples=3)
    assert 2.0 <= taken.ms < 20.0 and 2.0 <= taken.host_ms < 20.0 and taken.samples == 3 and taken.calls > 1
    assert seen[:6] == [0, 1, 0, 1, 0, 1]


def test_chained_calls_are_all_made():
    import compiled
    import measure
    import providers
    from plan import SMOKE

    x = jnp.ones((64, 64))
    sets = [(x,), (x + 1,), (x + 2,)]
    options = {"sample_seconds": 0.001, "samples": 3}
    assert measure.chained_ms(lambda x: x @ x, sets, 1, **options) > 0
    # a compiler that drops or merges calls shows in the count of kernels
    assert measure.chained_ms(lambda x: x @ x, sets, 100, **options) is None
    # and so for a backward pass, whose arguments are residuals
    workload = providers.build("sliding", smoke_case(), SMOKE, "xla")
    step, arguments = measure._step(workload, "backward")
    kernels = compiled.facts(measure._compile(step, arguments)[0])["kernels"]
    assert kernels > 1 and measure.chained_ms(step, [arguments], kernels, **options) > 0


def test_a_pass_computes_its_own_gradients_only():
    import compiled
    import measure
    import providers
    from plan import SMOKE

    workload = providers.build("compressed", smoke_case(), SMOKE, "xla")
    programs = {}
    for direction in ("both", "backward", "dq"):
        step, arguments = measure._step(workload, direction)
        programs[direction] = measure._compile(step, arguments)[0], arguments
    results = {direction: program(*arguments) for direction, (program, arguments) in programs.items()}
    gradients = results["both"][1]
    for got, expected in (("backward", gradients), ("dq", gradients[:1])):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), results[got], expected)
    kernels = {direction: compiled.facts(program)["kernels"] for direction, (program, _) in programs.items()}
    assert kernels["dq"] < kernels["backward"] < kernels["both"]
