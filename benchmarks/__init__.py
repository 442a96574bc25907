"""Benchmarks of `equalize`: what tying is good for and what it costs. Run `python -m benchmarks`.

`ways` says how variables are tied: untied, by reference, by `equalize`, by what people write today. A task, a
`task.Task` in a module of its own, says what is measured, and ties its variables only through `ways`.
"""
