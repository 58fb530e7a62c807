"""``compare``: lossless and approximate methods at several ratios and seeds, from one TOML file."""

from __future__ import annotations

import sys
from pathlib import Path

from exactprune.errors import OptionError


def run_compare(study: Path, output: Path, json: bool, quiet: bool, fresh: bool = False) -> int:
    """``exactprune compare``."""
    from exactprune.cli.progress import progress
    from exactprune.report.comparison import FILES, read_study, write_comparison
    from exactprune.report.comparison_words import comparison_summary
    from exactprune.report.strict import pretty
    from exactprune.report.tables import rendered

    if (output.exists() and not output.is_dir()) or not output.absolute().parent.is_dir():
        raise OptionError(f"--output {output}: name a folder in an existing folder")
    asked = read_study(study)
    bars = not quiet and not json and sys.stderr.isatty()
    say = (lambda text: None) if quiet or bars else (lambda text: print(f"compare: {text}", file=sys.stderr))
    try:
        with progress(not bars) as shown:
            facts = write_comparison(asked, output, say, progress=shown, source=str(study), fresh=fresh)
    except KeyboardInterrupt:
        kept = output / "cells.jsonl"
        words = f"what is finished is kept in {kept}; the same command goes on from there" if kept.exists() else "nothing written"
        raise KeyboardInterrupt(f"interrupted; {words}") from None
    if json:
        sys.stdout.write(pretty(facts))
    elif not quiet:
        sys.stdout.write(rendered(comparison_summary(facts)))
        print("\n".join(str(output / name) for name in FILES))
    return 0
