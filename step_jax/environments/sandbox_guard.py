"""What runs first in the sandbox: ``guard.py USER CPU MEMORY PROCESSES FILE FUNCTION``.

Gives up the user that it was started as, sets the limits, and then is the program: its text is
beside this file. With a FUNCTION, the program is a module, the arguments are JSON on the standard
input, and the result is written to the standard output as JSON, which is then closed to the rest.

It is standard library only and knows nothing that a program must not know.
"""

import os
import resource
import sys


def limit(user, cpu, memory, processes, file):
    if user:  # of the host's root: a user whose processes the kernel counts
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    for which, most in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_FSIZE, file),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        allowed = resource.getrlimit(which)[1]  # of whoever started us; it may be less
        most = most if allowed == resource.RLIM_INFINITY else min(most, allowed)
        resource.setrlimit(which, (most, most))


def call(function, code):
    import json

    arguments = json.load(sys.stdin)
    out = os.dup(1)
    os.dup2(2, 1)
    module = type(sys)("program")
    exec(code, module.__dict__)
    result = json.dumps(getattr(module, function)(*arguments))
    with open(out, "w", encoding="utf-8") as file:
        file.write(result)


def main():
    limit(*map(int, sys.argv[1:6]))
    function, sys.argv = sys.argv[6], ["program.py"]
    with open("/box/program.py", encoding="utf-8") as file:
        code = compile(file.read(), "program.py", "exec")
    if function:
        call(function, code)
    else:
        module = type(sys)("__main__")
        sys.modules["__main__"] = module
        exec(code, module.__dict__)


main()
