"""`python -m hierprompt`: the same as the command `hierprompt`."""
import sys


def main() -> int:
    "The command line; where the extra `pipeline` is not installed, one line that says so."
    try: from .pipeline.command_line import main as run
    except ImportError as error:
        print(error, file=sys.stderr)
        return 1
    return run()


if __name__ == "__main__": sys.exit(main())
