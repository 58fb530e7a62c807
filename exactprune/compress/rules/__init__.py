"""Rules, one a file: when it applies, the rewrite, its level, its certified deviation."""
