"""Benchmarks of `equalize`: what tying is good for and what it costs. Run `python -m benchmarks`.

`ways` says how variables are tied: untied, by reference, by `equalize`, by what people write today. A task, a
`task.Task` in a module of its own in the folder of its part (`quality`, `speed`, `memory` or `scale`), says what is
measured, and ties its variables only through `ways`. To add a way, add it to `ways.WAYS`; to add a task, add its file.
"""
