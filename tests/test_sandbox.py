"""The sandbox for code that models write: every attack of reliability_ux.md F41 must fail to do harm.

An attack is a program that prints HARM where it got through. Controls at tier `process` show for several of them that
the test can see harm: that tier keeps files, network and other processes from nobody.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rlkd import doctor
from rlkd.core.errors import PreflightError
from rlkd.doctor.check import Check
from rlkd.engines import sandbox_filter
from rlkd.engines.sandbox import Found, Ran, Session, Tier, probe
from rlkd.engines.sandbox_room import PROCESSES, Room
from rlkd.engines.sandbox_rules import allowed, equip
from tests.fake_passes import FAKES

CLOSED, OPEN = Room(closed=True, memory=1 << 29), Room(closed=False, memory=1 << 29)
FOUND = probe()
pytestmark = [
    pytest.mark.stack,  # real programs in real rooms
    pytest.mark.faults("F41"),
    pytest.mark.skipif(FOUND.tier is not Tier.SANDBOX, reason=f"no sandbox on this machine: {FOUND.reason}"),
]


def run(program: str, room: Room = CLOSED, limit_s: float = 10.0, stdin: str = "") -> Ran:
    with Session(program, room) as session:
        return session.program(stdin, limit_s)


def refused(program: str) -> str:
    """Runs an attack in the sandbox; what it says of its failure."""
    ran = run(program)
    assert ran.code == 0, ran.stderr
    assert "HARM" not in ran.stdout
    assert ran.stdout.startswith("refused"), "the attack must have been tried"
    return ran.stdout


def harms(program: str) -> None:
    """The control: the same attack gets through in tier `process`, so its failure in the sandbox says something."""
    ran = run(program, OPEN)
    assert "HARM" in ran.stdout, (ran.stdout, ran.stderr)


def trying(statement: str, before: str = "") -> str:
    """A program that does something forbidden and says how it went."""
    return f"import ctypes, os, socket, sys\n{before}\ntry:\n    {statement}\n    print('HARM')\n" + (
        "except OSError as e:\n    print('refused', e)\n"
    )


@pytest.fixture
def victim() -> Iterator[psutil.Process]:
    """Another process of the user, with a secret in its environment."""
    environment = {**os.environ, "HF_TOKEN": "canary-7f3a"}
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=environment) as process:
        yield psutil.Process(process.pid)
        process.kill()


def test_this_machine_says_what_it_gives() -> None:
    assert FOUND.tier is Tier.SANDBOX
    assert FOUND.landlock >= 1
    assert [t.rank for t in (Tier.NONE, Tier.PROCESS, Tier.SANDBOX)] == [0, 1, 2]


def test_a_program_runs_with_its_input_and_its_exit_code() -> None:
    ran = run("import sys\nprint(sum(map(int, sys.stdin.read().split())))\nsys.exit(3)", stdin="1 2 3\n")
    assert (ran.stdout, ran.code) == ("6\n", 3)
    raised = run("raise ValueError('no such thing')")
    assert raised.code == 1
    assert "ValueError: no such thing" in raised.stderr
    big = "x" * 3_000_000
    assert run("import sys; print(len(sys.stdin.read()))", stdin=big).stdout == "3000000\n"
    assert run("pass", stdin=big).code == 0, "a program need not read its input"


# --- what the answer must not see


def test_proc_1_environ() -> None:
    refused(trying("open('/proc/1/environ', 'rb').read()"))


@pytest.mark.faults("F41")
def test_another_process_s_environment(victim: psutil.Process) -> None:
    program = trying(f"assert b'canary-7f3a' in open('/proc/{victim.pid}/environ', 'rb').read()")
    refused(program)
    harms(program)


@pytest.mark.faults("F41")
@pytest.mark.parametrize("room", [CLOSED, OPEN], ids=["sandbox", "process"])
def test_the_environment_is_scrubbed(monkeypatch: pytest.MonkeyPatch, room: Room) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "canary-7f3a")
    program = "import ctypes, os\nprint(sorted(os.environ), 'canary-7f3a' in str(dict(os.environ)))"
    said = run(program, room).stdout
    kept = ["HOME", "LANG", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PATH"]
    assert said == f"{kept} False\n"


def test_nothing_of_the_judge_s_memory_or_descriptors_comes_along(tmp_path: Path) -> None:
    """The judge holds a secret in memory and in an open file when the sandbox is made."""
    secret = tmp_path / "secret"
    secret.write_text("canary-7f3a")
    with secret.open() as held:
        os.set_inheritable(held.fileno(), True)
        said = run("import os\nprint([d for d in range(3, 1024) if os.path.exists(f'/dev/fd/{d}')])\n" + _OPEN_ONES)
    assert said.stdout.splitlines()[-1] == "[]"


_OPEN_ONES = """
found = []
for d in range(3, 1024):
    try:
        os.fstat(d)
        found.append(d)
    except OSError:
        pass
print(found)
"""


def test_a_secret_file(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("canary-7f3a")
    program = trying(f"open({str(secret)!r}).read()")
    refused(program)
    harms(program)


def test_the_user_s_home() -> None:
    home = str(Path.home())
    refused(trying(f"assert set(os.listdir({home!r})) - {{'.pyenv'}} or print('only what Python needs') or open('/x')"))
    said = run(f"import os\nprint(os.listdir('/'), os.path.exists({home + '/.ssh'!r}), os.path.exists('/etc/passwd'))")
    assert "False False" in said.stdout or "Permission" in said.stderr


# --- the network


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        yield server


@pytest.mark.faults("F41")
def test_connect_to_this_machine(listener: socket.socket) -> None:
    program = trying(f"socket.create_connection(('127.0.0.1', {listener.getsockname()[1]}), 2).send(b'x')")
    refused(program)
    with pytest.raises(TimeoutError):
        listener.accept()
    harms(program)
    listener.accept()[0].close()


def test_connect_to_the_outside() -> None:
    assert "not permitted" in refused(trying("socket.create_connection(('192.0.2.1', 80), 2)"))


def test_bind_a_port() -> None:
    program = trying("socket.socket().bind(('127.0.0.1', 0))")
    refused(program)
    harms(program)


def test_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        program = trying(f"socket.socket(socket.AF_UNIX).connect({path!r})")
        refused(program)
        harms(program)


def test_without_the_filter_there_is_still_no_network() -> None:
    """The namespace alone: netlink says which interfaces there are, and loopback is down."""
    assert run("import os\nprint(os.path.exists('/sys/class/net'))").stdout == "False\n"


# --- what the answer must not change


@pytest.mark.faults("F41")
def test_write_outside_its_own_directory(tmp_path: Path) -> None:
    program = trying(f"open({str(tmp_path / 'written')!r}, 'w').write('x')")
    refused(program)
    assert not (tmp_path / "written").exists()
    harms(program)
    assert (tmp_path / "written").exists()


@pytest.mark.parametrize("path", ["/written", "/usr/lib/written", "/dev/written", os.__file__, "/dev/shm/written"])
def test_write_to_the_root_the_libraries_and_python_itself(path: str) -> None:
    refused(trying(f"open({path!r}, 'a').write('x')"))


def test_it_may_write_in_its_own_directory_and_that_is_gone_afterwards() -> None:
    program = "import os\nprint(sorted(os.listdir('.')))\nopen('mine', 'w').write('x')\nprint(os.getcwd())"
    assert [run(program).stdout for _ in range(2)] == ["[]\n/box\n"] * 2


def test_run_a_file_of_its_own() -> None:
    program = (
        "import shutil\nshutil.copyfile('/usr/lib/os-release', 'x') if os.path.exists('/usr/lib/os-release') else 0\n"
    )
    refused(
        trying(
            "os.execv('/box/x', ['x'])", f"{program}open('/box/x', 'ab').write(b'#!/bin/sh'); os.chmod('/box/x', 0o755)"
        )
    )


def test_a_symbolic_link_to_the_outside(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("canary-7f3a")
    program = trying("open('link/secret').read()", f"os.symlink({str(tmp_path)!r}, 'link')")
    refused(program)
    harms(program)


def test_a_symbolic_link_where_the_judge_cleans_up(tmp_path: Path) -> None:
    """In tier process the judge deletes the answer's directory: it must not follow what the answer put there, nor what
    the answer puts there meanwhile."""
    (tmp_path / "kept").write_text("x")
    race = f"""
import os
os.mkdir("a")
if os.fork() == 0:
    while True:
        try:
            os.rename("a", "b"); os.symlink({str(tmp_path)!r}, "a"); os.unlink("a"); os.rename("b", "a")
        except OSError:
            pass
os.symlink({str(tmp_path)!r}, "link")
print("done")
"""
    for _ in range(3):
        assert run(race, OPEN).stdout == "done\n"
    assert (tmp_path / "kept").read_text() == "x"


# --- other processes


@pytest.mark.faults("F41")
def test_kill_its_parent_and_everybody(victim: psutil.Process) -> None:
    program = f"""
import os, signal
killed = []
for pid in (os.getppid(), 1, {victim.pid}, {os.getpid()}, -{os.getpid()}):
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        try:
            os.kill(pid, number)
            killed.append(pid)
        except OSError:
            pass
print("HARM" if {victim.pid} in killed or {os.getpid()} in killed else "refused", killed)
"""
    with Session(program, CLOSED) as session:
        assert session.program("", 10.0).stdout.startswith("refused"), "and its parent lives on to say so"
        assert session.program("", 10.0).stdout.startswith("refused")
    assert victim.is_running()
    assert victim.status() != psutil.STATUS_ZOMBIE
    harms(f"import os\nos.kill({victim.pid}, 9)\nprint('HARM')")
    assert victim.wait(5) is not None


@pytest.mark.faults("F41")
def test_ptrace(victim: psutil.Process) -> None:
    attach = "libc = ctypes.CDLL(None, use_errno=True)\nlibc.ptrace.argtypes = [ctypes.c_long] * 4\n"
    attach += "def attach(pid):\n    if libc.ptrace(16, pid, 0, 0) != 0: raise OSError(ctypes.get_errno(), 'ptrace')\n"
    for pid in ("1", str(victim.pid)):
        refused(trying(f"attach({pid})", attach))
    harms(trying(f"attach({victim.pid}); libc.ptrace(17, {victim.pid}, 0, 0)", attach))


@pytest.mark.faults("F37")
def test_a_fork_bomb() -> None:
    """As many processes as allowed, and no more; the next program of the same sandbox runs undisturbed."""
    bomb = """
import os, time
made = 0
while True:
    try:
        if os.fork() == 0:
            time.sleep(600)
        made += 1
    except BlockingIOError:
        break
print(made)
"""
    with Session(bomb, CLOSED) as session:
        counts = [int(session.program("", 10.0).stdout) for _ in range(2)]
    assert all(PROCESSES // 2 < n < PROCESSES for n in counts)
    endless = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    with Session(endless, CLOSED) as session:
        inner = session._inner
        ran = session.program("", 1.0)
        assert ran.code is None
        assert len(psutil.Process(inner).children(recursive=True)) == 0, "gone when the program's time is over"


def _of_home(prefix: str) -> list[psutil.Process]:
    """Processes that were started with a private directory of tier `process`."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("HOME", "").startswith(prefix) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


SURVIVOR = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)
time.sleep(0.3)
print("started")
"""


def test_a_survivor_in_a_session_of_its_own() -> None:
    with Session(SURVIVOR, CLOSED) as session:
        inner = psutil.Process(session._inner)
        assert session.program("", 10.0).stdout == "started\n"
        assert inner.children(recursive=True) == [], "gone with the program"
    assert not inner.is_running()
    with Session(SURVIVOR, OPEN) as session:  # the control: without a PID namespace it lives on
        home = session._home or ""
        assert session.program("", 10.0).stdout == "started\n"
        left = _of_home(home)
        for process in left:
            process.kill()
    assert len(left) >= 2, "process 1 and the survivor"


def test_everything_ends_with_a_killed_judge() -> None:
    judge = (
        "import os, sys, time\n"
        "from rlkd.engines.sandbox import Room, Session\n"
        "s = Session('import time; time.sleep(600)', Room()).__enter__()\n"
        "s._send({'do': 'program', 'stdin': '', 'limit_s': 500.0, 'most': 100})\n"
        "time.sleep(0.5)\n"
        "print(s._outer, s._inner, flush=True)\n"
        "time.sleep(600)\n"
    )
    root = Path(__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", judge], stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        outer, inner = map(int, process.stdout.readline().split())
        tree = [psutil.Process(outer), psutil.Process(inner), *psutil.Process(inner).children(recursive=True)]
        assert len(tree) == 3
        process.kill()
    _, alive = psutil.wait_procs(tree, timeout=5)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def test_the_end_with_the_parent_cannot_be_called_off() -> None:
    refused(trying("ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0 or (_ for _ in ()).throw(OSError('prctl'))"))


# --- using up what there is


@pytest.mark.faults("F37")
def test_fill_the_disk() -> None:
    one = trying("open('big', 'wb').write(b'x' * (17 << 20))")
    assert "File too large" in refused(one)
    many = trying("[open(str(i), 'wb').write(b'x' * (8 << 20)) for i in range(20)]")
    assert "No space left" in refused(many)
    files = trying("[open(str(i), 'wb').close() for i in range(10000)]")
    assert "No space left" in refused(files)
    refused(trying("os.memfd_create('x')"))


@pytest.mark.faults("F37")
def test_huge_output() -> None:
    ran = run("while True: print('x' * 10000)")
    assert ran.overflow
    assert len(ran.stdout) <= 1 << 20
    quiet = run("import sys\nfor _ in range(10 ** 5): sys.stderr.write('x' * 1000)")
    assert len(quiet.stderr) <= 2000


@pytest.mark.faults("F37")
def test_memory() -> None:
    ran = run("x = bytearray(1 << 30)")
    assert "MemoryError" in ran.stderr
    assert run("x = bytearray(1 << 26)").code == 0


@pytest.mark.faults("F32")
def test_time() -> None:
    began = time.monotonic()
    ran = run("while True: pass", limit_s=0.5)
    assert ran.code is None
    assert time.monotonic() - began < 20
    blocked = "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64))\n7**7**8"
    assert run(blocked, limit_s=0.5).code is None


# --- the kernel


@pytest.mark.parametrize("statement", [
    "os.chroot('/box')",
    "checked(libc.mount(b'none', b'/box', b'tmpfs', 0, None))",
    "checked(libc.umount2(b'/box', 2))",
    "checked(libc.unshare(0x10000000))",
    "checked(libc.setns(0, 0))",
    "os.setuid(0)",
    "os.setgroups([0])",
    "os.mknod('disk', 0o60600, os.makedev(8, 0))",
    "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)); os.nice(-1)",
    "__import__('resource').setrlimit(__import__('resource').RLIMIT_NPROC, (1000, 1000))",
    "__import__('fcntl').ioctl(0, 0x5412, b'x')",
])  # fmt: skip
def test_what_needs_rights(statement: str) -> None:
    before = (
        "libc = ctypes.CDLL(None, use_errno=True)\ndef checked(r):\n    if r != 0: raise OSError(ctypes.get_errno())"
    )
    refused(trying(statement, before).replace("except OSError", "except (OSError, ValueError)"))


def test_every_call_of_the_list_is_refused() -> None:
    """Each by its number, with arguments that mean nothing: EPERM is the filter's, whatever else would have been wrong.
    Control: without the filter none of these says EPERM to the user for lack of the filter; `socket` opens a socket."""
    at = 0 if os.uname().machine == "x86_64" else 1
    numbers = {name: pair[at] for name, pair in sandbox_filter.DENIED.items() if pair[at] is not None}
    program = f"""
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
through = []
for name, number in {numbers}.items():
    ctypes.set_errno(0)
    if libc.syscall(number, -1, -1, -1, -1, -1, -1) != -1 or ctypes.get_errno() != errno.EPERM:
        through.append((name, ctypes.get_errno()))
print(through)
"""
    assert len(numbers) > 60
    assert run(program).stdout == "[]\n"
    for name in ("bpf", "io_uring_setup", "keyctl", "ptrace", "userfaultfd", "unshare", "mount", "socket"):
        assert name in numbers
    opened = (
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "print(libc.socket(2, 1, 0) >= 0, libc.socketpair(1, 1, 0, (ctypes.c_int * 2)()))"
    )
    assert run(opened, OPEN).stdout == "True 0\n"
    assert run(opened).stdout == "False 0\n"


def test_a_new_namespace_by_clone() -> None:
    before = "libc = ctypes.CDLL(None, use_errno=True)\ndef clone(number, *a):\n    r = libc.syscall(number, *a)\n"
    before += "    if r == 0: os._exit(0)\n    if r < 0: raise OSError(ctypes.get_errno(), 'clone')\n    return r"
    number = 56 if os.uname().machine == "x86_64" else 220
    refused(trying(f"clone({number}, 0x10000000 | 17, 0, 0, 0, 0)", before))
    assert "38" in refused(trying("clone(435, (ctypes.c_uint64 * 11)(), 88)", before)), "clone3 is not there"
    assert run(f"import ctypes, os\n{before}\nprint(clone({number}, 17, 0, 0, 0, 0) > 0)").stdout == "True\n"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x32 is of x86-64 only")
def test_the_second_set_of_numbers_of_x86() -> None:
    before = "libc = ctypes.CDLL(None, use_errno=True)\ndef call(n):\n"
    before += "    if libc.syscall(n) < 0: raise OSError(ctypes.get_errno(), '')"
    refused(trying("call(0x40000000 | 41)", before))
    refused(trying("call(0x40000000 | 39)", before))


# --- a fake verdict, and how an answer is tested


def test_tests_see_plain_data_of_the_answer() -> None:
    answer = """
import math
from fractions import Fraction
def add(a, b): return a + b
def squares(n):
    for i in range(n): yield i * i
def sort(values): values.sort()
def twice(f, values): return [f(f(v)) for v in values]
def fails(): raise KeyError("gone")
class Point:
    def __init__(self, x, y): self.x, self.y = x, y
    def norm(self): return math.hypot(self.x, self.y)
"""
    tests = [
        "assert add(1, 2) == 3 and add('a', 'b') == 'ab' and add((1,), (2,)) == (1, 2)",
        "assert add(10**400, 1) == 10**400 + 1",
        "assert add(0.1, 0.2) == 0.1 + 0.2 and math.isclose(add(0.1, 0.2), 0.3)",
        "assert list(squares(4)) == [0, 1, 4, 9] and sum(squares(4)) == 14 and 9 in squares(4)",
        "v = [3, 1, 2]\nsort(v)\nassert v == [1, 2, 3]",
        "assert twice(lambda x: x + 1, [1, 2]) == [3, 4] and twice(str, [1]) == ['1']",
        "try:\n    fails()\n    assert False\nexcept KeyError as e:\n    assert 'gone' in str(e)",
        "p = Point(3, 4)\nassert p.norm() == 5.0 and p.x == 3 and isinstance(p, Point)\np.x = 0\nassert p.norm() == 4",
        "from fractions import Fraction\nassert add(Fraction(1, 3), Fraction(1, 3)) == Fraction(2, 3)",
        "assert add([], [[1, {'a': (None, True)}]]) == [[1, {'a': (None, True)}]]",
        "def check(candidate):\n    assert candidate(2, 2) == 4\ncheck(add)",
    ]
    with Session(answer, CLOSED) as session:
        assert [session.test("", t, 10.0).how for t in tests] == ["passed"] * len(tests)
        wrong = [session.test("", t, 10.0) for t in ("assert add(1, 2) == 4", "assert nothing(1)", "x = (")]
    assert [w.how for w in wrong] == ["failed", "raised", "raised"]
    assert not any(w.passed for w in wrong)
    assert "nothing" in wrong[1].detail


@pytest.mark.parametrize("name", FAKES)
def test_a_pass_cannot_be_claimed(name: str) -> None:
    """Tests that f fails: f(20000) is to be 41421, in several ways of asking."""
    before = "import math" if "math" not in name else ""
    tests = [
        "assert f(20000) == 41421",
        "assert not f(20000) != 41421",
        "assert math.isclose(f(20000), 41421)",
        "assert set([f(20000)]) == {41421}",
        "assert abs(f(20000) - 41421) < 1",
        "assert f(20000) in [41421]",
        "assert 41421 in [f(20000)]",
    ]
    with Session(FAKES[name], CLOSED) as session:
        verdicts = [session.test(before, t, 5.0) for t in tests]
    assert not any(v.passed for v in verdicts), verdicts


def test_the_answer_reaches_nothing_of_a_function_it_is_given() -> None:
    answer = """
def f(g):
    for name in ("__globals__", "__code__", "__closure__", "__self__", "func_globals"):
        try:
            return getattr(g, name)
        except Exception as e:
            said = str(e)
    return said
"""
    with Session(answer, CLOSED) as session:
        tested = session.test("", "assert 'an answer can call' in f(lambda: 41421)", 10.0)
    assert tested.passed, tested.detail


def test_a_fake_verdict_is_seen_where_answer_and_test_share_a_process() -> None:
    """The control: in one process, as others do it, the same answers do pass."""
    shared = FAKES["equal to everything"] + "\nassert f(20000) == 41421\nprint('HARM')"
    assert run(shared).stdout == "HARM\n"
    shared = FAKES["leaves early"] + "\nassert f(20000) == 41421"
    assert run(shared).code == 0


def test_one_test_does_not_disturb_the_next() -> None:
    answer = """
import os
def f(x):
    if x == 0:
        while True: pass
    if x == 1:
        os._exit(0)
    return x
"""
    with Session(answer, CLOSED) as session:
        hows = [session.test("", f"assert f({x}) == {x}", 1.0 if x == 0 else 10.0).how for x in (0, 1, 2)]
    assert hows == ["timeout", "ended", "passed"]


# --- who may run code where


@pytest.mark.faults("F41")
def test_below_the_sandbox_nothing_runs_unless_accepted() -> None:
    poor = Found(Tier.PROCESS, "the kernel has no Landlock")
    for least in (Tier.SANDBOX, Tier.PROCESS):
        with pytest.raises(PreflightError, match="RLKD-E310") as caught:
            allowed(["code"], poor, least, accept_unsafe=False)
        assert caught.value.exit_code == 3
        for part in ("`code`", "`process`", "no Landlock", "accept_unsafe_code", "rlkd doctor"):
            assert part in str(caught.value)
    accepted = allowed(["code"], poor, Tier.SANDBOX, accept_unsafe=True)
    assert (accepted.tier, accepted.unsafe, accepted.reason) == (Tier.PROCESS, True, "the kernel has no Landlock")
    good = allowed(["code"], Found(Tier.SANDBOX), Tier.PROCESS, accept_unsafe=True)
    assert (good.tier, good.unsafe) == (Tier.SANDBOX, False), "the best there is, whatever would be accepted"


def test_rewards_that_run_no_code_cost_no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> Found:
        raise AssertionError("no reward runs code")

    monkeypatch.setattr("rlkd.engines.sandbox_rules.probe", never)
    assert equip({"exact": object()}, "userns+landlock", False) is None


@pytest.mark.parametrize("broken", ["landlock_version", "unshare", "pivot_root", "landlock"])
def test_a_machine_that_gives_less_says_why(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """Each layer is missing in turn: the tier drops, with the reason; nothing is claimed that is not there."""

    def fails(*_: object) -> int:
        if broken == "landlock_version":
            return 0
        raise OSError(1, f"{broken}: not permitted")

    monkeypatch.setattr(f"rlkd.engines.sandbox_kernel.{broken}", fails)
    found = probe()
    assert found.tier is Tier.PROCESS
    assert ("Landlock" if broken == "landlock_version" else f"{broken}: not permitted") in found.reason


def test_a_filter_that_lets_sockets_through_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sandbox_filter.DENIED, "socket")
    assert probe() == Found(Tier.PROCESS, "the sandbox leaks: a socket", FOUND.landlock)


def test_the_doctor_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.sandbox.tier() == Check(
        "sandbox", "ok", f"tier userns+landlock (Landlock {FOUND.landlock}, seccomp), for code that models write"
    )
    lacking = subprocess.CompletedProcess([], 0, '{"tier": "process", "reason": "no Landlock", "landlock": 0}\n', "")
    broken = subprocess.CompletedProcess([], 1, "", "Traceback\nImportError: numpy\n")
    for done, said in ((lacking, "tier process, below userns+landlock: no Landlock"), (broken, "ImportError: numpy")):
        monkeypatch.setattr("subprocess.run", lambda *_, _done=done, **__: _done)
        check = doctor.sandbox.tier()
        assert check.status == "warn", "most recipes run no code"
        assert said in check.detail
        assert check.fix is not None
