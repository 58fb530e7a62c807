"""What a run leaves for people and programs: run folder, tables, Markdown."""
