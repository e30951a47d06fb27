"""The few calls of Linux that the sandbox needs and Python's `os` does not have, through ctypes. Standard library only.

Constants are the kernel's (include/uapi/linux/{sched,mount,landlock,prctl,capability}.h). All raise OSError.
"""

import ctypes
import errno
import os
import platform

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x0002_0000, 0x0200_0000, 0x0400_0000
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x0800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 1 << 18
MNT_DETACH = 2

_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 1, 24, 38, 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAPABILITY_VERSION_3 = 0x2008_0522
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV = 1, 2, 4
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000

# The same number on every architecture for what is younger than Linux 5; the others by machine.
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def machine() -> str:
    """The architecture of this process: x86_64 or aarch64 are known here."""
    return platform.machine()


def unshare(flags: int) -> None:
    _checked(_libc.unshare(ctypes.c_int(flags)), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    said = None if options is None else options.encode()
    named = None if kind is None else kind.encode()
    result = _libc.mount(os.fsencode(source), os.fsencode(target), named, ctypes.c_ulong(flags), said)
    _checked(result, f"mount on {target}")


def read_only(target: str, device: bool = False) -> None:
    """The mount at `target`, with all below it: read-only, no set-uid, no devices unless it is one (Linux 5.12)."""

    class Attributes(ctypes.Structure):
        _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]

    wanted = _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID | (0 if device else _MOUNT_ATTR_NODEV)
    how = Attributes(wanted, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(how))
    at = (ctypes.c_int(_AT_FDCWD), ctypes.c_char_p(os.fsencode(target)), ctypes.c_uint(_AT_RECURSIVE))
    _checked(_libc.syscall(_MOUNT_SETATTR, *at, ctypes.byref(how), size), f"mount_setattr on {target}")


def pivot_root(new: str, old: str) -> None:
    number = _PIVOT_ROOT.get(machine())
    if number is None:
        raise OSError(f"pivot_root: its number on {machine()} is not known")
    _checked(_libc.syscall(number, ctypes.c_char_p(new.encode()), ctypes.c_char_p(old.encode())), "pivot_root")


def detach(target: str) -> None:
    _checked(_libc.umount2(target.encode(), MNT_DETACH), f"umount of {target}")


def die_with_parent(signal: int) -> None:
    """This process gets `signal` when its parent ends. Changing uid clears it, so it comes after that."""
    _prctl(_PR_SET_PDEATHSIG, signal, "PR_SET_PDEATHSIG")


def no_new_privileges() -> None:
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, "PR_SET_NO_NEW_PRIVS")


def drop_bounding_set() -> None:
    """No capability can come back, whatever is executed. Needs CAP_SETPCAP."""
    for capability in range(64):
        try:
            _prctl(_PR_CAPBSET_DROP, capability, f"PR_CAPBSET_DROP {capability}")
        except OSError as e:
            if e.errno == errno.EINVAL and capability > 30:
                return  # the kernel has no more than these
            raise


def drop_capabilities() -> None:
    """No capability now: neither permitted, nor effective, inheritable or ambient."""
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, "PR_CAP_AMBIENT_CLEAR_ALL")
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    _checked(_libc.capset(header, nothing), "capset")


def landlock_version() -> int:
    """The kernel's Landlock ABI; 0 where there is none."""
    version = _libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    return max(int(version), 0)


# Rights of files, by the ABI that brought them. The first three are all that reading needs.
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_RIGHTS_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_NETWORK_FROM, _SCOPES_FROM = 4, 6  # TCP bind and connect; abstract sockets and signals


def landlock(readable: list[str], devices: list[str], writable: list[str]) -> None:
    """From here on this process reads and executes below `readable`, reads and writes `devices`, does anything but
    execute below `writable`, and nothing else with files. Where the kernel knows how: no TCP, no signal and no abstract
    socket across the border. Needs no_new_privileges."""
    version = landlock_version()
    rights = _RIGHTS_BY_ABI[max(abi for abi in _RIGHTS_BY_ABI if abi <= max(version, 1))]

    class Ruleset(ctypes.Structure):
        _fields_ = [(name, ctypes.c_uint64) for name in ("files", "network", "scopes")]

    class Beneath(ctypes.Structure):
        _pack_ = 1
        _layout_ = "ms"
        _fields_ = [("rights", ctypes.c_uint64), ("parent", ctypes.c_int32)]

    handled = Ruleset(rights, 3 if version >= _NETWORK_FROM else 0, 3 if version >= _SCOPES_FROM else 0)
    size = 8 if version < _NETWORK_FROM else 16 if version < _SCOPES_FROM else 24
    ruleset = _libc.syscall(_LANDLOCK_CREATE, ctypes.byref(handled), ctypes.c_size_t(size), ctypes.c_uint(0))
    _checked(ruleset, "landlock_create_ruleset")
    given = [(p, _EXECUTE | _READ_FILE | _READ_DIR) for p in readable]
    given += [(p, _READ_FILE | _WRITE_FILE) for p in devices] + [(p, rights & ~_EXECUTE) for p in writable]
    for path, wanted in given:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            wanted &= _EXECUTE | _READ_FILE | _WRITE_FILE
        rule = Beneath(wanted & rights, parent)
        added = _libc.syscall(_LANDLOCK_ADD, ctypes.c_int(ruleset), 1, ctypes.byref(rule), ctypes.c_uint(0))
        _checked(added, f"landlock_add_rule for {path}")
        os.close(parent)
    _checked(_libc.syscall(_LANDLOCK_RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint(0)), "landlock_restrict_self")
    os.close(ruleset)


def _prctl(option: int, value: int, what: str) -> None:
    zero = ctypes.c_ulong(0)
    _checked(_libc.prctl(ctypes.c_int(option), ctypes.c_ulong(value), zero, zero, zero), what)


def _checked(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
