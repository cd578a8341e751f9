"""Problems whose answers can be checked: tasks, verifiers, the processes and the sandbox that they
run in, and environments of several turns.

Nothing here knows of models: texts (and token ids) come in, problems and scores go out. The modules
that a worker process imports (`verifiers`, `mathematics`, `gym`, `code`, `sandbox`) import no JAX.
"""
