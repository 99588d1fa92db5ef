"""Draws random state anew in each instance that comes from a snapshot.

An instance of a function continues where its snapshot was taken, and so do all others of that
snapshot: their generators would go on with equal numbers. The sandbox has a page of 16 random bytes
that differ from instance to instance ($TRENV_GENERATION). This module maps it and has generators
look at it whenever they are used, so that no order of threads ever meets an old state:

- `random`: the functions of the module and every instance of random.Random. One that was given a
  seed or a state keeps it: who asks for a certain sequence gets it.
- `numpy.random`: the functions of the module, in the same way.
- OpenSSL: `ssl.RAND_bytes`, and every TLS connection that is made, get fresh entropy first.

`secrets`, `os.urandom` and `uuid.uuid4` ask the kernel and need nothing. What cannot be drawn anew
is shared: the hash seed of strings above all. For any other generator, compare `current()`:

    if trenv_generation.current() != seen:
        rng, seen = numpy.random.default_rng(), trenv_generation.current()

Nothing tells a program that its snapshot is about to be taken, so a server of one's own calls
`settle()` when all is loaded, before it listens: what exists then stays shared between instances,
since the garbage collector does not write to it any more. `functions/runtime/python/serve.py` does
the same by itself.

It is imported at the start of Python by trenv_generation.pth, takes effect when the modules above
are imported, and does nothing outside of trenv.
"""

import os
import sys

__all__ = ["active", "current", "settle"]

_VARIABLE = "TRENV_GENERATION"
_IDENTIFIER = slice(16, 32)


def _open():
    path = os.environ.get(_VARIABLE)
    if not path:
        return None
    import mmap

    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            page = mmap.mmap(file, mmap.PAGESIZE, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        finally:
            os.close(file)
        if page[:8] != b"TRENVGEN":
            raise OSError("it is no generation page")
    except (OSError, ValueError) as error:
        print(
            f"trenv_generation: {path} cannot be used, so random state is shared between "
            f"instances: {error}",
            file=sys.stderr,
        )
        return None
    return page


_page = _open()


def active():
    """Whether there is a page to look at."""
    return _page is not None


def current():
    """The identifier of this instance: other bytes after each start from a snapshot."""
    return _page[_IDENTIFIER] if _page is not None else b""


def settle():
    """Collects garbage, and keeps the collector away from all that exists now."""
    if _page is None:
        return
    import gc

    gc.collect()
    gc.freeze()


class _Watch:
    """Calls `renew` before the first use in each instance."""

    def __init__(self, renew):
        self.renew = renew
        self.seen = current()

    def look(self, _page=_page, _identifier=_IDENTIFIER):
        now = _page[_identifier]
        if now != self.seen:
            self.renew()
            # Only now: another thread that comes between renews too, and uses nothing old.
            self.seen = now

    def before(self, function):
        look = self.look

        def looking(*arguments, **named):
            look()
            return function(*arguments, **named)

        _dress(looking, function)
        return looking


def _dress(wrapper, function):
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        if hasattr(function, name):
            setattr(wrapper, name, getattr(function, name))
    wrapper.__wrapped__ = function


def _random(module):
    """Patches the class, and so the generator of the module and all that programs make."""
    generator = module.Random
    seed_it, set_state = generator.seed, generator.setstate

    def renew(self):
        now = current()
        if not self._trenv_given:
            seed_it(self)
        self._trenv_seen = now

    def looking(draw, page=_page, identifier=_IDENTIFIER):
        def method(self, *arguments, **named):
            if page[identifier] != self._trenv_seen:
                renew(self)
            return draw(self, *arguments, **named)

        _dress(method, draw)
        return method

    def plain(draw, page=_page, identifier=_IDENTIFIER):
        def random(self):
            if page[identifier] != self._trenv_seen:
                renew(self)
            return draw(self)

        _dress(random, draw)
        return random

    def bits(draw, page=_page, identifier=_IDENTIFIER):
        def getrandbits(self, k):
            if page[identifier] != self._trenv_seen:
                renew(self)
            return draw(self, k)

        _dress(getrandbits, draw)
        return getrandbits

    def seed(self, *arguments, **named):
        now = current()
        seed_it(self, *arguments, **named)
        value = arguments[0] if arguments else named.get("a")
        self._trenv_given, self._trenv_seen = value is not None, now

    def setstate(self, state):
        now = current()
        set_state(self, state)
        self._trenv_given, self._trenv_seen = True, now

    _dress(seed, seed_it)
    _dress(setstate, set_state)
    generator._trenv_given = False
    generator._trenv_seen = current()
    # The two that all others draw by are quicker than any wrapper of any arguments.
    changed = {
        "random": plain(generator.random),
        "getrandbits": bits(generator.getrandbits),
        "gauss": looking(generator.gauss),
        "getstate": looking(generator.getstate),
        "seed": seed,
        "setstate": setstate,
    }
    for name, method in changed.items():
        setattr(generator, name, method)
        # The functions of the module were bound before.
        setattr(module, name, getattr(module._inst, name))


def _numpy_random(module):
    """Only the functions of the module; generators that programs make are theirs to watch."""
    state = module.mtrand._rand
    given = False

    def renew():
        if not given:
            state.seed()

    watch = _Watch(renew)

    def giving(function):
        def gives(*arguments, **named):
            nonlocal given
            now = current()
            result = function(*arguments, **named)
            value = arguments[0] if arguments else next(iter(named.values()), None)
            given, watch.seen = value is not None, now
            return result

        _dress(gives, function)
        return gives

    for name in module.__all__:
        function = getattr(module, name)
        if name in ("seed", "set_state", "set_bit_generator"):
            setattr(module, name, giving(function))
        elif callable(function) and not isinstance(function, type) and name != "default_rng":
            setattr(module, name, watch.before(function))


def _ssl(module):
    """OpenSSL has a generator for each thread; they follow the first one, to which this adds."""
    watch = _Watch(lambda: module.RAND_add(os.urandom(48), 48.0))
    for name in ("RAND_bytes", "RAND_pseudo_bytes"):
        if hasattr(module, name):
            setattr(module, name, watch.before(getattr(module, name)))
    for name in ("wrap_socket", "wrap_bio"):
        setattr(module.SSLContext, name, watch.before(getattr(module.SSLContext, name)))


class _Loader:
    """Loads as the module's own loader does, then has the module changed."""

    def __init__(self, loader, change):
        self.loader = loader
        self.change = change

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.change(module)


class _Finder:
    def __init__(self, changes):
        self.changes = changes

    def find_spec(self, name, path=None, target=None):
        change = self.changes.get(name)
        if change is None:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader, change)
                return spec
        return None


def _install():
    changes = {"random": _random, "ssl": _ssl, "numpy.random": _numpy_random}
    for name in [name for name in changes if name in sys.modules]:
        changes.pop(name)(sys.modules[name])
    sys.meta_path.insert(0, _Finder(changes))


if active():
    _install()
