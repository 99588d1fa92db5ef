"""Run by: python3 -m unittest discover functions/modules/python"""

import os
import subprocess
import sys
import tempfile
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
# What stands for a restore: the state of generators is put back, and the page is another one.
HELPERS = """
import os, sys
def page(byte):
    with open(os.environ["TRENV_GENERATION"], "r+b") as file:
        file.seek(16); file.write(bytes([byte]) * 16)
"""


def run(script, **environment):
    """Output of a Python of its own, with a page that the script can change."""
    with tempfile.NamedTemporaryFile() as page:
        page.write(b"TRENVGEN" + bytes(4088))
        page.flush()
        environment = {"PYTHONPATH": HERE, "TRENV_GENERATION": page.name, **environment}
        command = [sys.executable, "-c", "import trenv_generation\n" + HELPERS + script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(done.stderr)
    return done.stdout, done.stderr


class Generation(unittest.TestCase):
    def equal_lines(self, script, count, **environment):
        out, _ = run(script, **environment)
        lines = out.split()
        self.assertEqual(len(lines), count, out)
        return len(set(lines)) == 1

    # A forked child has the parent's state, as a clone has; what os.fork itself would reseed is
    # put back by going around it.
    CLONES = """
import ctypes
fork = ctypes.CDLL(None).fork
def clones(draw, change):
    for byte in (1, 2):
        sys.stdout.flush()
        pid = fork()
        if pid == 0:
            if change: page(byte)
            print(draw()); sys.stdout.flush(); os._exit(0)
        os.waitpid(pid, 0)
"""

    def check(self, prepare, draw):
        script = self.CLONES + prepare + "\nclones(lambda: " + draw + ", %s)"
        self.assertTrue(self.equal_lines(script % False, 2), "without a change they are equal")
        self.assertFalse(self.equal_lines(script % True, 2), "after one they differ")

    def test_functions_of_random(self):
        for draw in (
            "random.random()",
            "random.getrandbits(64)",
            "random.randint(1, 10**12)",
            "random.choices(range(1000), k=4).__repr__().replace(' ', '')",
            "random.sample(range(10**9), 2).__repr__().replace(' ', '')",
            "random.uniform(0, 1)",
            "random.gauss(0, 1)",
            "random.randbytes(8).hex()",
        ):
            with self.subTest(draw):
                self.check("import random; random.random(); random.gauss(0, 1)", draw)

    def test_names_that_were_imported(self):
        self.check("from random import random, shuffle", "random()")

    def test_instances_of_programs(self):
        self.check("import random; own = random.Random()", "own.random()")

    def test_a_seed_that_was_given_is_kept(self):
        for seeding in (
            "random.seed(7)",
            "random.seed(a='x')",
            "random.setstate(random.getstate())",
        ):
            script = self.CLONES + f"import random; {seeding}\nclones(random.random, True)"
            self.assertTrue(self.equal_lines(script, 2), seeding)
        script = self.CLONES + "import random; r = random.Random(7)\nclones(r.random, True)"
        self.assertTrue(self.equal_lines(script, 2))

    def test_a_seed_gives_the_usual_sequence(self):
        import random

        expected = random.Random(5)
        out, _ = run("import random; random.seed(5); print(random.random(), random.randrange(99))")
        self.assertEqual(out.split(), [str(expected.random()), str(expected.randrange(99))])

    def test_openssl(self):
        # OpenSSL notices a fork by the pid, which clones share: it is made to see one pid.
        out, _ = run(
            "import ssl; calls = []; ssl.RAND_add = lambda *a: calls.append(len(a[0]))\n"
            "ssl.RAND_bytes(4); page(3); ssl.RAND_bytes(4); ssl.RAND_bytes(4); print(calls)\n"
            "page(4); c = ssl.create_default_context()\n"
            "c.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname='x'); print(len(calls))"
        )
        self.assertEqual(out, "[48]\n2\n")

    def test_own_generators_can_be_watched(self):
        out, _ = run("seen = trenv_generation.current(); page(9)\n"
                     "print(len(seen), trenv_generation.current() == b'\\x09' * 16)")
        self.assertEqual(out, "16 True\n")

    def test_what_exists_when_a_program_settles_is_no_more_looked_at(self):
        script = (
            "import gc, weakref\n"
            "class Thing: pass\n"
            "gc.disable(); ring = Thing(); ring.self = ring; gone = weakref.ref(ring); del ring\n"
            "kept = Thing(); trenv_generation.settle()\n"
            "print(gone() is None, any(one is kept for one in gc.get_objects()))"
        )
        self.assertEqual(run(script)[0], "True False\n")
        out, _ = run(script, TRENV_GENERATION="")
        self.assertEqual(out, "False True\n", "outside of trenv it does nothing")

    def test_without_a_page_nothing_happens(self):
        script = "import random; print(random.random.__self__.__class__.random.__qualname__)"
        out, err = run(script, TRENV_GENERATION="")
        self.assertEqual((out, err), ("Random.random\n", ""))
        out, err = run("print(trenv_generation.active())", TRENV_GENERATION="/dev/null")
        self.assertEqual(out, "False\n")
        self.assertIn("random state is shared", err)

    def test_system_random_and_secrets_work(self):
        out, _ = run(
            "import random, secrets, pickle, copy\n"
            "r = random.SystemRandom(); r.random(); r.seed(); r.randrange(9); secrets.token_hex()\n"
            "assert isinstance(r, random.Random)\n"
            "own = random.Random(3); twin = pickle.loads(pickle.dumps(own))\n"
            "assert own.random() == twin.random(); copy.deepcopy(own); print('fine')"
        )
        self.assertEqual(out, "fine\n")

    def test_numpy(self):
        try:
            import numpy  # noqa: F401
        except ImportError:
            self.skipTest("numpy is not installed")
        self.check("import numpy", "numpy.random.rand()")
        self.check("import numpy", "numpy.random.ranf()")
        self.check("from numpy.random import randint; randint(9)", "randint(10**9)")
        script = self.CLONES + "import numpy; numpy.random.seed(7)\nclones(numpy.random.rand, True)"
        self.assertTrue(self.equal_lines(script, 2))


if __name__ == "__main__":
    unittest.main()
