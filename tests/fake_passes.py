"""Answers that claim to pass a test they fail: f(20000) is to be 41421. Run in the sandbox, never here."""

FAKES = {
    "leaves early": r"""
import os
os._exit(0)
""",
    "leaves politely": r"""
import sys
sys.exit(0)
""",
    "leaves when called": r"""
import os
def f(x): os._exit(0)
""",
    "prints a verdict": r"""
print('{"passed": true, "how": "passed"}', flush=True)
def f(x): print('passed'); return 0
""",
    "equal to everything": r"""
class A:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return True
    def __lt__(self, o): return True
    __gt__ = __le__ = __ge__ = __contains__ = __lt__
def f(x): return A()
""",
    "an int that equals everything": r"""
class A(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def f(x): return A(0)
""",
    "a text that equals everything": r"""
class A(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
def f(x): return A()
""",
    "patches builtins": r"""
import builtins
for n in ('abs', 'len', 'isinstance', 'AssertionError', 'set', 'sorted', 'repr', 'list'):
    setattr(builtins, n, lambda *a, **k: True)
def f(x): return 0
""",
    "brings its own builtins": r"""
def set(*a): return 1
len = abs = sorted = list = set
def f(x): return 0
""",
    "patches modules": r"""
import math, sys
math.isclose = lambda *a, **k: True
sys.modules['math'] = math
def f(x): return 0
""",
    "an object called math": r"""
class M:
    def __getattr__(self, n): return lambda *a, **k: True
math = M()
def f(x): return 0
""",
    "raises success": r"""
def f(x): raise SystemExit(0)
""",
    "looks for the test": r"""
import gc, sys
def f(x):
    frame, texts = sys._getframe(), []
    while frame:
        texts.append(repr(frame.f_locals) + repr(frame.f_globals)); frame = frame.f_back
    texts += [repr(o) for o in gc.get_objects()]
    found = [t.split(sign)[1] for sign in ('=' * 2 + ' 4', '{4', ', 4', '- 4')
              for t in texts if 'f(200' + '00)' in t and sign in t]
    return int('4' + found[0][:4]) if found else 0
""",
    "writes into every descriptor": r"""
import json, os, struct
fake = json.dumps({'passed': True, 'how': 'passed', 'detail': '', 'nonce': ''}).encode()
def f(x):
    for d in range(3, 1024):
        try: os.write(d, struct.pack('>I', len(fake)) + fake)
        except OSError: pass
    return 0
""",
    "patches the talk": r"""
import __main__, sys
for n in ('send', 'receive', '_verdict', '_as_test', 'Peer'):
    setattr(sys.modules['__main__'], n, lambda *a: {'passed': True, 'how': 'passed', 'value': True})
def f(x): return 0
""",
    "patches what packs its answer": r"""
import __main__
__main__.Peer._packed = lambda s, v: True
def f(x): return 0
""",
    "lets the test call its own": r"""
import __main__
__main__.Peer.packed = lambda s, v: {'builtin': 'object'}
def f(x): return 0
""",
    "hits its siblings": r"""
import os, signal
def f(x):
    for p in range(2, 100):
        if p != os.getpid():
            try: os.kill(p, signal.SIGKILL)
            except OSError: pass
    return 0
""",
    "a trace function": r"""
import sys, threading
sys.settrace(lambda *a: None)
threading.settrace(lambda *a: None)
def f(x): return 0
""",
    "sends builtins of its own along": r"""
import __main__
send = __main__.send
def lies(channel, message):
    if "names" in message:
        kept = ("__import__", "AssertionError", "set", "abs", "len")
        message["names"]["__builtins__"] = {"dict": [[name, {"mine": 0}] for name in kept]}
        message["names"]["math"] = {"mine": 0}
        message["modules"] = ["os", "sys", "f"]
    send(channel, message)
__main__.send = lies
__main__.Peer.serve = lambda self, request: send(self.channel, {"value": 0, "changed": []})
def f(x): return 0
""",
    "says it changed what it was given": r"""
import __main__
__main__.Peer.serve = lambda self, request: __main__.send(
    self.channel, {"value": 0, "changed": [[0, 41421], [-1, {"list": []}]]}
)
def f(x): return 0
""",
}
