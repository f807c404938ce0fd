"""The tasks: what is learnt from a record, from file to gradient to metric, in one file a task.

Adding a task is one entry in `ftray.task_spec.TASKS`: a module here that holds a `Task`, a subclass of
:class:`ftray.tasks.task.Task`. Imports nothing that is slow.
"""
