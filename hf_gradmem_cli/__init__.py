"""The command line, `hf-gradmem`.

It is a package of its own because `import hf_gradmem` brings torch and Transformers, to register with them, which takes
seconds. Help and mistakes in options are answered without: what needs them is imported by the commands as they run.
"""

# isort: off
try:
    from .app import app, main
    from . import writing, reading, talking, serving, training, sharing  # help lists the commands in this order
except KeyboardInterrupt:  # what is imported above has no `main` yet that would say so
    raise SystemExit(130) from None

__all__ = ["app", "main", "reading", "serving", "sharing", "talking", "training", "writing"]
