"""Starts one program in namespaces of its own. `experiments.sandbox` runs this as a script.

`python -I -S jail.py CONFIG` with CONFIG as `marshal` writes it, in hexadecimal digits: `folder` (holds `box`, which
the program sees as /box, and an empty `root`), `read_only` (paths it may read beside), `command`, `environment`,
`seconds`, `limits` (names of `resource` -> values), `disk` (bytes of its file system), `group` (where to make a control
group, and what to write to which of its files; or None), `keyctl` (that call's number), `filter` (of system calls),
`lifeline` (file descriptor; when its other end closes, the program is killed).

Exit code: 0 where the program ends with 0, 1 where it ends otherwise, 2 where it ran out of time. What goes wrong
before the program starts is written to stderr; the program's own stderr is thrown away.

It starts before every program, so it does without modules that take long to import (json, signal, contextlib).
"""

from __future__ import annotations

import ctypes
import marshal
import os
import resource
import select
import struct
import sys

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
DETACH = 2
SET_PDEATHSIG, SET_SECCOMP, SET_NO_NEW_PRIVS, FILTER = 1, 22, 38, 2
JOIN_SESSION_KEYRING = 1
SIGKILL = 9

libc = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    config = marshal.loads(bytes.fromhex(sys.argv[1]))
    os.set_inheritable(config["lifeline"], False)
    os.umask(0o022)
    root, box_user = os.geteuid() == 0, 40_000 + os.getpid() % 20_000
    group = ControlGroup(**config["group"]) if config["group"] else None
    try:
        libc.syscall(config["keyctl"], JOIN_SESSION_KEYRING, None)  # where keys are barred to us, so they are to it
        leave_namespaces(root)
        gate, opener = os.pipe()
        pid = os.fork()  # the first process of the new PID namespace: when it ends, the kernel kills all others in it
        if pid == 0:
            os.close(opener)
            try:
                enter(config, gate, root, box_user)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        if group:
            group.admit(pid)  # the kernel takes its time, in which the other side builds its file system
        os.write(opener, b"!")
        return watch(pid, config["lifeline"], config["seconds"])
    finally:
        if group:
            group.remove()


class ControlGroup:
    """A new control group.

    Args:
        folder: where to make it.
        limits: what to write to which of its files.
    """

    def __init__(self, folder: str, limits: dict[str, int]):
        self.name = f"sandbox-{os.getpid()}"
        self.folder = os.open(folder, os.O_RDONLY)  # paths will lead elsewhere when the program has its own root
        path = os.path.join(folder, self.name)
        os.makedirs(path, exist_ok=True)
        for name, value in limits.items():
            write(os.path.join(path, name), str(value))
        self.members = os.open(os.path.join(path, "cgroup.procs"), os.O_WRONLY)

    def admit(self, pid: int) -> None:
        os.write(self.members, b"%d" % pid)

    def remove(self) -> None:
        os.rmdir(self.name, dir_fd=self.folder)


def watch(pid: int, lifeline: int, seconds: float) -> int:
    """Wait for the program, and give its exit code; kill it after `seconds`, or when its caller is gone."""
    done = os.pidfd_open(pid)
    ready, _, _ = select.select([done, lifeline], [], [], seconds)
    if done in ready:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return code if code >= 0 else 1
    os.kill(pid, SIGKILL)
    os.waitpid(pid, 0)
    return 2


def leave_namespaces(root: bool) -> None:
    user, group = os.geteuid(), os.getegid()
    check("unshare", libc.unshare(NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET | (0 if root else NEWUSER)))
    if not root:
        for name, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            write(f"/proc/self/{name}", line)
    check("sethostname", libc.sethostname(b"sandbox", 7))


def enter(config: dict, gate: int, root: bool, box_user: int) -> None:
    """Become the program: a file system of its own, limits, no privileges, nothing open but stdin and stdout."""
    build_root(config)
    for name, value in config["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    os.setsid()
    if root:  # a user that owns nothing, and whose processes are counted apart
        os.chown("/tmp", box_user, box_user)
        os.setgroups([])
        os.setresgid(box_user, box_user, box_user)
        os.setresuid(box_user, box_user, box_user)
    check("prctl", libc.prctl(SET_PDEATHSIG, SIGKILL, 0, 0, 0))  # a change of user would undo it
    if not os.read(gate, 1):
        os._exit(1)  # the parent is dead by now
    null, errors = os.open("/dev/null", os.O_WRONLY), os.dup(2)
    os.set_inheritable(errors, False)
    os.dup2(null, 2)
    filter_calls(config["filter"])
    try:
        os.execve(config["command"][0], config["command"], config["environment"])
    except OSError:
        os.dup2(errors, 2)
        raise


def filter_calls(instructions: list[list[int]]) -> None:
    """Let all calls of this process and its children pass through a filter, for good."""
    check("prctl", libc.prctl(SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions))
    program = struct.pack("@HP", len(instructions), ctypes.addressof(code))
    check("seccomp", libc.prctl(SET_SECCOMP, FILTER, program, 0, 0))


def build_root(config: dict) -> None:
    """An empty file system in memory with what the program may read, in place of all that is mounted."""
    new = os.path.join(config["folder"], "root")
    mount("none", "/", REC | PRIVATE)
    mount("tmpfs", new, NOSUID | NODEV, "tmpfs", f"size={config['disk']},nr_inodes=4096,mode=755")
    for folder in ("tmp", "dev"):
        os.mkdir(os.path.join(new, folder))
    bind("/dev/null", f"{new}/dev/null", read_only=False)
    bind(os.path.join(config["folder"], "box"), f"{new}/box")
    for path in config["read_only"]:
        bind(path, new + path)
    os.chdir(new)
    check("pivot_root", libc.pivot_root(b".", b"."))
    check("umount", libc.umount2(b".", DETACH))
    os.chdir("/tmp")


def bind(source: str, target: str, read_only: bool = True) -> None:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(source):
        os.symlink(os.readlink(source), target)
        return
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        open(target, "x").close()
    mount(source, target, BIND)
    if read_only:
        kept = os.statvfs(target).f_flag & (NOSUID | NODEV | NOEXEC)  # a user namespace may not take these off
        mount("none", target, REMOUNT | BIND | RDONLY | kept)


def mount(source: str, target: str, flags: int, kind: str = "none", options: str = "") -> None:
    result = libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())
    check(f"mount {source} on {target}", result)


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def check(what: str, result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OSError as fault:
        sys.exit(str(fault))
