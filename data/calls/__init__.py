"""Call models: one room for every call to a teacher, student, critic or judge (docs/calls.md).

    caller = Caller(folder, Budget(calls=10_000))
    replies = caller.ask(engine, calls, role="teacher")     # in the order of the calls; None where no reply came

A `Call` is what a model is asked (call.py). An `Engine` answers: an `Endpoint` or a `LocalModel` (engine.py). The
`Caller` writes each reply to a journal as soon as it is there, so that no reply is paid twice (journal.py). It stops at
the limits of a `Budget` (budget.py).
"""
