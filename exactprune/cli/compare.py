"""``compare``: lossless and approximate methods at several ratios and seeds, from one TOML file."""

from __future__ import annotations

import sys
from pathlib import Path

from exactprune.errors import OptionError


def run_compare(study: Path, output: Path, json: bool, quiet: bool) -> int:
    """``exactprune compare``."""
    from exactprune.report.comparison import FILES, comparison_markdown, read_study, write_comparison
    from exactprune.report.strict import pretty

    if (output.exists() and not output.is_dir()) or not output.absolute().parent.is_dir():
        raise OptionError(f"--output {output}: name a folder in an existing folder")
    asked = read_study(study)
    facts = write_comparison(asked, output, lambda text: None if quiet else print(f"compare: {text}", file=sys.stderr))
    if json:
        sys.stdout.write(pretty(facts))
    elif not quiet:
        print("\n".join([comparison_markdown(facts), *(str(output / name) for name in FILES)]))
    return 0
