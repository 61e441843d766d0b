"""Several processes on one run: the same results as one, whatever dies; claims, attempts, signals, torchrun."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY
from lab import lab_data, open_lab, shortcuts, student

import run_exp1b_kaggle as exp

# ---- Claims and attempts, without training ----------------------------------------------------------------------------


class Board:
    """Stands for the run folder: what is finished or failed. As a collector it copies that into an experiment's index."""

    def __init__(self, experiment: exp.Experiment, finished: dict[str, dict[str, exp.Plain]]) -> None:
        self.experiment, self.finished = experiment, finished

    def refresh(self, final: bool = False) -> None:
        self.experiment.state["jobs"].update(self.finished)
        for path in self.experiment.folder.checkpoints.glob("*.failed"):
            self.experiment.state["jobs"][path.stem] = exp.load_plain(path)


@pytest.fixture
def make_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., exp.Worker]]:
    """Makes workers on one store and one board; a job calls `do(job)` of its worker, and is finished if that returns."""
    store, finished = torch.distributed.HashStore(), dict[str, dict[str, exp.Plain]]()
    monkeypatch.setattr(exp.Worker, "POLL_SECONDS", 0.01)

    def run(self: exp.JobRunner) -> None:
        self.experiment.do(self.job)  # type: ignore[attr-defined]
        finished[self.job.name] = {"status": "done", "config": exp.Distillation().plain()}

    monkeypatch.setattr(exp.JobRunner, "run", run)

    def make(generation: int = 0, do: Callable[[exp.Job], None] = lambda job: None) -> exp.Worker:
        experiment = open_lab(tmp_path, compression=("5x",), workers=2)  # a crash is the launcher's to deal with
        experiment.do = do  # type: ignore[attr-defined]
        return exp.Worker(experiment, Board(experiment, finished), store, generation)  # type: ignore[arg-type]

    return make


def test_workers_of_one_group_share_the_jobs(make_worker: Callable[..., exp.Worker]) -> None:
    done: list[str] = []

    def do(job: exp.Job) -> None:
        time.sleep(0.01)
        done.append(job.name)

    workers = [make_worker(do=do) for _ in range(3)]
    threads = [threading.Thread(target=worker.work) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(done) == sorted(job.name for job in workers[0].jobs)


def test_a_claim_is_a_lease_of_one_generation(make_worker: Callable[..., exp.Worker]) -> None:
    """What a dead worker had claimed is free for the next group, and only for one of its workers."""
    dead, same, restarted, other = (make_worker(generation) for generation in (0, 0, 1, 1))
    job = dead.jobs[0]
    assert [worker._claim(job) for worker in (dead, same, restarted, other)] == [True, False, True, False]


@pytest.mark.parametrize("crash", [RuntimeError("CUDA error: an illegal memory access"), KeyboardInterrupt()])
def test_a_job_that_ends_its_process_twice_is_failed(crash: BaseException, make_worker: Callable[..., exp.Worker]) -> None:
    """Neither a crash nor a kill gets a third attempt; all that does not need the job is finished."""
    attempts: list[str] = []

    def do(job: exp.Job) -> None:
        attempts.append(job.name)
        if job.kind == "intermediate":
            raise crash

    for generation in (0, 1):
        with pytest.raises(type(crash)):
            make_worker(generation, do).work()
    last = make_worker(2, do)
    last.work()
    assert attempts.count("intermediate_2.3x_SYNTHETIC") == 2
    failed = exp.load_plain(last.experiment.folder.failure_file("intermediate_2.3x_SYNTHETIC"))
    assert failed["status"] == "failed"
    assert "ended its process 2 times" in failed["reason"]


def test_a_stop_is_no_failed_attempt(make_worker: Callable[..., exp.Worker]) -> None:
    """Stopped by the clock any number of times (and by restarts of the group, which come as SIGTERM), a job stays innocent."""

    def stop(job: exp.Job) -> None:
        raise exp.Stopped("SIGTERM")

    for generation in range(4):
        with pytest.raises(exp.Stopped):
            make_worker(generation, stop).work()
    worker = make_worker(4)
    worker.work()
    assert not worker.experiment.folder.failure_file(worker.jobs[0].name).exists()


def test_a_waiting_worker_stops_when_another_of_its_group_has(make_worker: Callable[..., exp.Worker]) -> None:
    """What it waits for will not come. A stop of an earlier group means nothing: its jobs are taken up again."""
    waiting = make_worker(1)
    for job in waiting.jobs:
        waiting.store.add(f"claim/1/{job.name}", 1)
    waiting.store.add("stopped/0", 1)
    threading.Timer(0.3, waiting.store.add, ("stopped/1", 1)).start()
    started = time.monotonic()
    with pytest.raises(exp.Stopped, match="session clock"):
        waiting.work()
    assert time.monotonic() - started >= 0.25


def test_only_rank_0_writes(tmp_path: Path) -> None:
    """The others take in what is finished and leave index, tables, report and figures alone."""
    lab = open_lab(tmp_path / "run", compression=("7x",), methods=("Direct",))
    with shortcuts():
        exp.JobRunner(lab, student(lab, "Direct", "7x")).run()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    other = exp.Collector(lab.folder, lab.settings, lab.state, None, writes=False)
    other.refresh(final=True)
    assert student(lab, "Direct", "7x").name in lab.state["jobs"]
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    exp.Collector(lab.folder, lab.settings, {**lab.state, "jobs": {}}, None, writes=True).refresh()
    assert (tmp_path / "run/results.csv").exists()


# ---- The launcher's two sides, without processes ----------------------------------------------------------------------


@pytest.fixture
def two_workers(tmp_path: Path) -> exp.OpenRun:
    """A run for two workers that has not begun."""
    lab = open_lab(tmp_path / "run", workers=2)
    platform = exp.Platform(False, tmp_path, lab.scratch, (), False)
    return exp.OpenRun(lab.folder, lab.settings, lab.state, lab_data(), [lab.device], None, platform)


@pytest.mark.parametrize("error", [exp.DiskFull("no room"), exp.UsageError("no data")])
def test_an_error_that_a_restart_would_not_cure_is_raised_by_the_parent(
    error: Exception, two_workers: exp.OpenRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker hands it over as its result: a raised one would make the launcher restart the group twenty times."""
    monkeypatch.setattr(exp, "join_run", lambda *_: (_ for _ in ()).throw(error))
    monkeypatch.setenv("RANK", "1")
    session = exp.Session(None)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        outcome = exp.worker_main(two_workers.folder.path, two_workers.settings, two_workers.platform, None)
        assert outcome is error
        monkeypatch.setattr(exp, "elastic_launch", lambda config, main: lambda *_: {0: "", 1: outcome})
        with pytest.raises(type(error), match=str(error)):
            exp.launch(two_workers, session)
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)


def test_a_signal_before_the_launcher_listens_is_not_lost(two_workers: exp.OpenRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> Callable[..., dict[int, str]]:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        return lambda *_: {}

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(exp, "elastic_launch", interrupted)
    session = exp.Session(None)
    try:
        assert exp.launch(two_workers, session) == "SIGTERM"
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
    assert session.signal == signal.SIGTERM


def test_two_gpus_get_a_worker_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line to the launcher: nobody says how many workers, two are started, and each takes its own GPU."""
    t4 = {"is_available": True, "device_count": 2, "get_device_name": "T4", "get_device_capability": (7, 5), "get_arch_list": ["sm_75"]}
    for name, value in t4.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    chosen, worked = list[torch.device](), list[exp.Device]()
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(exp, "probe_gpu", lambda device: None)
    monkeypatch.setattr(exp, "group_store", lambda: store)

    def make_experiment(run: exp.OpenRun, session: exp.Session, device: exp.Device) -> exp.Experiment:
        worked.append(device)
        raise exp.Stopped("session clock")

    def launcher(config: exp.LaunchConfig, main: Callable[..., str]) -> Callable[..., dict[int, str]]:
        def start(*arguments: object) -> dict[int, str]:
            outcomes = {}
            for rank in map(str, range(config.nproc_per_node)):
                for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("TORCHELASTIC_RESTART_COUNT", "0")):
                    monkeypatch.setenv(name, value)
                outcomes[int(rank)] = main(*arguments)
            return outcomes

        return start

    monkeypatch.setattr(exp, "make_experiment", make_experiment)
    monkeypatch.setattr(exp, "elastic_launch", launcher)
    assert exp.main([*TINY, "--device", "auto", "--output-dir", str(tmp_path / "run")]) == 0
    assert [device.index for device in worked] == [0, 1]
    assert chosen == [torch.device("cuda", 0), torch.device("cuda", 1)]
    state = exp.load_plain(exp.RunFolder(tmp_path / "run").index_file)
    assert (state["precision"], state["sessions"][-1]["workers"], state["sessions"][-1]["stopped"]) == ("fp16", 2, "session clock")


MEMBER = {
    "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0", "GROUP_WORLD_SIZE": "1",
    "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "RANK": "1", "LOCAL_RANK": "1",
}  # fmt: skip


@pytest.fixture
def member(monkeypatch: pytest.MonkeyPatch) -> torch.distributed.HashStore:
    """This process as number 1 of 3 under torchrun; returns their store."""
    store = torch.distributed.HashStore()
    for name, value in MEMBER.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(exp, "group_store", lambda: store)
    return store


def test_members_wait_for_rank_0_to_prepare(member: torch.distributed.HashStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read before; and where rank 0 could not prepare, the others end too."""
    monkeypatch.setattr(exp, "join_run", lambda *_: pytest.fail("joined a run that was not prepared"))
    threading.Timer(0.3, member.set, ("prepared/0", "failed")).start()
    started = time.monotonic()
    request = exp.Request({"output_dir": tmp_path})
    assert exp.run_member(request, exp.detect_platform(tmp_path), exp.Session(None)) == 2
    assert time.monotonic() - started >= 0.25
    member.delete_key("prepared/0")
    with pytest.raises(exp.Stopped):
        exp.run_member(request, exp.detect_platform(tmp_path), exp.Session(deadline=0.0))
    assert member.add("left/0", 0) == 2, "rank 0 waits for those who left before they began, too"


@pytest.mark.parametrize(
    ("error", "said"), [(exp.Stopped("SIGTERM"), b"stopped"), (exp.DiskFull("no room"), b"failed"), (OSError(), b"failed")]
)
def test_the_others_learn_that_rank_0_could_not_prepare(
    member: torch.distributed.HashStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: bytes
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(exp, "open_run", fail)
    with pytest.raises(type(error)):
        exp.run_member(exp.Request({"output_dir": tmp_path}), exp.detect_platform(tmp_path), exp.Session(None))
    assert member.get("prepared/0") == said


def test_rank_0_leaves_last(member: torch.distributed.HashStore) -> None:
    """It holds the lock and writes the report; after a signal it does not wait for ever."""
    session, patience = exp.Session(None), 1.0
    threading.Timer(0.8, member.add, ("left/0", 2)).start()
    started = time.monotonic()
    exp.wait_for_members(member, 0, session)
    assert time.monotonic() - started >= 0.7
    session.signal = signal.SIGTERM
    exp.wait_for_members(member, 1, session, patience)


def test_a_group_started_again_for_nothing_repeats_the_exit_code(
    member: torch.distributed.HashStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1 tells of failed jobs, but with --max-restarts torchrun takes it for a crash. A crash leaves no code behind, in any rank."""
    request, platform = exp.Request({"output_dir": tmp_path}), exp.detect_platform(tmp_path)
    opened: list[str] = []

    @contextlib.contextmanager
    def open_run(*_: object) -> Iterator[None]:
        opened.append(os.environ["TORCHELASTIC_RESTART_COUNT"])
        yield None

    monkeypatch.setattr(exp, "open_run", open_run)
    monkeypatch.setattr(exp, "work", lambda *_: 1 / 0)
    monkeypatch.setattr(exp, "wait_for_members", lambda *_: None)
    monkeypatch.setattr(exp, "conclude", lambda *_: 1)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ZeroDivisionError):
        exp.run_member(request, platform, exp.Session(None))
    monkeypatch.setattr(exp, "work", lambda *_: "")
    terminated = exp.Session(None)
    terminated.signal = signal.SIGTERM  # another rank crashed
    for generation, rank, session in (("1", "0", terminated), ("2", "0", None), ("3", "0", None), ("3", "1", None)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", generation)
        monkeypatch.setenv("RANK", rank)
        assert exp.run_member(request, platform, session or exp.Session(None)) == 1
    assert opened == ["0", "1", "2"]


def test_what_torchrun_cannot_do(
    member: torch.distributed.HashStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exp.main([*TINY]) == 2
    assert "under torchrun give --output-dir" in capsys.readouterr().out
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert exp.main([*TINY, "--output-dir", "x"]) == 2
    assert "leave out --max-restarts" in capsys.readouterr().out


# ---- Real processes ----------------------------------------------------------------------------------------------------

PART = ["--compression", "7x", "--methods", "Direct", "TraditionalKD"]  # no pilot: some ten seconds

WRAPPER = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import run_exp1b_kaggle as exp

trace = os.path.join(os.path.dirname(__file__), "trace")
def note(text):
    with open(trace, "a") as file:
        file.write(text + "\\n")

compute, run, epoch_done = exp.TeacherOutputs._compute, exp.JobRunner.run, exp.Progress.epoch_done
def _compute(self, teacher, page):
    result = compute(self, teacher, page)
    note(f"page {{teacher}} {{page}}")
    return result
def poisoned(self):
    note(f"job {{self.job.name}}")
    if self.job.name == "student_7x_Direct_run2":
        os.kill(os.getpid(), signal.SIGKILL)
    run(self)
def killed_once(self, name, schedule, entry):
    epoch_done(self, name, schedule, entry)
    note(f"epoch {{name}} {{entry['epoch']}}")
    if name == "teacher_resnet50_SYNTHETIC" and entry["epoch"] == 1 and not os.path.exists(trace + ".killed"):
        open(trace + ".killed", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
exp.TeacherOutputs._compute, exp.JobRunner.run, exp.Progress.epoch_done = _compute, poisoned, killed_once

if __name__ == "__main__":
    sys.exit(exp.main())
"""


def rows(folder: Path, keep: Callable[[exp.pd.DataFrame], exp.pd.Series]) -> list[dict[str, str]]:
    """results.csv without its columns of times, as text (beside a failed job an integer ends in .0); what `keep` selects."""
    table = exp.pd.read_csv(folder / "results.csv", dtype=str).drop(columns=["train_seconds", "images_per_second"])
    return table[keep(table)].replace(r"\.0$", "", regex=True).to_dict("records")


def ratio(table: exp.pd.DataFrame) -> exp.pd.Series:
    """The rows of the ratio of PART, HPM-KD's included."""
    return table.compression == "7x"


def part(table: exp.pd.DataFrame) -> exp.pd.Series:
    """The rows of a run with PART."""
    return (table.compression == "7x") & table.method.isin(["Direct", "TraditionalKD"])


def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(tmp_path), "PYTHONWARNINGS": "default"}


@pytest.fixture(scope="module")
def battered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str], list[str]]:
    """Two workers; one is killed in the teacher's second epoch, and one student kills whoever takes it."""
    tmp_path = tmp_path_factory.mktemp("battered")
    (tmp_path / "wrapper.py").write_text(WRAPPER)
    command = [sys.executable, "wrapper.py", *TINY, *PART, "--workers", "2", "--output-dir", str(tmp_path / "run")]
    finished = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), text=True, capture_output=True, timeout=900, check=False)
    return tmp_path / "run", finished, (tmp_path / "trace").read_text().splitlines()


@pytest.mark.slow
def test_killed_workers_change_no_result(battered: tuple[Path, subprocess.CompletedProcess[str], list[str]], finished_run: Path) -> None:
    """Digit for digit what one process that nothing happened to finds, but for the student that kills its worker."""
    folder, finished, _ = battered
    assert finished.returncode == 1, finished.stdout + finished.stderr
    expected = [row for row in rows(finished_run, part) if (row["method"], row["run"]) != ("Direct", "2")]
    assert len(expected) == 3
    assert rows(folder, lambda table: part(table) & (table.status == "done")) == expected


@pytest.mark.slow
def test_a_student_that_kills_its_worker_twice_is_failed(
    battered: tuple[Path, subprocess.CompletedProcess[str], list[str]],
) -> None:
    folder, finished, trace = battered
    assert trace.count("job student_7x_Direct_run2") == 2
    record = exp.load_plain(folder / "checkpoints" / exp.STATE_NAME)["jobs"]["student_7x_Direct_run2"]
    assert (record["status"], "ended its process 2 times" in record["reason"]) == ("failed", True)
    assert "1 failed (student_7x_Direct_run2)" in finished.stdout
    assert "ended its process 2 times" in (folder / "experiment_report.md").read_text()


@pytest.mark.slow
def test_a_restarted_group_continues_from_the_last_epoch(
    battered: tuple[Path, subprocess.CompletedProcess[str], list[str]],
) -> None:
    """The teacher's worker was killed before the second epoch was saved: that one is done again, and never the first."""
    _, finished, trace = battered
    assert trace.count("epoch teacher_resnet50_SYNTHETIC 0") == 1
    assert trace.count("epoch teacher_resnet50_SYNTHETIC 1") >= 2
    assert "teacher_resnet50_SYNTHETIC continues after epoch 1 of 2" in finished.stdout


@pytest.mark.slow
def test_every_page_was_computed_once_by_all_workers_together(
    battered: tuple[Path, subprocess.CompletedProcess[str], list[str]],
) -> None:
    computed = [line for line in battered[2] if line.startswith("page")]
    used = {page for run in (1, 2) for page in exp.page_order(42, run, 2)}
    assert sorted(computed) == sorted(f"page teacher_resnet50_SYNTHETIC {page}" for page in used)


@pytest.mark.slow
def test_what_the_user_sees_of_the_launcher(
    battered: tuple[Path, subprocess.CompletedProcess[str], list[str]],
) -> None:
    """Of a dead worker one line, in the log too; no warnings, no traceback."""
    folder, finished, _ = battered
    assert finished.stderr == ""
    assert "Traceback" not in finished.stdout
    for text in (finished.stdout, (folder / "experiment.log").read_text()):
        deaths = text.count("a worker died, so all start again from their last epochs: process")
        assert deaths in (2, 3), "of the three kills two may fall together"
        assert text.count("terminated with signal SIGKILL") == deaths


def kill_when(path: Path, number: int) -> threading.Thread:
    """Send this very process a signal as soon as a file exists."""

    def watch() -> None:
        give_up = time.monotonic() + 600
        while not path.exists() and time.monotonic() < give_up:
            time.sleep(0.02)
        if path.exists():
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def group(leader: int) -> list[int]:
    """The living processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, leads, *_ = path.read_text().rsplit(")", 1)[1].split()
            found += [int(path.parent.name)] if int(leads) == leader and state != "Z" else []
    return found


def children(parent: int) -> list[int]:
    """The processes that another one has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rsplit(")", 1)[1].split()[1]) == parent:
                found.append(int(path.parent.name))
    return found


def wait_until(true: Callable[[], object], seconds: float = 300.0) -> None:
    give_up = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < give_up, "it does not come"
        time.sleep(0.02)


@pytest.mark.slow
def test_signals_reach_all_workers_and_torchrun_continues(tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills at random moments, Ctrl-C twice, SIGTERM to the parent alone: all leave a run that goes on, and no process.

    The last time it does as two members of torchrun, and one of them is killed. They do HPM-KD's chain, pilot and students too, and
    all is digit for digit what one process finds.
    """
    monkeypatch.chdir(tmp_path)
    folder = exp.RunFolder(tmp_path / "run")
    command = [*TINY, *PART, "--workers", "2", "--output-dir", str(folder.path)]
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def start(*options: str) -> subprocess.Popen[str]:
        script = [sys.executable, str(ROOT / "run_exp1b_kaggle.py"), *command, *options]
        return subprocess.Popen(script, env=environment(tmp_path), text=True, stdout=subprocess.PIPE, start_new_session=True)

    moment = random.Random(6)
    killed = start()
    wait_until(folder.progress_file("teacher_resnet50_SYNTHETIC").exists)
    os.kill(moment.choice([pid for pid in group(killed.pid) if pid != killed.pid]), signal.SIGKILL)
    time.sleep(4 * moment.random())
    killed.kill()
    killed.communicate()
    wait_until(lambda: not group(killed.pid), 60)  # workers do not outlive their parent: they would write into the next session's run
    before = folder.log_file.stat().st_size
    interrupted = start("--resume")
    wait_until(lambda: b"jobs to do" in folder.log_file.read_bytes()[before:])
    for _ in range(2):
        os.killpg(interrupted.pid, signal.SIGINT)
        time.sleep(0.2)
    said = interrupted.communicate(timeout=120)[0]
    assert interrupted.returncode == 130, said
    assert "Traceback" not in said
    assert "stopped by SIGINT: " in said.splitlines()[-1]
    assert not group(interrupted.pid)
    try:
        watch = kill_when(folder.model_file("teacher_resnet50_SYNTHETIC"), signal.SIGTERM)
        assert exp.main([*command, "--resume"]) == 143
        watch.join()
        assert not multiprocessing.active_children()
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
            signal.signal(number, handler)
    assert not (folder.path / "run.lock").exists()
    assert "stopped by SIGTERM" in folder.log_file.read_text()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command = [*launcher, str(ROOT / "run_exp1b_kaggle.py"), "--resume", "--threads", "1", "--device", "cpu", "--methods", *exp.METHODS]
    command += ["--output-dir", str(folder.path)]
    with (tmp_path / "said").open("w") as file:
        members = subprocess.Popen(command, env=environment(tmp_path), stdout=file, stderr=subprocess.STDOUT)
        wait_until(folder.progress_file("intermediate_2.3x_SYNTHETIC").exists)
        os.kill(moment.choice(children(members.pid)), signal.SIGKILL)
        members.wait(900)
    said = (tmp_path / "said").read_text()
    assert members.returncode == 0, said
    assert rows(folder.path, ratio) == rows(finished_run, ratio)
    assert "Traceback" not in said
    assert said.count("finished: 10 of 10 jobs done") == 1
    assert said.count("exitcode: -9") >= 1, "torchrun saw a member die, and started the group again"
    sessions = exp.load_plain(folder.index_file)["sessions"]
    assert [session["stopped"] for session in sessions] == ["", "SIGINT", "SIGTERM", ""]
    assert [session["workers"] for session in sessions] == [2, 2, 2, 2]
