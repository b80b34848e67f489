"""Integrations with other frameworks, one per file. Import the one that you use."""
