"""Callbacks that bring the schedule into training frameworks, a module for each.

``rlsched.integrations.lightning`` and ``rlsched.integrations.transformers`` import their framework, and are imported
by name; nothing else of rlsched needs them. Accelerate has no callbacks and needs no module: it prepares a
``ScheduledOptimizer`` as it prepares any optimizer, and ``ScheduledOptimizer.observe`` takes the loss.
"""
