# SPDX-License-Identifier: Apache-2.0
"""``python -m jax_smfree`` and the console script ``jax-smfree``; see `jax_smfree.cli`."""

import sys

_EXTRA = frozenset(["click", "rich", "matplotlib", "packaging", "pynvml"])


def main() -> None:
    """Runs the command line.

    Raises:
      SystemExit: always; with the cure when what the extra ``cli`` brings is missing.
    """
    try:
        from jax_smfree.cli import cli

        cli(prog_name="jax-smfree")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        sys.exit(
            f"jax-smfree: the command line needs {error.name!r}, which is not installed. Install "
            "all that it needs with: pip install 'jax_smfree[cli]'"
        )


if __name__ == "__main__":
    main()
