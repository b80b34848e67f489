"""One training of the laboratory, from settings to result.json."""
