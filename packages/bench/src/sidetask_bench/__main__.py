"""``python -m sidetask_bench`` is the ``sidetask`` command."""

from sidetask_bench.cli import app

if __name__ == "__main__":
    app(prog_name="sidetask")
