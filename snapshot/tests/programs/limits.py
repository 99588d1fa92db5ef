# A parent, a child that is another user with few capabilities, and threads: each has limits, a mask, a
# directory, a name, a policy and processors of its own. Each line is answered with "ok" where all find
# what they had set, else with what differs.
import ctypes
import json
import os
import resource
import sys
import threading

libc = ctypes.CDLL(None, use_errno=True)
KEEP_CAPABILITIES, SET_NAME, DROP, AMBIENT = 8, 15, 24, 47
BIND, CHOWN, NICE, NET_RAW = 10, 0, 23, 13
KEYS = ["Name", "Umask", "Uid", "Gid", "Groups", "NoNewPrivs", "Cpus_allowed"]
KEYS += ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"]


def prctl(*arguments):
    if libc.prctl(*(ctypes.c_ulong(number) for number in arguments)):
        raise OSError(ctypes.get_errno(), f"prctl {arguments}")


def name(text):
    libc.prctl(SET_NAME, text.encode(), 0, 0, 0)


def capabilities(*capabilities):
    """Permitted and effective are these; the first is inheritable too."""
    mask = sum(1 << number for number in capabilities)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)(mask, mask, 1 << capabilities[0], 0, 0, 0)
    if libc.capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")


def found():
    """What the kernel tells of this thread, and of its process."""
    with open("/proc/thread-self/status") as file:
        lines = (line.rstrip("\n").split(":\t", 1) for line in file)
        told = {key: value for key, value in lines if key in KEYS}
    told["cwd"] = os.getcwd()
    told["nice"] = os.getpriority(os.PRIO_PROCESS, 0)
    told["policy"] = os.sched_getscheduler(0), os.sched_getparam(0).sched_priority
    told["limits"] = [resource.getrlimit(number) for number in range(16)]
    return json.loads(json.dumps(told))


class Member(threading.Thread):
    """A thread that sets something, and compares when it is asked to."""

    def __init__(self, settings):
        super().__init__(daemon=True)
        self.settings, self.ask, self.answer = settings, threading.Semaphore(0), threading.Semaphore(0)
        self.start()
        self.answer.acquire()

    def run(self):
        self.settings()
        before = found()
        self.answer.release()
        while self.ask.acquire():
            now = found()
            self.differs = [f"{key} {before[key]} {now[key]}" for key in before if before[key] != now[key]]
            self.answer.release()

    def look(self):
        self.ask.release()
        self.answer.acquire()
        return self.differs


def policy(which, priority=0):
    os.sched_setscheduler(0, which, os.sched_param(priority))


def batch():
    name("batch")
    policy(os.SCHED_BATCH)
    os.setpriority(os.PRIO_PROCESS, 0, 11)


def idle():
    name("idle one)")
    policy(os.SCHED_IDLE)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def real_time():
    name("")
    # It may be that this kernel gives this group no such time.
    try:
        policy(os.SCHED_RR | os.SCHED_RESET_ON_FORK, 7)
    except PermissionError:
        pass


def parent():
    os.umask(0o027)
    os.chdir("/usr/lib")
    os.setpriority(os.PRIO_PROCESS, 0, 3)
    resource.setrlimit(resource.RLIMIT_NOFILE, (222, 333))
    resource.setrlimit(resource.RLIMIT_STACK, (4 << 20, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_NPROC, (5000, 6000))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    prctl(DROP, NET_RAW)


def child():
    os.umask(0o777)
    os.chdir("/")
    resource.setrlimit(resource.RLIMIT_NOFILE, (50, 60))
    resource.setrlimit(resource.RLIMIT_SIGPENDING, (77, 99))
    # What its parent drops after this it keeps.
    prctl(DROP, CHOWN)
    os.setgroups([7, 65533])
    os.setresgid(1001, 1002, 1003)
    prctl(KEEP_CAPABILITIES, 1)
    os.setresuid(1000, 1001, 1002)
    capabilities(BIND, NICE)
    prctl(AMBIENT, 2, BIND, 0, 0)


ask, tell = os.pipe()
hear, answer = os.pipe()
is_child = os.fork() == 0
child() if is_child else parent()
members = [Member(settings) for settings in (lambda: None, batch, idle, real_time)]


def look():
    return [difference for member in members for difference in member.look()]


if is_child:
    while os.read(ask, 1):
        os.write(answer, json.dumps(look()).encode())
    sys.exit()
for line in iter(sys.stdin.readline, ""):
    os.write(tell, b"?")
    differences = look() + [f"child: {one}" for one in json.loads(os.read(hear, 10000))]
    print("; ".join(differences) or "ok", flush=True)
