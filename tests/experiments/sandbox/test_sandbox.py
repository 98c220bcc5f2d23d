"""What programs in the sandbox can't reach, as root and as a normal user, and the filter of system calls."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from experiments import sandbox
from experiments.sandbox import Limits, Sandbox, system_calls
from experiments.sandbox.control_groups import Groups, find_groups
from experiments.sandbox.system_calls import NUMBERS, call_filter
from tests.experiments.graders.graded_programs import needs_namespaces

ROOT = Path(__file__).parents[3]
NOBODY = 65534
LIMITS = Limits(seconds=10, memory=256 << 20, processes=8, file_size=1 << 20, disk=4 << 20)
SEE = """
import sys
from experiments.sandbox import Limits, Sandbox
with Sandbox(eval(sys.argv[1])).start({"main.py": sys.stdin.read()}, stdout=1) as running:
    running.wait()
"""

PRELUDE = f"""
import ctypes, errno, os, platform, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
NUMBERS = {NUMBERS!r}
def call(name, *arguments):
    number = NUMBERS[name][["x86_64", "aarch64"].index(platform.machine())] if isinstance(name, str) else name
    result = libc.syscall(ctypes.c_long(number), *map(ctypes.c_ulong, arguments))
    return errno.errorcode[ctypes.get_errno()] if result == -1 else "ok"
"""


def python_for(user: int) -> str | None:
    """A Python that a user may run, and that can import this project's sandbox."""
    for python in (sys.executable, shutil.which("python3", path="/usr/bin")):
        try:
            subprocess.run([python, "-c", "import experiments.sandbox"], user=user, cwd=ROOT, check=True, env={})
        except (OSError, subprocess.CalledProcessError, TypeError):
            continue
        return python
    return None


@pytest.fixture(params=["this user", "a normal user"])
def see(request):
    """Runs a program in a sandbox of this user or, where this is root, of one that is not, and gives its output."""
    arguments = {}
    python = sys.executable
    if request.param == "a normal user":
        if os.geteuid() != 0:
            pytest.skip("this user is one")
        python = python_for(NOBODY)
        if python is None:
            pytest.skip("no Python here that a normal user may run")
        arguments = {"user": NOBODY, "group": NOBODY, "extra_groups": []}

    def run(program: str) -> str:
        command = [python, "-c", SEE, repr(LIMITS)]
        done = subprocess.run(
            command, check=False, input=PRELUDE + program, cwd=ROOT, capture_output=True, text=True, env={}, **arguments
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@needs_namespaces
class TestSystemCalls:
    def test_what_is_refused(self, see):
        """Each call is made with arguments that would let it succeed, or fail in another way."""
        assert see(
            """
names = [name for name in NUMBERS if name not in ("clone", "clone3", "socket", "socketpair")]
print({name: answer for name in names if (answer := call(name, 0, 0, 0, 0, 0)) != "EPERM"})
print(call("clone3", 0, 0), call(451), call(1000), call(0x40000000 | 39))
"""
        ) == ("{}\nENOSYS ENOSYS ENOSYS ENOSYS\n")

    def test_the_keyring_is_a_new_one(self, monkeypatch):
        """Seen without the filter, which would hide it."""
        monkeypatch.setattr(sandbox, "call_filter", lambda machine: [(system_calls.RETURN, 0, 0, system_calls.ALLOW)])
        number = NUMBERS["keyctl"][list(system_calls.MACHINES).index(platform.machine())]
        ours = ctypes.CDLL(None).syscall(number, 0, ctypes.c_int(-3), 1)  # KEYCTL_GET_KEYRING_ID of the session
        if ours == -1:
            pytest.skip("no keys here")
        look = f"import ctypes\nprint(ctypes.CDLL(None).syscall({number}, 0, ctypes.c_int(-3), 1))"
        with tempfile.TemporaryFile() as output:
            with Sandbox(LIMITS).start({"main.py": look}, stdout=output) as program:
                assert program.wait() == 0
            output.seek(0)
            assert int(output.read()) not in (-1, ours)

    def test_namespaces(self, see):
        assert see(
            """
print([call("clone", flag | 17, 0, 0, 0, 0) for flag in (0x20000, 0x10000000, 0x10000000 | 1 << 40)], flush=True)
import threading
thread = threading.Thread(target=lambda: print("thread", flush=True))
thread.start()
thread.join()
if os.fork() == 0:
    print("child", flush=True)
    os._exit(0)
os.wait()
print(socket.gethostname())
"""
        ) == ("['EPERM', 'EPERM', 'EPERM']\nthread\nchild\nsandbox\n")

    def test_sockets(self, see):
        assert see(
            """
def made(family, kind):
    try:
        socket.socket(family, kind).close()
        return "ok"
    except OSError as error:
        return errno.errorcode[error.errno]
print([made(family, socket.SOCK_STREAM) for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_VSOCK)])
print([made(family, socket.SOCK_RAW) for family in (socket.AF_NETLINK, socket.AF_PACKET)], made(38, 5))
print(len(socket.socketpair()))
"""
        ) == ("['ok', 'ok', 'EAFNOSUPPORT']\n['EAFNOSUPPORT', 'EAFNOSUPPORT'] EAFNOSUPPORT\n2\n")

    def test_handles(self, see):
        assert see(
            """
opened = []
try:
    while True: opened.append(os.open("/dev/null", os.O_RDONLY))
except OSError as error:
    print(len(opened) < 64, error.strerror)
"""
        ) == ("True Too many open files\n")

    @pytest.mark.skipif(platform.machine() != "x86_64", reason="machine code of x86_64")
    def test_calls_of_another_architecture_kill(self, see):
        """`int 0x80` makes a call of i386, whose numbers mean other calls: 288 there is keyctl."""
        assert see(
            """
import mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex("b820010000cd80c3"))  # mov eax, 288; int 0x80; ret
function = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
if os.fork() == 0:
    function()
    print("it ran on", flush=True)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
        ) == ("-31\n")

    def test_where_there_is_no_filter_nothing_runs(self, monkeypatch):
        monkeypatch.setattr(platform, "machine", lambda: "riscv64")
        assert Sandbox().check() == "no filter of system calls for riscv64, only for x86_64, aarch64"


@needs_namespaces
@pytest.mark.skipif(find_groups() is None, reason="no control group can be had here")
def test_all_processes_together_are_bounded():
    """Four processes of 150 MiB each, where one may have 256 and all together 260."""
    program = """
import os, time
for _ in range(4):
    if os.fork() == 0:
        held = b"x" * (150 << 20)
        time.sleep(0.3)
        os.write(1, b"lived")
        os._exit(0)
for _ in range(4):
    os.wait()
"""
    with tempfile.TemporaryFile() as output:
        with Sandbox(LIMITS).start({"main.py": program}, stdout=output) as running:
            running.wait()
        output.seek(0)
        assert output.read().count(b"lived") < 4


@needs_namespaces
@pytest.mark.skipif(find_groups() is None, reason="no control group can be had here")
def test_groups_of_the_dead_are_gone():
    folder = find_groups().folder
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = folder / f"sandbox-{dead.pid}"
    left.mkdir()
    find_groups.cache_clear()
    assert find_groups() is not None
    assert not left.exists()
    others = set(folder.glob("sandbox-*"))
    assert Sandbox(LIMITS).check() is None
    assert set(folder.glob("sandbox-*")) <= others


class TestControlGroups:
    @pytest.fixture
    def kernel(self, tmp_path, monkeypatch):
        """A process's view of a hierarchy of its own, in files."""

        def make(group: str, mount: str, parent: str, *files: str) -> Path:
            process = tmp_path / "self"
            process.mkdir()
            (process / "cgroup").write_text(f"{group}\n")
            (process / "mountinfo").write_text(
                f"22 1 8:1 / / rw - ext4 /dev/a rw\n30 22 0:26 / {tmp_path}/my\\040groups rw - {mount}\n"
            )
            folder = Path(f"{tmp_path}/my groups{parent}")
            folder.mkdir(parents=True)
            (folder / "cgroup.procs").touch()

            def mkdir(path, exist_ok=False):
                os.mkdir(path)
                for name in files:
                    (path / name).touch()

            def rmdir(path):
                shutil.rmtree(path)

            monkeypatch.setattr(Path, "mkdir", mkdir)
            monkeypatch.setattr(Path, "rmdir", rmdir)
            return process, folder

        return make

    def test_version_2_beside_the_own(self, kernel):
        process, folder = kernel("0::/user/mine", "cgroup2 cgroup2 rw", "/user", "memory.max", "memory.swap.max")
        found = find_groups(process)
        assert found == Groups(folder, "memory.max", "memory.swap.max", 2)
        assert found.limits(100) == {"memory.max": 100, "memory.swap.max": 0}
        assert not list(folder.glob("sandbox-*"))

    def test_version_2_at_the_root(self, kernel):
        process, _ = kernel("0::/", "cgroup2 cgroup2 rw", "", "memory.max")
        assert find_groups(process).limits(100) == {"memory.max": 100}

    def test_version_2_without_the_controller(self, kernel):
        process, _ = kernel("0::/", "cgroup2 cgroup2 rw", "", "pids.max")
        assert find_groups(process) is None

    def test_version_1_below_the_own(self, kernel):
        files = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
        process, folder = kernel("4:memory,cpu:/mine", "cgroup cgroup rw,cpu,memory", "/mine", *files)
        assert find_groups(process) == Groups(folder, *files, 1)
        assert find_groups(process).limits(100) == dict.fromkeys(files, 100)

    def test_none(self, kernel):
        process, _ = kernel("0::/../outside", "cgroup2 cgroup2 rw", "/x", "memory.max")
        assert find_groups(process) is None
        assert find_groups(Path("/nonexistent")) is None


def verdict(machine: str, architecture: int, number: int, argument: int = 0) -> int:
    """What a filter answers: the instructions of classic BPF that it is made of, run one by one."""
    data = struct.pack("<iIQQ", number if number < 1 << 31 else number - (1 << 32), architecture, 0, argument)
    program, position, loaded = call_filter(machine), 0, 0
    while True:
        code, jump, skip, operand = program[position]
        position += 1
        if code == system_calls.LOAD:
            (loaded,) = struct.unpack_from("<I", data, operand)
        elif code == system_calls.RETURN:
            return operand
        else:
            holds = {
                system_calls.EQUAL: loaded == operand,
                system_calls.ABOVE: loaded > operand,
                system_calls.ANY_BIT: bool(loaded & operand),
            }[code]
            position += jump if holds else skip


class TestFilter:
    X86_64, AARCH64, I386, ARM = 0xC000003E, 0xC00000B7, 0x40000003, 0x40000028
    ALLOW, KILL = 0x7FFF0000, 0x80000000

    @pytest.mark.parametrize(
        ("machine", "own", "others"),
        [
            ("x86_64", X86_64, (I386, AARCH64)),
            ("aarch64", AARCH64, (ARM, X86_64)),
        ],
    )
    def test_each_machine(self, machine, own, others):
        number = {name: numbers[machine == "aarch64"] for name, numbers in NUMBERS.items()}
        refused = {n: verdict(machine, own, n) for n in range(1000)}
        plain = {number[name] for name in NUMBERS} - {number[n] for n in ("clone", "clone3", "socket", "socketpair")}
        for n, answer in refused.items():
            if n in plain:
                assert answer == 0x50000 | errno.EPERM
            elif n == 435 or n > 450:
                assert answer == 0x50000 | errno.ENOSYS
            elif n in (number["socket"], number["socketpair"]):
                assert answer == 0x50000 | errno.EAFNOSUPPORT
            else:
                assert answer == self.ALLOW, n
        for other in others:
            assert verdict(machine, other, 1) == self.KILL
        assert verdict(machine, own, 0x40000000) == verdict(machine, own, 0xFFFFFFFF) == 0x50000 | errno.ENOSYS
        for flags, answer in ((17, self.ALLOW), (0x3D0F00, self.ALLOW), (0x10000011, 0x50001), (0x20000, 0x50001)):
            assert verdict(machine, own, number["clone"], flags) == answer
            assert verdict(machine, own, number["clone"], flags | 1 << 40) == answer
        for name in ("socket", "socketpair"):
            answers = {family: verdict(machine, own, number[name], family) for family in range(50)}
            assert {family for family, answer in answers.items() if answer == self.ALLOW} == {1, 2, 10}

    def test_numbers_are_those_of_the_kernel(self):
        """Against the headers of the kernel, where they are installed."""
        headers = ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h")
        for column, header in enumerate(map(Path, headers)):
            if not header.exists():
                pytest.skip(f"no {header}")
            defined = dict(re.findall(r"#define (__NR_\w+)\s+(\d+)", header.read_text()))
            for name, numbers in NUMBERS.items():
                assert int(defined[f"__NR_{name}"]) == numbers[column], name

    def test_other_machines_have_none(self):
        with pytest.raises(ValueError, match="no filter of system calls for s390x, only for x86_64, aarch64"):
            call_filter("s390x")
