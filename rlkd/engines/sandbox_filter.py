"""The system calls that code in the sandbox must not make: a seccomp filter of classic BPF. Standard library only.

A list of what is denied, not of what is allowed: Python, numpy and the C library need some 150 calls that change with
every version. Denied is what reaches beyond a process's own memory and files (other processes, mounts, namespaces,
keys, kernel modules, sockets) and what has been the kernel's weak side (bpf, io_uring, userfaultfd, perf). Own code
instead of libseccomp: its package is not on every machine, its Python bindings are not kept, and this is two tables and
fifty lines whose every entry the tests call.

Numbers: x86-64 from the kernel's syscall_64.tbl, aarch64 from include/uapi/asm-generic/unistd.h.
"""

import ctypes
import errno
import struct

# name: (x86_64, aarch64); None: there is none
DENIED: dict[str, tuple[int | None, int | None]] = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "process_mrelease": (448, 448),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "accept": (43, 202),
    "accept4": (288, 242), "bpf": (321, 280), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "userfaultfd": (323, 282), "perf_event_open": (298, 241), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
    "acct": (163, 89), "syslog": (103, 116), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "clock_adjtime": (305, 266), "adjtimex": (159, 171), "sethostname": (170, 161), "setdomainname": (171, 162),
    "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None), "personality": (135, 92),
    "vhangup": (153, 58), "fanotify_init": (300, 262), "mbind": (237, 235), "move_pages": (279, 239),
    "migrate_pages": (256, 238),
}  # fmt: skip
_CLONE3 = 435  # its flags lie in memory, where a filter cannot look: the C library falls back to clone on ENOSYS
_CLONE = (56, 220)
_PRCTL = (157, 167)
_IOCTL = (16, 29)
_NEW_NAMESPACES = 0x7E02_0000  # any CLONE_NEW… flag that clone takes
_SET_PDEATHSIG = 1  # the sandbox's own end must not be called off
_TERMINAL_INPUT = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX: typing for the user

_ARCHITECTURE = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}
_X32 = 0x4000_0000  # x86-64's second set of numbers
_LOAD, _EQUAL, _GREATER_OR_EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _REFUSE = 0x7FFF_0000, 0x8000_0000, 0x0005_0000
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2
_NUMBER, _ARCH, _ARGUMENT_0, _ARGUMENT_1 = 0, 4, 16, 24  # offsets in struct seccomp_data; low halves of arguments


def known(machine: str) -> bool:
    """Whether there is a table for this architecture."""
    return machine in _ARCHITECTURE


def program(machine: str) -> bytes:
    """The filter as the kernel reads it: struct sock_filter, 8 bytes each."""
    at = 0 if machine == "x86_64" else 1
    code = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, _ARCHITECTURE[machine]), (_RETURN, 0, 0, _KILL)]
    code += [(_LOAD, 0, 0, _NUMBER)]
    if machine == "x86_64":
        code += [(_GREATER_OR_EQUAL, 0, 1, _X32), _refuse(errno.ENOSYS)]
    code += [(_EQUAL, 0, 1, _CLONE3), _refuse(errno.ENOSYS)]
    for numbers in DENIED.values():
        if (number := numbers[at]) is not None:
            code += [(_EQUAL, 0, 1, number), _refuse(errno.EPERM)]
    code += _argument(_CLONE[at], _ARGUMENT_0, (_ANY_BIT, _NEW_NAMESPACES))
    code += _argument(_PRCTL[at], _ARGUMENT_0, (_EQUAL, _SET_PDEATHSIG))
    for request in _TERMINAL_INPUT:
        code += _argument(_IOCTL[at], _ARGUMENT_1, (_EQUAL, request))
    code += [(_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *line) for line in code)


def install(machine: str) -> None:
    """Puts the filter on this process and all it will start, for good. OSError. Needs no_new_privileges."""
    filters = program(machine)
    held = ctypes.create_string_buffer(filters, len(filters))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    given = Program(len(filters) // 8, ctypes.cast(held, ctypes.c_void_p))
    libc = ctypes.CDLL(None, use_errno=True)
    mode, zero = ctypes.c_ulong(_MODE_FILTER), ctypes.c_ulong(0)
    if libc.prctl(ctypes.c_int(_PR_SET_SECCOMP), mode, ctypes.byref(given), zero, zero) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {errno.errorcode.get(number, number)}")


def _refuse(number: int) -> tuple[int, int, int, int]:
    return (_RETURN, 0, 0, _REFUSE | number)


def _argument(call: int, offset: int, test: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """If it is this call: refuse it where the argument passes the test; the number is loaded again for what follows."""
    how, value = test
    return [
        (_EQUAL, 0, 4, call),
        (_LOAD, 0, 0, offset),
        (how, 0, 1, value),
        _refuse(errno.EPERM),
        (_LOAD, 0, 0, _NUMBER),
    ]
